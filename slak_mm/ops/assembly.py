"""Large kernels assembled from small filters, symmetric about the output pixel.

``reference`` is :func:`~slak_mm.ops.shift_tables.assemble_kernels` and zero taps. On GPUs one launch does both, and one
gives the gradient: its threads read the tables, so that there are no matrices to make of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._fused import attempt, gradients, visible, why_not
from .backends.layout import in_memory, power_of_two
from .shift_tables import assemble_kernels

Kernels = tuple[Tensor, Tensor, Tensor]

_LEAST_ENTRIES = 256  # of a program: fewer sizes to compile


def centered_kernels(filters: Tensor, shifts: Tensor, picks: Tensor, kernel_size: int) -> Kernels:
    """Assemble the large kernels, and fill them up with zero taps to an odd length, the middle tap being K // 2.

    Args:
        filters: Shape (c * nk, 1, s, s).
        shifts: Table of shape (c * nk, 2 * G), see :func:`~slak_mm.ops.shift_tables.shift_tables`.
        picks: Table of shape (c, G).
        kernel_size: K.

    Returns:
        The tall kernel (c, length, s), the wide one (c, s, length), and the small one (c, s, s).
    """
    if why_not(filters) or not shifts.dtype is picks.dtype is torch.int32:
        return reference(filters, shifts, picks, kernel_size)
    operands = filters, shifts, picks, kernel_size
    return attempt(lambda: _CenteredKernels.apply(*operands), filters) or reference(*operands)


def reference(filters: Tensor, shifts: Tensor, picks: Tensor, kernel_size: int) -> Kernels:
    """Compute :func:`centered_kernels` by PyTorch's functions."""
    tall, wide, small = assemble_kernels(filters, shifts, picks, kernel_size)
    before, length = _centered(tall.shape[1], kernel_size)
    after = length - before - tall.shape[1]
    return F.pad(tall, (0, 0, before, after)), F.pad(wide, (before, after)), small


def _centered(taps: int, kernel_size: int) -> tuple[int, int]:
    """Zero taps before those of the filters, and the length with all zero taps."""
    center = kernel_size // 2
    reach = max(center, taps - 1 - center)
    return reach - center, 2 * reach + 1


class _CenteredKernels(torch.autograd.Function):
    """Takes the arguments of :func:`centered_kernels`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, filters: Tensor, shifts: Tensor, picks: Tensor, kernel_size: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(filters, shifts, picks)
        ctx.kernel_size = kernel_size
        tables = shifts.contiguous(), picks.contiguous()
        return tuple(_assemble(in_memory(filters).contiguous(), *tables, kernel_size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        filters, shifts, picks = ctx.saved_tensors

        def fused() -> Sequence[Tensor]:
            given = [in_memory(grad).contiguous() for grad in grads]
            return [_assemble_gradient(given, shifts.contiguous(), picks.contiguous(), filters, ctx.kernel_size)]

        def plain(filters: Tensor) -> Kernels:
            return reference(filters, shifts, picks, ctx.kernel_size)

        return *gradients(fused, plain, [filters], *grads), None, None, None


# ---------------------------------------------------------------------------- kernels' launches


@visible('(Tensor filters, Tensor shifts, Tensor picks, int kernel_size) -> Tensor[]')
def _assemble(filters: Tensor, shifts: Tensor, picks: Tensor, kernel_size: int) -> list[Tensor]:
    channels, s = len(picks), filters.shape[-1]
    nk = len(filters) // channels
    before, length = _centered(nk * s, kernel_size)
    tall, wide = filters.new_empty(channels, length, s), filters.new_empty(channels, s, length)
    small = filters.new_empty(channels, s, s)
    if not filters.is_meta:
        from .backends import _triton_passes

        sizes = dict(S=s, G=picks.shape[1], E=power_of_two(length * s, _LEAST_ENTRIES))
        first = kernel_size // 2 - (s - 1)
        _triton_passes.assemble[(channels,)](
            *(filters, shifts, picks, tall, wide, small, first, before, length, nk), **sizes, num_warps=4
        )
    return [tall, wide, small]


@visible('(Tensor[] grads, Tensor shifts, Tensor picks, Tensor filters, int kernel_size) -> Tensor')
def _assemble_gradient(
    grads: Sequence[Tensor], shifts: Tensor, picks: Tensor, filters: Tensor, kernel_size: int
) -> Tensor:
    channels, s = len(picks), filters.shape[-1]
    nk = len(filters) // channels
    before, length = _centered(nk * s, kernel_size)
    out = torch.empty_like(filters, memory_format=torch.contiguous_format)
    if not filters.is_meta:
        from .backends import _triton_passes

        sizes = dict(S=s, G=picks.shape[1], E=power_of_two(nk * s * s, _LEAST_ENTRIES))
        first = kernel_size // 2 - (s - 1)
        _triton_passes.assemble_gradient[(channels,)](
            *(*grads, shifts, picks, out, first, before, length, nk), **sizes, num_warps=4
        )
    return out
