"""ShiftWise's operator on activations, as the official code defines it: filter, shift, add.

It is what the convolution with assembled kernels is compared to, in the benchmarks and in the
tests. Nothing here is shared with the operator of the package but the layout of the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_and_add(filtered: Tensor, shifts: Tensor, picks: Tensor, small_kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the shifted results of the small filters.

    With e = s - 1 - s // 2 the margin of the input and p running over a channel's filters::

        wide[y, x]  = sum over p, g of filtered[p, y + e, x - shifts[p, g]]
        tall[y, x]  = sum over p, g of filtered[p, y - shifts[p, G + g], x + e]
        small[y, x] = sum over g    of filtered[picks[g], y + e, x + e]

    and what lies outside ``filtered`` is zero.

    Args:
        filtered: (N, c * nk, H + 2 e, W + 2 e).
        shifts: (c * nk, 2 G).
        picks: (c, G).
        small_kernel: s.

    Returns:
        wide, tall and small, each (N, c, H, W).
    """
    e = small_kernel - 1 - small_kernel // 2
    n, maps, padded_h, padded_w = filtered.shape
    h, w = padded_h - 2 * e, padded_w - 2 * e
    c, num_reps = picks.shape
    output = torch.arange(maps) // (maps // c)
    wide = filtered.new_zeros(n, c, h, w)
    tall = filtered.new_zeros(n, c, h, w)
    # Maps with the same shift are moved together.
    for g in range(num_reps):
        for shift in shifts[:, g].unique().tolist():
            rows = (shifts[:, g] == shift).nonzero()[:, 0]
            low, high = max(0, shift), min(w, padded_w + shift)
            if low < high:
                moved = filtered[:, rows, e : e + h, low - shift : high - shift]
                wide = wide.index_add(1, output[rows], F.pad(moved, (low, w - high)))
        for shift in shifts[:, num_reps + g].unique().tolist():
            rows = (shifts[:, num_reps + g] == shift).nonzero()[:, 0]
            low, high = max(0, shift), min(h, padded_h + shift)
            if low < high:
                moved = filtered[:, rows, low - shift : high - shift, e : e + w]
                tall = tall.index_add(1, output[rows], F.pad(moved, (0, 0, low, h - high)))
    center = filtered[:, :, e : e + h, e : e + w]
    small = filtered.new_zeros(n, c, h, w)
    for g in range(num_reps):
        small = small + center[:, picks[:, g].long()]
    return wide, tall, small


class FusedShiftAndAdd(torch.autograd.Function):
    """:func:`shift_and_add` without intermediate results, for benchmarks.

    It reads each filtered map once per shift and adds it to the output in place, and its adjoint
    does the reverse, as the official CUDA code does. Each filter of a channel must have a place
    of its own, as in the official tables.
    """

    @staticmethod
    def forward(ctx: Any, filtered: Tensor, shifts: Tensor, picks: Tensor, small_kernel: int) -> tuple[Tensor, ...]:
        """Sum the shifted maps."""
        ctx.save_for_backward(shifts, picks)
        ctx.geometry = filtered.shape, small_kernel
        e = small_kernel - 1 - small_kernel // 2
        n, _, padded_h, padded_w = filtered.shape
        outs = [filtered.new_zeros(n, len(picks), padded_h - 2 * e, padded_w - 2 * e) for _ in range(3)]
        for out, rows, to, source in _moves(outs, shifts, picks, filtered.shape, small_kernel):
            out[to] += filtered[:, rows][source]
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore
        """Gather the gradient of the filtered maps."""
        shifts, picks = ctx.saved_tensors
        shape, small_kernel = ctx.geometry
        grad = grads[0].new_zeros(shape)
        # A pick may name one filter twice within a row, but never twice for one repetition.
        for out, rows, to, source in _moves(grads, shifts, picks, shape, small_kernel):
            moved = grad[:, rows]
            moved[source] += out[to]
            grad[:, rows] = moved
        return grad, None, None, None


def _moves(
    outs: Sequence[Tensor], shifts: Tensor, picks: Tensor, shape: Sequence[int], small_kernel: int
) -> Iterator[tuple[Tensor, Tensor, tuple[slice, ...], tuple[slice, ...]]]:
    """Output, filters, and the windows of both, of every term of the sums; wide, tall, small."""
    e = small_kernel - 1 - small_kernel // 2
    padded_h, padded_w = shape[2:]
    h, w = padded_h - 2 * e, padded_w - 2 * e
    every = slice(None)
    num_reps = picks.shape[1]
    for column in range(2 * num_reps):
        is_wide = column < num_reps
        size, padded = (w, padded_w) if is_wide else (h, padded_h)
        for shift in shifts[:, column].unique().tolist():
            low, high = max(0, shift), min(size, padded + shift)
            if low >= high:
                continue
            rows = (shifts[:, column] == shift).nonzero()[:, 0]
            to, source = slice(low, high), slice(low - shift, high - shift)
            if is_wide:
                yield (outs[0], rows, (every, every, every, to), (every, every, slice(e, e + h), source))
            else:
                yield outs[1], rows, (every, every, to), (every, every, source, slice(e, e + w))
    for column in range(num_reps):
        yield (outs[2], picks[:, column].long(), (every,), (every, every, slice(e, e + h), slice(e, e + w)))


def activation_space(
    x: Tensor, filters: Tensor, shifts: Tensor, picks: Tensor, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The branches wide, tall and small, each (N, c, H, W), of a ShiftWise layer before their batch norms.

    Args:
        x: (N, c, H, W).
        filters: (c * nk, 1, s, s), the sum of the paths.
        shifts: (c * nk, 2 G).
        picks: (c, G).
        fused: Use the faster code for benchmarks.
    """
    s = filters.shape[-1]
    filtered = F.conv2d(x, filters, padding=s - 1, groups=x.shape[1])
    if fused:
        return FusedShiftAndAdd.apply(filtered, shifts, picks, s)
    return shift_and_add(filtered, shifts, picks, s)
