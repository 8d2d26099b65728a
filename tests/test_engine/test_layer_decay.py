"""Learning-rate scales of the official downstream code (reference/semantics.md, section 6)."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from slak_mm.models import SLaK


class Segmentor(nn.Module):
    def __init__(self, depth=9, **options):
        super().__init__()
        arch = dict(depths=(1, 1, depth, 1), dims=(4, 4, 4, 4))
        self.backbone = SLaK(arch, kernel_sizes=(7, 7, 7, 7), width_factor=1.0, **options)
        self.decode_head = nn.Conv2d(4, 2, 1)


def build(model, lr=1e-4, weight_decay=0.05, **paramwise):
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=lr, weight_decay=weight_decay))
    cfg = dict(type='LargeKernelLayerDecayConstructor', optim_wrapper_cfg=wrapper, paramwise_cfg=paramwise)
    return OPTIM_WRAPPER_CONSTRUCTORS.build(ConfigDict(cfg))(model).optimizer


def scales(model, optimizer):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: (g['lr'] / 1e-4, g['weight_decay']) for g in optimizer.param_groups for p in g['params']}


def test_stage_wise():
    """UperNet + SLaK-T: decay 0.9, num_layers 6; downsampling 0, stage k -> k + 1, else 7."""
    model = Segmentor()
    got = scales(model, build(model, decay_rate=0.9, decay_type='stage_wise', num_layers=6))
    assert len(got) == len(list(model.parameters()))
    for name, (scale, _) in got.items():
        if '.downsample_layers.' in name:
            want = 0.9**7
        elif '.stages.' in name:
            want = 0.9 ** (7 - (int(name.split('.')[2]) + 1))
        else:
            want = 1.0
        assert scale == pytest.approx(want), name
    # "stage 3 gets 0.9^(L-3): 0.73 for tiny"
    assert got['backbone.stages.3.0.norm.weight'][0] == pytest.approx(0.729)


@pytest.mark.parametrize('depth, num_layers', [(9, 6), (18, 9), (27, 12)])
def test_layer_wise(depth, num_layers):
    """Cascade Mask R-CNN + SLaK: decay 0.7; the default number of layers fits the depth."""
    model = Segmentor(depth)
    got = scales(model, build(model, decay_rate=0.7))
    ids = {
        'downsample_layers.0.0': 0,
        'stages.0.0.norm': 1,
        'downsample_layers.1.1': 2,
        'stages.1.0.norm': 2,
        'downsample_layers.2.1': 3,
        'stages.2.0.norm': 3,
        'stages.2.2.norm': 3,
        'stages.2.3.norm': 4,
        f'stages.2.{depth - 1}.norm': num_layers - 1,
        'downsample_layers.3.1': num_layers,
        'stages.3.0.norm': num_layers,
        'norm0': num_layers + 1,
        'norm3': num_layers + 1,
    }
    for name, number in ids.items():
        scale = got[f'backbone.{name}.weight'][0]
        assert scale == pytest.approx(0.7 ** (num_layers + 1 - number)), name
    assert got['decode_head.weight'][0] == pytest.approx(1.0)


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_stages_that_are_not_built_change_no_number(decay_type):
    whole, part = Segmentor(), Segmentor(out_indices=(0, 1))
    want, got = (scales(model, build(model, decay_rate=0.9, decay_type=decay_type)) for model in (whole, part))
    assert got == {name: want[name] for name in got} and len(got) < len(want)


def test_weight_decay_spares_vectors_and_biases():
    model = Segmentor()
    for name, (_, decay) in scales(model, build(model, decay_rate=0.9)).items():
        p = model.get_parameter(name)
        assert decay == (0.05 if p.ndim > 1 and not name.endswith('.bias') else 0.0), name


def test_frozen_parameters_are_left_out():
    model = Segmentor(frozen_stages=2)
    names = scales(model, build(model, decay_rate=0.9))
    assert not any('.stages.0.' in n or '.stages.1.' in n for n in names)
    assert any('.stages.2.' in n for n in names)


def test_bare_backbone_and_wrapped_model():
    backbone = Segmentor().backbone
    wrapped = nn.Module()
    wrapped.module = backbone
    for model in (backbone, wrapped):
        lrs = {g['group_name']: g['lr'] for g in build(model, decay_rate=0.5).param_groups}
        assert lrs['layer_0_decay'] == pytest.approx(1e-4 * 0.5**7)
        assert lrs['layer_7_no_decay'] == pytest.approx(1e-4)


def test_groups_are_logged(caplog):
    import logging

    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance('layer_decay_test', logger_name='layer_decay_test')
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        build(Segmentor(), decay_rate=0.9, decay_type='stage_wise')
    table = caplog.text
    assert 'stage_wise learning-rate decay 0.9, num_layers 6' in table
    assert 'layer_0_decay' in table and '0.4783' in table  # 0.9 ** 7


@pytest.mark.parametrize(
    'paramwise, message',
    [
        (dict(), r'decay_rate must lie in \(0, 1\], got None'),
        (dict(decay_rate=1.5), r'decay_rate must lie in \(0, 1\], got 1.5'),
        (dict(decay_rate=0.9, decay_type='block_wise'), 'must be one of layer_wise, stage_wise'),
        (dict(decay_rate=0.9, norm_decay_mul=0), "unknown key 'norm_decay_mul'; did you mean 'norm_decay_mult'"),
        (dict(decay_rate=0.9, abc=0), "unknown key 'abc'; it takes decay_rate, "),
        (dict(decay_rate=0.9, custom_keys=dict(head=dict(lr_mul=2))), "custom_keys.head has .*'lr_mul'; .*'lr_mult'"),
        (dict(decay_rate=0.9, num_layers=4), 'num_layers is 4, .* 9 blocks needs at least 6'),
        (dict(decay_rate=0.9, lr=None), 'optimizer.lr must be given'),
        (
            dict(decay_rate=0.9, weight_decay=None, custom_keys=dict(decode_head=dict(decay_mult=0))),
            'weight_decay must be given: decay_mult multiplies it',
        ),
    ],
)
def test_bad_options(paramwise, message):
    with pytest.raises(ValueError, match=message):
        build(Segmentor(), **paramwise)


LONGEST = dict(custom_keys={'stages': dict(lr_mult=3), 'stages.0': dict(lr_mult=5, decay_mult=0)})


@pytest.mark.parametrize(
    'paramwise, name, factor, decay',
    [
        (dict(custom_keys=dict(decode_head=dict(lr_mult=10))), 'decode_head.weight', 10, 0.05),
        (dict(custom_keys=dict(decode_head=dict(lr_mult=10))), 'decode_head.bias', 10, 0),
        (dict(custom_keys=dict(decode_head=dict(decay_mult=2))), 'decode_head.bias', 1, 0.1),
        # The longest key counts, and multiplies what the layer has.
        (LONGEST, 'backbone.stages.0.0.pwconv1.weight', 5 * 0.5**6, 0),
        (dict(custom_keys=dict(stages=dict(lr_mult=3))), 'backbone.stages.0.0.norm.weight', 3 * 0.5**6, 0),
        (dict(norm_decay_mult=1), 'backbone.stages.3.0.norm.weight', 0.5, 0.05),
        (dict(norm_decay_mult=1), 'decode_head.bias', 1, 0),
        (dict(bias_decay_mult=1, bias_lr_mult=2), 'decode_head.bias', 2, 0.05),
        (dict(bias_decay_mult=1, bias_lr_mult=2), 'backbone.norm3.bias', 1, 0),
        (dict(flat_decay_mult=1), 'backbone.stages.3.0.gamma', 0.5, 0.05),
        (dict(dwconv_decay_mult=0), 'backbone.stages.3.0.large_kernel.small.conv.weight', 0.5, 0),
    ],
)
def test_factors_of_mmengine_multiply_those_of_the_layers(paramwise, name, factor, decay):
    model = Segmentor()
    got = scales(model, build(model, decay_rate=0.5, **paramwise))
    assert got[name] == pytest.approx((factor, decay))
    assert len(got) == len(list(model.parameters()))


def test_other_settings_of_a_part():
    groups = build(Segmentor(), decay_rate=0.5, custom_keys=dict(decode_head=dict(eps=1e-3))).param_groups
    assert {g['eps'] for g in groups if 'decode_head.weight' in g['param_names']} == {1e-3}
    assert {g['eps'] for g in groups if 'backbone.norm3.weight' in g['param_names']} == {1e-8}


def test_groups_can_be_compiled():
    """torch.compile traces an optimizer whose groups are plain dicts, not mmengine's."""
    model = nn.Sequential()
    model.backbone, model.decode_head = Segmentor().backbone, nn.Conv2d(4, 2, 1)
    optimizer = build(model, decay_rate=0.5)
    assert {type(group) for group in optimizer.param_groups} == {dict}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.decode_head.weight.detach().clone()
    torch.compile(optimizer.step, backend='eager')()
    # AdamW's first step moves by the learning rate, and decays before.
    torch.testing.assert_close(model.decode_head.weight.detach(), before * (1 - 1e-4 * 0.05) - 1e-4)


def test_needs_our_backbone():
    with pytest.raises(TypeError, match='exactly one backbone of slak_mm, but Linear has 0'):
        build(nn.Linear(2, 2), decay_rate=0.9)


def test_needs_four_stages():
    model = SLaK(dict(depths=(1, 1), dims=(4, 4)), kernel_sizes=(7, 7), width_factor=1.0, out_indices=(0, 1))
    with pytest.raises(ValueError, match='four stages, the backbone has 2'):
        build(model, decay_rate=0.9)
