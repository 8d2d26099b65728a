"""CPU backend: PyTorch's own kernels, each in the memory layout where it is fast.

Three facts about PyTorch's depthwise convolution on CPU (oneDNN) decide the speed of a large
kernel. They were measured with float32 on x86 with AVX-512 (``tools/benchmark.py op``
repeats the measurement):

* In NCHW a kernel wider than 14 columns, or one whose padding exceeds the width of the map,
  leaves oneDNN's fast path and is 5-50 times slower than in channels-last.
* In channels-last a kernel of 13 columns takes about twice the time of one of 15.
* The gradient with respect to a large kernel costs 10-100 times as much as the forward pass in
  either layout, except in channels-last for a kernel of at most 3 columns on a map that is at
  least as high as the kernel. Wider kernels are taken three columns at a time there. On smaller
  maps the gradient is a batched matrix product, which costs about as much as the forward pass.

The layout is chosen by rule and not by timing, so that two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autocast import is_autocast_enabled

# Widest kernel which oneDNN's blocked NCHW code handles on its fast path.
_NCHW_MAX_WIDTH = 14
# Kernel width which is slower in channels-last than the next larger odd one.
_SLOW_CHANNELS_LAST_WIDTH = 13
# Number of kernel columns up to which oneDNN's weight gradient is on its fast path.
_FAST_GRADIENT_WIDTH = 3


def unavailable_reason(x: Tensor, kernels: Sequence[Tensor]) -> str | None:
    """Say why this backend cannot run on these tensors, or None if it can."""
    if x.device.type != 'cpu':
        return f'the input is on {x.device.type}, not on cpu'
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f'dtype {x.dtype} is not one of float32, float64, bfloat16'
    if is_autocast_enabled('cpu'):
        return 'CPU autocast is on, and chooses the precision of each convolution itself'
    return None


def run(x: Tensor, kernels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Convolve ``x`` depthwise with every kernel; see :func:`.reference.run`.

    The results have the memory format of ``x``.
    """
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *kernels))
    # Export and FLOP counters trace the network and understand plain convolutions only.
    if not needs_gradient or torch.jit.is_tracing():
        return tuple(_convolve(x, k) for k in kernels)
    return tuple(_DepthwiseConv2d.apply(x, k) for k in kernels)


class _DepthwiseConv2d(torch.autograd.Function):
    """Depthwise convolution, (N, C, H, W) with (C, kh, kw), same size, odd kh and kw."""

    @staticmethod
    def forward(x: Tensor, kernel: Tensor) -> Tensor:  # type: ignore[override]
        return _convolve(x, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore
        x, kernel = ctx.saved_tensors
        grad_x = grad_kernel = None
        if ctx.needs_input_grad[0]:
            # With odd kernels and symmetric padding the adjoint is the same convolution with
            # the kernel flipped, which is faster than PyTorch's own input gradient.
            grad_x = _convolve(grad, kernel.flip(1, 2))
        if ctx.needs_input_grad[1]:
            grad_kernel = _kernel_gradient(x, grad, kernel)
        return grad_x, grad_kernel


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve in the layout that is faster for this kernel and map; keep the layout of ``x``."""
    if x.numel() == 0:
        return x * kernel.sum()  # keeps the graph; there is nothing to compute
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    width = kernel.shape[2]
    if not is_channels_last:
        if width <= _NCHW_MAX_WIDTH and width // 2 <= x.shape[3]:
            return _conv2d(x.contiguous(), kernel)
        x = x.contiguous(memory_format=torch.channels_last)
    if width == _SLOW_CHANNELS_LAST_WIDTH:
        kernel = F.pad(kernel, (1, 1))
    y = _conv2d(x, kernel)
    return y if is_channels_last else y.contiguous()


def _conv2d(x: Tensor, kernel: Tensor) -> Tensor:
    padding = (kernel.shape[1] // 2, kernel.shape[2] // 2)
    return F.conv2d(x, kernel.unsqueeze(1), padding=padding, groups=x.shape[1])


def _kernel_gradient(x: Tensor, grad: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of a loss with respect to the kernel, (C, kh, kw)."""
    kh, kw = kernel.shape[1:]
    if x.numel() == 0:
        return torch.zeros_like(kernel)
    if kernel.dtype is torch.bfloat16:  # sums over thousands of products need float32
        x, grad = x.float(), grad.float()
    # Work along the longer kernel axis.
    is_wide = kw > kh
    if is_wide:
        x, grad, kh, kw = x.transpose(2, 3), grad.transpose(2, 3), kw, kh
    if x.dtype is torch.float32 and x.shape[2] >= kh:
        gradient = _gradient_by_columns(x, grad, kh, kw)
    else:
        gradient = _gradient_by_matmul(x, grad, kh, kw)
    return (gradient.transpose(1, 2) if is_wide else gradient).to(kernel.dtype)


def _gradient_by_columns(x: Tensor, grad: Tensor, kh: int, kw: int) -> Tensor:
    """Gradient of a tall kernel (C, kh, kw) by PyTorch's own code, a few columns at a time."""
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    width = min(kw, _FAST_GRADIENT_WIDTH)
    columns: list[Tensor] = []
    while len(columns) < kw:
        # The last group overlaps the one before if the columns do not divide evenly.
        first = min(len(columns), kw - width)
        # Columns of x that these taps see: (kw // 2 - first) to the left of the pixel, and on.
        left = kw // 2 - first
        seen = F.pad(x, (left, width - 1 - left)).contiguous(memory_format=torch.channels_last)
        part = torch.ops.aten.convolution_backward(
            grad, seen, x.new_empty(x.shape[1], 1, kh, width), None, [1, 1], [kh // 2, 0], [1, 1],
            False, [0, 0], x.shape[1], [False, True, False])[1].squeeze(1)  # fmt: skip
        columns += part.unbind(-1)[len(columns) - first:]
    return torch.stack(columns, dim=-1)


def _gradient_by_matmul(x: Tensor, grad: Tensor, kh: int, kw: int) -> Tensor:
    """Gradient of a tall kernel by matrix products.

    The gradient of tap (m, j) is the sum over images n, rows h and columns w of
    ``x[n, c, h + m - kh // 2, w + j - kw // 2] * grad[n, c, h, w]``. For a fixed column shift j
    the products of all row pairs are one H x H matrix per channel, with images and columns as
    the contracted dimension, and tap m is the sum of its diagonal ``m - kh // 2``.

    Args:
        x: Input, (N, C, H, W), any strides.
        grad: Gradient of the output, same shape.
        kh: Kernel height.
        kw: Kernel width.

    Returns:
        Tensor of shape (C, kh, kw) with the dtype of ``x``.
    """
    n, c, h, w = x.shape
    reach = min(kh // 2, h - 1)  # taps further out never meet the image
    margin = kw // 2
    padded_width = w + 2 * margin
    contracted = n * padded_width - 2 * margin
    # Images side by side in one row. x has its padding around each image and grad behind it, so
    # that a column shift is an offset into the row: what a shift brings in from the next image
    # meets a zero of grad.
    rows = F.pad(x.permute(1, 2, 0, 3), (margin, margin)).reshape(c, h, n * padded_width)
    grads = F.pad(grad.permute(1, 2, 0, 3), (0, 2 * margin)).reshape(c, h, n * padded_width)
    grads = grads[:, :, :contracted].transpose(1, 2)
    taps = []
    for j in range(kw):
        pairs = torch.bmm(rows[:, :, j:j + contracted], grads)  # (C, H of x, H of grad)
        pairs = F.pad(pairs, (0, 0, reach, reach))
        stride = pairs.stride()
        diagonals = pairs.as_strided(
            (c, 2 * reach + 1, h), (stride[0], stride[1], stride[1] + stride[2]))  # fmt: skip
        taps.append(diagonals.sum(-1))
    gradient = torch.stack(taps, dim=-1)
    beyond = kh // 2 - reach
    return F.pad(gradient, (0, 0, beyond, beyond))
