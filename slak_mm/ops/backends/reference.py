"""Ground truth of the cross convolution: one ``F.conv2d`` per kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable_reason(x: Tensor, kernels: Sequence[Tensor]) -> str | None:
    """Say why this backend cannot run; it runs everywhere."""
    return None


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve (N, C, H, W) depthwise with (C, kh, kw), kh and kw odd, keeping the size."""
    padding = (kernel.shape[1] // 2, kernel.shape[2] // 2)
    return F.conv2d(x, kernel.unsqueeze(1), padding=padding, groups=x.shape[1])


def forward(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> tuple[Tensor, ...]:
    """See :mod:`slak_mm.ops.backends`. Differentiable by autograd."""
    results = tuple(convolve(x, kernel) for kernel in kernels)
    return (sum_of(results, bias),) if reduce else results


def sum_of(results: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Sum of (N, C, H, W) tensors and a bias (C,)."""
    total = results[0]
    for y in results[1:]:
        total = total + y
    return total if bias is None else total + bias.view(-1, 1, 1)


def backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """See :mod:`slak_mm.ops.backends`. Differentiable by autograd, to any order."""
    grad_x: Tensor | None = None
    grad_kernels = []
    for kernel, grad in zip(kernels, expand(grads, kernels), strict=True):
        of_x, of_kernel = torch.ops.aten.convolution_backward(
            grad,
            x,
            kernel.unsqueeze(1),
            None,
            [1, 1],
            [kernel.shape[1] // 2, kernel.shape[2] // 2],
            [1, 1],
            False,
            [0, 0],
            x.shape[1],
            [needs_x, needs_kernels, False],
        )[:2]
        if needs_x:
            grad_x = of_x if grad_x is None else grad_x + of_x
        if needs_kernels:
            grad_kernels.append(of_kernel.squeeze(1))
    return grad_x, tuple(grad_kernels) if needs_kernels else None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which branches that are added up should be computed: float32 at least.

    Rounded to half precision before, branches that nearly cancel would leave mostly rounding.
    """
    return torch.float32 if dtype.itemsize < 4 else dtype


def expand(grads: Sequence[Tensor], kernels: Sequence[Tensor]) -> Sequence[Tensor]:
    """One gradient per kernel; a single one is that of the sum of all branches."""
    return grads if len(grads) == len(kernels) else [grads[0]] * len(kernels)
