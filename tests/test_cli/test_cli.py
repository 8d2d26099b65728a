import argparse
import errno
import re

import pytest
import torch
from mmengine.config import Config, ConfigDict

from slak_mm import cli
from slak_mm.cli import ConfigOverrideError
from slak_mm.engine import DataError


@pytest.mark.parametrize(
    'text,size', [('128', (128, 128)), ('96x160', (96, 160)), ('96,160', (96, 160)), ('96X160', (96, 160))]
)
def test_crop_size(text, size):
    assert cli.crop_size(text) == size


@pytest.mark.parametrize('text', ['', '0', '-3', 'x', '1x2x3', '12.5'])
def test_crop_size_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError):
        cli.crop_size(text)


@pytest.mark.parametrize(
    'text,size', [('400', (0, 400)), ('667x400', (667, 400)), ('400,667', (667, 400)), ('64X64', (64, 64))]
)
def test_img_scale(text, size):
    assert cli.img_scale(text) == size


@pytest.mark.parametrize('text', ['', '0', '400x0', 'x', '1x2x3', '12.5'])
def test_img_scale_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match='667x400'):
        cli.img_scale(text)


@pytest.mark.parametrize(
    'error,message',
    [
        (ConfigOverrideError('so and so'), 'so and so'),
        (torch.cuda.OutOfMemoryError('CUDA out of memory. Tried'), 'lower --batch-size'),
        (ValueError('Expected more than 1 value per channel when training'), 'raise --batch-size'),
        (OSError(errno.ENOSPC, 'No space left on device', 'x.pth'), 'No space left.*x.pth'),
        (AssertionError('failed to load image: a.jpg'), 'The image a.jpg cannot be read'),
        (
            DataError('Caught DataError\n  a line of source\nslak_mm.DataError: a.jpg is empty.\n'),
            '^error: a.jpg is empty.$',
        ),
    ],
)
def test_errors_of_the_user_are_sentences(monkeypatch, capsys, error, message):
    monkeypatch.delenv('SLAK_MM_DEBUG', raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as exit_info:
        cli.run_tool(main)
    err = capsys.readouterr().err
    assert exit_info.value.code == 1 and err.startswith('error: ') and 'Traceback' not in err
    assert re.search(message, err)


@pytest.mark.parametrize('error,said', [(DataError('a.jpg is empty.'), True), (ConfigOverrideError('so'), False)])
def test_each_process_speaks_of_its_own_data(monkeypatch, capsys, error, said):
    monkeypatch.setattr('slak_mm.cli.run.get_rank', lambda: 1)

    def main():
        raise error

    with pytest.raises(SystemExit):
        cli.run_tool(main)
    assert (str(error) in capsys.readouterr().err) == said


def test_defects_keep_their_traceback():
    def main():
        raise ZeroDivisionError('a defect')

    with pytest.raises(ZeroDivisionError):
        cli.run_tool(main)


def test_interrupt(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        cli.run_tool(main)
    assert exit_info.value.code == 130 and 'interrupted' in capsys.readouterr().err


def test_options_come_last(config_path):
    """An interval given by hand is not scaled by --max-iters."""
    parser = argparse.ArgumentParser()
    cli.add_config_arguments(parser)
    cli.add_override_arguments(parser, training=True)
    args = parser.parse_args([config_path, '--max-iters', '100', '--cfg-options', 'train_cfg.val_interval=7'])
    cfg = cli.load_config(args.config)
    cli.apply_overrides(cfg, args)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (100, 7)
    assert cfg.work_dir == './work_dirs/upernet_slak_t_ade20k'


def test_configs_that_cannot_be_read(tmp_path):
    broken = tmp_path / 'broken.py'
    broken.write_text('model = dict(')
    with pytest.raises(ConfigOverrideError, match='broken.py cannot be read'):
        cli.load_config(str(broken))
    broken.write_text('a = 1')
    with pytest.raises(ConfigOverrideError, match='describes no model'):
        cli.load_config(str(broken))
    broken.write_text("model = dict(type='X')\ndefault_scope = 'mmnothing'")
    with pytest.raises(ConfigOverrideError, match='"mmnothing", which is not installed'):
        cli.load_config(str(broken))
    broken.write_text("_base_ = './nothing.py'")
    with pytest.raises(ConfigOverrideError, match='nothing.py'):
        cli.load_config(str(broken))


def test_resume_takes_the_seed_and_drops_the_weights(tmp_path):
    path = tmp_path / 'iter_3.pth'
    torch.save(dict(meta=dict(iter=3, seed=11), state_dict={}, optimizer={}, message_hub={}), path)
    cfg = Config(
        dict(
            work_dir=str(tmp_path),
            randomness=dict(seed=5, deterministic=True),
            model=dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='x'))),
        )
    )
    assert cli.prepare_resume(cfg, str(path)) == str(path)
    assert cfg.randomness == ConfigDict(seed=11, deterministic=True)
    assert cfg.resume is True and cfg.load_from == str(path)
    assert cfg.model.backbone.init_cfg is None


def test_torchrun_without_launcher_is_refused(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('LOCAL_RANK', '0')
    cfg = Config(dict(model=dict(type='X')))
    with pytest.raises(ConfigOverrideError, match='--launcher pytorch'):
        cli.init_distributed(cfg, argparse.Namespace(launcher='none', local_rank=0))
