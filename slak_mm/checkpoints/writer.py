"""Convert a checkpoint file to another spelling and write it whole or not at all."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slak_mm._files import replacing

from .errors import CheckpointError, shown
from .families import find_roots, known_backbones
from .formats import convert_state_dict, refuse_unrecognized, to_official
from .reader import META_KEY, log_report
from .unwrap import unwrap


def convert_checkpoint(checkpoint: Mapping[str, Any], to: str = 'ours', use_ema: bool = False) -> dict[str, Any]:
    """Convert the weights of a checkpoint, of a backbone or of a whole model.

    Only the weights and ``meta`` (classes and palette of OpenMMLab models) are kept; the states
    of optimizers and schedules are left out.

    Args:
        checkpoint: The content of a checkpoint file.
        to: 'ours', 'official', or a spelling of :func:`to_official`. Defaults to 'ours'.
        use_ema: Whether to take the moving average. Defaults to ``False``.

    Returns:
        ``model`` for a bare backbone in another spelling than ours, as in official files, else ``state_dict``; and
        ``meta`` where there was one.

    Raises:
        CheckpointMismatch: There is no backbone, or a tensor has no place in the other spelling.
    """
    source = unwrap(checkpoint, 'ema' if use_ema else 'model').state_dict
    roots = find_roots(source)
    if not roots:
        raise CheckpointError(f'The checkpoint holds no {known_backbones()} backbone to convert.')
    weights: dict[str, Any] = dict(source)
    for root in roots:
        if to == 'ours':
            weights, notes = convert_state_dict(weights, root)
            refuse_unrecognized(notes)
        else:
            weights = to_official(weights, None if to == 'official' else to, root)
    result: dict[str, Any] = {'model' if to != 'ours' and roots == [''] else 'state_dict': OrderedDict(weights)}
    if isinstance(checkpoint.get('meta'), Mapping):
        result['meta'] = checkpoint['meta']
    return result


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Write a checkpoint so that a reader sees the whole file or none.

    Args:
        checkpoint: As :func:`convert_checkpoint` returns it.
        path: The file, which is returned. '.safetensors' gets the weights in that format, and of ``meta`` what JSON can
            hold.
        overwrite: Whether an existing file may be replaced. Defaults to ``False``.

    Raises:
        CheckpointError: The file exists or cannot be written, or the format's package is not installed.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f'{path} exists already.')
    if not path.parent.is_dir():
        raise CheckpointError(f'There is no folder {path.parent} to write {path.name} into.')
    try:
        with replacing(path) as part:
            if path.suffix == '.safetensors':
                _write_safetensors(checkpoint, part)
            else:
                # A path would let torch name the archive's inner folder after the temporary file.
                with open(part, 'wb') as file:
                    torch.save(dict(checkpoint), file)
    except CheckpointError:
        raise
    except Exception as error:  # torch and safetensors hide the operating system's errors in their own
        raise CheckpointError(
            f'{path} could not be written ({shown(str(error))}): is there room on the disk? What was there before is '
            'unchanged.'
        ) from error
    return path


def _write_safetensors(checkpoint: Mapping[str, Any], path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise CheckpointError('Writing a .safetensors file needs that package: pip install safetensors.') from error
    tensors = unwrap(checkpoint).state_dict
    metadata = {'format': 'pt'}  # as other programs expect it of PyTorch's
    given = checkpoint.get('meta') or {}
    meta = {key: value for key, value in given.items() if _is_json({key: value})}
    if lost := given.keys() - meta.keys():
        log_report(f'Left out of the meta, as JSON cannot hold it: {", ".join(sorted(map(shown, lost)))}.')
    if meta:
        metadata[META_KEY] = json.dumps(meta)
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, str(path), metadata)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
