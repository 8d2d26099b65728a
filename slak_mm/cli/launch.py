"""Start the processes of a run and build what it needs."""

import argparse
import logging
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from filelock import FileLock, Timeout
from mmengine.config import Config, ConfigDict
from mmengine.dist import broadcast_object_list, init_dist, is_main_process
from mmengine.logging import print_log
from mmengine.registry import MODELS, OPTIMIZERS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn

from slak_mm._config import add_hook, framework, type_name
from slak_mm.checkpoints import CheckpointError
from slak_mm.engine.hooks import unwrap_model
from slak_mm.engine.reproducible import make_reproducible
from slak_mm.engine.samples import check_samples
from slak_mm.sparsity import SparsityError

from .device import adapt_to_device
from .errors import ConfigOverrideError, reason
from .model import check_channels, check_crop
from .weights import remove_weights


def init_distributed(cfg: Config, args: argparse.Namespace) -> None:
    """Adapt a config to the machine, in place, and start the process group of a distributed run.

    mmengine's launchers do it where there are GPUs. They select a GPU unconditionally, so without one the process group
    is made here, from the same environment variables.

    Raises:
        ConfigOverrideError: The process was not started by that launcher, or by torchrun without saying so, or there
            are fewer GPUs than processes.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    _check_numbers(args.launcher)
    cfg.launcher = args.launcher
    adapt_to_device(cfg)
    if args.launcher == 'none':
        if 'RANK' in os.environ and int(os.environ.get('WORLD_SIZE', '1')) > 1:
            count = os.environ['WORLD_SIZE']
            raise ConfigOverrideError(
                f'torchrun started {count} processes, each of which would do all: add --launcher pytorch.'
            )
        return
    variables = dict(
        pytorch=('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'),
        slurm=('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
        mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK', 'MASTER_ADDR'),
    )[args.launcher]
    missing = [name for name in variables if name not in os.environ]
    if missing:
        starter = dict(pytorch='torchrun --nproc_per_node=N', slurm='srun', mpi='mpirun')
        raise ConfigOverrideError(
            f'--launcher {args.launcher} needs processes started with {starter[args.launcher]}: '
            f'{", ".join(missing)} not set.'
        )
    env_cfg = cfg.get('env_cfg') or {}
    dist_cfg = dict(env_cfg.get('dist_cfg') or {})
    set_multi_processing(**(env_cfg.get('mp_cfg') or {}), distributed=True)
    if torch.cuda.is_available():
        local_rank = int(os.environ.get('SLURM_LOCALID', os.environ['LOCAL_RANK']))
        if args.launcher == 'pytorch' and local_rank >= torch.cuda.device_count():
            raise ConfigOverrideError(
                f'There are more processes on this machine than GPUs '
                f'({torch.cuda.device_count()}); start one process per GPU.'
            )
        with _meeting():
            init_dist(args.launcher, **dist_cfg)
        return
    if args.launcher == 'slurm':
        _slurm_environment(dist_cfg.pop('port', None))
    elif args.launcher == 'mpi':
        for name, source in (('RANK', 'RANK'), ('WORLD_SIZE', 'SIZE'), ('LOCAL_RANK', 'LOCAL_RANK')):
            os.environ[name] = os.environ[f'OMPI_COMM_WORLD_{source}']
        os.environ.setdefault('MASTER_PORT', '29500')
    with _meeting():
        torch.distributed.init_process_group(backend=dist_cfg.get('backend', 'gloo'))


def _check_numbers(launcher: str) -> None:
    """Refuse a launcher's variables that are no numbers, or do not go together."""
    names = ['LOCAL_RANK', 'RANK', 'WORLD_SIZE'] + ['MASTER_PORT'] * (launcher != 'none')
    names += ['SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'] * (launcher == 'slurm')
    names += [f'OMPI_COMM_WORLD_{name}' for name in ('RANK', 'SIZE', 'LOCAL_RANK')] * (launcher == 'mpi')
    numbers = {}
    for name, value in os.environ.items():
        if name in names:
            if not re.fullmatch(r'[0-9]+', value):
                raise ConfigOverrideError(
                    f'The environment variable {name}="{value}" is no number. Launchers such as torchrun set it: '
                    'start the tool with one, or unset it.'
                )
            numbers[name] = int(value)
    for rank, size in (('RANK', 'WORLD_SIZE'), ('SLURM_PROCID', 'SLURM_NTASKS')):
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            raise ConfigOverrideError(
                f'The environment variables {rank}={numbers[rank]} and {size}={numbers[size]} do not go together: '
                'processes are numbered from 0. Start the tool with a launcher such as torchrun, or unset them.'
            )
    if numbers.get('MASTER_PORT', 1) not in range(1, 2**16):
        raise ConfigOverrideError(f'The environment variable MASTER_PORT={numbers["MASTER_PORT"]} is no port.')


@contextmanager
def _meeting() -> Iterator[None]:
    """Say where processes were to meet that do not find each other."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        place = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
        raise ConfigOverrideError(f'The processes do not find each other at {place}: {reason(error)}') from error


def _slurm_environment(port: int | None) -> None:
    if 'MASTER_ADDR' not in os.environ:
        command = f'scontrol show hostname {os.environ["SLURM_NODELIST"]} | head -n1'
        os.environ['MASTER_ADDR'] = subprocess.getoutput(command)
    if port is not None:
        os.environ['MASTER_PORT'] = str(port)
    os.environ.setdefault('MASTER_PORT', '29500')
    ranks = dict(RANK=os.environ['SLURM_PROCID'], LOCAL_RANK=os.environ.get('SLURM_LOCALID', '0'))
    os.environ.update(ranks, WORLD_SIZE=os.environ['SLURM_NTASKS'])


@contextmanager
def own_work_dir(cfg: Config) -> Iterator[None]:
    """Make the work dir and keep other trainings out of it; the operating system ends this when the process dies.

    Raises:
        ConfigOverrideError: Another training is in it, or it cannot be written.
    """
    folder = Path(cfg.work_dir)
    lock = FileLock(folder / '.lock')
    problem = None
    if is_main_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            problem = f'Another training runs in {folder}: wait until it has ended, or choose another --work-dir.'
        except NotImplementedError:
            print_log(f'{folder} has no file locks: start no second training in it.', 'current', logging.WARNING)
        except OSError as error:
            problem = f'The work dir {folder} cannot be written ({error.strerror}): choose another --work-dir.'
    problems = [problem]
    broadcast_object_list(problems)
    if problems[0]:
        raise ConfigOverrideError(problems[0])
    try:
        yield
    finally:
        lock.release()


def build_model(cfg: Config, node: ConfigDict) -> nn.Module:
    """Build a model, or a part of one, with random weights and outside of a runner.

    The config is adapted to the device already; weights that it names are left out, in place.

    Raises:
        ConfigOverrideError: The config names something that does not exist or does not fit.
    """
    remove_weights(cfg)
    init_default_scope(framework(cfg))
    try:
        return MODELS.build(node)
    except Exception as error:  # registries wrap whatever a constructor raises
        raise ConfigOverrideError(f'The model cannot be built: {reason(error)}') from error


def _try_metrics(loop: Any) -> None:
    """Let mmsegmentation's metrics compute from nothing: they look at their names after a whole validation only."""
    for metric in loop.evaluator.metrics:
        if hasattr(metric, 'total_area_to_metrics'):
            metric.total_area_to_metrics(*[torch.ones(1)] * 4, metric.metrics)


def build_runner(cfg: Config, loops: Sequence[str]) -> Runner:
    """Build a runner and everything that the loops 'train', 'val' and 'test' are going to use.

    :class:`StrictCheckpointHook` is added to the config, and for training what :mod:`slak_mm.engine.reproducible`
    has and :class:`FiniteLossHook`; mmengine's checkpoint hook and loop over epochs become those of this package.
    Data sets check what they load.

    Raises:
        ConfigOverrideError: The config names something that does not exist or does not fit.
    """
    add_hook(cfg, 'StrictCheckpointHook', require_heads=bool(cfg.get('resume')))
    if 'train' in loops:
        make_reproducible(cfg)
        make_resumable(cfg)
        add_hook(cfg, 'FiniteLossHook')
    try:
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        if 'train' in loops:
            if runner.train_loop is None:
                raise ConfigOverrideError('This config has no training loop.')
            if runner._val_loop is not None:
                _try_metrics(runner.val_loop)  # a property that builds it
            kind = ((cfg.get('optim_wrapper') or {}).get('optimizer') or {}).get('type')
            if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:  # mmengine calls None then
                raise KeyError(f'{kind} is not in the mmengine::optimizer registry')
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        if 'test' in loops:
            if runner.test_loop is None:
                raise ConfigOverrideError('This config has no test loop.')
            _try_metrics(runner.test_loop)
    except (ConfigOverrideError, CheckpointError, SparsityError):
        raise
    except Exception as error:  # registries wrap whatever a constructor raises
        raise ConfigOverrideError(f'The config cannot be built: {reason(error)}') from error
    check_samples(runner)
    model = unwrap_model(runner.model)
    check_channels(model, cfg)
    check_crop(model, cfg)
    return runner


def make_resumable(cfg: Config) -> None:
    """Replace mmengine's checkpoint hook and loop over epochs by those of this package."""
    cfg.default_hooks = cfg.get('default_hooks') or ConfigDict()
    hooks = cfg.default_hooks
    hooks.setdefault('checkpoint', ConfigDict(type='CheckpointHook'))
    for hook in (hooks.checkpoint, *(cfg.get('custom_hooks') or [])):
        name = type_name(hook)
        if name == 'CheckpointHook':
            hook['type'] = 'AtomicCheckpointHook'
        elif hook is hooks.checkpoint and hook is not None and name != 'AtomicCheckpointHook':
            text = f'{name} saves the checkpoints of this config; what is lost when it is cut off is up to it.'
            print_log(text, 'current', logging.WARNING)
    loop = cfg.get('train_cfg') or {}
    if type_name(loop) == 'EpochBasedTrainLoop' or ('type' not in loop and loop.get('by_epoch', True)):
        loop.pop('by_epoch', None)
        loop['type'] = 'ResumableEpochLoop'
