"""ShiftWise's arguments, sizes, forms and loading; its numbers are in test_shiftwise_parity.py."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from backbone_helpers import images, random_
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from slak_mm import load_pretrained, switch_to_deploy
from slak_mm.checkpoints import CheckpointError, CheckpointMismatch, convert_checkpoint, describe, to_official
from slak_mm.models import ShiftWise, SLaK
from slak_mm.models.shiftwise import ShiftWiseConv

SMALL = dict(arch=dict(depths=(1, 1, 2, 1), dims=(8, 12, 16, 20)), kernel_sizes=(13, 11, 8, 7))
BOTH = pytest.mark.parametrize('version', [1, 2])
TABLES = ('shifts', 'picks', 'rep', 'ghost')


def outputs(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model.eval()(x)


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize(
    'arguments, parameters',
    # num_params_without_head of reference/manifests: without classifier and output norms.
    [
        (dict(arch='tiny'), 31_147_980),
        (dict(arch='small'), 56_542_356),
        (dict(arch='base'), 99_223_332),
        (dict(arch='tiny', version=1), 28_648_896),
        (dict(arch='small', version=1), 51_504_288),
        (dict(arch='base', version=1), 90_302_750),
        (dict(arch='tiny', num_paths=1), 30_360_390),
    ],
)
def test_parameter_count(arguments, parameters):
    with torch.device('meta'):
        model = ShiftWise(**arguments)
    output_norms = 2 * sum(model.dims)
    assert sum(p.numel() for p in model.parameters()) - output_norms == parameters


@pytest.mark.skipif(importlib.util.find_spec('mmseg') is None, reason='mmseg is not installed')
@pytest.mark.parametrize(
    'arch, num_paths, millions',
    [
        # As published (downstream/segmentation/README.md of the official code) ...
        ('t', 1, 61.73),
        ('t', 2, 62.51),
        # ... but SW-S is published as 87.5; docs/benchmarks.md says which arguments lead there.
        ('s', 1, 87.64),
    ],
)
def test_parameter_count_of_upernet(arch, num_paths, millions):
    from mmengine.config import Config

    from slak_mm.cli import adapt_to_device, remove_weights

    configs = Path(__file__).resolve().parents[2] / 'configs'
    cfg = Config.fromfile(str(configs / f'upernet_shiftwise_{arch}_ade20k.py'))
    remove_weights(cfg)
    adapt_to_device(cfg, has_gpu=lambda: False)
    cfg.model.backbone.num_paths = num_paths
    init_default_scope('mmseg')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@BOTH
@pytest.mark.parametrize('height, width', [(64, 64), (33, 47), (32, 100), (95, 63)])
def test_any_size(version, height, width):
    """Sizes are rounded down by version 1 and up by version 2; maps may be small."""
    model = ShiftWise(**SMALL, version=version)
    h, w = height, width
    for i, out in enumerate(outputs(model, images(1, height, width))):
        for _ in range(2 if i == 0 else 1):
            h, w = (h // 2, w // 2) if version == 1 else ((h + 1) // 2, (w + 1) // 2)
        assert out.shape == (1, model.dims[i], h, w) and out.isfinite().all()


def test_smallest_images():
    model = ShiftWise(**SMALL, version=1)
    with pytest.raises(ValueError, match='31 x 64 pixels is too small: stage 3 needs at least 32'):
        model(images(1, 31, 64))
    version2 = ShiftWise(**SMALL)
    assert [tuple(o.shape[2:]) for o in outputs(version2, images(1, 1, 1))] == [(1, 1)] * 4
    with pytest.raises(ValueError, match='0 x 5 pixels is too small'):
        version2(images(1, 0, 5))


@BOTH
def test_sizes_without_arithmetic(version):
    """On the meta device, as cost counters use it."""
    with torch.device('meta'):
        model = ShiftWise('tiny', version=version)
        outs = model(torch.empty(1, 3, 512, 512))
    assert [tuple(o.shape[1:]) for o in outs] == [(c, s, s) for c, s in zip(model.dims, (128, 64, 32, 16))]


@BOTH
def test_input_layout_does_not_matter(version):
    model = random_(ShiftWise(**SMALL, version=version)).double().eval()
    block = model.stages[0][0]
    x = images(2, 9, 11, torch.float64).repeat(1, 3, 1, 1)[:, :8]
    with torch.no_grad():
        plain = block(x.contiguous())
        last = block(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, last, rtol=0, atol=1e-10)
    assert last.is_contiguous(memory_format=torch.channels_last)


@BOTH
@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(branch_norm=False),
        dict(ghost_ratio=0),
        dict(num_paths=1, num_reps=1),
        dict(num_paths=3),
        dict(small_kernel=5),
        dict(layer_scale_init_value=0),
        dict(kernel_sizes=(3, 3, 3, 3)),
        dict(small_kernel=1, ghost_ratio=0.7),
    ],
    ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items()) or 'default',
)
def test_deploy_equals_eval(options, version):
    arguments = {**SMALL, **options, 'version': version}
    model = random_(ShiftWise(**arguments)).double()
    x = images(dtype=torch.float64)
    want = outputs(model, x)
    assert switch_to_deploy(nn.Sequential(model))[0] is model
    got = outputs(model, x)
    assert_close(got, want, 1e-9)
    left_over = ('filters', 'bn_', 'shifts', 'picks', 'ffn.norm', 'grn.beta')
    assert not any(part in name for name in model.state_dict() for part in left_over)
    if version == 2:
        assert not any(n.startswith('stages') and n.endswith(('.norm.weight', '0.gamma')) for n in model.state_dict())

    rebuilt = ShiftWise(**arguments, deploy=True).double()
    rebuilt.load_state_dict(model.state_dict())
    model.switch_to_deploy()  # a second time changes nothing
    for other in (rebuilt, model):
        for a, b in zip(outputs(other, x), got, strict=True):
            assert torch.equal(a, b)
    in_float = outputs(model.float(), x.float())
    assert_close([o.double() for o in in_float], want, 1e-4)


def test_deployed_block_calls_the_operator_once(monkeypatch):
    from slak_mm.models import shiftwise

    model = switch_to_deploy(random_(ShiftWise(**SMALL)))
    calls = []
    original = shiftwise.cross_dwconv2d
    monkeypatch.setattr(
        shiftwise, 'cross_dwconv2d', lambda *args, **kwargs: calls.append(kwargs) or original(*args, **kwargs)
    )
    outputs(model, images())
    assert len(calls) == 5 and all(kwargs['reduce'] for kwargs in calls)


@BOTH
def test_frozen_stages(version):
    model = ShiftWise(**SMALL, version=version, frozen_stages=1)
    for mode in (False, True):
        model.train(mode)
        assert not model.stages[0].training and model.stages[1].training == mode
    for name, p in model.named_parameters():
        frozen = name.startswith(('downsample_layers.0.', 'stages.0.'))
        assert p.requires_grad != frozen, name
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(images())[-1].sum().backward()
    for k, v in model.state_dict().items():
        if 'running_mean' in k:
            assert torch.equal(v, before[k]) == k.startswith('stages.0.'), k


@BOTH
def test_activation_checkpointing(version):
    """One step with drop path: same outputs, gradients and statistics."""
    results = []
    for with_cp in (False, True):
        model = random_(ShiftWise(**SMALL, version=version, with_cp=with_cp, drop_path_rate=0.5)).train()
        torch.manual_seed(3)
        outs = model(images())
        sum(o.square().mean() for o in outs).backward()
        results.append((outs, model))
    (plain_outs, plain), (outs, model) = results
    for a, b in zip(outs, plain_outs, strict=True):
        assert torch.equal(a, b)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_paths_have_equal_gradients():
    model = random_(ShiftWise(**SMALL, num_paths=3)).train()
    sum(o.square().mean() for o in model(images())).backward()
    first, *others = model.stages[0][0].large_kernel.filters
    assert first.weight.grad.abs().max() > 0
    for path in others:
        assert torch.equal(path.weight.grad, first.weight.grad)


@BOTH
def test_autocast(version):
    model = random_(ShiftWise(**SMALL, version=version)).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs = model(images())
    sum(o.float().square().mean() for o in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_registered_for_every_framework():
    mmseg = pytest.importorskip('mmseg.registry')
    for registry in (MODELS, mmseg.MODELS):
        assert type(registry.build(dict(type='ShiftWise', **SMALL))) is ShiftWise


def test_sync_bn_needs_no_process_group():
    model = ShiftWise(**SMALL)
    model(images())[-1].sum().backward()
    with_bn = ShiftWise(**SMALL, norm_cfg=dict(type='BN', momentum=0.05))
    assert list(model.state_dict()) == list(with_bn.state_dict())
    assert with_bn.stages[0][0].large_kernel.bn_wide.momentum == 0.05
    assert with_bn.stages[0][0].ffn.norm.momentum == 0.05


def test_weights_are_the_official_initialization():
    """Truncated normal of deviation 0.02, biases and GRN 0, norms 1 and 0, layer scale as given."""
    model = ShiftWise('tiny', layer_scale_init_value=1e-6)
    model.init_weights()
    for name, p in model.named_parameters():
        if '.grn.' in name:
            assert (p == 0).all()
        elif name.endswith('.gamma'):
            assert (p == 1e-6).all()
        elif p.ndim > 1 and p.numel() > 8_000:
            # The median, as one weight in 2**24 is cut at -2 by the usual implementation.
            median = float(p.detach().abs().median())
            assert median == pytest.approx(0.6745 * 0.02, rel=0.05), name
        elif p.ndim == 1:
            assert (p == (0 if name.endswith('bias') else 1)).all(), name


def test_construction_leaves_other_generators_alone(capsys):
    import random

    import numpy as np

    from slak_mm.ops import shift_tables

    states = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        python, numpy = random.getstate(), np.random.get_state()[1].copy()
        shift_tables._draw.cache_clear()
        ShiftWise(**SMALL, norm_cfg=dict(type='BN'))
        assert random.getstate() == python and (np.random.get_state()[1] == numpy).all()
        states.append(torch.get_rng_state())
    assert not torch.equal(*states)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(arch='huge'), "ShiftWise has no arch 'huge'; choose from tiny, small, base, large"),
        (dict(version=3), 'version must be 1 or 2, got 3'),
        (dict(kernel_sizes=(13, 11, 9)), 'one entry for each of the 4 stages'),
        (dict(kernel_sizes=(13, 11, 9, 2)), r'kernel_sizes .* not smaller than small_kernel \(3\)'),
        (dict(kernel_sizes=(13, 11, 9, 7.5)), 'kernel_sizes must be integers'),
        (dict(small_kernel=4), 'small_kernel must be an odd positive integer .* got 4'),
        (dict(small_kernel=-1), 'small_kernel must be an odd positive integer .* got -1'),
        (dict(small_kernel=None), 'small_kernel must be an odd positive integer .* got None'),
        (dict(ghost_ratio=1.0), r'ghost_ratio must lie in \[0, 1\), got 1.0'),
        (dict(ghost_ratio=-0.1), r'ghost_ratio must lie in \[0, 1\), got -0.1'),
        (dict(ghost_ratio=0.9), 'ghost_ratio 0.9 leaves none of the 8 channels of stage 0'),
        (dict(num_paths=0), 'num_paths must be a positive integer, got 0'),
        (dict(num_reps=0), 'num_reps must be a positive integer, got 0'),
        (dict(num_reps=1.5), 'num_reps must be a positive integer, got 1.5'),
        (dict(width_factor=0), 'width_factor must be positive, got 0'),
        (dict(width_factor=0.3), 'leave 2 channels to a stage, which needs at least 4'),
        (dict(drop_path_rate=1.0), r'drop_path_rate must lie in \[0, 1\), got 1.0'),
        (dict(out_indices=(0, 4)), 'out_indices must name stages 0 to 3'),
        (dict(norm_cfg=dict(type='GN', num_groups=2)), "norm_cfg type 'GN' is no batch norm"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ShiftWise(**{**SMALL, **change})


class TestTables:
    @BOTH
    def test_are_in_the_state_dict_and_drive_the_computation(self, version):
        model = random_(ShiftWise(**SMALL, version=version)).double()
        x = images(dtype=torch.float64)
        before = outputs(model, x)
        state = copy.deepcopy(model.state_dict())
        g = torch.Generator().manual_seed(0)
        for name, table in state.items():
            if name.endswith('.shifts'):  # filters change their places
                rows = table.view(-1, table.shape[0] // len(state[name[:-6] + 'picks']), 8)
                rows.copy_(rows[:, torch.randperm(rows.shape[1], generator=g)])
            elif name.endswith('.rep'):
                table.copy_(table.flip(0))
        model.load_state_dict(state)
        after = outputs(model, x)
        assert (after[0] - before[0]).abs().max() > 0.01
        fresh = ShiftWise(**SMALL, version=version).double()
        fresh.load_state_dict(state)
        for a, b in zip(outputs(fresh, x), after, strict=True):
            assert torch.equal(a, b)
        assert_close(outputs(switch_to_deploy(fresh), x), after, 1e-9)

    def test_cannot_go_to_official_checkpoints_unless_they_are_the_official_ones(self):
        state = ShiftWise(**SMALL).state_dict()
        assert not any(key.endswith(TABLES) for key in to_official(state))
        for name in ('shifts', 'picks', 'rep'):
            changed = copy.deepcopy(state)
            table = changed[f'stages.1.0.large_kernel.{name}']
            table.copy_(table.flip(0))
            with pytest.raises(CheckpointError, match=r'The index tables stages\.1\.0\.large_k'):
                to_official(changed)

    @pytest.mark.parametrize(
        'table, value', [('shifts', 1), ('shifts', 99), ('picks', 77), ('rep', 500), ('ghost', -1)]
    )
    def test_wrong_ones_are_refused_before_anything_is_loaded(self, table, value):
        model = ShiftWise(**SMALL)
        state = copy.deepcopy(random_(ShiftWise(**SMALL)).state_dict())
        state[f'stages.2.1.large_kernel.{table}'].view(-1)[0] += value
        before = copy.deepcopy(model.state_dict())
        for load in (model.load_state_dict, lambda s: load_pretrained(model, s)):
            with pytest.raises(CheckpointMismatch, match=r'stages\.2\.1\.large_kernel\.\*'):
                load(state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_survive_the_meta_device(self):
        with torch.device('meta'):
            model = ShiftWise(**SMALL)
        assert all(v.is_meta for v in model.state_dict().values())
        official = to_official(random_(ShiftWise(**SMALL)).state_dict())
        model.to_empty(device='cpu').load_state_dict(official)
        again = ShiftWise(**SMALL)
        again.load_state_dict(official)
        for a, b in zip(outputs(model, images()), outputs(again, images()), strict=True):
            assert torch.equal(a, b)

    def test_of_one_block_missing(self):
        model = ShiftWise(**SMALL)
        state = model.state_dict()
        del state['stages.1.0.large_kernel.picks']
        with pytest.raises(CheckpointMismatch, match=r'1 missing .*large_kernel\.picks'):
            load_pretrained(model, state)


class TestLoading:
    @BOTH
    def test_official_checkpoint(self, version):
        source = random_(ShiftWise(**SMALL, version=version))
        official = {'model': to_official(source.state_dict())}
        model = ShiftWise(**SMALL, version=version)
        report = load_pretrained(model, official)
        assert report.format == 'shiftwise' and not report.missing
        assert f'ShiftWise version {version}' in report.variant
        assert report.remarks == ['the index tables of 5 blocks were generated: official checkpoints have none']
        assert 'fitted        the index tables' in str(report)
        assert not report.newly_initialized
        for a, b in zip(outputs(model, images()), outputs(source, images()), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        'whose, num_paths, remark',
        [
            ('LoRA', 1, None),
            ('LoRA', 3, 'single filter path .* first of 3; the others are zero'),
            ('LoRAs', 1, '2 filter paths of the checkpoint were summed into one'),
        ],
    )
    def test_other_numbers_of_paths(self, whose, num_paths, remark):
        source = random_(ShiftWise(**SMALL)).double()
        official = to_official(source.state_dict(), whose)
        model = ShiftWise(**SMALL, num_paths=num_paths).double()
        want = outputs(source, images(dtype=torch.float64))
        report = load_pretrained(model, official)
        assert len(report.remarks) == (1 if remark is None else 2)
        if remark:
            assert re.search(remark, str(report))
        assert_close(outputs(model, images(dtype=torch.float64)), want, 1e-12)
        weights = [p.weight for p in model.stages[0][0].large_kernel.filters]
        assert len(weights) == num_paths and not any(w.any() for w in weights[1:])
        other = ShiftWise(**SMALL, num_paths=num_paths).double()
        other.load_state_dict(official)  # the framework's own way
        assert_close(outputs(other, images(dtype=torch.float64)), want, 1e-12)

    @pytest.mark.parametrize(
        'change, message',
        [
            (dict(num_paths=3), 'trained with num_paths=2, the model has 3; set num_paths'),
            (dict(ghost_ratio=0.5), 'another number of ghost channels: .* set ghost_ratio'),
            (dict(kernel_sizes=(13, 11, 8, 13)), 'checkpoint has 15/12/9/9 taps, the model 15/12/9/15'),
            (dict(small_kernel=5), 'set small_kernel'),
            (dict(version=1), 'is of version 2 of ShiftWise and the model of version 1; set version=2'),
            (dict(branch_norm=False), 'set branch_norm=True'),
            (dict(arch=dict(depths=(1, 1, 3, 1), dims=(8, 12, 16, 20))), 'set arch'),
        ],
    )
    def test_mismatch_names_the_argument(self, change, message):
        official = to_official(ShiftWise(**SMALL).state_dict())
        model = ShiftWise(**{**SMALL, **change})
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointMismatch, match=message):
            load_pretrained(model, official)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_other_families_are_named(self):
        slak = SLaK(**{**SMALL, 'kernel_sizes': (13, 11, 9, 7)}, small_kernel=3, width_factor=1.0)
        shiftwise = ShiftWise(**SMALL, version=1)
        for weights in (to_official(slak.state_dict()), slak.state_dict()):
            with pytest.raises(CheckpointMismatch, match='SLaK weights and the model is ShiftWise'):
                load_pretrained(shiftwise, weights)
        for weights in (to_official(shiftwise.state_dict()), shiftwise.state_dict()):
            with pytest.raises(CheckpointMismatch, match='ShiftWise weights and the model is SLaK'):
                load_pretrained(slak, weights)

    @BOTH
    def test_deployed_and_training_form_are_told_apart(self, version):
        training = random_(ShiftWise(**SMALL, version=version))
        deployed = switch_to_deploy(copy.deepcopy(training))
        assert describe(deployed.state_dict()).deploy
        assert describe(deployed.state_dict()).dims == (8, 12, 16, 20)
        with pytest.raises(CheckpointMismatch, match='folded for deployment'):
            load_pretrained(ShiftWise(**SMALL, version=version), deployed.state_dict())
        with pytest.raises(CheckpointMismatch, match='already folded for deployment'):
            load_pretrained(deployed, training.state_dict())
        again = ShiftWise(**SMALL, version=version, deploy=True)
        assert load_pretrained(again, deployed.state_dict()).format == 'ours-deployed'
        for a, b in zip(outputs(again, images()), outputs(deployed, images()), strict=True):
            assert torch.equal(a, b)
        with pytest.raises(CheckpointError, match='no place for .* training form'):
            to_official(deployed.state_dict())

    def test_converted_checkpoint(self):
        source = ShiftWise(**SMALL)
        whole = {'state_dict': {f'backbone.{k}': v for k, v in source.state_dict().items()}}
        for to, path in (('official', 'LoRAs.1.weight'), ('LoRA', 'LoRA.weight')):
            weights = convert_checkpoint(whole, to)['state_dict']
            assert f'backbone.stages.0.0.large_kernel.{path}' in weights
            assert not any(key.endswith(TABLES) for key in weights)
            back = convert_checkpoint({'state_dict': weights}, 'ours')['state_dict']
            assert 'backbone.stages.0.0.large_kernel.filters.0.weight' in back
            load_pretrained(ShiftWise(**SMALL), back)

    def test_moving_average_of_the_framework(self):
        """mmengine's EMA hook stores a second copy of the weights; it is completed as well."""
        pytest.importorskip('mmseg')
        from slak_mm.checkpoints import prepare_checkpoint

        model = ShiftWise(**SMALL)
        official = to_official(random_(ShiftWise(**SMALL)).state_dict())
        checkpoint = {'state_dict': official, 'ema_state_dict': {'module.' + k: v for k, v in official.items()}}
        prepare_checkpoint(model, checkpoint)
        model.load_state_dict(checkpoint['state_dict'])
        assert {k.removeprefix('module.') for k in checkpoint['ema_state_dict']} == set(model.state_dict())

    def test_whole_segmentor(self):
        pytest.importorskip('mmseg')
        init_default_scope('mmseg')
        cfg = dict(
            type='EncoderDecoder',
            backbone=dict(type='ShiftWise', **SMALL),
            decode_head=dict(
                type='FCNHead',
                in_channels=20,
                in_index=3,
                channels=4,
                num_convs=1,
                num_classes=3,
                norm_cfg=dict(type='BN'),
            ),
        )
        source, model, third = (MODELS.build(cfg) for _ in range(3))
        random_(source)
        assert not load_pretrained(model, {'state_dict': source.state_dict()}).newly_initialized
        report = load_pretrained(third, to_official(source.backbone.state_dict()))
        assert all(key.startswith('decode_head.') for key in report.newly_initialized)
        for other in (model, third):
            for a, b in zip(outputs(other.backbone, images()), outputs(source.backbone, images()), strict=True):
                assert torch.equal(a, b)


def test_tables_are_small():
    """What the state dict gains over the official one: less than 3% of the weights."""
    with torch.device('meta'):
        model = ShiftWise('tiny')
    tables = sum(
        t.numel() * t.element_size()
        for m in model.modules()
        if isinstance(m, ShiftWiseConv)
        for t in m.buffers(recurse=False)
    )
    assert tables < 0.03 * sum(p.numel() * 4 for p in model.parameters())
