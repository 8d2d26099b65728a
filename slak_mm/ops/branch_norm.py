"""The norms of a block's branches, their sum and the LayerNorm behind it, into the rows that a linear layer reads.

``reference`` is plain PyTorch. On GPUs the batch statistics of all branches are taken in one pass over their maps, and
normalizing, adding and the LayerNorm are another; the rows are padded with zeros to a multiple of 8 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._context import autocast_dtype, is_autocast_enabled
from ._fused import TILE, gradients, visible, why_not
from .backends.layout import eights, in_memory, memory_format, power_of_two

LayerNorm = tuple[Tensor, Tensor, float]
"""Weight, bias and epsilon."""

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
    kind = maps[0].device.type
    dtype = autocast_dtype(kind) if is_autocast_enabled(kind) else maps[0].dtype
    weight, bias, eps = norm
    of_norms = () if norms is None else (*norms.weights, *norms.biases)
    return _BranchNormRows.apply(norms, eps, dtype, len(maps), weight, bias, *maps, *of_norms)


def reference(
    maps: Sequence[Tensor], norms: BranchNorms | None, norm: LayerNorm, dtype: torch.dtype | None = None
) -> Tensor:
    """Compute :func:`branch_norm_rows` by PyTorch's functions, but for the running statistics."""
    maps = normalized(maps, norms)
    y = sum(maps[1:], start=maps[0]).permute(0, 2, 3, 1)
    weight, bias, eps = norm
    y = F.layer_norm(y, y.shape[-1:], weight.to(y.dtype), bias.to(y.dtype), eps).to(dtype or y.dtype)
    return F.pad(y, (0, eights(y.shape[-1]) - y.shape[-1]))


def normalized(maps: Sequence[Tensor], norms: BranchNorms | None) -> Sequence[Tensor]:
    """Maps behind their norms, by PyTorch's functions, but for the running statistics."""
    if norms is None:
        return maps
    running = zip(norms.running_means, norms.running_vars)
    of_batch = [(None, None)] * len(maps) if norms.training else running
    return [
        F.batch_norm(y, *statistics, weight.to(y.dtype), bias.to(y.dtype), norms.training, eps=norms.eps)
        for y, statistics, weight, bias in zip(maps, of_batch, norms.weights, norms.biases)
    ]


class _BranchNormRows(torch.autograd.Function):
    """Takes (norms, eps, dtype, number of maps, weight, bias, *maps, *weights and biases of the norms)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, norms: BranchNorms | None, eps: float, dtype: torch.dtype, count: int, *tensors: Tensor
    ) -> Tensor:
        weight, bias, *rest = tensors
        layout = memory_format(rest[0])
        maps = [in_memory(y).contiguous(memory_format=layout) for y in rest[:count]]
        coefficients = None if norms is None else batch_norm_coefficients(maps, norms)
        rows, pixels = _norm_rows(maps, coefficients, weight, bias, eps, dtype)
        # Maps are saved as they came, since a copy would not be part of the graph.
        ctx.save_for_backward(coefficients, pixels, weight, bias, *rest)
        ctx.norms, ctx.eps, ctx.dtype, ctx.count = norms, eps, dtype, count
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        coefficients, pixels, *inputs = ctx.saved_tensors
        norms, count = ctx.norms, ctx.count

        def fused() -> list[Tensor]:
            weight, _, *rest = inputs
            layout = memory_format(rest[0])
            maps = [in_memory(y).contiguous(memory_format=layout) for y in rest[:count]]
            rows = in_memory(grad).contiguous()
            sums, of_pixels = _norm_rows_sums(maps, coefficients, weight, rows, pixels)
            sums = sums.sum(0)
            of_weight, of_bias = sums[0].to(weight.dtype), sums[1].to(weight.dtype)
            of_norms: list[Tensor] = []
            if norms is not None:
                kind = norms.weights[0].dtype
                # Rows of their own: gradients that share memory would be clipped more than once.
                of_norms = [*sums[3:].to(kind, copy=True).unbind(), *sums[2].to(kind).repeat(count, 1).unbind()]
                if norms.training and norms.group is not None:
                    dist.all_reduce(sums[2:], group=norms.group)
            training = norms is not None and norms.training
            of_maps = _norm_rows_gradients(maps, coefficients, weight, rows, pixels, of_pixels, sums, training)
            return [of_weight, of_bias, *(of_maps.unbind() if norms is not None else list(of_maps) * count), *of_norms]

        def plain(weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
            if norms is None:
                return reference(rest, None, (weight, bias, ctx.eps), ctx.dtype)
            if norms.group is not None and norms.training:
                raise NotImplementedError('SyncBN has no gradients of gradients')
            own = norms._replace(weights=rest[count : 2 * count], biases=rest[2 * count :])
            return reference(rest[:count], own, (weight, bias, ctx.eps), ctx.dtype)

        return None, None, None, None, *gradients(fused, plain, inputs, grad)


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


def stacked_like(x: Tensor, count: int, channels: int) -> Tensor:
    """Memory for maps of the batch, size, layout and dtype of ``x``, (count, N, channels, H, W)."""
    n, _, h, w = x.shape
    if memory_format(x) is torch.channels_last:
        return x.new_empty(count, n, h, w, channels).permute(0, 1, 4, 2, 3)
    return x.new_empty(count, n, channels, h, w)


def _layout(x: Tensor) -> dict[str, Any]:
    return dict(LAST=memory_format(x) is torch.channels_last)


@visible('(Tensor[] maps, Tensor(a!)[] counters) -> Tensor')
def _branch_moments(maps: Sequence[Tensor], counters: Sequence[Tensor]) -> Tensor:
    """Moments of parts of the maps, (splits, B, 3, C) in float32; adds one to the counters."""
    x = maps[0]
    n, c, h, w = x.shape
    is_last = memory_format(x) is torch.channels_last
    sizes = dict(T=32, CB=32) if is_last else dict(T=1024 if h * w >= 1024 else 256, CB=1)
    tiles = -(-h * w // sizes['T'])
    blocks = -(-c // sizes['CB'])
    splits = min(n * tiles, _MOST_SPLITS, -(-1056 // blocks))  # eight programs for each of 132 multiprocessors
    steps = -(-n * tiles // splits)
    splits = -(-n * tiles // steps)
    out = x.new_empty(splits, len(maps), 3, c, dtype=torch.float32)
    if not x.is_meta:
        from .backends import _triton_passes

        _triton_passes.branch_moments[(blocks, splits)](
            *(*three(maps), *three(counters or (out,)), out, n, c, h * w, tiles, steps),
            B=len(maps),
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

        sizes = dict(S=power_of_two(splits, 2), CB=16)
        _triton_passes.merge_moments[(-(-c // 16),)](moments, out, splits, c, B=branches, **sizes, num_warps=4)
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
            *(len(moments), c, 0.0 if momentum is None else float(momentum), float(eps)),
            B=branches,
            TRAINING=training,
            CUMULATIVE=momentum is None and bool(counters),
            S=power_of_two(len(moments), 2),
            CB=16,
            num_warps=4,
        )
    return out


@visible(
    '(Tensor[] maps, Tensor? coefficients, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> (Tensor, Tensor)'
)
def _norm_rows(
    maps: Sequence[Tensor], coefficients: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows, and mean and reciprocal standard deviation of each pixel, (2, pixels)."""
    x = maps[0]
    n, c, h, w = x.shape
    rows = x.new_empty(n, h, w, eights(c), dtype=dtype)
    pixels = x.new_empty(2, n * h * w, dtype=torch.float32)
    if not x.is_meta:
        from .backends import _triton_passes

        tiles = -(-h * w // TILE['T'])
        _triton_passes.norm_rows[(n * tiles,)](
            *(*three(maps), pixels if coefficients is None else coefficients, weight, bias, rows, pixels),
            *(c, h * w, tiles, rows.shape[-1] // 8, float(eps)),
            B=len(maps),
            NORMED=coefficients is not None,
            **_layout(x),
            **TILE,
        )
    return rows, pixels


@visible('(Tensor[] maps, Tensor? coefficients, Tensor weight, Tensor grad, Tensor pixels) -> (Tensor, Tensor)')
def _norm_rows_sums(
    maps: Sequence[Tensor], coefficients: Tensor | None, weight: Tensor, grad: Tensor, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of some pixels each, (programs, rows, C), and two means over the channels of each pixel, (2, pixels)."""
    x = maps[0]
    n, c, h, w = x.shape
    tiles = -(-h * w // TILE['T'])
    sums = x.new_empty(n * tiles, 2 if coefficients is None else 3 + len(maps), c, dtype=torch.float32)
    of_pixels = torch.empty_like(pixels)
    if not x.is_meta:
        from .backends import _triton_passes

        _triton_passes.norm_rows_sums[(n * tiles,)](
            *(*three(maps), pixels if coefficients is None else coefficients, weight, grad, pixels, of_pixels, sums),
            *(c, h * w, tiles, grad.shape[-1] // 8),
            B=len(maps),
            NORMED=coefficients is not None,
            **_layout(x),
            **TILE,
        )
    return sums, of_pixels


@visible(
    '(Tensor[] maps, Tensor? coefficients, Tensor weight, Tensor grad, Tensor pixels, Tensor of_pixels, '
    'Tensor sums, bool training) -> Tensor'
)
def _norm_rows_gradients(
    maps: Sequence[Tensor],
    coefficients: Tensor | None,
    weight: Tensor,
    grad: Tensor,
    pixels: Tensor,
    of_pixels: Tensor,
    sums: Tensor,
    training: bool,
) -> Tensor:
    """Gradients of the maps, (B, N, C, H, W) in their layout; without norms they are all the same one."""
    x = maps[0]
    n, c, h, w = x.shape
    count = 1 if coefficients is None else len(maps)
    out = stacked_like(x, count, c)
    if not x.is_meta:
        from .backends import _triton_passes

        tiles = -(-h * w // TILE['T'])
        _triton_passes.norm_rows_gradients[(n * tiles, -(-c // TILE['CB']))](
            *(*three(maps), pixels if coefficients is None else coefficients, weight, grad, pixels, of_pixels),
            *(sums, out, c, h * w, tiles, grad.shape[-1] // 8),
            B=len(maps),
            NORMED=coefficients is not None,
            TRAINING=training,
            **_layout(x),
            **TILE,
        )
    return out
