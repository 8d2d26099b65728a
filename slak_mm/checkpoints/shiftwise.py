"""What ShiftWise checkpoints need beyond other names: filter paths and index tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slak_mm.ops.shift_tables import ghost_channels, num_filters, shift_tables

from .errors import CheckpointError

__all__ = ['fit_paths', 'merge_paths', 'without_generated_tables']

_PATH = re.compile(r'(.*large_kernel\.)filters\.(\d+)\.weight$')


def merge_paths(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Sum the filter paths of every operator; the computed function stays the same.

    Args:
        state_dict: Tensors by our names, with any prefix.

    Returns:
        The same with ``filters.0`` only.
    """
    return fit_paths(state_dict, 1)[0]


def fit_paths(state_dict: Mapping[str, Any], num_paths: int, prefix: str = '') -> tuple[dict[str, Any], str]:
    """Bring filter paths to another number, where that leaves the computed function as it is.

    Several paths are summed into one. A single path becomes the first of several, and the others
    are zero. Several paths are not distributed over another number of them.

    Args:
        state_dict: Tensors by our names, with any prefix.
        num_paths: The number wanted.
        prefix: Leave names alone that do not begin with it. Defaults to ''.

    Returns:
        The state dict, its order kept, and a sentence on what was done, '' if
        nothing was.
    """
    fitted: dict[str, Any] = {}
    remark = ''
    paths_of = _paths(state_dict)
    for key, value in state_dict.items():
        match = _PATH.match(key) if key.startswith(prefix) else None
        paths = paths_of[match.group(1)] if match else {}
        found = len(paths)
        same_shape = len({tuple(path.shape) for path in paths.values()}) == 1
        if match is None or found == num_paths or 1 not in (found, num_paths) or not same_shape:
            fitted[key] = value
            continue
        first = f'{match.group(1)}filters.0.weight'
        if first in fitted:
            continue  # summed before
        merged = sum(list(paths.values())[1:], start=value)
        fitted[first] = merged
        for p in range(1, num_paths):
            fitted[f'{match.group(1)}filters.{p}.weight'] = torch.zeros_like(merged)
        remark = (
            f'the {found} filter paths of the checkpoint were summed into one'
            if found > 1
            else f'the single filter path of the checkpoint became the first of {num_paths}; the others are zero'
        )
    return fitted, remark


def _paths(state_dict: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Filters of each operator by their number."""
    paths: dict[str, dict[int, Any]] = {}
    for key, value in state_dict.items():
        match = _PATH.match(key)
        if match:
            paths.setdefault(match.group(1), {})[int(match.group(2))] = value
    return paths


def without_generated_tables(state_dict: Mapping[str, Any], pattern: re.Pattern[str]) -> dict[str, Any]:
    """Leave out the index tables, which the official code generates and does not store.

    Args:
        state_dict: Tensors by our names, with any prefix.
        pattern: Matches the tables' names.

    Returns:
        The rest.

    Raises:
        CheckpointError: A table is not the one that the official code would generate.
    """
    for key, shifts in state_dict.items():
        if not (pattern.match(key) and key.endswith('.shifts')):
            continue
        operator = key.removesuffix('shifts')
        names = ('picks', 'rep', 'ghost', 'filters.0.weight')
        if any(operator + name not in state_dict for name in names):
            continue
        picks, rep, ghost, filters = (state_dict[operator + name] for name in names)
        if not any(
            _equal((shifts, picks, rep, ghost), tables)
            for tables in _official_tables(shifts, picks, rep, ghost, filters)
        ):
            raise CheckpointError(
                f'The index tables {operator}* are not those which the official code generates, '
                'and its checkpoints cannot hold others.'
            )
    return {key: value for key, value in state_dict.items() if not pattern.match(key)}


def _official_tables(
    shifts: Tensor, picks: Tensor, rep: Tensor, ghost: Tensor, filters: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """The tables for every kernel size that the greatest shift allows."""
    small = filters.shape[-1]
    channels, num_reps = picks.shape
    half = int(shifts.max()) + small - 1
    for kernel_size in (2 * half, 2 * half + 1):
        if kernel_size >= small and (num_filters(kernel_size, small) * channels == filters.shape[0]):
            yield (
                *shift_tables(channels, kernel_size, small, num_reps),
                *ghost_channels(len(rep) + len(ghost), len(ghost)),
            )


def _equal(tables: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(a.shape == b.shape and bool((a.cpu() == b).all()) for a, b in zip(tables, others))
