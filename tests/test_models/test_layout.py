"""Channels-last from the images to the heads on the CPU, without copies in between; NCHW in the stages on a GPU."""

import pytest
import torch
from backbone_helpers import BACKBONES, build, random_
from torch.profiler import ProfilerActivity, profile

from slak_mm import switch_to_deploy

BATCH = 5  # no weight has this first size


@pytest.mark.parametrize('mode', ['train', 'eval', 'deploy'])
@pytest.mark.parametrize('name', BACKBONES)
def test_only_the_images_are_copied(name, mode):
    model = random_(build(name)).train(mode == 'train')
    if mode == 'deploy':
        switch_to_deploy(model)
    images = torch.randn(BATCH, 3, 128, 96, generator=torch.Generator().manual_seed(0))

    def run():
        with torch.set_grad_enabled(mode == 'train'):
            maps = model(images)
            if mode == 'train':
                torch.autograd.backward(maps, [torch.ones_like(y) for y in maps])
        return maps

    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        maps = run()
    shapes = [tuple(event.input_shapes[0]) for event in profiler.events() if event.name == 'aten::copy_']
    of_maps = [s for s in shapes if len(s) == 4 and s[0] == BATCH and s[2:] != (1, 1)]
    assert of_maps == [images.shape]
    assert len(maps) == 4
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)


@pytest.mark.parametrize('name', BACKBONES)
def test_stages_run_in_nchw_on_a_gpu(name):
    """Deployed backbones have channels-last convolutions before their stages; the meta device stands for a GPU."""
    model = switch_to_deploy(build(name)).to('meta')
    layouts = []
    for stage in model.stages:
        stage.register_forward_pre_hook(lambda module, args: layouts.append(args[0].is_contiguous()))
    model(torch.ones(2, 3, 128, 96, device='meta').contiguous(memory_format=torch.channels_last))
    assert layouts == [True] * 4
