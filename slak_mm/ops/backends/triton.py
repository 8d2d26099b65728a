"""Triton backend: fused forward and both gradients on CUDA devices.

Maps are staged as planes with contiguous rows (:mod:`slak_mm.ops.backends._triton_kernels`). A wide kernel is a product
of row-shifted blocks with banded matrices; a tall one is the same on the transposed planes, whose results are stored
transposed back. The gradient of a kernel is a product of inputs and gradients over all rows, whose diagonals are
summed. Sums are in float32 and in a fixed order, so that every run gives the same bits; branches that are added up are
rounded once. float32 inputs are multiplied in TF32 if ``torch.backends.cudnn.allow_tf32`` says so for convolutions.

Each step is one launch for all branches whose blocks have the same sizes, as those of a cross on a square map do. On
NCHW maps a forward pass is three launches, and a backward pass six: staging, tables of the kernels' taps, convolutions,
their sum, kernel gradients, and the sums of their diagonals. A map may be a slice of channels.

The sizes of blocks follow from the shape, nothing is timed. Triton is imported at the first use. With the environment
variable ``TRITON_INTERPRET=1`` the kernels run on the CPU, slowly, which the tests use.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import eights, memory_format, power_of_two

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TILE = 64  # outputs along a row
_COPIED = 4096  # entries that a program copies or adds up at a time
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


@cache
def _kernels() -> Any:
    from . import _triton_kernels

    return _triton_kernels


def forward(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> tuple[Tensor, ...]:
    """See :mod:`slak_mm.ops.backends`."""
    source = _Map(x)
    planes = _stage([(source, _is_tall(kernel)) for kernel in kernels])
    return _convolve(x, planes, kernels, bias, reduce)


def backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """See :mod:`slak_mm.ops.backends`."""
    gradients = [_Map(grad) for grad in grads]
    if len(gradients) < len(kernels):  # that of the sum of all branches, staged once
        gradients *= len(kernels)
    talls = [_is_tall(kernel) for kernel in kernels]
    sources = [_Map(x)] * len(kernels) if needs_kernels else []
    planes = _stage([*zip(gradients, talls), *zip(sources, talls)])
    of_gradients, of_sources = planes[: len(kernels)], planes[len(kernels) :]
    # The adjoint is the same convolution with the kernels flipped.
    grad_x = _convolve(x, of_gradients, kernels, None, True, flipped=True)[0] if needs_x else None
    return grad_x, _kernel_gradients(x, of_sources, of_gradients, kernels) if needs_kernels else None


class _Planes(NamedTuple):
    """Planes with contiguous rows, and how many an image has: more than channels in a slice of a larger map."""

    tensor: Tensor
    channels: int


class _Map:
    """A map (N, C, H, W) as it lies in memory, or a copy: a slice of channels of one that is dense.

    Attributes:
        channels: Those of the larger map.
        is_last: Whether the maps are channels-last.
        planes: What is there, by whether it is transposed; of NCHW maps with aligned rows the map itself.
    """

    planes: dict[bool, _Planes]

    def __init__(self, x: Tensor) -> None:
        n, c, h, w = x.shape
        self.x, self.channels, self.is_last, self.planes = x, c, False, {}
        if not x.is_contiguous():
            of_image, of_channel, of_row, of_pixel = x.stride()
            if (of_channel, of_row, of_pixel) == (h * w, w, 1) and of_image >= c * h * w and not of_image % (h * w):
                self.channels = of_image // (h * w)
            elif of_channel == 1 and of_pixel >= c and of_row == w * of_pixel and of_image == h * of_row:
                self.channels, self.is_last = of_pixel, True
            else:
                self.x = x.contiguous()
        if not self.is_last and w % 8 == 0:
            self.planes[False] = _Planes(self.x, self.channels)


def _is_tall(kernel: Tensor) -> bool:
    return kernel.shape[1] > kernel.shape[2]


def _stage(wanted: Sequence[tuple[_Map, bool]]) -> list[_Planes]:
    """Planes of maps of one shape, transposed or not: (N, C, W, H rounded up) or (N, C, H, W rounded up)."""
    missing = [pair for pair in dict.fromkeys(wanted) if pair[1] not in pair[0].planes]
    missing.sort(key=_transposed_first)
    for is_last in (False, True):
        some = [pair for pair in missing if pair[0].is_last is is_last]
        if some:
            _stage_alike(some, is_last)
    return [source.planes[tall] for source, tall in wanted]


def _transposed_first(pair: tuple[_Map, bool]) -> bool:
    return not pair[1]


def _stage_alike(some: list[tuple[_Map, bool]], is_last: bool) -> None:
    """Add planes to maps of one layout; those that are transposed come first."""
    n, c, h, w = some[0][0].x.shape
    tall_shape, wide_shape = (n, c, w, eights(h)), (n, c, h, eights(w))
    sources, channels, planes, columns = [], [], [], 0
    for source, tall in some:
        tensor = source.x.new_empty(tall_shape if tall else wide_shape)
        source.planes[tall] = _Planes(tensor, c)
        sources.append(source.x)
        channels.append(source.channels)
        planes.append(tensor)
        columns += tall
    if is_last:
        run, entries = c, n * max(w * tall_shape[3], h * wide_shape[3])
        is_aligned = all(size % 8 == 0 for size in (c, *channels))
    else:
        run, entries, is_aligned = wide_shape[3], n * c * tall_shape[3], w % 8 == 0
    block = _TILE if run > _LEAST else _LEAST
    grid = -(-entries // (_COPIED // block)) * -(-run // block), len(some)
    _kernels().stage[grid](
        *(*_filled(sources, 5), *_filled(channels, 5), *_filled(planes, 5), n, c, h, w, columns),
        LAST=is_last,
        ALIGNED=is_aligned,
        R=_COPIED // block,
        B=block,
        num_warps=4,
    )


def _filled(values: list, count: int) -> list:
    """Up to a number, with the first."""
    return values + values[:1] * (count - len(values))


class _Group(NamedTuple):
    """Branches whose blocks have the same sizes."""

    branches: tuple[int, ...]
    """Three of them, those with a tall kernel first; the first again where there are fewer."""
    number: int
    talls: int
    lengths: tuple[int, ...]
    """Of the kernels, along the rows of the planes."""
    blocks: dict[str, int]
    tiles: int
    split: tuple[int, int]
    split_of_gradient: tuple[int, int]


@lru_cache(1024)
def _groups(shape: tuple[int, ...], sizes: tuple[tuple[int, int], ...], itemsize: int) -> list[_Group]:
    """Group branches of a map (N, C, H, W) with kernels of some sizes by their blocks."""
    n, c, h, w = shape
    found: dict[tuple, list[int]] = {}
    for i, (kh, kw) in sorted(enumerate(sizes), key=lambda item: item[1][0] <= item[1][1]):
        blocks = _blocks(h if kh > kw else w, min(kh, kw), max(kh, kw), itemsize)
        found.setdefault(tuple(blocks.items()), []).append(i)
    groups = []
    for key, some in found.items():
        blocks, count = dict(key), len(some)
        planes = [(h, n * w) if sizes[i][0] > sizes[i][1] else (w, n * h) for i in some]
        tiles = -(-max(length for length, _ in planes) // blocks['T'])
        rows, programs = max(rows for _, rows in planes), c * tiles * count
        splits = [_split(rows, blocks['R'], programs * each) for each in (1, blocks['KH'])]
        branches = tuple(_filled(some, 3))
        talls = sum(sizes[i][0] > sizes[i][1] for i in some)
        lengths = tuple(max(sizes[i]) for i in branches)
        groups.append(_Group(branches, count, talls, lengths, blocks, tiles, *splits))
    return groups


def _operands(group: _Group, *values: Sequence) -> list:
    """What belongs to the branches of a group, of each of some values."""
    return [of_branch[i] for of_branch in values for i in group.branches]


def _convolve(
    x: Tensor,
    planes: Sequence[_Planes],
    kernels: Sequence[Tensor],
    bias: Tensor | None,
    reduce: bool,
    flipped: bool = False,
) -> tuple[Tensor, ...]:
    """Convolve planes with their kernels, or with these flipped; the results have the shape and layout of ``x``."""
    is_sum = reduce and len(kernels) > 1
    tensors, channels = zip(*planes)
    kernels = [kernel.contiguous() for kernel in kernels]
    n, c, h, w = x.shape
    results = [x.new_empty((n, c, h, w), dtype=torch.float32 if is_sum else None)]
    results += [torch.empty_like(results[0]) for _ in kernels[1:]]
    of_bias = kernels[0] if bias is None else bias.contiguous()
    for group in _groups((n, c, h, w), tuple(kernel.shape[1:] for kernel in kernels), x.element_size()):
        (steps, splits), blocks = group.split, group.blocks
        keeps = _keeps(blocks, x.element_size())
        length = blocks['T'] + blocks['U']
        table = x.new_empty(group.number * c * blocks['KH'] * 8 * length)
        _kernels().lay_out_taps[-(-table.numel() // (group.number * _COPIED)), group.number](
            *(*_operands(group, kernels), table, c, blocks['KH'], *group.lengths, group.talls, int(flipped)),
            *(length // 8, blocks['U'] - blocks['OFF']),
            B=_COPIED,
            num_warps=8,
        )
        _kernels().convolve_rows[c, group.number * group.tiles, splits](
            *_operands(group, tensors, channels, results),
            *(table, of_bias, n, c, h, w, group.talls, group.tiles, steps),
            int(bias is not None and 0 in group.branches[: group.number]),  # to one branch of all
            **blocks,
            KEEP=keeps,
            ALIGNED=w % 8 == 0,
            PRECISION=_precision(x),
            num_warps=_warps(blocks, keeps),
        )
    padded = _filled(results, 3)
    if not x.is_contiguous() and memory_format(x) is torch.channels_last:
        maps = [x.new_empty((n, h, w, c)) for _ in range(1 if reduce else len(kernels))]
        tiles = -(-h * w // _TILE)
        _kernels().unstage[n * tiles, -(-c // _TILE), len(maps)](
            *(*padded, *_filled(maps, 3), c, h * w, tiles),
            B=len(kernels) if reduce else 1,
            T=_TILE,
            CB=_TILE,
            num_warps=4,
        )
        return tuple(y.permute(0, 3, 1, 2) for y in maps)
    if is_sum:
        y = x.new_empty((n, c, h, w))
        grid = (-(-y.numel() // _COPIED),)
        _kernels().add_up[grid](*padded, y, y.numel(), B=len(kernels), T=_COPIED, num_warps=4)
        return (y,)
    return tuple(results)


def _kernel_gradients(
    x: Tensor, planes: Sequence[_Planes], gradients: Sequence[_Planes], kernels: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients with respect to kernels (C, kh, kw)."""
    n, c, h, w = x.shape
    results = [torch.empty_like(kernel, memory_format=torch.contiguous_format) for kernel in kernels]
    operands = [*zip(*planes), *zip(*gradients)]
    for group in _groups((n, c, h, w), tuple(kernel.shape[1:] for kernel in kernels), x.element_size()):
        (steps, splits), blocks, count = group.split_of_gradient, group.blocks, group.number
        parts, taps = splits * group.tiles, blocks['KH'] * sum(group.lengths[:count])
        out = x.new_empty(parts * c * taps * blocks['T'], dtype=torch.float32)
        _kernels().kernel_gradient_rows[c * blocks['KH'], count * group.tiles, splits](
            *(*_operands(group, *operands), out, n, c, h, w, *group.lengths, group.talls, group.tiles, steps),
            **blocks,
            PRECISION=_precision(x),
            num_warps=4,
        )
        grid = -(-c * blocks['KH'] * max(group.lengths) // _TILE), count
        _kernels().sum_diagonals[grid](
            *(out, *_operands(group, results), c, blocks['KH'], *group.lengths, group.talls, parts),
            *(blocks['T'] // 8, blocks['U'], blocks['OFF']),
            B=_TILE,
            num_warps=4,
        )
    return tuple(results)


def _blocks(length: int, kh: int, kw: int, itemsize: int) -> dict[str, int]:
    """Sizes of the kernels' blocks for rows of a length and kernels of kh rows and kw columns as they lie on them."""
    tile, reach = _TILE, max(32, power_of_two(kw // 2, _LEAST))  # few values, each of which is compiled once
    if length <= _TILE:  # a tile is the whole row, and so are its inputs
        tile, reach = power_of_two(length, _LEAST), 0
    return dict(KH=kh, R=64 if itemsize == 2 else 32, T=tile, U=power_of_two(tile + 2 * reach, _LEAST), OFF=reach)


def _keeps(blocks: dict[str, int], itemsize: int) -> bool:
    """Whether the banded matrices of all kernel rows are held at once."""
    return blocks['KH'] <= 5 and blocks['KH'] * blocks['T'] * blocks['U'] * itemsize <= _MOST_KEPT_BYTES


def _warps(blocks: dict[str, int], keeps: bool) -> int:
    """Of a program: as measured with kept bands; more where they are made again and again, else registers run out."""
    return 8 if blocks['U'] == _TILE or blocks['U'] > _TILE and not keeps else 4


def _split(rows: int, block: int, programs: int) -> tuple[int, int]:
    """Steps of each program and number of programs that share the rows."""
    total = -(-rows // block)
    splits = max(1, min(total, -(-_PROGRAMS // programs)))
    steps = -(-total // splits)
    return steps, -(-total // steps)


def _precision(x: Tensor) -> str:
    if x.device.type != 'cuda':
        return 'float32'
    return 'ieee' if x.dtype is torch.float32 and not torch.backends.cudnn.allow_tf32 else 'tf32'
