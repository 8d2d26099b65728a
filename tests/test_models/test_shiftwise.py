"""ShiftWise's tables and loading; what it has in common with SLaK is in test_backbones.py."""

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


def test_paths_have_equal_gradients():
    model = random_(ShiftWise(**SMALL, num_paths=3)).train()
    sum(o.square().mean() for o in model(images())).backward()
    first, *others = model.stages[0][0].large_kernel.filters
    assert first.weight.grad.abs().max() > 0
    for path in others:
        assert torch.equal(path.weight.grad, first.weight.grad)


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
        head = dict(type='FCNHead', num_convs=1, norm_cfg=dict(type='BN'))
        cfg = dict(
            type='EncoderDecoder',
            backbone=dict(type='ShiftWise', **SMALL),
            decode_head=dict(head, in_channels=20, in_index=3, channels=4, num_classes=3),
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
