"""UniRepLKNet against the official code's results, and its names in every form."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from reference import (
    UNIREPLKNET_GOLDENS,
    Goldens,
    block_input,
    check_features,
    check_logits,
    input_for,
    load_part,
    official_weights,
    training_step,
    weight_for,
)
from torch import nn

from slak_mm import CheckpointMismatch, load_pretrained, switch_to_deploy
from slak_mm.checkpoints import ZOO, convert_state_dict, describe, to_official
from slak_mm.engine import LargeKernelLayerDecayConstructor
from slak_mm.models import UniRepLKNet
from slak_mm.models.shiftwise import ShiftWiseBlock
from slak_mm.models.unireplknet import DILATED, DilatedReparamConv
from slak_mm.sparsity import select_parameters

GOLDENS = Goldens(UNIREPLKNET_GOLDENS)
ARRAYS = np.load(UNIREPLKNET_GOLDENS)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
BN = dict(type='BN')
ARCHS = dict(zip(('a', 'f', 'p', 'n', 't', 's', 'b', 'l', 'xl'), UniRepLKNet.arch_settings))
every_dtype = pytest.mark.parametrize('dtype', TOLERANCE, ids=str)


def entries(name: str) -> dict:
    return json.loads(ARRAYS[name].tobytes())


def build(case: str) -> UniRepLKNet:
    model = UniRepLKNet(ARCHS[case.split('__')[0].rpartition('_')[2]], norm_cfg=BN)
    load_pretrained(model, official_weights(model, 'unireplknet'))
    return model.eval()


# Networks


@pytest.mark.parametrize('case', GOLDENS.cases('feat_'))
def test_features(case):
    """Before and behind the output norms, in training and deployed form."""
    model = build(case)
    for deploy in (False, True):
        if deploy:
            switch_to_deploy(model.double())
        for dtype, tolerance in TOLERANCE.items():
            assert check_features(GOLDENS, case, model.to(dtype), dtype, tolerance) == 8


@pytest.mark.parametrize('case', GOLDENS.cases('logits_'))
def test_logits(case):
    check_logits(GOLDENS, case, build(case))


@pytest.mark.parametrize('variant', ['n', 't'])
def test_every_tensor_of_the_deployed_network(variant):
    """Shape, mean, deviation and first element, under official names."""
    model = build(f'unireplknet_{variant}').double()
    model.switch_to_deploy()
    official = to_official(model.state_dict())
    want = entries('merged_stats')[f'unireplknet_{variant} reparameterised']
    for key, (shape, mean, std, first) in want.items():
        value = official.pop(key)
        got = [value.mean(), value.std(unbiased=False), value.flatten()[0]]
        assert list(value.shape) == shape
        assert [float(x) for x in got] == pytest.approx([mean, std, first], rel=1e-6, abs=1e-7), key
    assert not any(key.startswith('stages') for key in official)


# Blocks


@pytest.mark.parametrize('with_cp', [False, True], ids=['stored', 'recomputed'])
@every_dtype
@pytest.mark.parametrize('kind, kernel_size', [('lk', 13), ('small', 3)])
def test_block_in_training(kind, kernel_size, dtype, with_cp):
    """Output, every gradient and all running statistics, which move once; then the deployed form, tensor by tensor."""
    case = f'block_train_unireplknet_{kind}_c16_K{kernel_size}'
    block = ShiftWiseBlock(16, DilatedReparamConv(16, kernel_size, BN), BN, 0.0, 1.0, with_cp)
    ours = load_part(block, 'unireplknet', 'block/')
    checked = set()
    for name, got in training_step(GOLDENS, case, block, ours, dtype):
        array, _, key = name.partition(':')
        # Statistics are kept with the precision of float32. A bias before another batch norm has no effect, so that
        # its gradient is all rounding error.
        without_effect = key == 'act.1.beta' or key.startswith('dwconv') and key.endswith('bias')
        GOLDENS.assert_close(case, name, got, TOLERANCE[dtype], 1.0 if array == 'buf' or without_effect else 0.0)
        checked.add(ours.get(key, name))
    assert set(block.state_dict()) <= checked

    load_part(block, 'unireplknet', 'block/')
    block.eval()
    with torch.no_grad():
        GOLDENS.assert_close(case, 'out_eval', block(block_input(dtype)), TOLERANCE[dtype])
        block.switch_to_deploy()
        GOLDENS.assert_close(case, 'out_eval', block(block_input(dtype)), TOLERANCE[dtype])
    merged = to_official({f'stages.0.0.{k}': v for k, v in block.state_dict().items()}, family='unireplknet')
    expected = [name for name in GOLDENS.names(case) if name.startswith('merged:')]
    assert {f'merged:{k.removeprefix("stages.0.0.")}' for k in merged} == set(expected)
    for name in expected:
        GOLDENS.assert_close(case, name, merged[f'stages.0.0.{name.removeprefix("merged:")}'], TOLERANCE[dtype])


@pytest.mark.parametrize('kernel_size', [5, 7, 9, 11, 13, 15, 17])
def test_merged_kernels(kernel_size, monkeypatch):
    """Kernel, bias and result; the official layer knows a setting for 5 as well, which no block uses."""
    monkeypatch.setitem(DILATED, 5, ((3, 1), (3, 2)))
    case = f'merged_dilated_c4_K{kernel_size}'
    layer = DilatedReparamConv(4, kernel_size, BN)
    weights = {}
    for key, value in layer.state_dict().items():
        official = key.replace('large.conv', 'lk_origin').replace('large.bn', 'origin_bn')
        official = re.sub(r'k(\d)_r(\d)\.(conv|bn)', r'dil_\3_k\1_\2', official)
        weights[key] = weight_for(official, value.shape, 'eq/')
    layer.load_state_dict(weights)
    layer.double().eval()
    for name, got in zip(('kernel', 'bias'), layer.merged(), strict=True):
        GOLDENS.assert_close(case, name, got, 1e-6)
    x = input_for((2, 4, 21, 18) if kernel_size > 13 else (2, 4, 11, 7), 9).double()
    with torch.no_grad():
        GOLDENS.assert_close(case, 'out', layer(x), 1e-6)
        layer.switch_to_deploy()
        GOLDENS.assert_close(case, 'out', layer(x), 1e-6)


@pytest.mark.parametrize('mode', ['training', 'eval'])
@pytest.mark.parametrize('kernel_size', [3, 7, 17])
def test_kernels_filled_up_with_zeros_are_dilated_convolutions(kernel_size, mode):
    """Outputs, gradients and statistics, on a map that is smaller than the kernel; hooked layers are called."""
    torch.manual_seed(0)
    layer = DilatedReparamConv(4, kernel_size, BN).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    called = DilatedReparamConv(4, kernel_size, BN).double()
    called.load_state_dict(layer.state_dict())
    for module in called.modules():
        module.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 4, 9, 14, dtype=torch.float64)
    results = []
    for each in (layer, called):
        each.train(mode == 'training')
        image = x.clone().requires_grad_()
        y = each(image)
        y.square().sum().backward()
        results.append([y, image.grad, *(p.grad for p in each.parameters()), *each.buffers()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.detach().abs().max()))


# Training


@pytest.mark.parametrize('case', list(entries('layer_ids')))
def test_layer_ids(case):
    """Parameters of each layer number with and without weight decay, as in the official optimizer."""
    variant, num_layers = case.removeprefix('unireplknet_').split(' num_layers=')
    with torch.device('meta'):
        model = UniRepLKNet(ARCHS[variant], norm_cfg=BN)
    assert model.num_layers() == int(num_layers) or case.startswith('unireplknet_t')
    build_wrapper = LargeKernelLayerDecayConstructor(
        dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1.0, weight_decay=0.05)),
        dict(decay_rate=0.5, num_layers=int(num_layers)),
    )
    found: dict[str, dict[str, int]] = {}
    for group in build_wrapper(model).optimizer.param_groups:
        _, number, kind = group['group_name'].split('_', 2)
        found.setdefault(number, dict(decay=0, no_decay=0))[kind] += len(group['params'])
        assert group['lr'] == 0.5 ** (int(num_layers) + 1 - int(number))
    assert found == entries('layer_ids')[case]['layer_wise']


# Names

MANIFESTS = sorted(name.removeprefix('manifest/') for name in ARRAYS.files if name.startswith('manifest/'))


@pytest.mark.parametrize('variant', MANIFESTS)
def test_names_convert_both_ways(variant):
    """Every name and shape of the official networks: classifier, downstream and deployed."""
    name, _, kind = variant.partition('__')
    arch = ARCHS[name.removeprefix('unireplknet_')]
    with torch.device('meta'):
        model = UniRepLKNet(arch, out_norm=kind == 'seg', deploy=kind == 'deploy')
    official = to_official(model.state_dict())
    shapes = {k: list(v.shape) for k, v in official.items()}
    if kind != 'seg':
        channels = model.dims[-1]
        shapes |= {'norm.weight': [channels], 'norm.bias': [channels]}
        shapes |= {'head.weight': [1000, channels], 'head.bias': [1000]}
    lines = '\n'.join(sorted(f'{k} {s}' for k, s in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == str(ARRAYS[f'manifest/{variant}'])

    back, notes = convert_state_dict(official)
    assert not notes.unrecognized and notes.format == 'unireplknet'
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in model.state_dict().items()}
    facts = describe(back)
    assert (facts.arch, facts.deploy, facts.width_factor) == (arch, kind == 'deploy', 1.0)
    assert describe(back) == describe(model.state_dict())


def small(**options) -> UniRepLKNet:
    arch = dict(depths=(1, 1, 2, 1), dims=(8, 12, 16, 20))
    return UniRepLKNet(**dict(dict(arch=arch, kernel_sizes=(3, 13, (7, 5), 9), norm_cfg=BN), **options))


@pytest.mark.parametrize('wrap', [dict, lambda w: dict(model=w), lambda w: dict(state_dict=w)])
def test_files_of_classifiers(wrap):
    """The released files: bare, from the training script and from the scripts that merge; 21841 classes fit as well."""
    torch.manual_seed(0)
    source, target = small(), small()
    head = {'norm.weight': torch.ones(20), 'norm.bias': torch.zeros(20), 'head.weight': torch.zeros(21841, 20)}
    weights = {k: v for k, v in to_official(source.state_dict()).items() if not k.startswith('norm')}
    report = load_pretrained(target, wrap({**weights, **head, 'head.bias': torch.zeros(21841)}))
    assert len(report.newly_initialized) == 8 and set(report.dropped) == {*head, 'head.bias'}
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


def test_files_of_the_first_revisions():
    """Small kernels with a bias before their norm compute the same without; deployed large ones had short names."""
    torch.manual_seed(0)
    model, target = small().eval(), small().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    weights = to_official(model.state_dict())
    biases = {f'stages.{stage}.dwconv.bias': torch.randn(c) for stage, c in (('0.0', 8), ('2.1', 16))}
    load_pretrained(target, {**weights, **biases})
    for key, bias in biases.items():  # as the convolution with its bias was
        block = model.get_submodule(key.removesuffix('.dwconv.bias'))
        block.norm.running_mean -= bias
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in model.state_dict().items())

    model.switch_to_deploy()
    deployed = small(deploy=True)
    bare = {k.replace('.lk_origin', ''): v for k, v in to_official(model.state_dict()).items()}
    report = load_pretrained(deployed, bare)
    assert report.converted['stages.1.0.dwconv.weight'] == 'stages.1.0.large_kernel.large.conv.weight'
    assert all(torch.equal(v, deployed.state_dict()[k]) for k, v in model.state_dict().items())


def test_networks_without_large_kernels():
    """Their official names are told from ConvNeXt's and ShiftWise's."""
    torch.manual_seed(0)
    source, target = (small(kernel_sizes=(3, 5, (3, 0), 5)) for _ in range(2))
    report = load_pretrained(target, to_official(source.state_dict()))
    assert report.format == 'unireplknet' and 'kernels 3/5/3 0/5' in report.variant
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize(
    'theirs, ours, message',
    [
        ({}, dict(kernel_sizes=(3, 13, 7, 9)), 'have 3/13/7 5/9, those of the model 3/13/7/9; set kernel_sizes'),
        ({}, dict(width_factor=2), r'another width: .*8/12/16/20 .* 16/24/32/40'),
        (dict(layer_scale_init_value=0), {}, 'set layer_scale_init_value to 0'),
        (dict(deploy=True), {}, 'folded for deployment and the model is in training form'),
    ],
)
def test_what_differs_is_named(theirs, ours, message):
    with pytest.raises(CheckpointMismatch, match=message) as error:
        load_pretrained(small(**ours), to_official(small(**theirs).state_dict()))
    assert len(error.value.causes) == 1


def test_large_kernels_can_be_masked_alone():
    names = list(select_parameters(small(), 'large_kernel'))
    assert names == [f'stages.{block}.large_kernel.large.conv.weight' for block in ('1.0', '2.0', '3.0')]


def test_published_models():
    """Every entry of the zoo builds, and its address names what it holds."""
    infos = [info for info in ZOO.values() if info.backbone['type'] == 'UniRepLKNet']
    assert len(infos) == 27
    for info in infos:
        assert info.url.startswith('https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/')
        letter = info.name.partition('unireplknet_')[2].split('_')[0]
        assert info.backbone['arch'] == ARCHS[letter]
        assert info.counted == 'deployed'
    assert ZOO['unireplknet_xl_in22k_to_in1k_384'].url.endswith('unireplknet_xl_in22k_to_in1k_384_acc87.96.pth')
    assert ZOO['upernet_unireplknet_t_512_160k_ade20k'].figures == dict(miou_percent=48.6, params_m=61, flops_g=946)
