"""Stages that are not returned: built where a later one needs them, and nowhere else."""

import itertools

import pytest
import torch
import torch.distributed as dist
from backbone_helpers import BACKBONES, build, images, random_
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from slak_mm import load_pretrained, switch_to_deploy
from slak_mm.checkpoints import CheckpointMismatch, describe, likely_causes, to_official
from slak_mm.models import SLaK

SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(range(4), size)]
every_family = pytest.mark.parametrize('family', BACKBONES)


def train(model):
    sum(y.square().mean() for y in model(images())).backward()


@every_family
@pytest.mark.parametrize('options', [dict(), dict(out_norm=False, drop_path_rate=0.3), dict(deploy=True)], ids=str)
def test_every_parameter_has_a_gradient(family, options):
    for subset in SUBSETS:
        for frozen_stages in range(-1, 5):
            model = build(family, out_indices=subset, frozen_stages=frozen_stages, **options).train()
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            if trained:
                train(model)
            assert [name for name, p in model.named_parameters() if p.grad is not None] == trained


def run_process(rank, meeting_point):
    dist.init_process_group('gloo', init_method=f'file://{meeting_point}', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(build('slak', out_indices=(0, 2), frozen_stages=1))
    for _ in range(3):
        train(model)
    del model  # it must not outlive its process group
    dist.destroy_process_group()


def test_distributed_training(tmp_path):
    """It stops in the second step where a parameter had no gradient."""
    multiprocessing.spawn(run_process, (tmp_path / 'meeting_point',), nprocs=2)


@every_family
def test_an_official_checkpoint_fits_every_choice(family):
    whole = random_(build(family)).eval()
    official = to_official(whole.state_dict())
    x = images()
    with torch.no_grad():
        want = whole(x)
        for subset in SUBSETS:
            loaded, framework = (build(family, out_indices=subset).eval() for _ in range(2))
            report = load_pretrained(loaded, {'model': dict(official)})
            assert not report.missing
            left_out = {key for key, why in report.dropped.items() if f'behind stage {subset[-1]}' in why}
            assert bool(left_out) == (subset[-1] < 3) and left_out <= official.keys() - report.converted.keys()
            framework.load_state_dict(dict(official), strict=False)
            for model in (loaded, framework, switch_to_deploy(loaded)):
                for got, i in zip(model(x), subset, strict=True):
                    torch.testing.assert_close(got, want[i], rtol=0, atol=1e-3 * float(want[i].abs().max()))


@every_family
def test_stages_that_are_not_built_explain_nothing(family):
    """Only what else differs is named; a checkpoint that ends too early is told from another architecture."""
    whole, part = build(family), build(family, out_indices=(0, 1))
    assert not likely_causes(describe(whole.state_dict()), describe(part.state_dict()))
    (cause,) = likely_causes(describe(part.state_dict()), describe(whole.state_dict()))
    assert 'the checkpoint ends with stage 1, the model with stage 3: set out_indices' in cause
    for load in (load_pretrained, type(whole).load_state_dict):
        with pytest.raises(CheckpointMismatch, match='ends with stage 1') as error:
            load(whole, to_official(part.state_dict()))
        assert len(error.value.causes) == 1
        other, cause = (
            (dict(dw_ratio=2), 'set dw_ratio=1')
            if family == 'replknet'
            else (dict(layer_scale_init_value=0), 'has layer scale')
        )
        part = build(family, out_indices=1, **other)
        with pytest.raises(CheckpointMismatch, match=cause) as error:
            load(part, to_official(whole.state_dict()))
        assert len(error.value.causes) == 1
        part = build(family, out_indices=1)


@pytest.mark.parametrize('key', ['stages.4.0.norm.weight', 'stages.0.3.norm.weight', 'downsample_layers.7.0.weight'])
def test_other_names_are_not_left_out(key):
    model = build('slak', out_indices=(0,), out_norm=False)
    with pytest.raises((CheckpointMismatch, RuntimeError), match=key.rsplit('.', 1)[0]):
        model.load_state_dict({**build('slak', out_norm=False).state_dict(), key: torch.ones(8)})


@pytest.mark.parametrize('last, unused', [(3, 0), (2, 26.4)])
def test_parameters_of_the_tiny_network(last, unused):
    """In millions: SLaK-T has 49.7 without its classifier, 26.4 of them behind stage 2."""
    with torch.device('meta'):
        model = SLaK(out_indices=last, out_norm=False)
    assert round((49_702_842 - sum(p.numel() for p in model.parameters())) / 1e6, 1) == unused


def test_stochastic_depth_and_layer_numbers_are_those_of_the_whole_network():
    rates = [
        [getattr(block.drop_path, 'drop_prob', 0.0) for stage in model.stages for block in stage]
        for model in (build('slak', drop_path_rate=0.4, out_indices=last) for last in (3, 1))
    ]
    assert rates == [pytest.approx([0, 0.1, 0.2, 0.3, 0.4]), pytest.approx([0, 0.1])]
    model = SLaK(out_indices=1)
    assert model.depths == (3, 3, 9, 3) and model.dims == (124, 249, 499, 998)
