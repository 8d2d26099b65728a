"""Whether the values of a checkpoint mean the same in a model; checked before any is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, CheckpointMismatch

_DAMAGED = 'The training it comes from diverged or the file is damaged.'
_NO_WEIGHTS = 'These are no weights that were trained for it: look for the file that they were made from.'


def check_dense(state_dict: Mapping[str, Any], label: str) -> None:
    """Raise CheckpointError for tensors that are no plain arrays of numbers."""
    found: dict[tuple[str, str], list[str]] = {}
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            form = 'entries that are no tensors', 'Save model.state_dict(), and nothing beside it.'
        elif value.is_quantized or (value.is_floating_point() and value.itemsize < 2):
            form = 'quantized values', 'Save the weights before they were quantized.'
        elif value.is_nested or value.layout is not torch.strided:
            form = 'sparse or nested tensors', 'Call to_dense() on them and save the file again.'
        elif value.is_meta:
            form = 'tensors of the meta device, which have no values', 'Save the model after it was loaded.'
        else:
            continue
        found.setdefault(form, []).append(key)
    _raise(found, label)


def check_values(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], label: str) -> None:
    """Raise CheckpointError for numbers of another kind than the model's, infinite ones, and overflow in its dtypes.

    Args:
        state_dict: Dense tensors by the model's names.
        expected: The model's own, which have its dtypes.
        label: Name of the file for messages.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for key, value in state_dict.items():
        problem = _problem(value, expected.get(key, value).dtype)
        if problem:
            found.setdefault(problem, []).append(key)
    _raise(found, label)


def _problem(value: Tensor, dtype: torch.dtype) -> tuple[str, str] | None:
    """What is wrong with a tensor as one of this dtype, and the remedy."""
    if value.is_complex() and not dtype.is_complex:
        return 'complex numbers', _NO_WEIGHTS
    if value.dtype != dtype and (dtype.is_floating_point or value.dtype == torch.bool):
        if not value.is_floating_point():
            kind = 'booleans' if value.dtype == torch.bool else 'integers'
            return f'{kind} where the model has {_name(dtype)}', _NO_WEIGHTS
    if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value).all()):
        return 'infinite values or NaN', _DAMAGED
    if value.dtype == dtype:
        return None
    inside = value.to(dtype)
    if dtype.is_floating_point and not bool(torch.isfinite(inside).all()):
        return f"values that overflow in the model's {_name(dtype)}", 'Load it into a model of a wider dtype.'
    # Counters of batch norms may have been saved with all else in half precision.
    if not dtype.is_floating_point and not torch.equal(inside.to(value.dtype), value):
        return f"numbers that the model's {_name(dtype)} does not hold", _NO_WEIGHTS
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def _raise(found: Mapping[tuple[str, str], list[str]], label: str) -> None:
    for (what, remedy), keys in found.items():
        names = ', '.join(keys[: CheckpointMismatch.num_shown])
        raise CheckpointError(f'{label} holds {what} in {len(keys)} tensors: {names}. {remedy} Nothing was loaded.')
