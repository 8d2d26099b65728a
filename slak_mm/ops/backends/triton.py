"""Triton backend: fused forward and both gradients on CUDA devices.

Maps are staged as planes with contiguous rows (:mod:`slak_mm.ops.backends._triton_kernels`). A wide kernel is a product
of row-shifted blocks with banded matrices; a tall one is the same on the transposed planes, whose results are stored
transposed back. The gradient of a kernel is a product of inputs and gradients over all rows, whose diagonals are
summed. Sums are in float32 and in a fixed order, so that every run gives the same bits; branches that are added up are
rounded once. float32 inputs are multiplied in TF32 if ``torch.backends.cudnn.allow_tf32`` says so for convolutions.

The sizes of blocks follow from the shape, nothing is timed. Triton is imported at the first use. With the environment
variable ``TRITON_INTERPRET=1`` the kernels run on the CPU, slowly, which the tests use.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import eights, memory_format, power_of_two

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TILE = 64  # outputs along a row, and side of the tiles of transposed copies
_LEAST = 16  # rows and columns of a matrix product
_PROGRAMS = 1056  # eight for each of 132 multiprocessors; the rows are split among as many
_MOST_KEPT_BYTES = 80 << 10  # of banded matrices, beside which a block of inputs fits into shared memory


def unavailable_reason(x: Tensor, kernels: Sequence[Tensor]) -> str | None:
    """Say why this backend cannot run on these tensors, or None if it can."""
    if x.device.type != 'cuda' and not (_is_interpreted() and x.device.type == 'cpu'):
        return f'the input is on {x.device.type}, not on cuda'
    if x.dtype not in _DTYPES:
        return f'dtype {x.dtype} is not one of float16, bfloat16, float32'
    if not is_installed():
        return 'Triton 3 or later is not installed'
    if x.device.type == 'cuda' and torch.version.hip is None:
        capability = _capability(x.device)
        least = (8, 0) if x.dtype is torch.bfloat16 else (7, 0)
        if capability < least:
            return f'the GPU has compute capability {capability[0]}.{capability[1]}, below {least[0]}.{least[1]}'
    return None


def is_preferred(x: Tensor, kernels: Sequence[Tensor]) -> bool:
    """On GPUs, for kernels that are larger than what PyTorch's own are written for; the interpreter is for tests."""
    return x.device.type == 'cuda' and max(max(k.shape[1:]) for k in kernels) > 7


def _is_interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET') == '1'


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


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
    planes = _Planes(x)
    return _convolve([planes] * len(kernels), kernels, bias, reduce)


def backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """See :mod:`slak_mm.ops.backends`."""
    layout = memory_format(x)
    gradients = [_Planes(grad.contiguous(memory_format=layout)) for grad in grads]
    if len(gradients) < len(kernels):  # that of the sum of all branches, staged once
        gradients *= len(kernels)
    grad_x = grad_kernels = None
    if needs_x:
        # The adjoint is the same convolution with the kernels flipped.
        (grad_x,) = _convolve(gradients, kernels, None, True, flipped=True)
    if needs_kernels:
        planes = _Planes(x)
        grad_kernels = tuple(_kernel_gradient(planes, g, kernel) for g, kernel in zip(gradients, kernels))
    return grad_x, grad_kernels


class _Planes:
    """A map (N, C, H, W) as planes with rows that are padded to a multiple of 8 entries, and as transposed ones."""

    def __init__(self, x: Tensor) -> None:
        self.layout = memory_format(x)
        self.x = x.contiguous(memory_format=self.layout)
        self.shape = tuple(x.shape)

    @cached_property
    def rows(self) -> Tensor:
        """(N, C, H, W rounded up)."""
        n, c, h, w = self.shape
        padded = eights(w)
        if self.layout is torch.contiguous_format:
            return F.pad(self.x, (0, padded - w)) if padded > w else self.x
        planes = self.x.new_empty(n, c, h, padded)
        _transpose(self.x, planes, (n, h, w, c), padded, (h * w * c, w * c, c), (c * h * padded, padded, h * padded))
        return planes

    @cached_property
    def columns(self) -> Tensor:
        """(N, C, W, H rounded up)."""
        n, c, h, w = self.shape
        padded = eights(h)
        planes = self.x.new_empty(n, c, w, padded)
        if self.layout is torch.contiguous_format:
            sizes, strides, to = (n, c, h, w), (c * h * w, h * w, w), (c * w * padded, w * padded, padded)
        else:
            sizes, strides, to = (n, w, h, c), (h * w * c, c, w * c), (c * w * padded, padded, w * padded)
        _transpose(self.x, planes, sizes, padded, strides, to)
        return planes

    def along(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """The planes whose rows lie along the longer side of a kernel, and a view of the kernel as it lies on them."""
        if kernel.shape[1] > kernel.shape[2]:
            return self.columns, kernel.transpose(1, 2)
        return self.rows, kernel


def _convolve(
    inputs: Sequence[_Planes], kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool, flipped: bool = False
) -> tuple[Tensor, ...]:
    """Convolve each input with its kernel, or with it flipped; the results have the layout of the inputs."""
    from . import _triton_kernels

    x = inputs[0].x
    n, c, h, w = inputs[0].shape
    results = x.new_empty(1 if reduce else len(kernels), n, c, h, eights(w))
    sums = x.new_empty(results.shape[1:], dtype=torch.float32) if reduce and len(kernels) > 1 else None
    for i, (planes, kernel) in enumerate(zip(inputs, kernels)):
        source, kernel = planes.along(kernel)
        is_last = i == len(kernels) - 1
        into = sums if reduce and not is_last else results[0 if reduce else i]
        rows, length = n * source.shape[2], w if source is planes.rows else h
        blocks = _blocks(length, kernel, x.element_size())
        tiles = -(-length // blocks['T'])
        steps, splits = _split(rows, blocks['R'], c * tiles)
        channel, row, tap = kernel.stride()
        first = (kernel.shape[1] - 1) * row + (kernel.shape[2] - 1) * tap if flipped else 0
        _triton_kernels.convolve_rows[(c, tiles, splits)](
            *(source, kernel, kernel if bias is None else bias.contiguous(), into if sums is None else sums, into),
            *(n, c, source.shape[2], length, source.shape[3] // 8, results.shape[-1] // 8, steps),
            *(kernel.shape[2], first, channel, -row if flipped else row, -tap if flipped else tap),
            KEEP=_keeps(blocks, kernel),
            TRANSPOSED=source is not planes.rows,
            HAS_BIAS=bias is not None and is_last,
            HAS_ADDEND=reduce and i > 0,
            PRECISION=_precision(x),
            **{name: size for name, size in blocks.items() if name != 'KW'},
            num_warps=8 if blocks['U'] == _TILE else 4,
        )
    return _unstage(results, w, inputs[0].layout)


def _unstage(results: Tensor, w: int, layout: torch.memory_format) -> tuple[Tensor, ...]:
    """Planes (K, N, C, H, W rounded up) as K maps (N, C, H, W) in a layout."""
    k, n, c, h, padded = results.shape
    if layout is torch.contiguous_format:
        return tuple(results[..., :w].contiguous().unbind())
    maps = results.new_empty(k * n, h, w, c)
    _transpose(results, maps, (k * n, h, c, w), c, (c * h * padded, padded, h * padded), (h * w * c, w * c, c))
    return tuple(maps.view(k, n, h, w, c).permute(0, 1, 4, 2, 3).unbind())


def _kernel_gradient(planes: _Planes, gradient: _Planes, kernel: Tensor) -> Tensor:
    """Gradient with respect to a kernel (C, kh, kw)."""
    from . import _triton_kernels

    x, lying = planes.along(kernel)
    g, _ = gradient.along(kernel)
    n, c, h, w = planes.shape
    length = w if x is planes.rows else h
    kh, kw = lying.shape[1:]
    blocks = _blocks(length, lying, x.element_size())
    tiles = -(-length // blocks['T'])
    steps, splits = _split(n * x.shape[2], blocks['R'], c * kh * tiles)
    out = x.new_zeros(splits, tiles, c, kh, kw, blocks['T'], dtype=torch.float32)
    _triton_kernels.kernel_gradient_rows[(c * kh, tiles, splits)](
        x, g, out, n, c, x.shape[2], length, x.shape[3] // 8, steps, PRECISION=_precision(x), **blocks, num_warps=4
    )
    result = out.sum((0, 1, 5)).to(kernel.dtype)
    return result if x is planes.rows else result.transpose(1, 2)


def _transpose(
    source: Tensor,
    to: Tensor,
    sizes: tuple[int, int, int, int],
    padded: int,
    source_strides: tuple[int, int, int],
    to_strides: tuple[int, int, int],
) -> None:
    """``to[n, other, b, a] = source[n, other, a, b]``; sizes (N, others, A, B), strides of n, other and a or b."""
    from . import _triton_kernels

    n, others, a, b = sizes
    grid = n * others * -(-padded // _TILE) * -(-b // _TILE)
    _triton_kernels.transpose[(grid,)](
        source, to, a, b, padded, others, *source_strides, *to_strides, SIDE=_TILE, num_warps=4
    )


def _blocks(length: int, kernel: Tensor, itemsize: int) -> dict[str, int]:
    """Sizes of the kernels' blocks for rows of a length and a kernel (C, KH, KW) that lies along them."""
    kh, kw = kernel.shape[1:]
    tile, reach = _TILE, max(32, power_of_two(kw // 2, _LEAST))  # few values, each of which is compiled once
    if length <= _TILE:  # a tile is the whole row, and so are its inputs
        tile, reach = power_of_two(length, _LEAST), 0
    return dict(
        KW=kw, KH=kh, R=64 if itemsize == 2 else 32, T=tile, U=power_of_two(tile + 2 * reach, _LEAST), OFF=reach
    )


def _keeps(blocks: dict[str, int], kernel: Tensor) -> bool:
    """Whether the banded matrices of all kernel rows are held at once."""
    size = blocks['KH'] * blocks['T'] * blocks['U'] * kernel.element_size()
    return blocks['KH'] <= 5 and size <= _MOST_KEPT_BYTES


def _split(rows: int, block: int, programs: int) -> tuple[int, int]:
    """Steps of each program and number of programs that share the rows."""
    total = -(-rows // block)
    splits = max(1, min(total, -(-_PROGRAMS // programs)))
    steps = -(-total // splits)
    return steps, -(-total // steps)


def _precision(x: Tensor) -> str:
    if x.device.type != 'cuda':
        return 'float32'
    return 'tf32' if torch.backends.cudnn.allow_tf32 else 'ieee'
