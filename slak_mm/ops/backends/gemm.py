"""Matrix products along the long axis, in plain PyTorch, on any device.

One row of a depthwise convolution is the product of that row with a banded Toeplitz matrix which holds the taps of one
kernel row. A branch with a wide n x M kernel is hence the sum over the n kernel rows of batched matrix products
(channels are the batch) of row-shifted views of the padded input with an W x W matrix per channel; for a tall kernel
the matrix stands on the left. That costs W / M times the multiplications of the direct form, fewer than it on a map
narrower than the kernel, and they are matrix products. Rows that are long beside the kernel are cut into tiles of T
outputs, which see T + M - 1 inputs, so that the cost stays (T + M - 1) / M.

WBMM (Wang et al., https://github.com/wansong-s/WBMM) computes large depthwise kernels by batched matrix products too.

Both gradients are matrix products as well: that of the input is the convolution with the flipped
kernel; that of the kernel is the sums of the diagonals of the products of input and gradient.

Channels are taken in groups, so that the copies and matrices of one group take at most
:data:`GROUP_BYTES` and stay in the cache of a CPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .layout import memory_format

GROUP_BYTES = {'cpu': 4 << 20, 'cuda': 256 << 20}
"""Working memory of a group of channels by device type."""

CACHE_BYTES = 512 << 20
"""Limit of the matrices which are kept for kernels that do not change (CPU)."""

_TILE = 64
# Kernels up to this length are left to PyTorch's convolution.
_SHORT = 7


def unavailable_reason(x: Tensor, kernels: Sequence[Tensor]) -> str | None:
    """Say why this backend cannot run on these tensors, or None if it can."""
    if not x.dtype.is_floating_point:
        return f'dtype {x.dtype} is not a floating-point type'
    return None


def is_preferred(x: Tensor, kernels: Sequence[Tensor]) -> bool:
    """On the CPU for half precision, which PyTorch convolves slowly."""
    return x.device.type == 'cpu' and x.dtype is torch.float16


def forward(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> tuple[Tensor, ...]:
    """See :mod:`slak_mm.ops.backends`."""
    return tuple(convolve(x, [(x, kernel) for kernel in kernels], reduce, bias, keep=True))


def backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """See :mod:`slak_mm.ops.backends`."""
    grads = reference.expand(grads, kernels)
    grad_x = grad_kernels = None
    if needs_x:
        (grad_x,) = convolve(x, [(grad, kernel.flip(1, 2)) for grad, kernel in zip(grads, kernels)], True)
    if needs_kernels:
        grad_kernels = tuple(kernel_gradient(x, grad, kernel) for grad, kernel in zip(grads, kernels))
    return grad_x, grad_kernels


def convolve(
    like: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], reduce: bool, bias: Tensor | None = None, keep: bool = False
) -> list[Tensor]:
    """Convolve several inputs (N, C, H, W), each with its kernel (C, kh, kw), into results like ``like``.

    With ``reduce`` their sum is the only result, to which a bias (C,) is added. ``keep`` says that the kernels may come
    again unchanged, so that it pays to keep their matrices.
    """
    layout = memory_format(like)
    dtype = reference.sum_dtype(like.dtype) if reduce else like.dtype
    results: list[Tensor] = []
    for x, kernel in pairs:
        if max(kernel.shape[1:]) <= _SHORT:
            y = reference.convolve(x.to(dtype), kernel.to(dtype))
            if reduce and results:
                results[0] += y
            else:
                results.append(y.contiguous(memory_format=layout))
            continue
        is_new = not (reduce and results)
        if is_new:
            results.append(torch.empty_like(like, dtype=dtype, memory_format=layout))
        _convolve_long(x, kernel, results[-1], accumulate=not is_new, keep=keep)
    if bias is not None:
        results[0] += bias.view(-1, 1, 1)
    return [y.to(like.dtype) for y in results]


def _convolve_long(x: Tensor, kernel: Tensor, out: Tensor, accumulate: bool, keep: bool) -> None:
    """Convolve with a large kernel into ``out``, group by group of channels."""
    kh, kw = kernel.shape[1:]
    if kw < kh:  # a tall kernel is a wide one on the transposed map
        x, kernel, out = x.transpose(2, 3), kernel.transpose(1, 2), out.transpose(2, 3)
    n, c, h, w = x.shape
    dtype = _compute_dtype(x)
    tile = _tile_size(w, kernel.shape[2])
    # On a GPU the look-up would wait for the device, and to build them takes little there.
    matrices = _cache.get(kernel, w, tile, dtype) if keep and x.device.type == 'cpu' else None
    for group in _groups(x, kernel.shape[1], tile, dtype):
        part = matrices[group] if matrices is not None else toeplitz_matrices(kernel[group], w, tile, dtype)
        # In half precision each addition to the result would be rounded. On a CPU, where it is
        # not used, the additions are cheaper than the copy.
        y = _rows_times_matrices(
            x[:, group].to(dtype), part, kernel.shape[2], tile, joint=x.device.type != 'cpu', dtype=out.dtype
        )
        if accumulate:
            out[:, group] += y.to(out.dtype)
        else:
            out[:, group].copy_(y)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: half precision is for GPUs."""
    if x.device.type == 'cpu' and x.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return x.dtype


def _tile_size(width: int, length: int) -> int:
    """Outputs per tile; the whole row if tiles would save less than a third."""
    return _TILE if 3 * width > 4 * (_TILE + length - 1) else width


def _groups(x: Tensor, taps: int, tile: int, dtype: torch.dtype) -> list[slice]:
    """Groups of channels whose copies and matrices fit into the working memory."""
    n, c, h, w = x.shape
    itemsize = torch.empty((), dtype=dtype).element_size()
    copies = 3 if x.device.type == 'cpu' else 3 + taps
    bytes_per_channel = itemsize * (copies * n * (h + taps) * (w + tile) + taps * (w + tile) * tile)
    limit = GROUP_BYTES.get(x.device.type, GROUP_BYTES['cuda'])
    size = max(1, min(c, limit // max(1, bytes_per_channel)))
    return [slice(first, min(first + size, c)) for first in range(0, c, size)]


def toeplitz_matrices(kernel: Tensor, width: int, tile: int, dtype: torch.dtype) -> Tensor:
    """Banded matrices of the rows of wide kernels (C, n, M), M odd, for maps that are W = ``width`` wide.

    Their shape is (C, n, W, W) for a single tile, whose inputs are the row; else (C, n, tile + M - 1, tile). Entry
    (u, w) is the tap of the kernel that takes input u to output w.
    """
    c, n, length = kernel.shape
    inputs, first = (width, length // 2) if tile == width else (tile + length - 1, 0)
    # Entry (u, w) depends on u - w alone: row u is the line of all taps, read from place u on and backwards.
    taps = torch.arange(inputs + tile - 1, device=kernel.device) - (tile - 1) + first
    inside = (taps >= 0) & (taps < length)
    line = torch.where(inside, kernel.detach()[:, :, taps.clamp(0, length - 1)], 0).to(dtype)
    return line.unfold(-1, tile, 1).flip(-1)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a batched matrix product; unrounded to float32 where PyTorch can (from 2.8 on, CUDA)."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    elif a.device.type == 'cuda' and 'dtype' in torch.ops.aten.bmm.overloads():
        out.copy_(torch.bmm(a, b, out_dtype=out.dtype))
    else:
        out.copy_(torch.bmm(a, b))


def _rows_times_matrices(
    x: Tensor, matrices: Tensor, length: int, tile: int, joint: bool, dtype: torch.dtype
) -> Tensor:
    """Convolve (N, C, H, W) with wide kernels, given as Toeplitz matrices, into ``dtype``.

    With ``joint`` the products of all kernel rows are one product, else they are added up.
    """
    n, c, h, w = x.shape
    taps = matrices.shape[1]
    margin = taps // 2
    is_tiled = tile < w
    sides = (length // 2, -w % tile + length // 2) if is_tiled else (0, 0)
    # Images below each other in one column, with padding between, so that a row shift is an
    # offset for all of them. The rows computed at the seams are dropped.
    rows = F.pad(x.transpose(0, 1), (*sides, margin, margin)).flatten(1, 2)
    count = rows.shape[1] - 2 * margin
    width = -(-w // tile) * tile
    y = rows.new_empty(c, count + 2 * margin, width, dtype=dtype if joint else None)
    inputs = matrices.shape[2]
    for first in range(0, width, tile):
        into = y[:, :count, first : first + tile]
        seen = [rows[:, i : i + count, first : first + inputs] for i in range(taps)]
        if joint:
            _multiply(torch.cat(seen, dim=-1), matrices.flatten(1, 2), into)
            continue
        torch.bmm(seen[0], matrices[:, 0], out=into)
        for i in range(1, taps):
            into.baddbmm_(seen[i], matrices[:, i])
    return y.unflatten(1, (n, -1))[:, :, :h, :w].transpose(0, 1)


# ---------------------------------------------------------------------------- kernel gradient


def kernel_gradient(x: Tensor, grad: Tensor, kernel: Tensor) -> Tensor:
    """Gradient with respect to a kernel, of its shape and dtype.

    The gradient of tap (i, m) is the sum over images, rows h and columns w of ``x[h + i - kh // 2, w + m - kw // 2] *
    grad[h, w]``. For a fixed i the products of all pairs of columns are one matrix per channel, with images and rows as
    the contracted dimension, and tap m is the sum of its diagonal ``m - kw // 2``. ``x`` and ``grad`` are (N, C, H, W);
    the values of ``kernel``, (C, kh, kw), do not matter.
    """
    is_tall = kernel.shape[1] > kernel.shape[2]
    if is_tall:
        x, grad, kernel = x.transpose(2, 3), grad.transpose(2, 3), kernel.transpose(1, 2)
    dtype = _compute_dtype(x)
    taps, length = kernel.shape[1:]
    tile = _tile_size(x.shape[3], length)
    gradient = torch.cat(
        [
            _gradient_of_rows(x[:, group].to(dtype), grad[:, group].to(dtype), taps, length, tile)
            for group in _groups(x, taps, tile, dtype)
        ]
    )
    return (gradient.transpose(1, 2) if is_tall else gradient).to(kernel.dtype)


def _gradient_of_rows(x: Tensor, grad: Tensor, taps: int, length: int, tile: int) -> Tensor:
    """Gradient of wide kernels, (C, taps, length)."""
    n, c, h, w = x.shape
    margin, half = taps // 2, length // 2
    is_tiled = tile < w
    reach = half if is_tiled else min(half, w - 1)  # taps further out never meet the image
    sides = (half, -w % tile + half) if is_tiled else (0, 0)
    # As in _rows_times_matrices; what a row shift brings in from the next image meets a zero.
    rows = F.pad(x.transpose(0, 1), (*sides, margin, margin)).flatten(1, 2)
    grads = F.pad(grad.transpose(0, 1), (0, -w % tile, 0, 2 * margin)).flatten(1, 2)
    count = rows.shape[1] - 2 * margin
    inputs = tile + length - 1 if is_tiled else w
    result = []
    for i in range(taps):
        pairs: Tensor | None = None
        for first in range(0, w, tile):
            seen = rows[:, i : i + count, first : first + inputs].transpose(1, 2)
            given = grads[:, :count, first : first + tile]
            product = x.new_empty(c, inputs, tile, dtype=reference.sum_dtype(x.dtype))
            _multiply(seen, given, product)
            pairs = product if pairs is None else pairs.add_(product)
        assert pairs is not None
        if not is_tiled:
            pairs = F.pad(pairs, (0, 0, reach, reach))
        stride = pairs.stride()
        diagonals = pairs.as_strided((c, 2 * reach + 1, pairs.shape[2]), (stride[0], stride[1], stride[1] + stride[2]))
        result.append(diagonals.sum(-1))
    gradient = torch.stack(result, dim=1)
    return F.pad(gradient, (half - reach, half - reach))


# -------------------------------------------------------------------------------------- cache


class _Cache:
    """Toeplitz matrices of the kernels used last.

    They are made when a kernel comes a second time with the same values, so not in training, and
    used only if the kernel still has these values. The values are compared at each call, which
    costs a fraction of the matrix products: no way of changing a weight leaves a matrix behind.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple, tuple[Tensor, Tensor | None]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, kernel: Tensor, width: int, tile: int, dtype: torch.dtype) -> Tensor | None:
        """Matrices of a kernel, or None where none are kept."""
        key = (kernel.data_ptr(), kernel.shape, kernel.stride(), kernel.dtype, width, tile, dtype)
        with self._lock:
            values, matrices = self._entries.pop(key, (None, None))
            is_same = values is not None and torch.equal(values, kernel)
            if not is_same:
                values, matrices = kernel.detach().clone(), None
            elif matrices is None:
                matrices = toeplitz_matrices(kernel, width, tile, dtype)
            assert values is not None
            self._entries[key] = values, matrices
            while self._entries and self.nbytes() > CACHE_BYTES:
                self._entries.popitem(last=False)
            return matrices

    def nbytes(self) -> int:
        """Memory in use."""
        return sum(
            values.nbytes + (0 if matrices is None else matrices.nbytes) for values, matrices in self._entries.values()
        )


_cache = _Cache()
