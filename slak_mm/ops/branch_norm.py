"""The norms of a block's branches, their sum and the LayerNorm behind it, into the rows that a linear layer reads.

``reference`` is plain PyTorch. On GPUs the batch statistics of all branches are taken in one pass over their maps, and
normalizing, adding and the LayerNorm are another; the rows are padded with zeros to a multiple of 8 channels. The
LayerNorm of a map, into a map, is the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._context import is_autocast_enabled, result_dtype
from ._fused import PARTS, TILE, attempt, gradients, launch_layout, visible, why_not
from .backends.layout import eights, in_memory, memory_format, power_of_two

LayerNorm = tuple[Tensor, Tensor, float]
"""Weight, bias and epsilon."""

_CASTS_LAYER_NORM = ('cuda',)
"""Device types whose autocast makes a LayerNorm float32; elsewhere it keeps the dtype of the map."""

_MOST_SPLITS = 64  # of the values of a channel, whose statistics are merged in one step


class BranchNorms(NamedTuple):
    """Batch norms of up to three branches, which differ in nothing but their tensors (C,).

    Attributes:
        weights: Weights.
        biases: Biases.
        running_means: Running means, which change in training.
        running_vars: Running variances.
        counters: ``num_batches_tracked``, or none.
        momentum: That of the running statistics; None for a cumulative average.
        eps: Epsilon.
        training: Whether to normalize with the statistics of the batch.
        group: Processes that share them (SyncBN), or None.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    running_means: tuple[Tensor, ...]
    running_vars: tuple[Tensor, ...]
    counters: tuple[Tensor, ...]
    momentum: float | None
    eps: float
    training: bool
    group: Any = None

    def why_not(self, x: Tensor) -> str | None:
        """Why the fused passes leave these norms to PyTorch, or None."""
        if self.training and x.numel() == x.shape[1]:
            return 'there is one value per channel'
        if any(len({t.dtype for t in some}) > 1 for some in self[:4]):
            return 'the norms are of several dtypes'
        return None


def why_not_fused(maps: Sequence[Tensor], norms: BranchNorms | None, norm: LayerNorm) -> str | None:
    """Say why :func:`branch_norm_rows` cannot run, or None if it can."""
    x = maps[0]
    if len(maps) > 3 or x.dim() != 4 or any(y.shape != x.shape or y.dtype != x.dtype for y in maps):
        return 'there are more than three branches, or branches of different kinds'
    of_norms = () if norms is None else (*norms.weights, *norms.biases, *norms.running_means, *norms.running_vars)
    return (norms and norms.why_not(x)) or why_not(*maps, *norm[:2], *of_norms)


def branch_norm_rows(maps: Sequence[Tensor], norms: BranchNorms | None, norm: LayerNorm) -> Tensor:
    """Compute ``LayerNorm(sum of norms[i](maps[i]))`` for each pixel, by fused passes.

    Args:
        maps: One to three maps (N, C, H, W).
        norms: Their batch norms. In training their running statistics are updated. None for none.
        norm: The LayerNorm over the channels.

    Returns:
        Rows (N, H, W, C rounded up to a multiple of 8), filled up with zeros; in the dtype of autocast, or of the maps.
    """
    weight, bias, eps = norm
    of_norms = () if norms is None else (*norms.weights, *norms.biases)
    return _BranchNormRows.apply(norms, eps, result_dtype(maps[0]), True, len(maps), weight, bias, *maps, *of_norms)


def layer_norm_map(x: Tensor, norm: LayerNorm) -> Tensor | None:
    """Compute the LayerNorm over the channels of each pixel of a map by the fused passes, or None if they cannot run.

    Args:
        x: Map (N, C, H, W).
        norm: The LayerNorm.

    Returns:
        Map in the memory format of ``x`` and the dtype of PyTorch's LayerNorm: under CUDA's autocast float32.
    """
    weight, bias, eps = norm
    if why_not(x, weight, bias) or weight is None or bias is None or x.dim() != 4 or x.shape[1:2] != weight.shape:
        return None
    kind = x.device.type
    is_cast = kind in _CASTS_LAYER_NORM and is_autocast_enabled(kind)
    if not is_cast and not x.dtype == weight.dtype == bias.dtype:
        return None
    dtype = torch.float32 if is_cast else x.dtype
    return attempt(lambda: _BranchNormRows.apply(None, eps, dtype, False, 1, weight, bias, x), x)


def reference(
    maps: Sequence[Tensor],
    norms: BranchNorms | None,
    norm: LayerNorm,
    dtype: torch.dtype | None = None,
    into_rows: bool = True,
) -> Tensor:
    """Compute :func:`branch_norm_rows` or :func:`layer_norm_map` by PyTorch's functions.

    Running statistics are left as they are.
    """
    maps = normalized(maps, norms)
    y = sum(maps[1:], start=maps[0]).permute(0, 2, 3, 1)
    weight, bias, eps = norm
    y = F.layer_norm(y, y.shape[-1:], weight.to(y.dtype), bias.to(y.dtype), eps).to(dtype or y.dtype)
    return F.pad(y, (0, eights(y.shape[-1]) - y.shape[-1])) if into_rows else y.permute(0, 3, 1, 2)


def normalized(maps: Sequence[Tensor], norms: BranchNorms | None) -> Sequence[Tensor]:
    """Maps behind their norms, by PyTorch's functions. Running statistics are left as they are."""
    if norms is None:
        return maps
    running = zip(norms.running_means, norms.running_vars)
    of_batch = [(None, None)] * len(maps) if norms.training else running
    return [
        F.batch_norm(y, *statistics, weight.to(y.dtype), bias.to(y.dtype), norms.training, eps=norms.eps)
        for y, statistics, weight, bias in zip(maps, of_batch, norms.weights, norms.biases)
    ]


class _BranchNormRows(torch.autograd.Function):
    """Takes (norms, eps, dtype, rows or map, number of maps, weight, bias, *maps, *weights and biases of the norms)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        norms: BranchNorms | None,
        eps: float,
        dtype: torch.dtype,
        into_rows: bool,
        count: int,
        *tensors: Tensor,
    ) -> Tensor:
        weight, bias, *rest = tensors
        layout = memory_format(rest[0])
        maps = [in_memory(y).contiguous(memory_format=layout) for y in rest[:count]]
        coefficients = None if norms is None else batch_norm_coefficients(maps, norms)
        out, pixels = _norm_rows(maps, coefficients, weight, bias, eps, dtype, into_rows)
        # Maps are saved as they came, since a copy would not be part of the graph.
        ctx.save_for_backward(coefficients, pixels, weight, bias, *rest)
        ctx.norms, ctx.eps, ctx.dtype, ctx.into_rows, ctx.count = norms, eps, dtype, into_rows, count
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        coefficients, pixels, *inputs = ctx.saved_tensors
        norms, count = ctx.norms, ctx.count
        is_training = norms is not None and norms.training

        def fused() -> list[Tensor]:
            weight, bias, *rest = inputs
            parameters = [weight, bias, *rest[count:]]
            layout = memory_format(rest[0])
            maps = [in_memory(y).contiguous(memory_format=layout) for y in rest[:count]]
            rows = in_memory(grad).contiguous(memory_format=torch.contiguous_format if ctx.into_rows else layout)
            parts, of_pixels, of_maps = _norm_rows_sums(
                maps, coefficients, weight, rows, pixels, is_training, ctx.into_rows
            )
            sums, *of_parameters = _norm_gradients(parts, parameters)
            if is_training:
                if norms.group is not None:
                    dist.all_reduce(sums[2:], group=norms.group)
                of_maps = _norm_rows_gradients(maps, coefficients, weight, rows, pixels, of_pixels, sums)
            of_maps = of_maps.unbind() if norms is not None else list(of_maps) * count
            return [*of_parameters[:2], *of_maps, *of_parameters[2:]]

        def plain(weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
            if norms is None:
                return reference(rest, None, (weight, bias, ctx.eps), ctx.dtype, ctx.into_rows)
            if norms.group is not None and norms.training:
                raise NotImplementedError('SyncBN has no gradients of gradients')
            own = norms._replace(weights=rest[count : 2 * count], biases=rest[2 * count :])
            return reference(rest[:count], own, (weight, bias, ctx.eps), ctx.dtype)

        return None, None, None, None, None, *gradients(fused, plain, inputs, grad)


def batch_norm_coefficients(maps: Sequence[Tensor], norms: BranchNorms) -> Tensor:
    """What the norms do to their maps, see :mod:`slak_mm.ops.backends._triton_passes`; updates running statistics."""
    moments = _branch_moments(maps, norms.counters) if norms.training else maps[0].new_empty(1, len(maps), 3, 0)
    return coefficients_of(moments, norms)


def coefficients_of(moments: Tensor, norms: BranchNorms) -> Tensor:
    """The same, of the moments (splits, B, 3, C) of parts of the maps."""
    if norms.training and norms.group is not None:
        # One message for all branches: every process fills in its row.
        all_moments = moments.new_zeros(dist.get_world_size(norms.group), *moments.shape[1:])
        all_moments[dist.get_rank(norms.group)] = _merge_moments(moments)
        dist.all_reduce(all_moments, group=norms.group)
        moments = all_moments
    return _batch_norm_coefficients(
        norms.weights,
        norms.biases,
        norms.running_means,
        norms.running_vars,
        moments,
        norms.counters,
        norms.momentum,
        norms.eps,
        norms.training,
    )


# ---------------------------------------------------------------------------- kernels' launches


def three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fill up with the first, which kernels for fewer branches do not read."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def new_maps(x: Tensor, count: int, c: int, dtype: torch.dtype) -> Tensor:
    """Memory for maps in the layout of one, (count, N, c, H, W)."""
    n, _, h, w = x.shape
    if memory_format(x) is torch.channels_last:
        return x.new_empty(count, n, h, w, c, dtype=dtype).permute(0, 1, 4, 2, 3)
    return x.new_empty(count, n, c, h, w, dtype=dtype)


@visible('(Tensor[] maps, Tensor(a!)[] counters) -> Tensor')
def _branch_moments(maps: Sequence[Tensor], counters: Sequence[Tensor]) -> Tensor:
    """Moments of parts of the maps, (splits, B, 3, C) in float32; adds one to the counters."""
    x = maps[0]
    n, c, h, w = x.shape
    is_last = memory_format(x) is torch.channels_last
    sizes = dict(U=1, T=32, CB=32) if is_last else dict(U=4, T=256, CB=1)
    tiles = -(-h * w // sizes['T'])
    groups = -(-n * tiles // sizes['U'])
    blocks = -(-c // sizes['CB'])
    # Eight programs for each of 132 multiprocessors.
    splits = min(groups, _MOST_SPLITS, -(-1056 // (blocks * len(maps))))
    steps = -(-groups // splits)
    splits = -(-groups // steps)
    out = x.new_empty(splits, len(maps), 3, c, dtype=torch.float32)
    if not x.is_meta:
        from .backends import _triton_passes

        _triton_passes.branch_moments[(blocks, splits, len(maps))](
            *(*three(maps), *three(counters or (out,)), out, n, c, h * w, tiles, steps),
            COUNTED=bool(counters),
            LAST=is_last,
            **sizes,
            num_warps=4,
        )
    return out


@visible('(Tensor moments) -> Tensor')
def _merge_moments(moments: Tensor) -> Tensor:
    splits, branches, _, c = moments.shape
    out = moments.new_empty(branches, 3, c)
    if not moments.is_meta:
        from .backends import _triton_passes

        sizes = dict(S=power_of_two(splits, _MOST_SPLITS), CB=16)
        _triton_passes.merge_moments[(-(-c // 16), branches)](moments, out, splits, c, **sizes, num_warps=4)
    return out


@visible(
    '(Tensor[] weights, Tensor[] biases, Tensor(a!)[] means, Tensor(b!)[] vars, Tensor moments, Tensor[] counters, '
    'float? momentum, float eps, bool training) -> Tensor'
)
def _batch_norm_coefficients(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    moments: Tensor,
    counters: Sequence[Tensor],
    momentum: float | None,
    eps: float,
    training: bool,
) -> Tensor:
    """Coefficients of the norms, (3 B + 2, C) in float32; in training the running statistics follow."""
    c, branches = len(weights[0]), len(weights)
    out = weights[0].new_empty(3 * branches + 2, c, dtype=torch.float32)
    if not out.is_meta:
        from .backends import _triton_passes

        tensors = (weights, biases, means, variances)
        _triton_passes.batch_norm_coefficients[(-(-c // 16),)](
            *(moments, *(t for some in tensors for t in three(some)), counters[0] if counters else moments, out),
            *(len(moments), branches, c, 0.0 if momentum is None else float(momentum), float(eps)),
            TRAINING=training,
            CUMULATIVE=momentum is None and bool(counters),
            S=power_of_two(len(moments), _MOST_SPLITS),
            CB=16,
            num_warps=4,
        )
    return out


@visible(
    '(Tensor[] maps, Tensor? coefficients, Tensor weight, Tensor bias, float eps, ScalarType dtype, bool into_rows) '
    '-> (Tensor, Tensor)'
)
def _norm_rows(
    maps: Sequence[Tensor],
    coefficients: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    into_rows: bool,
) -> tuple[Tensor, Tensor]:
    """Rows or a map, and mean and reciprocal standard deviation of each pixel, (2, pixels)."""
    x = maps[0]
    n, c, h, w = x.shape
    out = x.new_empty(n, h, w, eights(c), dtype=dtype) if into_rows else new_maps(x, 1, x.shape[1], dtype)[0]
    pixels = x.new_empty(2, n * h * w, dtype=torch.float32)
    if not x.is_meta:
        from .backends import _triton_passes

        tiles = -(-h * w // TILE['T'])
        _triton_passes.norm_rows[(n * tiles,)](
            *(*three(maps), pixels if coefficients is None else coefficients, weight, bias, out, pixels),
            *(c, h * w, tiles, eights(c) // 8, float(eps)),
            B=len(maps),
            NORMED=coefficients is not None,
            ROWS=into_rows,
            **launch_layout(x),
            **TILE,
        )
    return out, pixels


@visible(
    '(Tensor[] maps, Tensor? coefficients, Tensor weight, Tensor grad, Tensor pixels, bool training, bool from_rows) '
    '-> (Tensor, Tensor, Tensor)'
)
def _norm_rows_sums(
    maps: Sequence[Tensor],
    coefficients: Tensor | None,
    weight: Tensor,
    grad: Tensor,
    pixels: Tensor,
    training: bool,
    from_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of some pixels each, (programs, rows, C), and what the gradients of the maps need or these themselves.

    In training two means over the channels of each pixel, (2, pixels), and nothing; else nothing and the gradients,
    (B, N, C, H, W) in the maps' layout, without norms a single one.
    """
    x = maps[0]
    n, c, h, w = x.shape
    tiles = -(-h * w // TILE['T'])
    count = 1 if coefficients is None else len(maps)
    parts = x.new_empty(n * tiles, 2 if coefficients is None else 3 + count, c, dtype=torch.float32)
    of_pixels = pixels.new_empty(pixels.shape if training else 0)
    of_maps = x.new_empty(0) if training else new_maps(x, count, x.shape[1], x.dtype)
    if not x.is_meta:
        from .backends import _triton_passes

        _triton_passes.norm_rows_sums[(n * tiles,)](
            *(*three(maps), pixels if coefficients is None else coefficients, weight, grad, pixels, of_pixels, parts),
            *(of_maps, c, h * w, tiles, eights(c) // 8),
            B=len(maps),
            NORMED=coefficients is not None,
            TRAINING=training,
            ROWS=from_rows,
            **launch_layout(x),
            **TILE,
        )
    return parts, of_pixels, of_maps


@visible('(Tensor parts, Tensor[] parameters) -> Tensor[]')
def _norm_gradients(parts: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Sums (rows, C) in float32, and gradients of the LayerNorm's weight and bias, the norms' weights and biases.

    Each has memory of its own: gradients that share it would be clipped more than once.
    """
    number, rows, c = parts.shape
    out = [parts.new_empty(rows, c), *(torch.empty_like(t) for t in parameters)]
    if not parts.is_meta:
        from .backends import _triton_passes

        sums, weight, bias, *rest = out
        rest = rest or [weight, bias]
        count = len(rest) // 2
        _triton_passes.norm_gradients[(-(-c // 16), rows)](
            *(parts, sums, weight, bias, *three(rest[:count]), *three(rest[count:]), number, c), **PARTS
        )
    return out


@visible(
    '(Tensor[] maps, Tensor coefficients, Tensor weight, Tensor grad, Tensor pixels, Tensor of_pixels, Tensor sums) '
    '-> Tensor'
)
def _norm_rows_gradients(
    maps: Sequence[Tensor],
    coefficients: Tensor,
    weight: Tensor,
    grad: Tensor,
    pixels: Tensor,
    of_pixels: Tensor,
    sums: Tensor,
) -> Tensor:
    """Gradients of the maps in training, (B, N, C, H, W) in their layout."""
    x = maps[0]
    n, c, h, w = x.shape
    out = new_maps(x, len(maps), x.shape[1], x.dtype)
    if not x.is_meta:
        from .backends import _triton_passes

        tiles = -(-h * w // TILE['T'])
        _triton_passes.norm_rows_gradients[(n * tiles, -(-c // TILE['CB']))](
            *(*three(maps), coefficients, weight, grad, pixels, of_pixels, sums, out),
            *(c, h * w, tiles, grad.shape[-1] // 8),
            B=len(maps),
            **launch_layout(x),
            **TILE,
        )
    return out
