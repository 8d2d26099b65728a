"""What all backbones have: arguments, sizes and forms. Their numbers are in the tests of parity."""

import random

import numpy as np
import pytest
import torch
from backbone_helpers import BACKBONES, DIMS, SMALL, build, images, random_
from mmengine.registry import MODELS
from torch import nn

from slak_mm import switch_to_deploy
from slak_mm.models import RepLKNet, ShiftWise, SLaK, UniRepLKNet
from slak_mm.ops import shift_tables

every_backbone = pytest.mark.parametrize('name', BACKBONES)


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


def test_parameters():
    """As num_params_without_head of reference/manifests: without classifier and output norms."""
    k31, k61 = dict(kernel_sizes=(31, 29, 27, 13)), dict(kernel_sizes=(61, 59, 57, 13))
    square = dict(decomposed=False, width_factor=1.0)
    for cls, arguments, parameters in (
        (SLaK, dict(), 49_702_842),
        (SLaK, k31, 48_580_842),
        (SLaK, k61, 50_263_842),
        (SLaK, dict(arch='small'), 90_130_824),
        (SLaK, dict(arch='base'), 156_616_130),
        (SLaK, dict(kernel_sizes=(7, 7, 7, 7), small_kernel=None, **square), 27_825_216),
        (SLaK, dict(**k31, **square), 31_349_472),
        (ShiftWise, dict(), 31_147_980),
        (ShiftWise, dict(arch='small'), 56_542_356),
        (ShiftWise, dict(arch='base'), 99_223_332),
        (ShiftWise, dict(version=1), 28_648_896),
        (ShiftWise, dict(arch='small', version=1), 51_504_288),
        (ShiftWise, dict(arch='base', version=1), 90_302_750),
        (ShiftWise, dict(num_paths=1), 30_360_390),
        (UniRepLKNet, dict(), 31_051_140),
        (UniRepLKNet, dict(deploy=True), 30_395_700),
        (UniRepLKNet, dict(arch='atto'), 4_327_420),
        (UniRepLKNet, dict(arch='xlarge'), 386_637_888),
        (RepLKNet, dict(), 78_837_120),
        (RepLKNet, dict(arch='31L'), 171_130_944),
        (RepLKNet, dict(arch='XL'), 333_382_656),
    ):
        with torch.device('meta'):
            model = cls(**arguments, out_norm=False)
        assert sum(p.numel() for p in model.parameters()) == parameters, (cls, arguments)


def test_width_is_truncated():
    with torch.device('meta'):
        assert SLaK('tiny').dims == (124, 249, 499, 998)
        assert SLaK('base').dims == (166, 332, 665, 1331)
        assert SLaK('large').dims == (249, 499, 998, 1996)


@every_backbone
@pytest.mark.parametrize('height, width', [(64, 64), (33, 47), (32, 100), (95, 63)])
def test_any_size(name, height, width):
    """Sizes are halved and rounded down by SLaK and version 1 of ShiftWise, up by others; kernels may exceed maps."""
    up = int(name not in ('slak', 'shiftwise1'))
    h, w = (height + up) // 2, (width + up) // 2
    for out, channels in zip(outputs(build(name), images(1, height, width)), DIMS, strict=True):
        h, w = (h + up) // 2, (w + up) // 2
        assert out.shape == (1, channels, h, w) and out.isfinite().all()


def test_smallest_images():
    for name in ('slak', 'shiftwise1'):
        with pytest.raises(ValueError, match='31 x 64 pixels is too small: stage 3 needs at least 32'):
            build(name)(images(1, 31, 64))
        assert build(name, out_indices=1)(images(2, 8, 8))[0].shape == (2, 12, 1, 1)
    for name in ('shiftwise2', 'unireplknet'):
        assert [tuple(y.shape[2:]) for y in outputs(build(name), images(1, 1, 1))] == [(1, 1)] * 4
    with pytest.raises(ValueError, match='0 x 5 pixels is too small'):
        build('shiftwise2')(images(1, 0, 5))


@every_backbone
def test_sizes_without_arithmetic(name):
    """On the meta device, as cost counters use it."""
    with torch.device('meta'):
        maps = build(name)(torch.empty(1, 3, 512, 512))
    assert [y.shape[1:] for y in maps] == [(c, s, s) for c, s in zip(DIMS, (128, 64, 32, 16))]


@every_backbone
def test_input_layout_does_not_matter(name):
    block = random_(build(name)).double().eval().stages[0][0]
    x = images(2, 9, 11, torch.float64).repeat(1, 3, 1, 1)[:, :8]
    plain, last = (
        outputs(block, x.contiguous(memory_format=f)) for f in (torch.contiguous_format, torch.channels_last)
    )
    torch.testing.assert_close(plain, last, rtol=0, atol=1e-10)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_out_indices_and_norms():
    model = random_(build('slak'))
    some = build('slak', out_indices=(1, -1), out_norm=False)
    some.load_state_dict(model.state_dict(), strict=False)
    whole, raw = outputs(model, images()), outputs(some, images())
    assert some.out_indices == (1, 3) and not hasattr(some, 'norm1')
    for i, y in zip((1, 3), raw, strict=True):
        assert torch.equal(getattr(model, f'norm{i}')(y), whole[i])


SLAK_FORMS = [
    dict(),
    dict(branch_norm=False),
    dict(conv_bias=True),
    dict(decomposed=False),
    dict(decomposed=False, small_kernel=None),
    dict(branch_norm=False, conv_bias=True),
    dict(layer_scale_init_value=0),
]
REPLKNET_FORMS = [dict(), dict(small_kernel=None), dict(dw_ratio=1.5, out_norm=False), dict(out_indices=(1, 2))]
SHIFTWISE_FORMS = [
    dict(),
    dict(branch_norm=False),
    dict(ghost_ratio=0),
    dict(num_paths=1, num_reps=1),
    dict(num_paths=3),
    dict(small_kernel=5),
    dict(layer_scale_init_value=0),
    dict(kernel_sizes=(3, 3, 3, 3)),
    dict(kernel_sizes=(13, 11, 8, 7)),
    dict(small_kernel=1, ghost_ratio=0.7),
]
UNIREPLKNET_FORMS = [
    dict(),
    dict(layer_scale_init_value=0),
    dict(kernel_sizes=(0, 3, 5, 7)),
    dict(kernel_sizes=(17, 15, (11, 0), 9)),
]
FORMS = dict(
    slak=SLAK_FORMS,
    shiftwise1=SHIFTWISE_FORMS,
    shiftwise2=SHIFTWISE_FORMS,
    replknet=REPLKNET_FORMS,
    unireplknet=UNIREPLKNET_FORMS,
)


@pytest.mark.parametrize('name, options', [(name, form) for name in BACKBONES for form in FORMS[name]], ids=str)
def test_deploy_equals_eval(name, options):
    model = random_(build(name, **options)).double()
    x = images(dtype=torch.float64)
    want = outputs(model, x)
    assert switch_to_deploy(nn.Sequential(model))[0] is model
    got = outputs(model, x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(b.abs().max()))
    keys = list(model.state_dict())
    folded = (
        ('large_kernel.square.bn', '.small.')
        if name == 'replknet'
        else (('.bn', '.small.', 'filters', 'shifts', 'picks', 'ffn.norm', 'grn.beta'))
    )
    assert not any(part in key for key in keys for part in folded)
    if name in ('shiftwise2', 'unireplknet'):
        assert not any(key.startswith('stages') and key.endswith(('.norm.weight', '0.gamma')) for key in keys)

    rebuilt = build(name, **options, deploy=True).double()
    rebuilt.load_state_dict(model.state_dict())
    model.switch_to_deploy()  # a second time changes nothing
    for other in (rebuilt, model):
        assert all(map(torch.equal, outputs(other, x), got))
    for a, b in zip(outputs(model.float(), x.float()), want):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4 * float(b.abs().max()))


def test_deploy_without_a_backbone():
    with pytest.raises(ValueError, match='Linear contains no backbone of slak_mm'):
        switch_to_deploy(nn.Linear(2, 2))


@every_backbone
@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2])
def test_frozen_stages(name, frozen_stages):
    model = build(name, frozen_stages=frozen_stages)
    frozen = tuple(f'{kind}.{i}.' for i in range(frozen_stages) for kind in ('downsample_layers', 'stages'))
    frozen += ('downsample_layers.0.',) if frozen_stages == 0 else ()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad != key.startswith(frozen), key
    for mode in (True, False, True):
        model.train(mode)
        assert [stage.training for stage in model.stages] == [mode and i >= frozen_stages for i in range(4)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(images())[-1].sum().backward()
    for key, value in model.state_dict().items():
        if 'running_mean' in key:
            assert torch.equal(value, before[key]) == key.startswith(frozen), key


@every_backbone
def test_activation_checkpointing(name):
    """A step with drop path has the same results, gradients and statistics, for less memory."""
    deep = dict(depths=(4, 4, 4, 4), dims=DIMS)

    def step(with_cp):
        model = random_(build(name, arch=deep, with_cp=with_cp, drop_path_rate=0.5)).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            maps = model(images())
        kept = sum(saved.values())
        sum(y.square().mean() for y in maps).backward()
        return [*maps, *model.buffers()], {key: p.grad for key, p in model.named_parameters()}, kept

    (plain, plain_grads, plain_bytes), (got, grads, kept) = step(False), step(True)
    assert all(map(torch.equal, got, plain))
    for key, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[key], rtol=1e-3, atol=1e-4, msg=key)
    # A block keeps over ten maps of its size for the backward pass; recomputed, its input.
    assert kept < plain_bytes / 4


@every_backbone
def test_autocast(name):
    model = random_(build(name)).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        maps = model(images())
    sum(y.float().square().mean() for y in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_kernel_sizes_of_unireplknet():
    """By stages, blocks of stages or blocks; the published ones by depths, as the official code has them."""
    with torch.device('meta'):
        models = [
            build('unireplknet', kernel_sizes=k) for k in ((13, 3, 9, 7), ((13,), (3,), [9, 9], 7), [13, 3, 9, 9, 7])
        ]
        assert {model.kernel_sizes for model in models} == {((13,), (3,), (9, 9), (7,))}
        small, nano = UniRepLKNet('small'), UniRepLKNet('nano')
    assert small.kernel_sizes == ((3,) * 3, (13,) * 3, (13, 3, 3) * 9, (13,) * 3)
    assert nano.kernel_sizes == ((3, 3), (13, 13), (13,) * 8, (13, 13))


def test_drop_path_rises_linearly():
    model = build('slak', drop_path_rate=0.4)
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert torch.equal(outputs(model, images())[0], outputs(model, images())[0])


@pytest.mark.parametrize('cls', [SLaK, ShiftWise, RepLKNet, UniRepLKNet])
def test_registered_for_every_framework(cls):
    """The frameworks' registries fall back on mmengine's root."""
    mmseg = pytest.importorskip('mmseg.registry')
    for registry in (MODELS, mmseg.MODELS):
        assert type(registry.build(dict(type=cls.__name__, **SMALL))) is cls


@every_backbone
def test_batch_norms_are_plain_or_synchronized(name):
    """The default norm works on one process; names are those of BN."""
    model = build(name, norm_cfg=None)
    if not torch.cuda.is_available():
        model(images())[-1].sum().backward()
    with_bn = build(name, norm_cfg=dict(type='BN', momentum=0.05))
    assert list(model.state_dict()) == list(with_bn.state_dict())
    norms = [m for m in with_bn.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {norm.momentum for norm in norms} == {0.05}
    expected = nn.SyncBatchNorm if torch.cuda.is_available() else nn.BatchNorm2d
    assert sum(isinstance(m, expected) for m in model.modules()) == len(norms)


@pytest.mark.parametrize('cls', [SLaK, ShiftWise, UniRepLKNet])
def test_weights_are_the_official_initialization(cls):
    """Truncated normal of deviation 0.02, biases and GRN 0, norms 1 and 0, layer scale as given."""
    model = cls('tiny', layer_scale_init_value=1e-6)
    model.init_weights()
    for name, p in model.named_parameters():
        if '.grn.' in name:
            assert (p == 0).all()
        elif name.endswith('.gamma'):
            assert (p == 1e-6).all()
        elif p.ndim > 1 and p.numel() > 10_000:
            weights = p.detach()
            assert float(weights.std()) == pytest.approx(0.02, rel=0.05), name
            assert float(weights.abs().max()) <= 0.1 and abs(float(weights.mean())) < 0.001, name
        elif p.ndim == 1:
            assert (p == (0 if name.endswith('bias') else 1)).all(), name


@every_backbone
def test_construction_leaves_other_generators_alone(name, capsys):
    """Nothing is seeded or printed: the generators end in a state that depends on the user's seed."""
    states = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        python, numpy = random.getstate(), np.random.get_state()[1].copy()
        shift_tables._draw.cache_clear()
        build(name)
        assert random.getstate() == python and (np.random.get_state()[1] == numpy).all()
        states.append(torch.get_rng_state())
    assert not torch.equal(*states)
    assert capsys.readouterr() == ('', '')


TWO_CHECKPOINTS = [dict(type='Pretrained', checkpoint=name) for name in 'ab']
WRONG = [
    (SLaK, dict(arch='huge'), "SLaK has no arch 'huge'; choose from tiny, small, base, large"),
    (ShiftWise, dict(arch='huge'), "ShiftWise has no arch 'huge'; choose from tiny, small, base, large"),
    (SLaK, dict(arch=dict(depths=(1, 1))), 'arch must be a name or dict'),
    (SLaK, dict(arch=dict(depths=(1, 1), dims=(8,))), 'as many depths as dims'),
    (SLaK, dict(arch=dict(depths=(1, 0), dims=(8, 8)), kernel_sizes=(7, 7)), 'all of them positive'),
    (SLaK, dict(kernel_sizes=(13, 11, 9, 8)), 'must be odd positive integers .* got 8'),
    (SLaK, dict(kernel_sizes=(13, 11, 9, -7)), 'must be odd positive integers .* got -7'),
    (SLaK, dict(small_kernel=4), 'must be odd positive integers .* got 4'),
    (SLaK, dict(small_kernel=7), r'small_kernel \(7\) must be smaller than every entry'),
    (SLaK, dict(small_kernel=None), 'decomposed=True needs small_kernel'),
    (SLaK, dict(width_factor=0.1), 'leave 0 channels to a stage'),
    (SLaK, dict(out_indices=()), 'out_indices must name stages 0 to 3'),
    (SLaK, dict(init_cfg=TWO_CHECKPOINTS), 'names 2 checkpoints'),
    (RepLKNet, dict(arch='31S'), "RepLKNet has no arch '31S'; choose from 31B, 31L, XL"),
    (RepLKNet, dict(arch=dict(layers=(1, 1), channels=(8,))), 'as many depths as dims'),
    (RepLKNet, dict(small_kernel=7), r'small_kernel \(7\) must be smaller than every entry'),
    (RepLKNet, dict(dw_ratio=0.1), 'dw_ratio 0.1 leaves no channel'),
    (ShiftWise, dict(version=3), 'version must be 1 or 2, got 3'),
    (ShiftWise, dict(kernel_sizes=(13, 11, 9, 2)), r'kernel_sizes .* not smaller than small_kernel \(3\)'),
    (ShiftWise, dict(kernel_sizes=(13, 11, 9, 7.5)), 'kernel_sizes must be integers'),
    (ShiftWise, dict(ghost_ratio=1.0), r'ghost_ratio must lie in \[0, 1\), got 1.0'),
    (ShiftWise, dict(ghost_ratio=-0.1), r'ghost_ratio must lie in \[0, 1\), got -0.1'),
    (ShiftWise, dict(ghost_ratio=0.9), 'ghost_ratio 0.9 leaves none of the 8 channels of stage 0'),
    (ShiftWise, dict(num_paths=0), 'num_paths must be a positive integer, got 0'),
    (ShiftWise, dict(width_factor=0.3), 'leave 2 channels to a stage, which needs at least 4'),
    *(
        (ShiftWise, dict(small_kernel=size), f'small_kernel must be an odd positive integer .* got {size}')
        for size in (4, -1, None)
    ),
    (UniRepLKNet, dict(arch='huge'), "UniRepLKNet has no arch 'huge'; choose from atto, femto, pico, nano, tiny"),
    (UniRepLKNet, dict(kernel_sizes=None), r'no usual kernel_sizes for the depths \(1, 1, 2, 1\): give one entry'),
    (UniRepLKNet, dict(kernel_sizes=(13, 11, 9, 31)), 'must be among 0, 3, 5, 7, 9, 11, 13, 15, 17, got 31'),
    (UniRepLKNet, dict(kernel_sizes=(13, 11, (9, 3, 3), 7)), 'each of the 1/1/2/1 blocks of the stages, got 1/1/3/1'),
    (UniRepLKNet, dict(width_factor=0.3), 'leave 2 channels to a stage, which needs at least 4'),
    *((ShiftWise, dict(num_reps=n), f'num_reps must be a positive integer, got {n}') for n in (0, 1.5)),
    *(
        (cls, arguments, message)
        for cls in (SLaK, ShiftWise, RepLKNet, UniRepLKNet)
        for arguments, message in (
            (dict(kernel_sizes=(13, 11, 9)), 'one entry for each of the 4 stages'),
            (dict(width_factor=0), 'width_factor must be positive, got 0'),
            (dict(drop_path_rate=1.0), r'drop_path_rate must lie in \[0, 1\), got 1.0'),
            (dict(out_indices=(0, 4)), 'out_indices must name stages 0 to 3'),
            (dict(frozen_stages=5), 'frozen_stages must lie between -1 and 4, got 5'),
            (dict(norm_cfg=dict(type='GN', num_groups=2)), "norm_cfg type 'GN' is no batch norm"),
        )
    ),
]


@pytest.mark.parametrize('cls, change, message', WRONG)
def test_bad_arguments(cls, change, message):
    with pytest.raises(ValueError, match=message):
        cls(**{**SMALL, **change})


def test_pointwise_layers_as_convolutions_are_loaded():
    """Some code bases have 1x1 convolutions; the names alone may be ours already."""
    model, loaded = random_(build('slak')), build('slak')
    state = model.state_dict()
    loaded.load_state_dict({k: v[:, :, None, None] if '.pwconv' in k and v.ndim == 2 else v for k, v in state.items()})
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
