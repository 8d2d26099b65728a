"""Errors of the command line, and sentences about those of others."""

import errno
import re

import torch
import torch.distributed

from slak_mm.checkpoints import CheckpointError
from slak_mm.engine.samples import DataError
from slak_mm.engine.sparsity_hook import SparsityMismatch
from slak_mm.sparsity import DenseWeights, SparsityError

# The options of what errors of the library advise.
_OPTIONS = {
    DenseWeights: 'In options: --sparse off, or --sparsity 0.4.',
    SparsityMismatch: 'In options: resume it with the --sparse that it had, with --sparse off if it trained densely; '
    'a new run is started with --cfg-options load_from=CHECKPOINT.',
}


class ConfigOverrideError(ValueError):
    """A change that was asked for does not fit the config or the machine."""


def explain(error: Exception) -> str | None:
    """A sentence about an error that a user can cause; None for any other."""
    text = str(error)
    if isinstance(error, (ConfigOverrideError, CheckpointError, SparsityError, FloatingPointError)):
        sentence, *rest = text.split('\n', 1)
        options = [options for kind, options in _OPTIONS.items() if isinstance(error, kind)]
        return '\n'.join([' '.join([sentence, *options]), *rest])
    if isinstance(error, DataError):
        # Out of a data worker it comes with the worker's traceback before it.
        return text.rpartition('DataError: ')[2].strip()
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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        place = error.filename or 'the disk of the work dir'
        remedy = (
            ' Make room there; what was saved before is intact.' if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''
        )
        return f'{error.strerror}: {place}.{remedy}'
    # What mmcv says of an image that cannot be decoded, where a pipeline is not checked.
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
