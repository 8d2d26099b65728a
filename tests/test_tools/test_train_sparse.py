"""``tools/train.py`` with sparsity: ``--sparse``, ``--sparsity``, the configs, interruptions."""

import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY_SLAK_BACKBONE, assert_same, load
from mmengine.config import Config
from mmengine.registry import MODELS

from slak_mm import cli
from slak_mm.cli import ConfigOverrideError
from slak_mm.engine.sparsity_hook import saved_masks

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


def hooks_of(cfg):
    return [hook.to_dict() for hook in cfg.get('custom_hooks') or [] if hook.type == 'SparsityHook']


def read(name):
    return Config.fromfile(str(CONFIGS / name))


@pytest.mark.parametrize('name', sorted(path.name for path in CONFIGS.glob('upernet_*.py')))
def test_sparsity_of_the_official_recipes(name):
    hooks = hooks_of(read(name))
    if 'convnext' in name or 'replknet' in name or '80k' in name:
        assert not hooks
        return
    (hook,) = hooks
    assert hook['mode'] == ('rigl' if 'dynamic' in name else 'static')
    assert hook['distribution'] == 'from_weights'
    assert hook['from_scratch']['sparsity'] == (0.3 if 'shiftwise' in name else 0.4)


@pytest.mark.parametrize('name', ['upernet_slak_t_ade20k.py', 'upernet_convnext_t_ade20k.py'])
def test_sparse_changes_the_hook(name):
    cfg = read(name)
    other = dict(type='EMAHook')
    cfg.custom_hooks = [*cfg.custom_hooks, other]
    for choice in ('set', 'rigl', 'momentum', 'static'):
        cli.set_sparse(cfg, choice)
        (hook,) = hooks_of(cfg)
        assert (hook['mode'], hook['distribution']) == (choice, 'from_weights')
        assert hook['from_scratch']['sparsity'] == 0.4
    for choice, sparsity in (('slak_t', 0.4), ('slak_b', 0.4), ('shiftwise', 0.3)):
        cli.set_sparse(cfg, choice)
        drawn = dict(distribution='snip', sparsity=sparsity)
        expected = dict(type='SparsityHook', preset=choice, distribution='from_weights', from_scratch=drawn)
        assert hooks_of(cfg) == [expected]
    cli.set_sparse(cfg, 'off')
    assert cfg.custom_hooks == [other]
    with pytest.raises(ConfigOverrideError, match='add one with --sparse'):
        cli.set_sparsity(cfg, 0.5)


def test_masks_from_scratch():
    cfg = read('upernet_slak_t_ade20k.py')
    before = hooks_of(cfg)[0]
    cli.masks_from_scratch(cfg)
    expected = {key: value for key, value in before.items() if key != 'from_scratch'}
    assert hooks_of(cfg) == [dict(expected, **before['from_scratch'])]
    # There is nothing left to replace, and masks are not taken from weights any more.
    cli.masks_from_scratch(cfg)
    cfg.custom_hooks = [dict(type='SparsityHook')]
    with pytest.raises(ConfigOverrideError, match='--sparse off'):
        cli.masks_from_scratch(cfg)
    cli.set_sparsity(cfg, 0.7)
    assert hooks_of(cfg) == [dict(type='SparsityHook', distribution='erk', sparsity=0.7)]


def density(state_dict):
    weights = [value for key, value in state_dict.items() if key.startswith('backbone.') and value.dim() in (2, 4)]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def test_from_scratch_as_the_config_says(train, tmp_path):
    result = train('--from-scratch --max-iters 2', code=0)
    checkpoint = load(tmp_path / 'work' / 'iter_2.pth')
    assert density(checkpoint['state_dict']) == pytest.approx(0.6, abs=0.002)
    assert re.search(r'Sparse training begins \(static\): (59.9|60.0)', result.text)
    # What the log names is what is in the file.
    table = dict(re.findall(r'^(backbone\S+) +[\dx]+ +([\d,]+) ', result.text, re.M))
    for name, active in table.items():
        assert int(checkpoint['state_dict'][name].count_nonzero()) == int(active.replace(',', ''))
    assert len(table) == 4 + 4 * 5

    result = train('--from-scratch --max-iters 2 --sparse off', work='dense', code=0)
    assert 'Sparse training' not in result.text
    checkpoint = load(tmp_path / 'dense' / 'iter_2.pth')
    assert 'sparsity' not in checkpoint and density(checkpoint['state_dict']) > 0.999


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A dense and a sparse backbone, as ImageNet training would leave them."""
    folder = tmp_path_factory.mktemp('pretrained')
    torch.manual_seed(3)
    backbone = MODELS.build(TINY_SLAK_BACKBONE)
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.save(dict(model=state), folder / 'dense.pth')
    for value in state.values():
        if value.dim() in (2, 4):
            value.mul_(torch.rand(value.shape) < 0.6)
    torch.save(dict(model=state), folder / 'sparse.pth')
    return folder


def test_pretrained_zeros_stay(train, tmp_path, pretrained):
    sparse, dense = ([f'model.backbone.init_cfg.checkpoint={pretrained / name}.pth'] for name in ('sparse', 'dense'))
    train('--max-iters 2', options=sparse, code=0)
    before = load(pretrained / 'sparse.pth')['model']
    after = load(tmp_path / 'work' / 'iter_2.pth')['state_dict']
    changed = 0
    for key, value in before.items():
        if value.dim() in (2, 4):
            assert torch.equal(after[f'backbone.{key}'] != 0, value != 0), key
            changed += int((after[f'backbone.{key}'] != value).sum())
    assert changed > 1000

    result = train('--max-iters 2', options=dense, code=1)
    assert re.search('error: .*dense network.*--sparse off', result.err)
    train('--max-iters 2 --sparsity 0.5 --sparse set', options=dense, code=0)
    state = load(tmp_path / 'work' / 'iter_2.pth')['state_dict']
    assert density(state) == pytest.approx(0.5, abs=0.002)


def test_shiftwise_prunes_whole_filters(call_tool, small, tiny, tmp_path):
    options = [*(option for option in tiny if 'width_factor' not in option), 'custom_hooks.0.update_interval=2']
    config = CONFIGS / 'upernet_shiftwise_t_ade20k_dynamic.py'
    common = [*small, '--from-scratch --max-iters 4', '--work-dir', tmp_path / 'w', '--cfg-options']
    call_tool('train', config, *common, *options, code=0)
    checkpoint = load(tmp_path / 'w' / 'iter_4.pth')
    assert checkpoint['sparsity']['updates'] == 1
    masks = saved_masks(checkpoint)
    weights = checkpoint['state_dict']
    filters = {key: weights[key].flatten(1) for key in weights if re.search(r'filters\.\d\.weight$', key)}
    assert len(filters) == 4 * 2 and masks.keys() == filters.keys()
    kept = {key: mask.flatten() for key, mask in masks.items()}
    # A filter is there or not, with all of its taps.
    assert all(len(kept[key]) == len(weight) for key, weight in filters.items())
    assert not any(weight[~kept[key]].any() for key, weight in filters.items())
    share = sum(int(mask.sum()) for mask in kept.values()) / sum(map(len, kept.values()))
    assert share == pytest.approx(0.7, abs=0.02)


def test_any_framework(call_tool, demo_coco, tmp_path):
    """A detector of mmdet's with its own backbone."""
    pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")
    import mmdet

    config = Path(mmdet.__file__).parent / '.mim/configs/retinanet/retinanet_r18_fpn_1x_coco.py'
    how = '--num-workers 0 --from-scratch --sparse set --sparsity 0.8 --max-iters 2 --batch-size 2 --seed 1'
    options = ['train_dataloader.dataset.pipeline.2.scale=(96,64)', 'val_cfg=None', 'val_evaluator=None']
    common = ['--data-root', demo_coco, '--work-dir', tmp_path / 'w', how, '--cfg-options', 'val_dataloader=None']
    call_tool('train', config, *common, *options, code=0)
    masks = load(tmp_path / 'w' / 'iter_2.pth')['sparsity']['masks']
    assert masks and all(name.startswith('backbone.') for name in masks)


KILLER = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == int(os.environ['KILL_AT']):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_at_a_step_and_resumed(start_tool, call_tool, config_path, small, tiny, tmp_path, monkeypatch):
    (tmp_path / 'killer.py').write_text(KILLER)
    config = tmp_path / 'dynamic.py'
    config.write_text(f"""
_base_ = {config_path!r}
custom_imports = dict(imports=['slak_mm', 'killer'], allow_failed_imports=False)
custom_hooks = [
    dict(type='KillHook'), dict(type='EMAHook', momentum=0.1, update_buffers=True),
    dict(type='SparsityHook', mode='rigl', distribution='from_weights', update_interval=2,
         from_scratch=dict(distribution='erk', sparsity=0.4))]
""")
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    common = [config, *small, '--max-iters', '10']
    options = ['--cfg-options', *tiny, 'default_hooks.checkpoint.interval=3', 'train_cfg.val_interval=5']
    runs = {}
    for name, step in (('whole', '0'), ('killed', '8')):
        monkeypatch.setenv('KILL_AT', step)
        runs[name] = start_tool('train', *common, '--work-dir', tmp_path / name, '--from-scratch', *options)
    outputs = {name: run.communicate(timeout=200)[0] for name, run in runs.items()}
    assert runs['whole'].returncode == 0, outputs['whole']
    assert runs['killed'].returncode == -signal.SIGKILL, outputs['killed']

    monkeypatch.setenv('KILL_AT', '0')
    # Neither forgotten nor changed.
    monkeypatch.syspath_prepend(str(tmp_path))
    for how, message in (('off', 'resume it with the --sparse that it had'), ('set', "mode 'rigl', this one 'set'")):
        result = call_tool('train', *common, '--work-dir', tmp_path / 'killed', '--resume', '--sparse', how, *options)
        assert result.code == 1 and message in result.err
    resumed = start_tool('train', *common, '--work-dir', tmp_path / 'killed', '--resume', *options)
    output, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, output
    assert 'iter: 6' in output
    whole, killed = (load(tmp_path / name / 'iter_10.pth') for name in ('whole', 'killed'))
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        assert_same(whole[key], killed[key], key)
    for sparsity in (whole['sparsity'], killed['sparsity']):
        assert sparsity['updates'] == 3
        # What the config says of the start is not part of the run.
        sparsity['settings'].pop('distribution'), sparsity['settings'].pop('sparsity')
    assert_same(whole['sparsity'], killed['sparsity'], 'sparsity')


def test_dense_run_is_not_resumed_sparsely(train):
    train('--from-scratch --sparse off --max-iters 1', code=0)
    result = train('--resume --max-iters 2', code=1)
    assert re.search('error: .*trained densely.*--sparse off', result.err)
