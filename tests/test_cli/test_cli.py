import argparse
import errno
import re

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from slak_mm import cli
from slak_mm.cli import ConfigOverrideError
from slak_mm.engine import DataError


@pytest.mark.parametrize(
    'kind, text, size',
    [
        *((cli.crop_size, text, (96, 160)) for text in ('96x160', '96,160', '96X160')),
        (cli.crop_size, '128', (128, 128)),
        (cli.img_scale, '400', (0, 400)),
        *((cli.img_scale, text, (667, 400)) for text in ('667x400', '400,667')),
        (cli.img_scale, '64X64', (64, 64)),
    ],
)
def test_sizes(kind, text, size):
    assert kind(text) == size


@pytest.mark.parametrize('text', ['', '0', '-3', '400x0', 'x', '1x2x3', '12.5'])
def test_wrong_sizes(text):
    for kind, message in ((cli.crop_size, '128x192|at least 1'), (cli.img_scale, '667x400')):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            kind(text)


def fail(error):
    """The exit code of a tool that raises."""

    def main():
        raise error

    with pytest.raises(SystemExit) as leaving:
        cli.run_tool(main)
    return leaving.value.code


@pytest.mark.parametrize(
    'error,message',
    [
        (ConfigOverrideError('so and so'), 'so and so'),
        (torch.cuda.OutOfMemoryError('CUDA out of memory. Tried'), 'lower --batch-size'),
        (ValueError('Expected more than 1 value per channel when training'), 'raise --batch-size'),
        (OSError(errno.ENOSPC, 'No space left on device', 'x.pth'), 'No space left.*x.pth'),
        (AssertionError('failed to load image: a.jpg'), 'The image a.jpg cannot be read'),
        (DataError('Caught DataError\n  a line\nslak_mm.DataError: a.jpg is empty.\n'), '^error: a.jpg is empty.$'),
    ],
)
def test_errors_of_the_user_are_sentences(monkeypatch, capsys, error, message):
    monkeypatch.delenv('SLAK_MM_DEBUG', raising=False)
    assert fail(error) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: ') and 'Traceback' not in err and re.search(message, err)


@pytest.mark.parametrize('error,said', [(DataError('a.jpg is empty.'), True), (ConfigOverrideError('so'), False)])
def test_each_process_speaks_of_its_own_data(monkeypatch, capsys, error, said):
    monkeypatch.setattr('slak_mm.cli.run.get_rank', lambda: 1)
    fail(error)
    assert (str(error) in capsys.readouterr().err) == said


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError('a defect'))


def test_interrupt(capsys):
    assert fail(KeyboardInterrupt()) == 130 and 'interrupted' in capsys.readouterr().err


def overridden(config_path, *words):
    parser = argparse.ArgumentParser()
    cli.add_config_arguments(parser)
    cli.add_override_arguments(parser, training=True)
    args = parser.parse_args([config_path, *words])
    cfg = cli.load_config(args.config)
    cli.apply_overrides(cfg, args)
    return cfg


def test_options_come_last(config_path):
    """An interval given by hand is not scaled by --max-iters."""
    cfg = overridden(config_path, '--max-iters', '100', '--cfg-options', 'train_cfg.val_interval=7')
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (100, 7)
    assert cfg.work_dir == './work_dirs/upernet_slak_t_ade20k'


def test_compile_is_mmengines(config_path, monkeypatch):
    assert overridden(config_path, '--compile').compile is True and 'compile' not in overridden(config_path)
    cfg = Config(dict(compile=dict(backend='eager')))
    cli.set_compile(cfg)
    assert cfg.compile == dict(backend='eager')
    monkeypatch.delattr(Runner, '_maybe_compile')
    with pytest.raises(ConfigOverrideError, match='--compile needs mmengine'):
        cli.set_compile(cfg)
    monkeypatch.delattr(torch, 'compile')
    with pytest.raises(ConfigOverrideError, match='--compile needs PyTorch 2.0'):
        cli.set_compile(cfg)


@pytest.mark.parametrize(
    'text, message',
    [
        ('model = dict(', 'broken.py cannot be read'),
        ('a = 1', 'describes no model'),
        ("model = dict(type='X')\ndefault_scope = 'mmnothing'", '"mmnothing", which is not installed'),
        ("_base_ = './nothing.py'", 'nothing.py'),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / 'broken.py').write_text(text)
    with pytest.raises(ConfigOverrideError, match=message):
        cli.load_config(str(tmp_path / 'broken.py'))


def test_resume_takes_the_seed_and_drops_the_weights(tmp_path):
    path = tmp_path / 'iter_3.pth'
    torch.save(dict(meta=dict(iter=3, seed=11), state_dict={}, optimizer={}, message_hub={}), path)
    model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='x')))
    cfg = Config(dict(work_dir=str(tmp_path), randomness=dict(seed=5, deterministic=True), model=model))
    assert cli.prepare_resume(cfg, str(path)) == str(path)
    assert cfg.randomness == ConfigDict(seed=11, deterministic=True)
    assert cfg.resume is True and cfg.load_from == str(path)
    assert cfg.model.backbone.init_cfg is None


def test_torchrun_without_launcher_is_refused(monkeypatch):
    for name, value in dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0').items():
        monkeypatch.setenv(name, value)
    cfg = Config(dict(model=dict(type='X')))
    with pytest.raises(ConfigOverrideError, match='--launcher pytorch'):
        cli.init_distributed(cfg, argparse.Namespace(launcher='none', local_rank=0))
