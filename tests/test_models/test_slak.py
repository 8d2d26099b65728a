"""SLaK's arguments, sizes and forms; its numbers are in test_slak_parity.py."""

import pytest
import torch
from backbone_helpers import images, random_
from mmengine.registry import MODELS
from torch import nn

from slak_mm import switch_to_deploy
from slak_mm.models import SLaK

SMALL = dict(
    arch=dict(depths=(1, 1, 2, 1), dims=(8, 12, 16, 20)), kernel_sizes=(13, 11, 9, 7), small_kernel=3, width_factor=1.0
)


@pytest.mark.parametrize(
    'arguments, parameters',
    # num_params_without_head of reference/manifests: without classifier and output norms.
    [
        (dict(arch='tiny'), 49_702_842),
        (dict(arch='tiny', kernel_sizes=(31, 29, 27, 13)), 48_580_842),
        (dict(arch='tiny', kernel_sizes=(61, 59, 57, 13)), 50_263_842),
        (dict(arch='small'), 90_130_824),
        (dict(arch='base'), 156_616_130),
        (
            dict(arch='tiny', kernel_sizes=(7, 7, 7, 7), small_kernel=None, decomposed=False, width_factor=1.0),
            27_825_216,
        ),
        (dict(arch='tiny', kernel_sizes=(31, 29, 27, 13), decomposed=False, width_factor=1.0), 31_349_472),
    ],
)
def test_parameter_count(arguments, parameters):
    with torch.device('meta'):
        model = SLaK(**arguments)
    output_norms = 2 * sum(model.dims)
    assert sum(p.numel() for p in model.parameters()) - output_norms == parameters


def test_width_is_truncated():
    with torch.device('meta'):
        assert SLaK('tiny').dims == (124, 249, 499, 998)
        assert SLaK('base').dims == (166, 332, 665, 1331)
        assert SLaK('large').dims == (249, 499, 998, 1996)


@pytest.mark.parametrize('height, width', [(64, 64), (33, 47), (32, 100), (95, 63)])
def test_any_size(height, width):
    """Odd sizes lose the last row or column; maps may be smaller than the kernels."""
    model = SLaK(**SMALL).eval()
    with torch.no_grad():
        outs = model(images(1, height, width))
    for i, (out, channels) in enumerate(zip(outs, (8, 12, 16, 20), strict=True)):
        want_h, want_w = height // 4, width // 4
        for _ in range(i):
            want_h, want_w = want_h // 2, want_w // 2
        assert out.shape == (1, channels, want_h, want_w)


def test_too_small_an_image():
    model = SLaK(**SMALL)
    with pytest.raises(ValueError, match='31 x 64 pixels is too small: stage 3 needs at least 32'):
        model(images(1, 31, 64))
    assert SLaK(**SMALL, out_indices=1)(images(2, 8, 8))[0].shape == (2, 12, 1, 1)


def test_out_indices_and_norms():
    model = random_(SLaK(**SMALL)).eval()
    some = SLaK(**SMALL, out_indices=(1, -1), out_norm=False).eval()
    some.load_state_dict(model.state_dict(), strict=False)
    x = images()
    with torch.no_grad():
        all_outs, some_outs = model(x), some(x)
    assert some.out_indices == (1, 3) and not hasattr(some, 'norm1')
    for i, raw in zip(some.out_indices, some_outs, strict=True):
        normed = getattr(model, f'norm{i}')(raw)
        torch.testing.assert_close(normed, all_outs[i], rtol=0, atol=0)


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(branch_norm=False),
        dict(conv_bias=True),
        dict(decomposed=False),
        dict(decomposed=False, small_kernel=None),
        dict(branch_norm=False, conv_bias=True),
        dict(layer_scale_init_value=0),
    ],
    ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items()) or 'default',
)
def test_deploy_equals_eval(options):
    model = random_(SLaK(**{**SMALL, **options})).double().eval()
    x = images(dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        names_before = set(model.state_dict())
        assert switch_to_deploy(nn.Sequential(model))[0] is model
        got = model(x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(b.abs().max()))
    assert not any('.bn.' in k or '.small.' in k for k in model.state_dict())
    assert len(model.state_dict()) <= len(names_before)

    rebuilt = SLaK(**{**SMALL, **options}, deploy=True).double().eval()
    rebuilt.load_state_dict(model.state_dict())
    model.switch_to_deploy()  # a second time changes nothing
    with torch.no_grad():
        for a, b, c in zip(rebuilt(x), model(x), got, strict=True):
            assert torch.equal(a, c) and torch.equal(b, c)


def test_deploy_without_a_backbone():
    with pytest.raises(ValueError, match='Linear contains no backbone of slak_mm'):
        switch_to_deploy(nn.Linear(2, 2))


class TestFrozenStages:
    @pytest.mark.parametrize(
        'frozen_stages, frozen',
        [
            (-1, []),
            (0, ['downsample_layers.0']),
            (2, ['downsample_layers.0', 'stages.0', 'downsample_layers.1', 'stages.1']),
        ],
    )
    def test_parameters(self, frozen_stages, frozen):
        model = SLaK(**SMALL, frozen_stages=frozen_stages)
        for name, p in model.named_parameters():
            assert p.requires_grad != any(name.startswith(f + '.') for f in frozen), name

    def test_statistics_stay(self):
        model = SLaK(**SMALL, frozen_stages=1)
        for mode in (True, False, True):
            model.train(mode)
            assert not model.stages[0].training
            assert model.stages[1].training == mode
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model(images())[-1].sum().backward()
        for k, v in model.state_dict().items():
            if 'running_mean' in k:
                assert torch.equal(v, before[k]) == k.startswith('stages.0.'), k

    def test_out_of_range(self):
        with pytest.raises(ValueError, match='frozen_stages must lie between -1 and 4, got 5'):
            SLaK(**SMALL, frozen_stages=5)


class TestActivationCheckpointing:
    def run(self, with_cp):
        """One training step with drop path: outputs, gradients, statistics, saved bytes."""
        deep = {**SMALL, 'arch': dict(depths=(4, 4, 4, 4), dims=(8, 12, 16, 20))}
        model = random_(SLaK(**deep, with_cp=with_cp, drop_path_rate=0.5)).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outs = model(images())
        kept = sum(saved.values())
        sum(o.square().mean() for o in outs).backward()
        return outs, model, kept

    def test_same_result_for_less_memory(self):
        plain_outs, plain, plain_bytes = self.run(False)
        outs, model, kept = self.run(True)
        for a, b in zip(outs, plain_outs, strict=True):
            assert torch.equal(a, b)
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
        for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(a, b), name
        # A block keeps over ten maps of its size for the backward pass; recomputed, its input.
        assert kept < plain_bytes / 4


def test_drop_path_rises_linearly():
    model = SLaK(**SMALL, drop_path_rate=0.4)
    rates = [getattr(b.drop_path, 'drop_prob', 0.0) for s in model.stages for b in s]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images())[0], model(images())[0])


def test_registered_for_every_framework():
    """The frameworks' registries fall back on mmengine's root."""
    mmseg = pytest.importorskip('mmseg.registry')
    for registry in (MODELS, mmseg.MODELS):
        assert type(registry.build(dict(type='SLaK', **SMALL))) is SLaK


def test_sync_bn_needs_no_process_group():
    """The default norm works on one process; names are those of BN."""
    model = SLaK(**SMALL)
    model(images())[-1].sum().backward()
    with_bn = SLaK(**SMALL, norm_cfg=dict(type='BN', momentum=0.05))
    assert list(model.state_dict()) == list(with_bn.state_dict())
    assert with_bn.stages[0][0].large_kernel.tall.bn.momentum == 0.05


def test_weights_are_the_official_initialization():
    """Truncated normal of deviation 0.02, biases 0, norms 1 and 0, layer scale as given."""
    model = SLaK('tiny', layer_scale_init_value=1e-6)
    model.init_weights()
    for name, p in model.named_parameters():
        if name.endswith('.gamma'):
            assert (p == 1e-6).all()
        elif p.ndim > 1 and p.numel() > 10_000:
            assert float(p.std()) == pytest.approx(0.02, rel=0.05), name
            assert float(p.abs().max()) <= 0.1, name
            assert abs(float(p.mean())) < 0.001, name
        elif p.ndim == 1:
            assert (p == (0 if name.endswith('bias') else 1)).all(), name


def test_construction_leaves_other_generators_alone():
    """Nothing is seeded: the generators end in a state that depends on the user's seed."""
    import random

    import numpy as np

    states = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        python, numpy = random.getstate(), np.random.get_state()[1].copy()
        SLaK(**SMALL)
        assert random.getstate() == python and (np.random.get_state()[1] == numpy).all()
        states.append(torch.get_rng_state())
    assert not torch.equal(*states)


def test_construction_prints_nothing(capsys):
    SLaK(**SMALL, norm_cfg=dict(type='BN'))
    captured = capsys.readouterr()
    assert captured.out == '' and captured.err == ''


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(arch='huge'), "SLaK has no arch 'huge'; choose from tiny, small, base, large"),
        (dict(arch=dict(depths=(1, 1))), 'arch must be a name or dict'),
        (dict(arch=dict(depths=(1, 1), dims=(8,))), 'as many depths as dims'),
        (dict(arch=dict(depths=(1, 0), dims=(8, 8)), kernel_sizes=(7, 7)), 'all of them positive'),
        (dict(kernel_sizes=(13, 11, 9)), 'one entry for each of the 4 stages'),
        (dict(kernel_sizes=(13, 11, 9, 8)), 'must be odd positive integers .* got 8'),
        (dict(kernel_sizes=(13, 11, 9, -7)), 'must be odd positive integers .* got -7'),
        (dict(small_kernel=4), 'must be odd positive integers .* got 4'),
        (dict(small_kernel=7), r'small_kernel \(7\) must be smaller than every entry'),
        (dict(small_kernel=None), 'decomposed=True needs small_kernel'),
        (dict(width_factor=0), 'width_factor must be positive, got 0'),
        (dict(width_factor=0.1), 'leave 0 channels to a stage'),
        (dict(drop_path_rate=1.0), r'drop_path_rate must lie in \[0, 1\), got 1.0'),
        (dict(out_indices=(0, 4)), 'out_indices must name stages 0 to 3'),
        (dict(out_indices=()), 'out_indices must name stages 0 to 3'),
        (dict(norm_cfg=dict(type='GN', num_groups=2)), "norm_cfg type 'GN' is no batch norm"),
        (
            dict(init_cfg=[dict(type='Pretrained', checkpoint='a'), dict(type='Pretrained', checkpoint='b')]),
            'names 2 checkpoints',
        ),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        SLaK(**{**SMALL, **change})


def test_batch_norm_layers_are_plain_or_synchronized():
    model = SLaK(**SMALL)
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert len(kinds) == 1
    assert issubclass(kinds.pop(), nn.SyncBatchNorm if torch.cuda.is_available() else nn.BatchNorm2d)


def test_pointwise_layers_as_convolutions_are_loaded():
    """Some code bases have 1x1 convolutions; the names alone may be ours already."""
    model = random_(SLaK(**SMALL))
    other = {k: v[:, :, None, None] if '.pwconv' in k and v.ndim == 2 else v for k, v in model.state_dict().items()}
    loaded = SLaK(**SMALL)
    loaded.load_state_dict(other)
    for (name, a), b in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
