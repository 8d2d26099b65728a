"""``tools/train.py`` with sparsity: ``--sparse``, ``--sparsity``, the configs, interruptions."""

import re
import signal
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from slak_mm import cli
from slak_mm.cli import ConfigOverrideError
from slak_mm.engine.sparsity_hook import saved_masks

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


@pytest.fixture
def small(demo_data):
    """Arguments for some hundredths of a second per iteration."""
    return ['--data-root', demo_data, '--crop-size', '64', '--batch-size', '2', '--num-workers', '0', '--seed', '5']


def load(path):
    return torch.load(path, map_location='cpu', weights_only=False)


def hooks_of(cfg):
    return [hook.to_dict() for hook in cfg.get('custom_hooks') or [] if hook.type == 'SparsityHook']


def read(name):
    return Config.fromfile(str(CONFIGS / name))


# -------------------------------------------------------------------------------- configs, options


@pytest.mark.parametrize('name', sorted(path.name for path in CONFIGS.glob('upernet_*.py')))
def test_sparsity_of_the_official_recipes(name):
    hooks = hooks_of(read(name))
    if 'convnext' in name or '80k' in name:
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
        assert hooks_of(cfg) == [
            dict(
                type='SparsityHook',
                preset=choice,
                distribution='from_weights',
                from_scratch=dict(distribution='snip', sparsity=sparsity),
            )
        ]
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


@pytest.mark.parametrize('arguments', [['--sparse', 'half'], ['--sparsity', '1'], ['--sparsity', '0.']])
def test_wrong_arguments_get_the_usage(call_tool, config_path, arguments):
    result = call_tool('train', config_path, *arguments)
    assert result.code == 2 and 'usage:' in result.err


# -------------------------------------------------------------------------------------------- runs


def density(state_dict):
    weights = [value for key, value in state_dict.items() if key.startswith('backbone.') and value.dim() in (2, 4)]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def test_from_scratch_as_the_config_says(call_tool, config_path, small, tiny, tmp_path):
    common = [config_path, *small, '--from-scratch', '--max-iters', '2']
    result = call_tool('train', *common, '--work-dir', tmp_path / 'sparse', '--cfg-options', *tiny)
    assert result.code == 0, result.text
    checkpoint = load(tmp_path / 'sparse' / 'iter_2.pth')
    assert density(checkpoint['state_dict']) == pytest.approx(0.6, abs=0.002)
    assert re.search(r'Sparse training begins \(static\): (59.9|60.0)', result.text)
    # What the log names is what is in the file.
    table = dict(re.findall(r'^(backbone\S+) +[\dx]+ +([\d,]+) ', result.text, re.M))
    for name, active in table.items():
        assert int(checkpoint['state_dict'][name].count_nonzero()) == int(active.replace(',', ''))
    assert len(table) == 4 + 4 * 5

    result = call_tool('train', *common, '--sparse', 'off', '--work-dir', tmp_path / 'dense', '--cfg-options', *tiny)
    assert result.code == 0 and 'Sparse training' not in result.text
    checkpoint = load(tmp_path / 'dense' / 'iter_2.pth')
    assert 'sparsity' not in checkpoint and density(checkpoint['state_dict']) > 0.999


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A dense and a sparse backbone, as ImageNet training would leave them."""
    folder = tmp_path_factory.mktemp('pretrained')
    torch.manual_seed(3)
    backbone = MODELS.build(
        dict(
            type='SLaK',
            arch=dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
            width_factor=1.0,
            kernel_sizes=(7, 7, 7, 7),
            small_kernel=3,
            norm_cfg=dict(type='BN'),
            out_norm=False,
        )
    )
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.save(dict(model=state), folder / 'dense.pth')
    for value in state.values():
        if value.dim() in (2, 4):
            value.mul_(torch.rand(value.shape) < 0.6)
    torch.save(dict(model=state), folder / 'sparse.pth')
    return folder


def test_pretrained_zeros_stay(call_tool, config_path, small, tiny, tmp_path, pretrained):
    common = [config_path, *small, '--max-iters', '2', '--work-dir', tmp_path / 'w']
    options = ['--cfg-options', *tiny, 'model.backbone.init_cfg.checkpoint=']
    sparse, dense = (options[:-1] + [options[-1] + str(pretrained / name)] for name in ('sparse.pth', 'dense.pth'))
    result = call_tool('train', *common, *sparse)
    assert result.code == 0, result.text
    before = load(pretrained / 'sparse.pth')['model']
    after = load(tmp_path / 'w' / 'iter_2.pth')['state_dict']
    changed = 0
    for key, value in before.items():
        if value.dim() in (2, 4):
            assert torch.equal(after[f'backbone.{key}'] != 0, value != 0), key
            changed += int((after[f'backbone.{key}'] != value).sum())
    assert changed > 1000

    result = call_tool('train', *common, *dense)
    assert result.code == 1 and re.search('error: .*dense network.*--sparse off', result.err)
    assert 'Traceback' not in result.err
    result = call_tool('train', *common, '--sparsity', '0.5', '--sparse', 'set', *dense)
    assert result.code == 0, result.text
    state = load(tmp_path / 'w' / 'iter_2.pth')['state_dict']
    assert density(state) == pytest.approx(0.5, abs=0.002)


def test_shiftwise_prunes_whole_filters(call_tool, small, tiny, tmp_path):
    options = [option for option in tiny if 'width_factor' not in option]
    result = call_tool(
        'train',
        CONFIGS / 'upernet_shiftwise_t_ade20k_dynamic.py',
        *small,
        '--from-scratch',
        '--max-iters',
        '4',
        '--work-dir',
        tmp_path / 'w',
        '--cfg-options',
        *options,
        'custom_hooks.0.update_interval=2',
    )
    assert result.code == 0, result.text
    checkpoint = load(tmp_path / 'w' / 'iter_4.pth')
    assert checkpoint['sparsity']['updates'] == 1
    masks = saved_masks(checkpoint)
    filters = {
        key: value.flatten(1)
        for key, value in checkpoint['state_dict'].items()
        if re.search(r'filters\.\d\.weight$', key)
    }
    assert len(filters) == 4 * 2 and masks.keys() == filters.keys()
    kept = {key: mask.flatten() for key, mask in masks.items()}
    # A filter is there or not, with all of its taps.
    assert all(len(kept[key]) == len(weight) for key, weight in filters.items())
    assert not any(weight[~kept[key]].any() for key, weight in filters.items())
    share = sum(int(mask.sum()) for mask in kept.values()) / sum(map(len, kept.values()))
    assert share == pytest.approx(0.7, abs=0.02)


def test_any_framework(call_tool, coco_data, tmp_path):
    """A detector of mmdet's with its own backbone."""
    pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")
    import mmdet

    config = Path(mmdet.__file__).parent / '.mim/configs/retinanet/retinanet_r18_fpn_1x_coco.py'
    result = call_tool(
        'train',
        config,
        '--data-root',
        coco_data,
        '--num-workers',
        '0',
        '--work-dir',
        tmp_path / 'w',
        '--from-scratch',
        '--sparse',
        'set',
        '--sparsity',
        '0.8',
        '--max-iters',
        '2',
        '--batch-size',
        '2',
        '--seed',
        '1',
        '--cfg-options',
        'train_dataloader.dataset.pipeline.2.scale=(96,64)',
        'val_dataloader=None',
        'val_cfg=None',
        'val_evaluator=None',
    )
    assert result.code == 0, result.text
    masks = load(tmp_path / 'w' / 'iter_2.pth')['sparsity']['masks']
    assert masks and all(name.startswith('backbone.') for name in masks)


# ------------------------------------------------------------------------------------------- resume

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


def assert_same(ours, theirs, place=''):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours:
            assert_same(ours[key], theirs[key], f'{place}.{key}')
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), place
        for index, pair in enumerate(zip(ours, theirs)):
            assert_same(*pair, f'{place}[{index}]')
    elif torch.is_tensor(ours):
        assert torch.equal(ours, theirs), place
    else:
        assert ours == theirs, place


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
        assert result.code == 1 and message in result.err and 'Traceback' not in result.err
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


def test_dense_run_is_not_resumed_sparsely(call_tool, config_path, small, tiny, tmp_path):
    common = [config_path, *small, '--work-dir', tmp_path / 'w']
    result = call_tool(
        'train', *common, '--from-scratch', '--sparse', 'off', '--max-iters', '1', '--cfg-options', *tiny
    )
    assert result.code == 0, result.text
    result = call_tool('train', *common, '--resume', '--max-iters', '2', '--cfg-options', *tiny)
    assert result.code == 1 and re.search('error: .*trained densely.*--sparse off', result.err)
