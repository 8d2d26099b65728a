"""Which checkpoint a run goes on from, and that it has its work dir for itself."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook

from slak_mm import cli
from slak_mm.checkpoints import CheckpointError
from slak_mm.cli import ConfigOverrideError
from slak_mm.cli.errors import explain
from slak_mm.cli.launch import make_resumable


def save(path, iteration, **parts):
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    meta = dict(iter=iteration, epoch=0, seed=3)
    torch.save(dict(state_dict={'w': torch.ones(9)}, optimizer={}, message_hub=hub, meta=meta, **parts), path)


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / 'w'
    folder.mkdir()
    for iteration in (2, 4, 10):
        save(folder / f'iter_{iteration}.pth', iteration)
    return folder


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr('slak_mm.cli.weights.print_log', lambda message, *args, **kwargs: messages.append(message))
    return messages


def config(folder, **checkpoint):
    hooks = dict(checkpoint=dict(dict(by_epoch=False), **checkpoint))
    return Config(dict(model=dict(), work_dir=str(folder), default_hooks=hooks))


def resume(folder, source='auto', **checkpoint):
    cfg = config(folder, **checkpoint)
    found = cli.prepare_resume(cfg, source)
    assert found is None or (cfg.load_from, cfg.resume, cfg.randomness.seed) == (found, True, 3)
    return found and os.path.relpath(found, folder)


@pytest.mark.parametrize(
    'pointer', [None, b'', b'\0\xff\xfe', b'/moved/away/iter_4.pth', b'iter_2.pth', b'/', b'nowhere.pth\niter_2.pth']
)
def test_the_newest_whatever_the_pointer_says(work_dir, pointer):
    if pointer is not None:
        (work_dir / 'last_checkpoint').write_bytes(pointer)
    assert resume(work_dir) == 'iter_10.pth'
    moved = work_dir.rename(work_dir.with_name('elsewhere'))
    assert resume(moved) == 'iter_10.pth'
    # In a copy no time of modification tells which is the newest.
    for path in sorted(moved.iterdir(), reverse=True):
        os.utime(path)
    assert resume(moved) == 'iter_10.pth'


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


SPOILS = {
    'cut': cut,
    'empty': lambda path: path.write_bytes(b''),
    'folder': lambda path: path.unlink() or path.mkdir(),
    'link to nothing': lambda path: path.unlink() or path.symlink_to('nowhere'),
    'weights only': lambda path: torch.save(dict(state_dict={}), path),
    'negative': lambda path: save(path, -1),
}


@pytest.mark.parametrize('spoil', SPOILS.values(), ids=SPOILS)
def test_what_does_not_read_whole_is_passed_over_by_name(work_dir, said, spoil):
    spoil(work_dir / 'iter_10.pth')
    assert resume(work_dir) == 'iter_4.pth'
    text = ''.join(said)
    assert 'goes on from' in text and 'Passed over' in text and 'iter_10.pth (' in text
    with pytest.raises((CheckpointError, ConfigOverrideError), match='iter_10.pth'):
        resume(work_dir, str(work_dir / 'iter_10.pth'))
    for name in ('iter_2.pth', 'iter_4.pth'):
        cut(work_dir / name)
    with pytest.raises(ConfigOverrideError, match='None of the checkpoints.*iter_10.pth.*iter_4.pth.*iter_2.pth'):
        resume(work_dir)


def test_names_of_this_config_come_first(work_dir, tmp_path):
    for name in ('epoch_3.pth', 'run-0004.pth', 'best_mIoU_iter_20.pth', 'iter_30.pth.part', 'x_iter_40.pth'):
        save(work_dir / name, 3)
    assert resume(work_dir) == 'iter_10.pth'
    assert resume(work_dir, by_epoch=True) == 'epoch_3.pth'
    assert resume(work_dir, filename_tmpl='run-{:04d}.pth') == 'run-0004.pth'
    os.unlink(work_dir / 'epoch_3.pth')
    assert resume(work_dir, by_epoch=True) == 'iter_10.pth'
    shutil.copytree(work_dir, tmp_path / 'out' / 'w')
    assert resume(tmp_path / 'w', out_dir=str(tmp_path / 'out')) == '../out/w/iter_10.pth'
    with pytest.raises(ConfigOverrideError, match='s3://bucket.*name one'):
        resume(work_dir, out_dir='s3://bucket/runs')


def test_an_empty_work_dir_starts_at_the_beginning(tmp_path, said):
    assert resume(tmp_path / 'new') is None and resume(tmp_path) is None
    assert 'has no checkpoint, training starts at the beginning' in ''.join(said)


def test_masks_from_scratch_are_restored(work_dir):
    cfg = config(work_dir)
    cfg.custom_hooks = [dict(type='SparsityHook', mode='set', from_scratch=dict(distribution='erk', per_filter=True))]
    save(work_dir / 'iter_12.pth', 12, sparsity=dict(settings=dict(distribution='erk')))
    cli.prepare_resume(cfg, 'auto')
    assert cfg.custom_hooks[0].to_dict() == dict(type='SparsityHook', mode='set', distribution='erk', per_filter=True)


class OwnHook(Hook):
    """A user's."""


@pytest.mark.parametrize('kind', ['CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook, OwnHook, None])
def test_mmengines_checkpoint_hook_is_replaced(monkeypatch, kind):
    said = []
    monkeypatch.setattr('slak_mm.cli.launch.print_log', lambda message, *_: said.append(message))
    cfg = Config(dict(train_cfg=dict(by_epoch=True, max_epochs=3)))
    if kind:
        cfg.default_hooks = dict(checkpoint=dict(type=kind, interval=7))
    make_resumable(cfg)
    make_resumable(cfg)
    hook = cfg.default_hooks.checkpoint
    assert hook.type == (OwnHook if kind is OwnHook else 'AtomicCheckpointHook') and hook.get('interval', 7) == 7
    assert [message.split()[0] for message in said] == ['OwnHook'] * 2 * (kind is OwnHook)
    assert cfg.train_cfg.to_dict() == dict(type='ResumableEpochLoop', max_epochs=3)


def test_no_checkpoints_on_purpose():
    cfg = Config(dict(default_hooks=dict(checkpoint=None), train_cfg=dict(by_epoch=False, max_iters=3)))
    make_resumable(cfg)
    assert cfg.default_hooks.checkpoint is None and cfg.train_cfg.to_dict() == dict(by_epoch=False, max_iters=3)


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained(code):
    said = 'Full: w/iter_2.pth. Make room there; what was saved before is intact.'
    assert explain(OSError(code, 'Full', 'w/iter_2.pth')) == said


HOLD = """
import sys, time
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from slak_mm import cli
with cli.own_work_dir(Config(dict(work_dir=sys.argv[1]))):
    print('held', flush=True)
    time.sleep(100)
"""


def test_one_training_in_a_work_dir(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path / 'w')))
    with subprocess.Popen([sys.executable, '-c', HOLD, cfg.work_dir], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(ConfigOverrideError, match=f'Another training runs in {cfg.work_dir}.*--work-dir'):
            with cli.own_work_dir(cfg):
                pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with cli.own_work_dir(cfg):
            pass
        (tmp_path / 'file').touch()
        cfg.work_dir = str(tmp_path / 'file')
        with pytest.raises(ConfigOverrideError, match='cannot be written'), cli.own_work_dir(cfg):
            pass
