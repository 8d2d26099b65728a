"""CPU backend: PyTorch's own kernels, each in the memory layout where it is fast.

Three facts about PyTorch's depthwise convolution on CPU (oneDNN) decide the speed of a large
kernel. They were measured with float32 on x86 with AVX-512 (``slak-mm benchmark op``
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

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm, reference

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
    return None


def forward(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> tuple[Tensor, ...]:
    """See :mod:`slak_mm.ops.backends`."""
    if not reduce:
        return tuple(_convolve(x, kernel) for kernel in kernels)
    return (reference.sum_of_convolutions([x] * len(kernels), kernels, bias, _convolve),)


def backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """See :mod:`slak_mm.ops.backends`."""
    grads = reference.expand(grads, kernels)
    grad_x = grad_kernels = None
    if needs_x:
        # With odd kernels and symmetric padding the adjoint is the same convolution with the
        # kernel flipped, which is faster than PyTorch's own input gradient.
        grad_x = reference.sum_of_convolutions(grads, [kernel.flip(1, 2) for kernel in kernels], None, _convolve)
    if needs_kernels:
        grad_kernels = tuple(_kernel_gradient(x, grad, kernel) for grad, kernel in zip(grads, kernels))
    return grad_x, grad_kernels


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve in the layout that is faster for this kernel and map; keep the layout of ``x``."""
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    width = kernel.shape[2]
    if not is_channels_last:
        if width <= _NCHW_MAX_WIDTH and width // 2 <= x.shape[3]:
            return reference.convolve(x.contiguous(), kernel)
        x = x.contiguous(memory_format=torch.channels_last)
    if width == _SLOW_CHANNELS_LAST_WIDTH:
        kernel = F.pad(kernel, (1, 1))
    y = reference.convolve(x, kernel)
    return y if is_channels_last else y.contiguous()


def _kernel_gradient(x: Tensor, grad: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of a loss with respect to the kernel, (C, kh, kw)."""
    kh, kw = kernel.shape[1:]
    is_wide = kw > kh
    long, short = x.shape[:1:-1] if is_wide else x.shape[2:]
    # A line of pixels has no channels-last format of its own, and takes the path that is wrong for
    # many rows (see reference.py).
    if x.dtype is torch.float64 or long < max(kh, kw) or short == 1:
        return gemm.kernel_gradient(x, grad, kernel)
    x, grad = x.float(), grad.float()  # sums over thousands of products need it
    if is_wide:  # work along the longer axis
        gradient = _gradient_by_columns(x.transpose(2, 3), grad.transpose(2, 3), kw, kh)
        return gradient.transpose(1, 2).to(kernel.dtype)
    return _gradient_by_columns(x, grad, kh, kw).to(kernel.dtype)


def _gradient_by_columns(x: Tensor, grad: Tensor, kh: int, kw: int) -> Tensor:
    """Gradient of a tall kernel (C, kh, kw) by PyTorch's own code, a few columns at a time."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    padded = F.pad(x, (kw // 2, kw // 2))
    width = min(kw, _FAST_GRADIENT_WIDTH)
    columns: list[Tensor] = []
    while len(columns) < kw:
        # The last group overlaps the one before if the columns do not divide evenly.
        first = min(len(columns), kw - width)
        seen = padded[..., first : first + x.shape[3] + width - 1].contiguous(memory_format=torch.channels_last)
        _, part = reference.gradients(grad, seen, x.new_empty(x.shape[1], kh, width), [kh // 2, 0], False, True)
        columns += part.unbind(-1)[len(columns) - first :]
    return torch.stack(columns, dim=-1)
