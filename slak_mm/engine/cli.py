"""What the command lines in ``tools/`` share."""

import argparse
import difflib
import errno
import gc
import importlib.util
import logging
import os
import os.path as osp
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import get_rank, init_dist, is_distributed
from mmengine.logging import print_log
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn

from slak_mm.checkpoints import CheckpointError, CheckpointNotFound, read_checkpoint
from slak_mm.checkpoints.reader import resolve
from slak_mm.sparsity import SparsityError

from . import overrides
from .overrides import ConfigOverrideError
from .reproducible import add_hook, make_reproducible

__all__ = [
    'KeyValuePairs',
    'add_config_arguments',
    'add_override_arguments',
    'add_size_arguments',
    'apply_overrides',
    'build_model',
    'build_runner',
    'check_weights',
    'crop_size',
    'img_scale',
    'init_distributed',
    'load_config',
    'non_negative_int',
    'positive_int',
    'prepare_resume',
    'reason',
    'run_tool',
    'share',
    'use_test_time_augmentation',
]

# ------------------------------------------------------------------------------------ running


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a command line and leave the process with its exit code.

    What a user can cause (:class:`ConfigOverrideError`, ``CheckpointError``, and what
    :func:`_explain` knows) ends in one sentence on stderr and exit code 1; with
    ``SLAK_MM_DEBUG=1`` or ``--debug`` the traceback is shown as well. Everything else is a
    defect and keeps its traceback. An interrupt ends with exit code 130.

    Args:
        main: Does the work; returns the exit code, None for 0.
    """
    code = 1
    try:
        code = main() or 0
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        if os.environ.get('SLAK_MM_DEBUG', '0') != '0' or '--debug' in sys.argv:
            traceback.print_exc()
        if get_rank() == 0:
            print(f'error: {message}', file=sys.stderr)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 130
    finally:
        sys.stdout.flush()
        leave_process_group()
    sys.exit(code)


def leave_process_group() -> None:
    """Leave the default process group, if there is one, for good.

    Threads of gloo keep the tensors of the last collectives until the group is gone, and what
    refers to the group, as a DistributedDataParallel model does, keeps it. A thread that frees a
    tensor while the interpreter shuts down aborts the process (PyTorch's pull request 179291).
    """
    if is_distributed():
        gc.collect()  # runners and their hooks refer to each other
        torch.distributed.destroy_process_group()


def _explain(error: Exception) -> str | None:
    """A sentence about an error that a user can cause; None for any other."""
    text = str(error)
    if isinstance(error, (ConfigOverrideError, CheckpointError, SparsityError)):
        return text
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            'The GPU has too little memory for this run: lower --batch-size, --crop-size '
            f'or --img-scale, or use --amp ({text.splitlines()[0]}).'
        )
    if 'Expected more than 1 value per channel' in text:
        return (
            'Batch norm cannot train on one image per process: raise --batch-size, or train '
            'with SyncBN on several GPUs.'
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return f'{error.strerror}: {error.filename or "the disk of the work dir"}.'
    # What mmcv says of an image that cannot be decoded, behind a data worker's traceback.
    unreadable = re.search(r'failed to load image: (.+)|cannot identify image file (.+)', text)
    if unreadable:
        return f'The image {(unreadable[1] or unreadable[2]).strip()} cannot be read.'
    return None


def reason(error: BaseException) -> str:
    """An exception in one line, with a remedy where there is a usual one."""
    if 'mmcv._ext' in str(error):
        return (
            'mmcv is installed without its compiled operators, which it needs; install a '
            'build of mmcv that has them (see "Set-up" in the README).'
        )
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[0].strip()}' if lines else type(error).__name__


# ---------------------------------------------------------------------------------- arguments


class KeyValuePairs(DictAction):
    """mmengine's ``key=value`` pairs, with a usage message for what is not one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Parse the pairs into the namespace."""
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError, RecursionError):
            # It has no syntax for dicts, and recurses without end on one.
            parser.error(
                f'{option_string} takes key=value pairs with numbers, words, lists or '
                f'tuples as values (a dict is set by its keys, a.b=1 a.c=2), got: '
                f'{" ".join(values)}'
            )


def positive_int(text: str) -> int:
    """Argument type: an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
    return value


def non_negative_int(text: str) -> int:
    """Argument type: an integer from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'must not be negative, got {text}')
    return value


def crop_size(text: str) -> tuple[int, int]:
    """Argument type: ``128`` or ``128x192``, height and width."""
    try:
        sides = [positive_int(side) for side in text.lower().replace(',', 'x').split('x')]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f'must be like 128 or 128x192 (HxW), got {text}')
    return sides[0], sides[-1]


def img_scale(text: str) -> tuple[int, int]:
    """Argument type: ``400`` or ``667x400``; longer (0 where not given) and shorter side."""
    try:
        sides = crop_size(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'must be like 400 (shorter side) or 667x400 (longer x shorter side), got {text}'
        ) from None
    return (max(sides) if 'x' in text.lower().replace(',', 'x') else 0), min(sides)


def share(text: str) -> float:
    """Argument type: a number between 0 and 1, both excluded."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'must lie between 0 and 1, got {text}')
    return value


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every tool takes: the config, its options, the work dir, the launcher."""
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where logs and results go (default: ./work_dirs/<name of the config>)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValuePairs,
        metavar='KEY=VALUE',
        help='override any key of the config, e.g. model.backbone.drop_path_rate=0.2',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed run were started (pytorch: torchrun)',
    )
    # torch.distributed.launch passes this; torchrun sets the environment variable instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        '--debug', action='store_true', help='show the traceback of every error (also: SLAK_MM_DEBUG=1)'
    )


def add_override_arguments(parser: argparse.ArgumentParser, training: bool) -> None:
    """Add the overrides of :mod:`slak_mm.engine.overrides`.

    Args:
        parser: The parser.
        training: Whether to add those that only concern training.
    """
    group = parser.add_argument_group('changes to the config')
    group.add_argument('--data-root', metavar='DIR', help='folder with the data set')
    if training:
        group.add_argument(
            '--max-iters',
            type=positive_int,
            metavar='N',
            help='train for N iterations; the schedule keeps its proportions',
        )
        group.add_argument('--batch-size', type=positive_int, metavar='N', help='training images per process')
    group.add_argument('--num-workers', type=non_negative_int, metavar='N', help='data loading processes per process')
    add_size_arguments(group)


def add_size_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the overrides that concern the size of images."""
    parser.add_argument(
        '--crop-size',
        type=crop_size,
        metavar='N or HxW',
        help='training crop (semantic segmentation); image scales, sliding window and its stride follow in proportion',
    )
    parser.add_argument(
        '--img-scale',
        type=img_scale,
        metavar='S or LxS',
        help='shorter, or longer and shorter side of test images (detection); '
        'training scales and crops follow in proportion',
    )


# ------------------------------------------------------------------------------------- config


def load_config(path: str) -> Config:
    """Read a config.

    Args:
        path: Config file.

    Returns:
        The config.

    Raises:
        ConfigOverrideError: The file is missing or cannot be read, or the framework it is for is
            not installed.
    """
    if not osp.isfile(path):
        folder = osp.dirname(path) or '.'
        names = [name for name in os.listdir(folder) if name.endswith('.py')] if osp.isdir(folder) else []
        close = difflib.get_close_matches(osp.basename(path), names, 3)
        hint = f' Did you mean {" or ".join(osp.join(folder, name) for name in close)}?' if close else ''
        raise ConfigOverrideError(f'There is no config file "{path}".{hint}')
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:
        raise ConfigOverrideError(f'{path} cannot be read: {error}') from error
    except Exception as error:  # a config is a program: it can fail in any way
        raise ConfigOverrideError(f'{path} cannot be read: {reason(error)}') from error
    if 'model' not in cfg:
        raise ConfigOverrideError(f'{path} describes no model; is it a base config?')
    scope = cfg.get('default_scope')
    if scope and scope != 'mmengine' and importlib.util.find_spec(scope) is None:
        raise ConfigOverrideError(f'{path} is for "{scope}", which is not installed in this Python environment.')
    return cfg


def apply_overrides(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the work dir, :func:`add_override_arguments`, and last ``--cfg-options``.

    The options come last so that they mean what they say: an interval given by hand is not
    scaled by ``--max-iters``.

    Args:
        cfg: Changed in place.
        args: Parsed arguments; those a tool does not have are skipped.

    Raises:
        ConfigOverrideError: An override or option does not fit the config.
    """
    if getattr(args, 'work_dir', None) is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('./work_dirs', Path(args.config).stem)
    for name, change in (
        ('data_root', overrides.set_data_root),
        ('max_iters', overrides.set_max_iters),
        ('batch_size', overrides.set_batch_size),
        ('num_workers', overrides.set_num_workers),
        ('crop_size', overrides.set_crop_size),
        ('img_scale', overrides.set_img_scale),
        ('sparse', overrides.set_sparse),
        ('sparsity', overrides.set_sparsity),
    ):
        value = getattr(args, name, None)
        if value is not None:
            change(cfg, value)
    if args.cfg_options:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except Exception as error:  # it meets whatever the config has at that key
            raise ConfigOverrideError(f'--cfg-options does not fit {args.config}: {reason(error)}') from error


def use_test_time_augmentation(cfg: Config) -> None:
    """Test with the config's ``tta_model`` and ``tta_pipeline``.

    Args:
        cfg: Changed in place; left as it is where its model is one already.

    Raises:
        ConfigOverrideError: The config has no test-time augmentation.
    """
    if overrides.model_of(cfg) is not cfg.model:
        return
    if cfg.get('tta_model') is None or cfg.get('tta_pipeline') is None:
        raise ConfigOverrideError('--tta needs a config with tta_model and tta_pipeline; this one has none.')
    for _, dataset in overrides.datasets_of(cfg, ('test_dataloader',)):
        dataset['pipeline'] = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


# ------------------------------------------------------------------------------------ weights

# Addresses that mmengine's own loader knows and this package does not.
_FRAMEWORK_SCHEMES = (
    'torchvision://',
    'open-mmlab://',
    'openmmlab://',
    'mmcls://',
    'modelzoo://',
    'pavi://',
    's3://',
    'petrel://',
    'local://',
)


def check_weights(cfg: Config, config_path: str) -> None:
    """Fetch the weights that a config names, before anything is built.

    Args:
        cfg: Changed in place: ``load_from`` becomes the path of a local file.
        config_path: For messages.

    Raises:
        ConfigOverrideError: The config names no weights.
        CheckpointError: They are not here and cannot be fetched.
    """
    advice = 'To train from random weights on purpose, add --from-scratch.'
    sources = overrides.named_weights(cfg)
    load_from = cfg.get('load_from')
    if not sources and not load_from:
        raise ConfigOverrideError(
            f'{config_path} names no pretrained weights (init_cfg of the backbone, or load_from), '
            f'so this run would start from random ones. {advice}'
        )
    backbone = overrides.model_of(cfg).get('backbone') or {}
    ours = backbone.get('type') in overrides.OUR_BACKBONES
    for place, source in sources:
        foreign = not (ours and '.backbone.' in place)
        if source.startswith(_FRAMEWORK_SCHEMES) or (foreign and '://' in source):
            continue
        try:
            resolve(source)
        except CheckpointNotFound as error:
            raise CheckpointNotFound(f'{error}\n{advice}') from error
    if load_from and not load_from.startswith(_FRAMEWORK_SCHEMES):
        path = resolve(load_from)
        read_checkpoint(path)
        cfg.load_from = str(path)


def prepare_resume(cfg: Config, resume: str) -> str | None:
    """Find and check the checkpoint to resume from.

    Args:
        cfg: Changed in place: ``resume``, ``load_from``, the seed of the earlier run,
            and no pretrained weights any more, since all weights come from the checkpoint.
        resume: A file, or 'auto' for the newest checkpoint of the work dir.

    Returns:
        The file; None if the work dir has no checkpoint ('auto' only): the run then
        begins at the beginning.

    Raises:
        CheckpointError: The file is missing or unreadable.
        ConfigOverrideError: It is not from a training run.
    """
    if resume == 'auto':
        found = find_latest_checkpoint(cfg.work_dir)
        if found is None:
            print_log(
                f'--resume: {cfg.work_dir} has no checkpoint, training starts at the beginning.',
                logger='current',
                level=logging.WARNING,
            )
            return None
    else:
        found = resume
    found = str(resolve(found))
    checkpoint = read_checkpoint(found)
    meta = checkpoint.get('meta') or {}
    if 'optimizer' not in checkpoint or 'iter' not in meta or 'message_hub' not in checkpoint:
        raise ConfigOverrideError(
            f'{found} has weights but no state of a training run, so there is nothing to resume; '
            f'to start from its weights use --cfg-options load_from={found}'
        )
    seed = meta.get('seed')
    randomness = ConfigDict(cfg.get('randomness') or {})
    if seed is not None:
        if randomness.get('seed') not in (None, seed):
            print_log(
                f'The run to resume has the seed {seed}; it goes on with that one.',
                logger='current',
                level=logging.WARNING,
            )
        # mmengine takes the seed over itself, but only after the samplers were built.
        randomness.seed = seed
        cfg.randomness = randomness
    overrides.remove_weights(cfg)
    cfg.resume = True
    cfg.load_from = found
    return found


# ------------------------------------------------------------------------------------- launch


def init_distributed(cfg: Config, args: argparse.Namespace) -> None:
    """Adapt a config to the machine and start the process group of a distributed run.

    mmengine's launchers do it where there are GPUs. They select a GPU unconditionally, so
    without one the process group is made here, from the same environment variables.

    Args:
        cfg: Changed in place, see :func:`slak_mm.engine.overrides.adapt_to_device`.
        args: Parsed arguments, with ``launcher`` and ``local_rank``.

    Raises:
        ConfigOverrideError: The process was not started by that launcher, or by torchrun without
            saying so, or there are fewer GPUs than processes.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    overrides.adapt_to_device(cfg)
    if args.launcher == 'none':
        if 'RANK' in os.environ and int(os.environ.get('WORLD_SIZE', '1')) > 1:
            raise ConfigOverrideError(
                f'torchrun started {os.environ["WORLD_SIZE"]} processes, which would each do the '
                'whole run: add --launcher pytorch.'
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
            f'--launcher {args.launcher} needs processes started with '
            f'{starter[args.launcher]}: {", ".join(missing)} not set.'
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
        init_dist(args.launcher, **dist_cfg)
        return
    if args.launcher == 'slurm':
        _slurm_environment(dist_cfg.pop('port', None))
    elif args.launcher == 'mpi':
        for name, source in (('RANK', 'RANK'), ('WORLD_SIZE', 'SIZE'), ('LOCAL_RANK', 'LOCAL_RANK')):
            os.environ[name] = os.environ[f'OMPI_COMM_WORLD_{source}']
        os.environ.setdefault('MASTER_PORT', '29500')
    torch.distributed.init_process_group(backend=dist_cfg.get('backend', 'gloo'))


def _slurm_environment(port: int | None) -> None:
    import subprocess

    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = subprocess.getoutput(
            f'scontrol show hostname {os.environ["SLURM_NODELIST"]} | head -n1'
        )
    if port is not None:
        os.environ['MASTER_PORT'] = str(port)
    os.environ.setdefault('MASTER_PORT', '29500')
    os.environ['RANK'] = os.environ['SLURM_PROCID']
    os.environ['WORLD_SIZE'] = os.environ['SLURM_NTASKS']
    os.environ['LOCAL_RANK'] = os.environ.get('SLURM_LOCALID', '0')


def build_model(cfg: Config, node: ConfigDict) -> nn.Module:
    """Build a model, or a part of one, outside of a runner.

    Args:
        cfg: A complete config, adapted to the device; weights that it names are left
            out, in place.
        node: Its model, or a part of that.

    Returns:
        With random weights.

    Raises:
        ConfigOverrideError: The config names something that does not exist or does not fit.
    """
    overrides.remove_weights(cfg)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    try:
        return MODELS.build(node)
    except Exception as error:  # registries wrap whatever a constructor raises
        raise ConfigOverrideError(f'The model cannot be built: {reason(error)}') from error


def build_runner(cfg: Config, loops: Sequence[str]) -> Runner:
    """Build a runner and everything it is going to use.

    Args:
        cfg: A complete config; :class:`StrictCheckpointHook` is added, and for training
            what :mod:`slak_mm.engine.reproducible` has.
        loops: Which of 'train', 'val' and 'test' to build.

    Returns:
        With its model and those loops built, and the optimizer for training.

    Raises:
        ConfigOverrideError: The config names something that does not exist or does not fit.
    """
    add_hook(cfg, 'StrictCheckpointHook', require_heads=bool(cfg.get('resume')))
    if 'train' in loops:
        make_reproducible(cfg)
    try:
        if 'runner_type' in cfg:
            from mmengine.registry import RUNNERS

            runner = RUNNERS.build(cfg)
        else:
            runner = Runner.from_cfg(cfg)
        if 'train' in loops:
            if runner.train_loop is None:
                raise ConfigOverrideError('This config has no training loop.')
            if runner._val_loop is not None:
                runner.val_loop  # noqa: B018  # a property that builds it
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        if 'test' in loops and runner.test_loop is None:
            raise ConfigOverrideError('This config has no test loop.')
    except (ConfigOverrideError, CheckpointError, SparsityError):
        raise
    except Exception as error:  # registries wrap whatever a constructor raises
        raise ConfigOverrideError(f'The config cannot be built: {reason(error)}') from error
    return runner
