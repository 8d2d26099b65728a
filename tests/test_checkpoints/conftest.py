"""Synthetic checkpoints in the official layout, written down independently of the package."""

from collections import OrderedDict

import pytest
import torch

from slak_mm.models import SLaK

TOY = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
TOY_KERNELS = (13, 11, 9, 7)
LORA = ('LoRA1', 'LoRA2')
#: Arguments that make a SLaK a ConvNeXt.
CONVNEXT = dict(kernel_sizes=(7,) * 4, small_kernel=None, decomposed=False, branch_norm=False, conv_bias=True)


def affine(name, weight):
    """A weight of this shape, and a bias."""
    return [(f'{name}.weight', weight), (f'{name}.bias', weight[:1])]


def official_layout(
    depths, dims, kernels, small=5, width_factor=1.0, decomposed=True, bn=True, classifier=True, names=LORA
):
    """Keys and shapes of the official class, in its order."""
    c = [int(d * width_factor) for d in dims]
    layout = affine('downsample_layers.0.0', (c[0], 3, 4, 4)) + affine('downsample_layers.0.1', (c[0],))
    for i in range(1, 4):
        layout += affine(f'downsample_layers.{i}.0', (c[i - 1],))
        layout += affine(f'downsample_layers.{i}.1', (c[i], c[i - 1], 2, 2))
    for i in range(4):
        big = kernels[i]
        branches = [(names[0], (big, small)), (names[1], (small, big))] if decomposed else [('lkb_origin', (big, big))]
        if small < big:
            branches.append(('small_conv', (small, small)))
        for j in range(depths[i]):
            block = f'stages.{i}.{j}.'
            layout.append((block + 'gamma', (c[i],)))
            for name, size in branches:
                branch = f'{block}large_kernel.{name}.'
                layout.append((branch + 'conv.weight', (c[i], 1, *size)))
                if bn:
                    layout += affine(branch + 'bn', (c[i],))
                    layout += [(f'{branch}bn.{leaf}', (c[i],)) for leaf in ('running_mean', 'running_var')]
                    layout.append((branch + 'bn.num_batches_tracked', ()))
            layout += affine(block + 'norm', (c[i],))
            layout += affine(block + 'pwconv1', (4 * c[i], c[i])) + affine(block + 'pwconv2', (c[i], 4 * c[i]))
    if classifier:
        return layout + affine('norm', (c[3],)) + affine('head', (1000, c[3]))
    return layout + [entry for i in range(4) for entry in affine(f'norm{i}', (c[i],))]


def official_state_dict(seed=0, kernels=TOY_KERNELS, depths=TOY['depths'], dims=TOY['dims'], **kwargs):
    """Random tensors in the official layout."""
    generator = torch.Generator().manual_seed(seed)
    tensors = OrderedDict()
    for key, shape in official_layout(depths, dims, kernels, **kwargs):
        is_count = key.endswith('num_batches_tracked')
        tensors[key] = torch.tensor(0) if is_count else torch.rand(shape, generator=generator) + 0.5
    return tensors


def toy_backbone(**kwargs):
    """A SLaK small enough for tests."""
    settings = dict(arch=TOY, kernel_sizes=TOY_KERNELS, small_kernel=5, width_factor=1.0, norm_cfg=dict(type='BN'))
    return SLaK(**{**settings, **kwargs})


def snapshot(model):
    """Copies of all tensors of a model."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model, before):
    """Every tensor is bit for bit what it was."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


class Toolbox:
    """What the tests of this folder share."""

    TOY, CONVNEXT = TOY, CONVNEXT
    layout = staticmethod(official_layout)
    official = staticmethod(official_state_dict)
    backbone = staticmethod(toy_backbone)
    snapshot = staticmethod(snapshot)
    assert_untouched = staticmethod(assert_untouched)


@pytest.fixture(scope='session')
def toy():
    return Toolbox


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees or fills the user's cache."""
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'checkpoints'
