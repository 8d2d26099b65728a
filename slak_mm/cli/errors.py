"""Errors of the command line, and sentences about those of others."""

import difflib
import errno
import os
import re

import mmengine.registry
import torch
import torch.distributed
from mmengine.registry import Registry

from slak_mm.checkpoints import CheckpointError, CheckpointMismatch
from slak_mm.engine.samples import DataError
from slak_mm.engine.sparsity_hook import SparsityMismatch
from slak_mm.export import ExportError
from slak_mm.ops.backends import ENVIRONMENT_VARIABLE
from slak_mm.sparsity import DenseWeights, SparsityError

# The options of what errors of the library advise.
_OPTIONS = {
    DenseWeights: 'In options: --sparse off, or --sparsity 0.4.',
    SparsityMismatch: 'In options: resume it with the --sparse that it had, with --sparse off if it trained densely; '
    'a new run is started with --cfg-options load_from=CHECKPOINT.',
}

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)

PRETRAINED = (
    'model.pretrained names weights of another backbone: remove it from the config, or add '
    "--cfg-options model.pretrained=None. This package's backbones take theirs from model.backbone.init_cfg."
)


class ConfigOverrideError(ValueError):
    """A change that was asked for does not fit the config or the machine."""


def explain(error: Exception) -> str | None:
    """A sentence about an error that a user can cause; None for any other."""
    text = str(error)
    if isinstance(error, CheckpointMismatch) and 'another number of classes' in text:
        return (
            f"{text}\nTo test, give the config the checkpoint's classes (num_classes of the heads). To fine-tune all "
            "that fits, decoder included, add dict(type='StrictCheckpointHook', strict=False) to custom_hooks of the "
            'config, and name the checkpoint with --cfg-options load_from=CHECKPOINT.'
        )
    if isinstance(error, (ConfigOverrideError, CheckpointError, SparsityError, ExportError, FloatingPointError)):
        sentence, *rest = text.split('\n', 1)
        options = [options for kind, options in _OPTIONS.items() if isinstance(error, kind)]
        return '\n'.join([' '.join([sentence, *options]), *rest])
    if isinstance(error, DataError):
        # Out of a data worker it comes with the worker's traceback before it.
        return text.rpartition('DataError: ')[2].strip()
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            'The GPU has too little memory for this run: lower --batch-size, --crop-size '
            f'or --img-scale, use --amp, or infer with a --window ({text.splitlines()[0]}).'
        )
    if 'Expected more than 1 value per channel' in text:
        remedy = 'raise --batch-size, or train with SyncBN on several GPUs.'
        return f'Batch norm cannot train on one image per process: {remedy}'
    if ENVIRONMENT_VARIABLE in text or 'was asked for but cannot run' in text:
        forced = os.environ.get(ENVIRONMENT_VARIABLE)
        return f'{text} ({ENVIRONMENT_VARIABLE}={forced}).' if forced else f'{text}.'
    unknown = _unknown_name(text)
    if unknown:
        return unknown[0].upper() + unknown[1:]
    # Where a file cannot be written whole, torch.save says so in words of its own, behind the disk's.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror and (cause is error or cause.errno in _CANNOT_WRITE):
            is_full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = ' Make room there; what was saved before is intact.' if is_full else ''
            return f'{cause.strerror}: {cause.filename or "what was to be written"}.{remedy}'
        cause = cause.__cause__ or cause.__context__
    # What mmcv says of an image that cannot be decoded, where a pipeline is not checked.
    unreadable = re.search(r'failed to load image: (.+)|cannot identify image file (.+)', text)
    if unreadable:
        return f'The image {(unreadable[1] or unreadable[2]).strip()} cannot be read.'
    return None


def reason(error: BaseException) -> str:
    """An exception in one line, with a remedy where there is a usual one."""
    text = str(error)
    if 'mmcv._ext' in text:
        return (
            'mmcv is installed without its compiled operators, which it needs; install a '
            'build of mmcv that has them (see "Set-up" in the README).'
        )
    unknown = _unknown_name(text)
    if unknown:
        return unknown
    if "unexpected keyword argument 'pretrained'" in text:
        return PRETRAINED
    lines = [line for line in text.splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[0].strip()}' if lines else type(error).__name__


def _unknown_name(text: str) -> str | None:
    """A sentence about a name that a registry of mmengine does not have, with those like it."""
    found = re.search(r'(\S+) is not in the \S+?::(.+?) registry', text)
    if not found:
        return None
    name, kind = found[1].strip('\'"'), found[2]
    roots = [root for root in vars(mmengine.registry).values() if isinstance(root, Registry) and root.name == kind]
    known = {key for root in roots for registry in (root, *root.children.values()) for key in registry.module_dict}
    close = difflib.get_close_matches(name.rpartition('.')[2], known, 3)
    hint = f'did you mean {" or ".join(close)}?' if close else 'custom_imports in the config names modules of your own.'
    return f'there is no {kind} "{name}"; {hint}'
