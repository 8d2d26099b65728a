"""Saving that nothing cuts off, and going on exactly, in mmengine's runner on a small model."""

import copy
import errno
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import killed_run
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook
from sparse_toy import Images, Toy, make_runner

from slak_mm.checkpoints import CheckpointMismatch, read_checkpoint
from slak_mm.engine import AtomicCheckpointHook
from slak_mm.engine.checkpoint_hook import AtomicLocalBackend, checkpoint_pattern

STRICT = dict(type='StrictCheckpointHook')
POLY = dict(type='PolyLR', end=8, by_epoch=False)


def steps_in(folder, template='iter_{}.pth'):
    found = (checkpoint_pattern(template).fullmatch(path.name) for path in Path(folder).iterdir())
    return sorted(int(match['step']) for match in found if match)


def state_of(runner):
    optimizer = runner.optim_wrapper.optimizer.state_dict()['state']
    moments = {f'{i}.{key}': torch.as_tensor(v) for i, state in optimizer.items() for key, v in state.items()}
    return {key: value.detach().clone() for key, value in {**runner.model.state_dict(), **moments}.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def trained(folder, **options):
    runner = make_runner(folder, [STRICT], **options)
    runner.train()
    return state_of(runner)


# Saving


def test_killed_at_every_step_of_saving(tmp_path, monkeypatch):
    options = dict(iters=3, checkpoint_interval=1, checkpoint=dict(max_keep_ckpts=1))
    whole = trained(tmp_path / 'whole', **options)
    event = newest = 0
    # Not forked from this process, whose threads would be missing.
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(sys.path))
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['killed_run'])
    while True:
        folder = tmp_path / str(event)
        arguments = (event, torch.get_num_threads(), folder, [STRICT], options)
        child = processes.Process(target=killed_run.run, args=arguments)
        child.start()
        child.join()
        code = child.exitcode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        steps = steps_in(folder)
        for step in steps:
            assert read_checkpoint(folder / f'iter_{step}.pth')['meta']['iter'] == step
        assert max(steps, default=0) >= newest
        newest = max(steps, default=0)
        if steps:
            last = str(folder / f'iter_{newest}.pth')
            assert_same(whole, trained(folder, resume=True, load_from=last, **options))
            assert steps_in(folder)[-1] == 3 and not list(folder.glob('.*.part'))
        event += 1
    # A half-written file, two fsyncs and a rename for each of three checkpoints and pointers; two are deleted.
    assert event == 3 * (1 + 3 + 3) + 2 and steps_in(folder) == [3]


@pytest.mark.parametrize('place', ['torch.save', 'pathlib.Path.write_bytes', 'os.fsync', 'os.replace'])
def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, place):
    options = dict(checkpoint_interval=2, checkpoint=dict(max_keep_ckpts=1))
    trained(tmp_path, iters=2, **options)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(place, full)
    with pytest.raises(OSError, match='No space left') as error:
        trained(tmp_path, iters=4, resume=True, load_from=str(tmp_path / 'iter_2.pth'), **options)
    if place != 'torch.save':  # which here writes to memory
        assert error.value.filename == str(tmp_path / 'iter_4.pth')
    assert steps_in(tmp_path) == [2] and not list(tmp_path.glob('.*.part'))
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_2.pth')


class Rising(BaseMetric):
    """Better at every validation."""

    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        self.score = getattr(self, 'score', 0) + 1
        return dict(acc=self.score, other=-self.score)


@pytest.mark.parametrize('metrics', ['auto', 'toy/acc', ['toy/acc', 'toy/other']])
def test_the_best_is_deleted_after_the_better_one_is_saved(tmp_path, monkeypatch, metrics):
    options = dict(
        val_interval=2, checkpoint=dict(interval=4, save_best=metrics, rule='greater', published_keys=['state_dict'])
    )
    trained(tmp_path / 'a', iters=4, metric=Rising(), **options)
    # Validated after iterations 2 and 4; the other metric was best at first.
    best = [path.name for path in (tmp_path / 'a').glob('best_*_?.pth')]
    assert sorted(best) == ['best_toy_acc_iter_4.pth', *(['best_toy_other_iter_2.pth'] if len(metrics) == 2 else [])]
    (published,) = (tmp_path / 'a').glob('iter_4-????????.pth')
    assert set(read_checkpoint(published)) == {'state_dict'}

    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    resumed = dict(resume=True, load_from=str(tmp_path / 'b' / 'iter_4.pth'), iters=6, metric=Rising(), **options)
    resumed['metric'].score = 5
    with monkeypatch.context() as patch:
        patch.setattr(AtomicLocalBackend, 'put', lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full')))
        with pytest.raises(OSError):
            trained(tmp_path / 'b', **resumed)
    assert (tmp_path / 'b' / 'best_toy_acc_iter_4.pth').is_file()
    trained(tmp_path / 'b', **resumed)
    assert [path.name for path in (tmp_path / 'b').glob('best_toy_acc_*_?.pth')] == ['best_toy_acc_iter_6.pth']
    assert (tmp_path / 'a' / 'best_toy_acc_iter_4.pth').is_file(), 'the copied run is left alone'


def test_other_storage_is_left_to_mmengine(tmp_path):
    hook = AtomicCheckpointHook(by_epoch=False, backend_args=dict(backend='http'))
    runner = make_runner(tmp_path, checkpoint=dict(backend_args=dict(backend='http')))
    hook.before_train(runner)
    assert hook.backend_args == dict(backend='http')


def test_checkpoints_of_an_earlier_run_are_moved_aside(tmp_path, capfd):
    options = dict(checkpoint_interval=2, val_interval=2, checkpoint=dict(save_best='toy/count', rule='greater'))
    trained(tmp_path, iters=6, **options)
    first = torch.load(tmp_path / 'iter_6.pth', weights_only=False)
    trained(tmp_path, iters=2, **options)
    assert steps_in(tmp_path) == [2]
    (aside,) = tmp_path.glob('earlier_*')
    assert steps_in(aside) == [2, 4, 6] and (aside / 'best_toy_count_iter_2.pth').is_file()
    assert f'moved to {aside}' in capfd.readouterr().out
    assert torch.load(aside / 'iter_6.pth', weights_only=False)['meta']['time'] == first['meta']['time']
    # What was before the checkpoint to resume stays, what was after it was not seen by this run.
    aside.rename(tmp_path / 'old')
    trained(tmp_path / 'old', iters=5, resume=True, load_from=str(tmp_path / 'old' / 'iter_4.pth'), **options)
    assert steps_in(tmp_path / 'old') == [2, 4, 5]
    assert [steps_in(folder) for folder in (tmp_path / 'old').glob('earlier_*')] == [[6]]


# Going on exactly


class Few(Images):
    def __init__(self, number=20):
        super().__init__(number)


@pytest.mark.parametrize(
    'options,template',
    [
        (dict(iters=10, accumulative_counts=4), 'iter_{}.pth'),
        (dict(iters=10, accumulative_counts=4, optimizer='SGD', clip_grad=dict(max_norm=0.1)), 'iter_{}.pth'),
        # Five iterations an epoch, which three do not divide.
        (dict(train_cfg=dict(by_epoch=True, max_epochs=3), accumulative_counts=3), 'epoch_{}.pth'),
        (dict(train_cfg=dict(type='ResumableEpochLoop', max_epochs=3), accumulative_counts=2), 'iter_{}.pth'),
    ],
)
def test_resumed_from_every_checkpoint_is_the_same_run(tmp_path, monkeypatch, options, template):
    monkeypatch.setattr('sparse_toy.Images', Few)
    options['checkpoint'] = dict(by_epoch='epoch' in template, interval=1)
    options['schedulers'] = POLY
    whole = trained(tmp_path / 'whole', **options)
    steps = steps_in(tmp_path / 'whole', template)
    assert len(steps) == {'iter_{}.pth': 15 if 'train_cfg' in options else 10, 'epoch_{}.pth': 3}[template]
    for step in steps[:-1]:
        last = str(tmp_path / 'whole' / template.format(step))
        assert_same(whole, trained(tmp_path / str(step), resume=True, load_from=last, **options))


def test_a_place_that_was_not_saved_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('sparse_toy.Images', Few)
    options = dict(checkpoint=dict(type='CheckpointHook', interval=1), accumulative_counts=2)
    for folder, loop, message in (
        ('a', dict(by_epoch=False, max_iters=4), 'inside an accumulation over 2'),
        ('b', dict(by_epoch=True, max_epochs=2), 'inside an epoch'),
    ):
        if folder == 'b':
            del options['accumulative_counts']
        options['train_cfg'] = loop
        trained(tmp_path / folder, **options)
        with pytest.raises(CheckpointMismatch, match=message):
            trained(tmp_path / folder, resume=True, load_from=str(tmp_path / folder / 'iter_3.pth'), **options)


# What does not fit


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    make_runner(folder, [STRICT, EMAHook()], 4, schedulers=POLY).train()
    return torch.load(folder / 'iter_4.pth', weights_only=False)


def resumed(folder, checkpoint, hooks=(EMAHook,), **options):
    torch.save(checkpoint, folder / 'x.pth')
    model = Toy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = dict(schedulers=POLY, iters=6, model=model, resume=True, load_from=str(folder / 'x.pth')) | options
    try:
        make_runner(folder, [STRICT, *(hook() for hook in hooks)], **options).train()
    except CheckpointMismatch:
        assert_same(before, dict(model.state_dict()))
        raise


@pytest.mark.parametrize(
    'part,damage',
    [
        ('message_hub', lambda c: c.update(message_hub=[1])),
        ('message_hub', lambda c: c['message_hub'].pop('runtime_info')),
        ('message_hub', lambda c: c['message_hub']['runtime_info'].update(keep_ckpt_ids=['x'])),
        ('meta', lambda c: c['meta'].update(iter=-1)),
        ('meta', lambda c: c['meta'].update(iter='4')),
        ('meta', lambda c: c['meta'].pop('epoch')),
        ('meta', lambda c: c.update(meta=None)),
        ('optimizer', lambda c: c['optimizer']['param_groups'].append(dict(c['optimizer']['param_groups'][0]))),
        ('optimizer', lambda c: c['optimizer']['state'][0].update(exp_avg=torch.ones(2, 2))),
        ('optimizer', lambda c: c['optimizer']['param_groups'][0]['params'].pop()),
        ('optimizer', lambda c: c['optimizer']['param_groups'][0].pop('betas')),
        ('optimizer', lambda c: c['optimizer']['param_groups'][0].update(lr='x')),
        ('optimizer', lambda c: c.update(optimizer=7)),
        ('param_schedulers', lambda c: c.pop('param_schedulers')),
        ('param_schedulers', lambda c: c['param_schedulers'].clear()),
        ('param_schedulers', lambda c: c.update(param_schedulers=['x'])),
        ('param_schedulers', lambda c: c['param_schedulers'][0].update(last_step=-2)),
        ('ema_state_dict', lambda c: c['ema_state_dict'].pop('module.head.weight')),
        ('ema_state_dict', lambda c: c.update(ema_state_dict=[])),
        ('gradients', lambda c: c.update(gradients=[{'head.weight': torch.ones(1)}])),
        ('gradients', lambda c: c.update(gradients=[{}, {}])),
    ],
)
def test_a_damaged_part_is_named_with_its_file(tmp_path, saved, part, damage):
    checkpoint = copy.deepcopy(saved)
    damage(checkpoint)
    with pytest.raises(CheckpointMismatch, match=f'x.pth cannot be resumed, .*part "{part}" do not fit') as error:
        resumed(tmp_path, checkpoint)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(
    'changes,message',
    [
        (dict(), None),
        (dict(batch_size=2), 'batch_size was 4, is 2'),
        (dict(hooks=()), 'averaged weights are not restored, because this run has no EMAHook'),
        (dict(schedulers=None), 'the schedules of the run before are not restored'),
        (dict(schedulers=dict(POLY, end=20)), 'end of PolyLR stays 8 in place of 20'),
        (dict(accumulative_counts=2), 'accumulative_counts was 1, is 2'),
    ],
)
def test_what_is_not_the_same_is_said(tmp_path, capfd, saved, changes, message):
    resumed(tmp_path, saved, **changes)
    text = capfd.readouterr().out
    assert message in text if message else 'not the same run' not in text


@pytest.mark.parametrize('has_name', [True, False])
def test_another_optimizer_is_refused(tmp_path, saved, has_name):
    checkpoint = dict(saved, meta={k: v for k, v in saved['meta'].items() if has_name or k != 'run'})
    message = 'AdamW, and this run trains with SGD' if has_name else 'another optimizer'
    with pytest.raises(CheckpointMismatch, match=message):
        resumed(tmp_path, checkpoint, optimizer='SGD')


def test_another_schedule_is_refused(tmp_path, saved):
    with pytest.raises(CheckpointMismatch, match='it is not of CosineAnnealingLR'):
        resumed(tmp_path, saved, schedulers=dict(type='CosineAnnealingLR', T_max=8, by_epoch=False))
