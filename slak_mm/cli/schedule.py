"""Length of the training of a config."""

import math
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from slak_mm._config import type_name

from .errors import ConfigOverrideError


def scaled(value: Any, factor: float, least: int = 0) -> int:
    """A number times a factor, rounded, and not below ``least``."""
    return max(least, round(value * factor))


def set_max_iters(cfg: Config, max_iters: int) -> None:
    """Train for another number of iterations, with the schedule keeping its proportions.

    The intervals of validation and checkpoints and every boundary of every learning-rate schedule are scaled alike, so
    that each of them happens at the same fraction of the run. A config that counts epochs becomes one that counts
    iterations.

    Raises:
        ConfigOverrideError: The config does not train, or its loop is not one of mmengine's.
    """
    loop = cfg.get('train_cfg')
    if not loop:
        raise ConfigOverrideError('--max-iters has no effect: this config does not train.')
    by_epoch = loop.get('by_epoch', 'max_epochs' in loop)
    old = loop.get('max_epochs') if by_epoch else loop.get('max_iters')
    if type_name(loop) not in ('IterBasedTrainLoop', 'EpochBasedTrainLoop', 'ResumableEpochLoop', '') or not old:
        raise ConfigOverrideError(
            f'--max-iters cannot change the training loop "{type_name(loop)}" of this config; use --cfg-options.'
        )
    factor = max_iters / old

    if by_epoch:
        kept = {key: loop[key] for key in ('val_begin', 'val_interval', 'dynamic_intervals') if key in loop}
        cfg.train_cfg = ConfigDict(kept, type='IterBasedTrainLoop')
        _count_iterations(cfg)
        loop = cfg.train_cfg
        # EpochBasedTrainLoop validates after every epoch unless told otherwise.
        loop.setdefault('val_interval', 1)
    loop.max_iters = max_iters
    loop.val_interval = scaled(loop.get('val_interval', 1000), factor, 1)
    if 'val_begin' in loop:
        loop.val_begin = scaled(loop.val_begin, factor, 1)
    if loop.get('dynamic_intervals'):
        loop.dynamic_intervals = [(scaled(a, factor), scaled(b, factor, 1)) for a, b in loop.dynamic_intervals]

    schedulers = cfg.get('param_scheduler') or []
    schedulers = [schedulers] if isinstance(schedulers, dict) else schedulers
    for scheduler in schedulers:
        _rescale(scheduler, by_epoch, factor, max_iters)
    if schedulers:
        # mmengine's ramps take one step less than their length: one of a single step would hold
        # the learning rate at the start of the warm-up for ever.
        cfg.param_scheduler = [
            scheduler
            for scheduler in schedulers
            if not type_name(scheduler).startswith(('LinearLR', 'ConstantLR'))
            or scheduler.get('end', math.inf) - scheduler.get('begin', 0) >= 2
        ]

    hooks = cfg.get('default_hooks') or {}
    checkpoint = hooks.get('checkpoint')
    if checkpoint and checkpoint.get('interval', -1) > 0:
        checkpoint.interval = scaled(checkpoint.interval, factor, 1)
    logger = hooks.get('logger')
    if logger:
        # A short run still shows some ten lines with its loss.
        logger.interval = max(1, min(logger.get('interval', 10), max_iters // 10))


def check_schedule(cfg: Config) -> None:
    """Refuse lengths and intervals of training that mmengine divides by or never reaches.

    Raises:
        ConfigOverrideError: Names the setting.
    """
    loop = cfg.get('train_cfg') or {}
    values = {key: loop.get(key) for key in ('max_iters', 'max_epochs')}
    if cfg.get('val_dataloader'):
        values['val_interval'] = loop.get('val_interval')
        values |= {f'dynamic_intervals[{i}]': pair[1] for i, pair in enumerate(loop.get('dynamic_intervals') or [])}
    for key, value in values.items():
        if value is not None and not (isinstance(value, (int, float)) and value >= 1):
            remedy = '; to train without validation set val_dataloader, val_cfg and val_evaluator to None'
            remedy = '' if key.startswith('max') else remedy
            raise ConfigOverrideError(f'train_cfg.{key} must be a number from 1, got {value!r}{remedy}.')


def _count_iterations(cfg: Config) -> None:
    """Switch what counts epochs beside the training loop to iterations."""
    cfg.log_processor = ConfigDict(cfg.get('log_processor') or dict(type='LogProcessor'))
    cfg.log_processor.by_epoch = False
    cfg.setdefault('default_hooks', ConfigDict())
    hooks = cfg.default_hooks
    for name, hook in (('checkpoint', 'CheckpointHook'), ('logger', 'LoggerHook')):
        if hooks.get(name) is None:
            hooks[name] = ConfigDict(type=hook)
    hooks.checkpoint.by_epoch = False
    hooks.checkpoint.setdefault('interval', 1)
    hooks.logger.log_metric_by_epoch = False
    sampler = cfg.train_dataloader.get('sampler')
    if sampler and type_name(sampler) == 'DefaultSampler':
        cfg.train_dataloader.sampler = ConfigDict(type='InfiniteSampler', shuffle=sampler.get('shuffle', True))
    text = 'this config counts epochs; it is run by iterations instead, with its schedule in the same proportions.'
    print_log(f'--max-iters: {text}', logger='current')


def _rescale(scheduler: ConfigDict, loop_by_epoch: bool, factor: float, max_iters: int) -> None:
    """Scale one parameter scheduler, which may count iterations in a loop that counts epochs."""
    if loop_by_epoch and not scheduler.get('by_epoch', True):
        # A warm-up in iterations of a run in epochs: how long that run is in iterations depends
        # on the data. Kept as it is, but never more than a tenth of the new run.
        end = scheduler.get('end')
        if end is not None and not math.isinf(end):
            scheduler.end = max(scheduler.get('begin', 0) + 1, min(end, max_iters // 10))
        return
    if loop_by_epoch:
        scheduler.by_epoch = False
        scheduler.pop('convert_to_iter_based', None)
    for key in ('begin', 'end', 'T_max', 'total_steps', 'step_size'):
        value = scheduler.get(key)
        if value is not None and not math.isinf(value):
            scheduler[key] = scaled(value, factor, 0 if key == 'begin' else 1)
    for key in ('milestones', 'periods', 'restarts'):
        if scheduler.get(key) is not None:
            scheduler[key] = [scaled(value, factor, 0 if key == 'restarts' else 1) for value in scheduler[key]]
    begin, end = scheduler.get('begin', 0), scheduler.get('end')
    if end is not None and end <= begin:
        scheduler.end = begin + 1
