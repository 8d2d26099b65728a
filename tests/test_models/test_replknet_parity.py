"""RepLKNet against the official code's results: features, gradients, running statistics, merged kernels, names."""

import hashlib
import json

import numpy as np
import pytest
import torch
from reference import (
    REPLKNET_GOLDENS,
    Goldens,
    block_input,
    check_features,
    official_weights,
    training_step,
    weight_for,
)
from torch import nn

from slak_mm import load_pretrained, switch_to_deploy
from slak_mm.checkpoints import CheckpointMismatch, convert_state_dict, detect_format, to_official
from slak_mm.models import RepLKNet
from slak_mm.models.replknet import ConvFFN, RepLKBlock
from slak_mm.models.slak import LargeKernelConv

GOLDENS = Goldens(REPLKNET_GOLDENS)
ARRAYS = np.load(REPLKNET_GOLDENS)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
HEAD = {f'norm.{kind}' for kind in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')}
HEAD |= {'head.weight', 'head.bias'}
FOUR_BLOCKS = dict(arch=dict(layers=(1, 1, 1, 1), channels=(8, 12, 16, 20)), kernel_sizes=(13, 11, 9, 7))


@pytest.mark.parametrize('case', GOLDENS.cases('feat_'))
@pytest.mark.parametrize('form', ['training', 'deployed'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_features(case, form, dtype):
    model = RepLKNet(out_norm=True)
    load_pretrained(model, official_weights(model, 'replknet'))
    model.eval().to(dtype)
    if form == 'deployed':
        switch_to_deploy(model)
    assert check_features(GOLDENS, case, model, dtype, TOLERANCE[dtype]) == 8


BLOCKS = {'stage_c16_K13_k5': (13, 5, 16), 'stage_c16_K31_r1.5': (31, None, 24)}


@pytest.mark.parametrize('with_cp', [False, True], ids=['stored', 'recomputed'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('case', GOLDENS.cases('block_train_'))
def test_pair_of_blocks_in_training(case, dtype, with_cp):
    """Output, all gradients and running statistics; the same with activation checkpointing. Then the merged form."""
    size, small, hidden = BLOCKS[case.removeprefix('block_train_replknet_')]
    bn = dict(type='BN')
    large_kernel = LargeKernelConv(hidden, size, small, False, True, False, bn)
    block = nn.Sequential(RepLKBlock(16, large_kernel, hidden, 0, bn, with_cp), ConvFFN(16, 0, bn, with_cp))
    prefix = 'stages.0.'
    names = to_official({prefix + key: value for key, value in block.state_dict().items()})
    official = {key.removeprefix(prefix): ours for key, ours in zip(names, block.state_dict())}
    weights = {ours: weight_for(k, block.state_dict()[ours].shape, 'block/') for k, ours in official.items()}
    block.load_state_dict(weights)
    for name, got in training_step(GOLDENS, case, block, official, dtype):
        # Variances are near 1; the gradient of a shift before a batch norm is 0, as a sum of values near 1.
        least_scale = 1.0 if name.endswith(('running_var', 'prelkb_bn.bias', 'preffn_bn.bias')) else 0.0
        GOLDENS.assert_close(case, name, got, TOLERANCE[dtype], least_scale)

    block.load_state_dict(weights)
    block.eval()
    with torch.no_grad():
        GOLDENS.assert_close(case, 'out_eval', block(block_input(dtype)), TOLERANCE[dtype])
        large_kernel.switch_to_deploy()
        GOLDENS.assert_close(case, 'out_eval', block(block_input(dtype)), TOLERANCE[dtype])
    for name, value in dict(weight=large_kernel.square.conv.weight, bias=large_kernel.bias).items():
        GOLDENS.assert_close(case, f'merged:blocks.0.large_kernel.lkb_reparam.{name}', value, TOLERANCE[dtype])


def test_merged_kernels():
    """Of the whole network: shape, mean, deviation and first value of each tensor."""
    model = RepLKNet(out_norm=True)
    load_pretrained(model, official_weights(model, 'replknet'))
    merged = to_official(switch_to_deploy(model.double()).state_dict())
    (stats,) = json.loads(ARRAYS['merged_stats'].tobytes()).values()
    for name, (shape, *want) in stats.items():
        if name.startswith(('norm.', 'head.')):
            continue
        value = merged[name]
        got = [float(value.mean()), float(value.std(correction=0)), float(value.flatten()[0])]
        assert list(value.shape) == shape and got == pytest.approx(want, rel=1e-6, abs=1e-9), name


MANIFESTS = sorted(name.removeprefix('manifest/') for name in ARRAYS.files if name.startswith('manifest/'))


@pytest.mark.parametrize('variant', MANIFESTS)
def test_names_convert_both_ways(variant):
    """Every name and shape of the official networks: classifier, downstream with and without norms, and merged."""
    arch, _, kind = variant.removeprefix('replknet_').partition('__')
    arch = arch.upper()
    with torch.device('meta'):
        model = RepLKNet(arch, deploy=kind == 'merged', out_norm=kind == 'seg_norm')
    ours = model.state_dict()
    official = to_official(ours)
    shapes = {key: list(value.shape) for key, value in official.items()}
    if 'seg' not in kind:
        width = model.dims[-1]
        shapes |= {key: [width] for key in HEAD}
        shapes |= {'norm.num_batches_tracked': [], 'head.weight': [1000, width], 'head.bias': [1000]}
    lines = '\n'.join(sorted(f'{key} {shape}' for key, shape in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == str(ARRAYS[f'manifest/{variant}'])
    back, notes = convert_state_dict(official)
    assert not notes.unrecognized and list(back) == list(ours)
    assert notes.format == ('replknet-merged' if kind == 'merged' else 'replknet')


@pytest.mark.parametrize('deploy', [False, True])
def test_names_of_mmpretrain(deploy):
    """As the official ones, but the norm before the head is that of the last stage, and the layer is called fc."""
    model = RepLKNet(**FOUR_BLOCKS, deploy=deploy)
    names = {**model.state_dict(), **{key: torch.zeros(()) for key in HEAD}}
    official, theirs = to_official(names), to_official(names, 'mmpretrain')
    renamed = {key: key.replace('norm.', 'stages.3.norm.', 1).replace('head.', 'head.fc.') for key in HEAD}
    assert list(theirs) == [renamed.get(key, key) for key in official]
    back, notes = convert_state_dict(theirs)
    assert list(back) == list(names) and not notes.unrecognized

    classifier = {key if key.startswith('head.') else f'backbone.{key}': value for key, value in theirs.items()}
    for out_norm in (False, True):
        report = load_pretrained(RepLKNet(**FOUR_BLOCKS, deploy=deploy, out_norm=out_norm), classifier)
        assert set(report.loaded) == set(model.state_dict())
        assert {key.split('.')[-2] for key in report.dropped} == {'norm', 'fc'}
        assert any(key.startswith('norm3.') for key in report.newly_initialized) == out_norm


def test_one_map_with_a_norm_is_no_classifier():
    """Our own names are what they say, also where a single stage is returned with its norm."""
    model = RepLKNet(**FOUR_BLOCKS, out_norm=True, out_indices=3)
    assert list(convert_state_dict(model.state_dict())[0]) == list(model.state_dict())


def test_what_does_not_fit_is_named():
    """Forms and arguments, told by the checkpoint's names and shapes."""
    model = RepLKNet(**FOUR_BLOCKS)
    state = to_official(model.state_dict())
    fused = {key.replace('.bn.bias', '.conv.bias') if '.pw' in key else key: value for key, value in state.items()}
    wide = to_official(RepLKNet(**FOUR_BLOCKS, dw_ratio=1.5).state_dict())
    plain = to_official(RepLKNet(**FOUR_BLOCKS, small_kernel=None).state_dict())
    merged = to_official(switch_to_deploy(RepLKNet(**FOUR_BLOCKS)).state_dict())
    for weights, cause in (
        (fused, 'deep_fuse_BN'),
        (wide, r'set dw_ratio=1\.5'),
        (plain, 'the checkpoint has None, the model 5; set small_kernel'),
        (merged, 'the checkpoint is folded for deployment'),
    ):
        with pytest.raises(CheckpointMismatch, match=cause):
            load_pretrained(model, weights)


def test_families_are_told_apart():
    """RepLKNet's large-kernel layer is that of dense SLaK."""
    for deploy in (False, True):
        model = RepLKNet(**FOUR_BLOCKS, deploy=deploy)
        official = to_official(model.state_dict())
        assert [detect_format(state) for state in (model.state_dict(), official)] == [
            'ours',
            'replknet-merged' if deploy else 'replknet',
        ]


def test_layer_ids():
    """As the official optimizer for ImageNet; stage 2 has 36 blocks, four to a layer."""
    with torch.device('meta'):
        model = RepLKNet(out_norm=True)
    assert model.num_layers() == 12
    for name, number in {
        'downsample_layers.0.9.weight': 0,
        'stages.0.3.pw1.conv.weight': 1,
        'downsample_layers.1.0.weight': 1,
        'stages.1.0.prelkb_bn.weight': 2,
        'downsample_layers.2.3.weight': 2,
        'stages.2.3.pw2.bn.weight': 3,
        'stages.2.4.large_kernel.square.conv.weight': 4,
        'stages.2.35.pw2.conv.weight': 11,
        'downsample_layers.3.0.weight': 11,
        'stages.3.0.pw1.conv.weight': 12,
        'norm0.weight': 13,
        '': 13,
    }.items():
        assert model.layer_id(name, 12, 'layer_wise') == number, name
