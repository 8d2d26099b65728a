"""The norm and the squeeze-excite gates behind a sum of branches, into the rows that a linear layer reads.

``reference`` is plain PyTorch. On GPUs the sum, of which some channels consist of a map alone (ghosts), is computed
again where it is needed and never stored: one pass takes its statistics, another writes the rows; one adds up what the
backward pass needs of every image, and one gives all gradients. The gates are computed of the means of each image, by
PyTorch's functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._context import result_dtype
from ._fused import TILE, gradients, launch_layout, visible, why_not
from .backends.layout import eights, in_memory, memory_format
from .branch_norm import BranchNorms, batch_norm_coefficients, coefficients_of, new_maps, normalized, three

_MOST_PARTS = 16  # of an image, whose sums are added up in one step


class Gates(NamedTuple):
    """Tensors of squeeze-excite: two linear layers, C to J and back, ReLU between them and a sigmoid behind."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor


def _without_autocast(x: Tensor) -> Any:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # which meta does not have


# ------------------------------------------------------------------------------ order of channels


def permute_channels(x: Tensor, rep: Tensor, ghost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring channels into the order (rep, ghost) and the dtype of autocast, by one pass, forward and backward.

    Args:
        x: (N, C, H, W).
        rep: int64 indices of channels.
        ghost: Those of the others, (C - len(rep),).

    Returns:
        The map, a view of its first ``len(rep)`` channels, and x itself: what uses this instead of x has its gradient
        added in the same pass.
    """
    return _PermuteChannels.apply(x, rep, ghost, result_dtype(x))


def ordered_channels(
    x: Tensor, rep: Tensor, ghost: Tensor, scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute :func:`permute_channels` without autograd, with a scale and a bias of the ghosts where they are given."""
    x = in_memory(x).contiguous(memory_format=memory_format(x))
    permuted = _permute_channels(x, [], rep, ghost, result_dtype(x), scale, bias)
    return permuted, permuted[:, : len(rep)]


class _PermuteChannels(torch.autograd.Function):
    """Takes the arguments of :func:`permute_channels`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, rep: Tensor, ghost: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rep, ghost)
        ctx.dtype = x.dtype
        lying = in_memory(x).contiguous(memory_format=memory_format(x))
        permuted = _permute_channels(lying, [], rep, ghost, dtype)
        return permuted, permuted.detach()[:, : len(rep)], x

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *more: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rep, ghost = ctx.saved_tensors

        def fused() -> list[Tensor]:
            return [_permute_channels(*_lying(grad, more), rep, ghost, ctx.dtype)]

        def plain(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            permuted = x.index_select(1, torch.cat([rep, ghost])).to(grad.dtype)
            return permuted, permuted[:, : len(rep)], x.view_as(x)

        # Of the input only shape and dtype matter.
        like = torch.zeros_like(grad, dtype=ctx.dtype).requires_grad_() if torch.is_grad_enabled() else grad
        return *gradients(fused, plain, [like], grad, *more), None, None, None


# ----------------------------------------------------------------------------------- gated rows


def why_not_norms(norms: BranchNorms | None, norm: BranchNorms, extra: Tensor) -> str | None:
    """Say why :func:`gated_rows` leaves these norms, of the branches and of the sum, to PyTorch, or None."""
    if norms is not None and (norms.training, norms.group) != (norm.training, norm.group):
        return 'the norms are of several kinds'
    of_norms = [t for some in (norms, norm) if some is not None for ts in some[:4] for t in ts]
    return norm.why_not(extra) or why_not(extra, *of_norms)


def gated_rows(
    maps: Sequence[Tensor], extra: Tensor, norms: BranchNorms | None, norm: BranchNorms, gates: Gates
) -> Tensor:
    """Compute ``gate * norm(extra + sum of norms[i](maps[i]))`` for each pixel, by fused passes.

    Args:
        maps: Up to three maps (N, c, H, W), which are added to the first c channels.
        extra: (N, C, H, W).
        norms: Batch norms of the maps, or None. In training their running statistics are updated.
        norm: One batch norm over C channels, likewise.
        gates: Squeeze-excite over the means of each image.

    Returns:
        Rows (N, H, W, C rounded up to a multiple of 8), filled up with zeros; in the dtype of autocast, or of the maps.
    """
    of_norms = () if norms is None else (*norms.weights, *norms.biases)
    tensors = (extra, *gates, norm.weights[0], norm.biases[0], *maps, *of_norms)
    return _GatedRows.apply(norms, norm, result_dtype(extra), len(maps), *tensors)


def reference(
    maps: Sequence[Tensor],
    extra: Tensor,
    norms: BranchNorms | None,
    norm: BranchNorms,
    gates: Gates,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute :func:`gated_rows` by PyTorch's functions, but for the running statistics."""
    z = extra
    if maps:
        first, *others = normalized(maps, norms)
        branches = sum(others, start=first)
        z = z + F.pad(branches, (0, 0, 0, 0, 0, z.shape[1] - branches.shape[1]))
    (z,) = normalized([z], norm)
    logits, _ = _logits(z.mean((2, 3)), gates)
    y = (z * logits.sigmoid().to(z.dtype)[..., None, None]).permute(0, 2, 3, 1)
    return F.pad(y, (0, eights(y.shape[-1]) - y.shape[-1])).to(dtype or y.dtype)


def _logits(means: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
    """What the sigmoid makes gates of, (N, C), and the inner layer, (N, J)."""
    hidden = F.relu(F.linear(means.to(gates.weight1.dtype), gates.weight1, gates.bias1))
    return F.linear(hidden, gates.weight2, gates.bias2), hidden


class _GatedRows(torch.autograd.Function):
    """Takes (norms, norm, dtype, number of maps, extra, *gates, weight, bias, *maps, *weights and biases of norms)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, norms: BranchNorms | None, norm: BranchNorms, dtype: torch.dtype, count: int, *tensors: Tensor
    ) -> Tensor:
        gates = Gates(*tensors[1:5])
        extra, maps = _lying(tensors[0], tensors[7 : 7 + count])
        coefficients = None if norms is None else batch_norm_coefficients(maps, norms)
        moments = _sum_moments(extra, maps, coefficients, norm.counters if norm.training else [], True)
        of_z = coefficients_of(moments.unsqueeze(1), norm)
        means = _image_means(moments, of_z[2:4], len(extra), gates.weight1.dtype)
        with _without_autocast(extra):
            logits, hidden = _logits(means, gates)
        ctx.save_for_backward(coefficients, of_z, means, logits, hidden, *tensors)
        ctx.norms, ctx.norm, ctx.dtype, ctx.count = norms, norm, dtype, count
        return _gated_rows(extra, maps, coefficients, of_z[2:4], logits, True, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        coefficients, of_z, means, logits, hidden, *inputs = ctx.saved_tensors
        norms, norm, count = ctx.norms, ctx.norm, ctx.count

        def fused() -> list[Tensor]:
            gates = Gates(*inputs[1:5])
            extra, maps = _lying(inputs[0], inputs[7 : 7 + count])
            rows = in_memory(grad).contiguous()
            sums = _gated_sums(extra, maps, coefficients, of_z, rows)
            sums, of_logits = _gate_gradients(sums, norm.weights[0], norm.biases[0], logits)
            of_hidden = torch.ops.aten.threshold_backward(of_logits @ gates.weight2, hidden, 0)
            of_means = of_hidden @ gates.weight1
            of_gates = (of_hidden.t() @ means, of_hidden.sum(0), of_logits.t() @ hidden, of_logits.sum(0))
            share = 1 / (extra.shape[2] * extra.shape[3])
            own = total = _batch_sums(sums, logits, of_means, of_z, share)
            if norm.training and norm.group is not None:
                dist.all_reduce(total := own.clone(), group=norm.group)
            of_maps, of_extra = _gated_gradients(
                extra, maps, coefficients, of_z, logits, rows, of_means, total, norm.training
            )
            number = extra.numel() // extra.shape[1]
            weights = [norm.weights[0], *(norms.weights if norms else ())]
            of_norms = _branch_norm_gradients(total, own, of_z, number, norm.training, weights)
            of_weights, of_biases = of_norms[: len(weights)], of_norms[len(weights) :]
            each = list(of_maps) * count if norms is None and count else of_maps.unbind()
            return [of_extra, *of_gates, of_weights[0], of_biases[0], *each, *of_weights[1:], *of_biases[1:]]

        def plain(*given: Tensor) -> Tensor:
            if norm.group is not None and norm.training:
                raise NotImplementedError('SyncBN has no gradients of gradients')
            own = norm._replace(weights=given[5:6], biases=given[6:7])
            of_maps = norms
            if norms is not None:
                of_maps = norms._replace(weights=given[7 + count : 7 + 2 * count], biases=given[7 + 2 * count :])
            return reference(given[7 : 7 + count], given[0], of_maps, own, Gates(*given[1:5]), ctx.dtype)

        return None, None, None, None, *gradients(fused, plain, inputs, grad)


def _lying(extra: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All in memory, in the layout of the first."""
    like = memory_format(extra)
    extra, *maps = (in_memory(y).contiguous(memory_format=like) for y in (extra, *maps))
    return extra, maps


def deployed_rows(maps: Sequence[Tensor], extra: Tensor, gates: Gates) -> Tensor:
    """Compute ``gate * cat(maps[0], the other channels of extra)`` for each pixel, without autograd.

    Args:
        maps: (N, c, H, W), or none.
        extra: (N, C, H, W).
        gates: Squeeze-excite over the means of each image.

    Returns:
        Rows as of :func:`gated_rows`.
    """
    dtype = result_dtype(extra)
    extra, maps = _lying(extra, maps)
    moments = _sum_moments(extra, maps, None, [], False)
    means = _image_means(moments, None, len(extra), gates.weight1.dtype)
    with _without_autocast(extra):
        logits, _ = _logits(means, gates)
    return _gated_rows(extra, maps, None, None, logits, False, dtype)


# ---------------------------------------------------------------------------- kernels' launches


def _parts(x: Tensor, pixels: int, channels: int) -> tuple[int, int, int]:
    """Blocks of channels, parts of an image and tiles in each, for tiles of some pixels and channels."""
    n, c, h, w = x.shape
    tiles, blocks = -(-h * w // pixels), -(-c // channels)
    parts = max(1, min(tiles, _MOST_PARTS, -(-1056 // (blocks * n))))  # eight programs for each of 132 multiprocessors
    steps = -(-tiles // parts)
    return blocks, -(-tiles // steps), steps


@visible(
    '(Tensor x, Tensor[] more, Tensor rep, Tensor ghost, ScalarType dtype, Tensor? scale=None, Tensor? bias=None) '
    '-> Tensor'
)
def _permute_channels(
    x: Tensor,
    more: Sequence[Tensor],
    rep: Tensor,
    ghost: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Channels in the order (rep, ghost), or with two more gradients back again."""
    n, c, h, w = x.shape
    out = torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))
    if not x.is_meta:
        from .backends import _triton_gated

        tiles = -(-h * w // TILE['T'])
        _triton_gated.permute_channels[(n * tiles, -(-c // TILE['CB']))](
            *(x, *(more or (x, x)), rep, ghost, x if scale is None else scale, x if bias is None else bias),
            *(out, c, len(rep), h * w, tiles),
            BACKWARD=bool(more),
            SCALED=scale is not None,
            **launch_layout(x),
            **TILE,
        )
    return out


@visible('(Tensor extra, Tensor[] maps, Tensor? coefficients, Tensor(a!)[] counters, bool added) -> Tensor')
def _sum_moments(
    extra: Tensor, maps: Sequence[Tensor], coefficients: Tensor | None, counters: Sequence[Tensor], added: bool
) -> Tensor:
    """Moments of parts of each image, (N * parts, 3, C) in float32; adds one to the counter."""
    n, c, h, w = extra.shape
    is_last = memory_format(extra) is torch.channels_last
    tile = dict(T=32, CB=32) if is_last else dict(T=1024 if h * w >= 1024 else 256, CB=1)
    blocks, parts, steps = _parts(extra, tile['T'], tile['CB'])
    out = extra.new_empty(n * parts, 3, c, dtype=torch.float32)
    if not extra.is_meta:
        from .backends import _triton_gated

        _triton_gated.sum_moments[(blocks, n * parts)](
            *(*three(maps or [extra]), extra, out if coefficients is None else coefficients),
            *(counters[0] if counters else out, out, c, _width(maps), h * w, parts, steps),
            B=len(maps),
            NORMED=coefficients is not None,
            ADDED=added,
            COUNTED=bool(counters),
            LAST=is_last,
            **tile,
            num_warps=4,
        )
    return out


def _width(maps: Sequence[Tensor]) -> int:
    return maps[0].shape[1] if maps else 0


@visible('(Tensor moments, Tensor? affine, int images, ScalarType dtype) -> Tensor')
def _image_means(moments: Tensor, affine: Tensor | None, images: int, dtype: torch.dtype) -> Tensor:
    c = moments.shape[2]
    out = moments.new_empty(images, c, dtype=dtype)
    if not moments.is_meta:
        from .backends import _triton_gated

        parts = len(moments) // images
        sizes = dict(AFFINE=affine is not None, S=_MOST_PARTS, CB=64)
        affine = moments if affine is None else affine
        _triton_gated.image_means[(images, -(-c // 64))](moments, affine, out, c, parts, **sizes, num_warps=4)
    return out


@visible(
    '(Tensor extra, Tensor[] maps, Tensor? coefficients, Tensor? affine, Tensor logits, bool added, ScalarType dtype) '
    '-> Tensor'
)
def _gated_rows(
    extra: Tensor,
    maps: Sequence[Tensor],
    coefficients: Tensor | None,
    affine: Tensor | None,
    logits: Tensor,
    added: bool,
    dtype: torch.dtype,
) -> Tensor:
    n, c, h, w = extra.shape
    rows = extra.new_empty(n, h, w, eights(c), dtype=dtype)
    if not extra.is_meta:
        from .backends import _triton_gated

        tiles = -(-h * w // TILE['T'])
        _triton_gated.gated_rows[(n * tiles, -(-rows.shape[-1] // TILE['CB']))](
            *(*three(maps or [extra]), extra, logits if coefficients is None else coefficients),
            *(logits if affine is None else affine, logits, rows, c, _width(maps), h * w, tiles, rows.shape[-1] // 8),
            B=len(maps),
            NORMED=coefficients is not None,
            ADDED=added,
            AFFINE=affine is not None,
            **launch_layout(extra),
            **TILE,
        )
    return rows


@visible('(Tensor extra, Tensor[] maps, Tensor? coefficients, Tensor of_z, Tensor grad) -> Tensor')
def _gated_sums(
    extra: Tensor, maps: Sequence[Tensor], coefficients: Tensor | None, of_z: Tensor, grad: Tensor
) -> Tensor:
    """Sums over parts of each image, (N * parts, K, C)."""
    n, c, h, w = extra.shape
    blocks, parts, steps = _parts(extra, TILE['T'], TILE['CB'])
    out = extra.new_empty(n * parts, 3 if coefficients is None else 3 + 3 * len(maps), c, dtype=torch.float32)
    if not extra.is_meta:
        from .backends import _triton_gated

        _triton_gated.gated_sums[(blocks, n * parts)](
            *(*three(maps or [extra]), extra, out if coefficients is None else coefficients, of_z, grad, out),
            *(c, _width(maps), h * w, parts, steps, grad.shape[-1] // 8),
            B=len(maps),
            NORMED=coefficients is not None,
            **launch_layout(extra),
            **TILE,
        )
    return out


@visible('(Tensor sums, Tensor weight, Tensor bias, Tensor logits) -> (Tensor, Tensor)')
def _gate_gradients(sums: Tensor, weight: Tensor, bias: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each image, (N, K, C), and the gradient of the logits, (N, C)."""
    _, k, c = sums.shape
    images = len(logits)
    out, of_logits = sums.new_empty(images, k, c), torch.empty_like(logits)
    if not sums.is_meta:
        from .backends import _triton_gated

        sizes = dict(S=_MOST_PARTS, CB=64)
        _triton_gated.gate_gradients[(images, -(-c // 64))](
            *(sums, weight, bias, logits, out, of_logits, c, len(sums) // images, k), **sizes, num_warps=4
        )
    return out, of_logits


@visible('(Tensor sums, Tensor logits, Tensor of_means, Tensor of_z, float share) -> Tensor')
def _batch_sums(sums: Tensor, logits: Tensor, of_means: Tensor, of_z: Tensor, share: float) -> Tensor:
    images, k, c = sums.shape
    out = sums.new_empty(k, c)
    if not sums.is_meta:
        from .backends import _triton_gated

        sizes = dict(NB=16, CB=16)
        _triton_gated.batch_sums[(-(-c // 16),)](
            *(sums, logits, of_means, of_z, out, images, c, k, share), **sizes, num_warps=4
        )
    return out


@visible(
    '(Tensor extra, Tensor[] maps, Tensor? coefficients, Tensor of_z, Tensor logits, Tensor grad, Tensor of_means, '
    'Tensor total, bool training) -> (Tensor, Tensor)'
)
def _gated_gradients(
    extra: Tensor,
    maps: Sequence[Tensor],
    coefficients: Tensor | None,
    of_z: Tensor,
    logits: Tensor,
    grad: Tensor,
    of_means: Tensor,
    total: Tensor,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the maps, (B, N, c, H, W) or without norms a single one, and of the extra map."""
    n, c, h, w = extra.shape
    count = len(maps) if coefficients is not None else min(len(maps), 1)
    of_maps = new_maps(extra, count, _width(maps), extra.dtype)
    of_extra = torch.empty_like(extra, memory_format=memory_format(extra))
    if not extra.is_meta:
        from .backends import _triton_gated

        tiles = -(-h * w // TILE['T'])
        _triton_gated.gated_gradients[(n * tiles, -(-c // TILE['CB']))](
            *(*three(maps or [extra]), extra, total if coefficients is None else coefficients, of_z, logits, grad),
            *(of_means, total, of_maps, of_extra, c, _width(maps), h * w, tiles, grad.shape[-1] // 8, 1 / (h * w)),
            B=len(maps),
            NORMED=coefficients is not None,
            TRAINING=training,
            **launch_layout(extra),
            **TILE,
        )
    return of_maps, of_extra


@visible('(Tensor total, Tensor own, Tensor of_z, int number, bool training, Tensor[] weights) -> Tensor[]')
def _branch_norm_gradients(
    total: Tensor, own: Tensor, of_z: Tensor, number: int, training: bool, weights: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the norms' weights, that of z first, and of their biases."""
    out = [torch.empty_like(t) for t in (*weights, *weights)]
    of_weights, of_biases = out[: len(weights)], out[len(weights) :]
    if not total.is_meta:
        from .backends import _triton_gated

        c, width = len(weights[0]), len(weights[-1]) if len(weights) > 1 else 0
        branches = [three(some[1:] or some) for some in (of_weights, of_biases)]
        _triton_gated.branch_norm_gradients[(-(-c // 64),)](
            *(total, own, of_z, of_weights[0], of_biases[0], *branches[0], *branches[1], c, width, number),
            B=len(weights) - 1,
            TRAINING=training,
            CB=64,
            num_warps=4,
        )
    return out
