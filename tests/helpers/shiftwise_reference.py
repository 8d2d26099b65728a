"""ShiftWise's operator on activations, and its tables drawn one entry at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.shifted_sum import activation_space, shift_and_add

__all__ = ['activation_space', 'draw_tables', 'shift_and_add']


def draw_tables(channels: int, kernel_size: int, small_kernel: int, num_reps: int) -> tuple[Tensor, Tensor]:
    """The tables, drawn in the documented order one entry at a time."""
    nk = -(-kernel_size // small_kernel)
    generator = torch.Generator().manual_seed(123)
    shifts = torch.zeros(channels * nk, 2 * num_reps, dtype=torch.int32)
    for column in range(2 * num_reps):
        for o in range(channels):
            order = torch.randperm(nk, generator=generator)
            for i in range(nk):
                pad = kernel_size // 2 - i * small_kernel - (small_kernel - 1)
                shifts[o * nk + order[i], column] = pad
    picks = torch.zeros(channels, num_reps, dtype=torch.int32)
    for g in range(num_reps):
        for o, r in enumerate(torch.randint(0, nk, (channels,), generator=generator).tolist()):
            picks[o, g] = o * nk + r
    return shifts, picks
