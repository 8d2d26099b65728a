"""Triton backend: fused forward and both gradients on CUDA devices.

The branches of a tile of the output are computed by one program, each as products of matrices
along its long axis, as in :mod:`slak_mm.ops.backends.gemm`, but with banded matrices that exist
in registers only and with in-bounds inputs only. The gradient of a kernel is a product of shifted
gradients and shifted inputs over blocks of pixels, whose partial sums are added in a fixed order.
Sums are in float32; float32 inputs are multiplied in TF32 if
``torch.backends.cudnn.allow_tf32`` says so for convolutions.

Channels-last tensors are copied to NCHW and back, which costs little beside the arithmetic.

The sizes of the blocks are timed once per shape class on a GPU. Triton is imported at the first
use. With the environment variable ``TRITON_INTERPRET=1`` the kernels run on the CPU, slowly,
which the tests use.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import measured, reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Tile height and width, inputs per step, warps; the first is taken where nothing is timed.
_CONVOLVE_BLOCKS = (
    (64, 64, 32, 4),
    (64, 64, 32, 8),
    (32, 64, 32, 4),
    (64, 32, 32, 4),
    (32, 32, 32, 4),
    (128, 64, 32, 8),
    (64, 64, 64, 8),
)
# Pixels per step, warps.
_GRADIENT_BLOCKS = ((32, 4), (64, 4), (128, 4), (64, 8))
# Programs that share the pixels of a channel are at most this many, and all programs about this.
_MOST_PARTS, _PROGRAMS = 64, 4096

_tuned: dict[tuple[Any, ...], tuple[int, ...]] = {}


def unavailable_reason(x: Tensor, kernels: Sequence[Tensor]) -> str | None:
    """Say why this backend cannot run on these tensors, or None if it can."""
    if x.device.type != 'cuda' and not (_is_interpreted() and x.device.type == 'cpu'):
        return f'the input is on {x.device.type}, not on cuda'
    if x.dtype not in _DTYPES:
        return f'dtype {x.dtype} is not one of float16, bfloat16, float32'
    if not is_installed():
        return 'Triton 3 or later is not installed'
    if x.device.type == 'cuda' and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(x.device)
        least = (8, 0) if x.dtype is torch.bfloat16 else (7, 0)
        if capability < least:
            return f'the GPU has compute capability {capability[0]}.{capability[1]}, below {least[0]}.{least[1]}'
    return None


def is_preferred(x: Tensor, kernels: Sequence[Tensor]) -> bool:
    """A candidate on GPUs only; the interpreter is for tests."""
    return x.device.type == 'cuda'


def _is_interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET') == '1'


@cache
def is_installed() -> bool:
    """Whether there is a Triton with the language features that the kernels use (3 or later)."""
    for name in ('triton', 'pytorch-triton', 'pytorch-triton-rocm', 'triton-windows'):
        try:
            return int(importlib.metadata.version(name).split('.')[0]) >= 3
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def forward(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> tuple[Tensor, ...]:
    """See :mod:`slak_mm.ops.backends`."""
    return tuple(_convolve([x.contiguous()] * len(kernels), kernels, bias, reduce))


def backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """See :mod:`slak_mm.ops.backends`."""
    planes = reference.expand([grad.contiguous() for grad in grads], kernels)
    grad_x = grad_kernels = None
    if needs_x:
        # The adjoint is the same convolution with the kernels flipped.
        grad_x = _convolve(planes, [k.flip(1, 2) for k in kernels], None, True)[0]
    if needs_kernels:
        x = x.contiguous()
        grad_kernels = tuple(_kernel_gradient(x, grad, kernel) for grad, kernel in zip(planes, kernels))
    return grad_x, grad_kernels


def _convolve(inputs: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> list[Tensor]:
    """Convolve contiguous inputs (N, C, H, W), each with its kernel."""
    from . import _triton_kernels

    n, c, h, w = inputs[0].shape
    results = [torch.empty_like(inputs[0]) for _ in range(1 if reduce else len(kernels))]
    sizes = [tuple(kernel.shape[1:]) for kernel in kernels] + [(0, 0)] * (3 - len(kernels))
    operands = [
        *_three(inputs),
        *_three([kernel.contiguous() for kernel in kernels]),
        results[0] if bias is None else bias.contiguous(),
        *_three(results),
    ]

    def launch(blocks: tuple[int, ...]) -> None:
        height, width, depth, warps = blocks
        # A tile need not be larger than the map; a matrix product needs 16.
        height, width = min(height, _power_of_two(h)), min(width, _power_of_two(w))
        tiles = -(-h // height) * -(-w // width)
        _triton_kernels.convolve_kernel[(n * c * tiles,)](
            *operands,
            c,
            h,
            w,
            *sizes[0],
            *sizes[1],
            *sizes[2],
            HAS_BIAS=bias is not None,
            REDUCE=reduce,
            BLOCK_H=height,
            BLOCK_W=width,
            BLOCK_K=depth,
            PRECISION=_precision(inputs[0]),
            num_warps=warps,
        )

    key = ('convolve', inputs[0].device, inputs[0].dtype, reduce, c, *_size_class(n, h, w), *sizes)
    _launch_tuned(launch, key, _CONVOLVE_BLOCKS, inputs[0].device)
    return results


def _kernel_gradient(x: Tensor, grad: Tensor, kernel: Tensor) -> Tensor:
    """Gradient with respect to a kernel (C, kh, kw), of contiguous x and grad."""
    from . import _triton_kernels

    n, c, h, w = x.shape
    kh, kw = kernel.shape[1:]
    is_tall = kh > kw
    taps, length = (kw, kh) if is_tall else (kh, kw)
    rows, long = (w, h) if is_tall else (h, w)
    strides = (1, w) if is_tall else (w, 1)

    result: list[Tensor] = []

    def launch(blocks: tuple[int, ...]) -> None:
        depth, warps = blocks
        items = n * long * -(-rows // depth) if is_tall else n * rows * -(-long // depth)
        parts = min(_MOST_PARTS, -(-_PROGRAMS // c), -(-items // 8))
        per_program = -(-items // parts)
        partial = x.new_empty(parts, c, taps, length, dtype=torch.float32)
        _triton_kernels.gradient_kernel[(c, parts)](
            x,
            grad,
            partial,
            n,
            c,
            rows,
            long,
            *strides,
            per_program,
            TAPS=taps,
            LENGTH=length,
            ALONG_R=is_tall,
            BLOCK_I=_power_of_two(taps),
            BLOCK_M=_power_of_two(length),
            BLOCK_K=depth,
            PRECISION=_precision(x),
            num_warps=warps,
        )
        result[:] = [partial.sum(0)]

    key = ('gradient', x.device, x.dtype, c, *_size_class(n, h, w), kh, kw)
    _launch_tuned(launch, key, _GRADIENT_BLOCKS, x.device)
    gradient = result[0].transpose(1, 2) if is_tall else result[0]
    return gradient.to(kernel.dtype)


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Three tensors; those that do not exist are stood for by the first and not touched."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _power_of_two(n: int) -> int:
    """The least power of two from 16 on that is not below n."""
    return max(16, 1 << (n - 1).bit_length())


def _size_class(*sizes: int) -> tuple[int, ...]:
    return tuple((n - 1).bit_length() for n in sizes)


def _precision(x: Tensor) -> str:
    if x.device.type != 'cuda':
        return 'float32'
    return 'tf32' if torch.backends.cudnn.allow_tf32 else 'ieee'


def _launch_tuned(
    launch: Callable[[tuple[int, ...]], None],
    key: tuple[Any, ...],
    choices: Sequence[tuple[int, ...]],
    device: torch.device,
) -> None:
    """Launch with the fastest block sizes, which are timed at the first call of each key."""
    blocks = _tuned.get(key, choices[0])
    if key not in _tuned and measured.may_measure(device):
        blocks = _tuned[key] = measured.fastest_of(launch, choices, device)
    launch(blocks)
