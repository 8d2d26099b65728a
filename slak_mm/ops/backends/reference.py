"""Ground truth of the cross convolution: one ``F.conv2d`` per kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._context import is_counted

# Kernels with as many rows and fewer columns are padded, see _widened.
_MANY_ROWS, _SAFE_COLUMNS = 17, 5


def unavailable_reason(x: Tensor, kernels: Sequence[Tensor]) -> str | None:
    """Say why this backend cannot run; it runs everywhere."""
    return None


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve (N, C, H, W) depthwise with (C, kh, kw), kh and kw odd, keeping the size."""
    if torch.is_grad_enabled() and not torch.jit.is_tracing() and not is_counted():
        kernel = _widened(kernel)
    padding = (kernel.shape[1] // 2, kernel.shape[2] // 2)
    return F.conv2d(x, kernel.unsqueeze(1), padding=padding, groups=x.shape[1])


def _widened(kernel: Tensor) -> Tensor:
    """A kernel (C, kh, kw) with columns of zeros where PyTorch's gradient would be wrong without.

    oneDNN's gradient of a depthwise kernel of at most 3 columns and more than some 36 rows is wrong
    by a fifth of its largest value (NCHW, version 3.12 on a CPU with AVX-512).
    """
    rows, columns = kernel.shape[1:]
    if kernel.device.type != 'cpu' or rows < _MANY_ROWS or columns >= _SAFE_COLUMNS:
        return kernel
    side = (_SAFE_COLUMNS - columns) // 2
    return F.pad(kernel, (side, side))


def forward(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> tuple[Tensor, ...]:
    """See :mod:`slak_mm.ops.backends`. Differentiable by autograd."""
    if not reduce:
        return tuple(convolve(x, kernel) for kernel in kernels)
    return (sum_of_convolutions([x] * len(kernels), kernels, bias),)


def sum_of_convolutions(
    inputs: Sequence[Tensor],
    kernels: Sequence[Tensor],
    bias: Tensor | None,
    convolve: Callable[[Tensor, Tensor], Tensor] = convolve,
) -> Tensor:
    """Convolve inputs (N, C, H, W), each with its kernel, and add up, with a bias (C,); rounds once."""
    dtype = sum_dtype(inputs[0].dtype)
    results = [convolve(x.to(dtype), kernel.to(dtype)) for x, kernel in zip(inputs, kernels)]
    total = sum(results[1:], start=results[0])
    return (total if bias is None else total + bias.view(-1, 1, 1)).to(inputs[0].dtype)


def backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """See :mod:`slak_mm.ops.backends`. Differentiable by autograd, to any order."""
    dtype = sum_dtype(x.dtype)
    grad_x: Tensor | None = None
    grad_kernels = []
    for kernel, grad in zip(kernels, expand(grads, kernels), strict=True):
        padded = _widened(kernel)
        side = (padded.shape[2] - kernel.shape[2]) // 2
        padding = [padded.shape[1] // 2, padded.shape[2] // 2]
        part, grad_kernel = gradients(grad.to(dtype), x.to(dtype), padded.to(dtype), padding, needs_x, needs_kernels)
        if needs_x:
            grad_x = part if grad_x is None else grad_x + part
        if needs_kernels:
            grad_kernels.append(grad_kernel.narrow(2, side, kernel.shape[2]).to(x.dtype))
    return None if grad_x is None else grad_x.to(x.dtype), tuple(grad_kernels) if needs_kernels else None


def gradients(
    grad: Tensor, x: Tensor, kernel: Tensor, padding: list[int], needs_x: bool, needs_kernel: bool
) -> tuple[Any, Any]:
    """PyTorch's gradients of a depthwise convolution: (N, C, H, W) and (C, kh, kw), each if it is needed."""
    fixed = [1, 1], padding, [1, 1], False, [0, 0], x.shape[1]  # stride, dilation, not transposed, groups
    needed = [needs_x, needs_kernel, False]
    grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(grad, x, kernel.unsqueeze(1), None, *fixed, needed)
    return grad_x, grad_kernel.squeeze(1) if needs_kernel else None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which branches that are added up should be computed: float32 at least.

    Rounded to half precision before, branches that nearly cancel would leave mostly rounding.
    """
    return torch.float32 if dtype.itemsize < 4 else dtype


def expand(grads: Sequence[Tensor], kernels: Sequence[Tensor]) -> Sequence[Tensor]:
    """One gradient per kernel; a single one is that of the sum of all branches."""
    return grads if len(grads) == len(kernels) else [grads[0]] * len(kernels)
