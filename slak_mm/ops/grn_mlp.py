"""The linear layers of a block with GRN between them, and batch norm, layer scale, drop path and residual behind them.

``reference`` is plain PyTorch. On GPUs GELU is never kept: the pass that sums up the squares for GRN computes it, the
one that applies GRN does so again, and in the backward pass so do two others. What follows the second layer is one pass
behind the statistics of the norm. The rows have their channels padded with zeros to a multiple of 8, which stay zeros:
GELU(0) is 0, GRN multiplies it and has no ``beta`` there, and its gradients are dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._fused import TILE, gradients, launch_layout, visible, why_not
from .backends.layout import eights, in_memory, memory_format
from .branch_norm import BranchNorms, batch_norm_coefficients
from .pointwise import global_response_norm
from .row_mlp import aligned, scaled_residual

_MOST_SPLITS = 64  # programs that share the pixels of an image
_PROGRAMS = 1056  # eight for each of 132 multiprocessors


def why_not_fused(
    weight1: Tensor,
    bias1: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    norm: BranchNorms | None,
    scale: Tensor | None,
    residual: Tensor,
) -> str | None:
    """Say why :func:`grn_mlp` cannot run, or None if it can."""
    if bias1 is None or residual.dim() != 4:
        return 'the first layer has no bias, or the residual is no map'
    of_norm: tuple[Tensor, ...] = ()
    if norm is not None:
        if bias2 is not None or len(norm.weights) != 1:
            return 'the second layer has a bias and a norm behind it, or several'
        of_norm = (*norm.weights, *norm.biases, *norm.running_means, *norm.running_vars)
    weights = (weight1, bias1, gamma, beta, weight2, bias2, scale)
    return (norm and norm.why_not(residual)) or why_not(residual, *weights, *of_norm)


def grn_mlp(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    norm: BranchNorms | None,
    scale: Tensor | None,
    keep: float,
    residual: Tensor,
) -> Tensor:
    """Compute ``residual + kept * scale * norm(W2 GRN(GELU(W1 rows + b1)) + b2)`` by fused passes.

    Args:
        rows: (N, H, W, C rounded up to a multiple of 8), filled up with zeros.
        weight1: W1, (D, C).
        bias1: b1, (D,).
        gamma: That of :func:`slak_mm.ops.pointwise.global_response_norm`, (D,).
        beta: Likewise, (D,), or None.
        weight2: W2, (E, D).
        bias2: b2, (E,), or None. Not with a norm.
        norm: One batch norm over (N, E, H, W), or None. In training its running statistics are updated.
        scale: Layer scale, (E,), or None.
        keep: Probability to keep an image; what is kept is divided by it (drop path).
        residual: (N, E, H, W).

    Returns:
        Shape, and memory format, of the residual; in the widest dtype of rows, scale and residual.
    """
    kept = None if keep == 1 else torch.empty(len(rows), device=rows.device, dtype=torch.float32).bernoulli_(keep)
    of_norm = (None, None) if norm is None else (norm.weights[0], norm.biases[0])
    tensors = (rows, weight1, bias1, gamma, beta, weight2, bias2, *of_norm, scale, residual)
    return _GRNMLP.apply(norm, kept, keep, *tensors)


def reference(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    norm: BranchNorms | None,
    scale: Tensor | None,
    residual: Tensor | None,
    kept: Tensor | None = None,
    keep: float = 1.0,
) -> Tensor:
    """Compute :func:`grn_mlp` by PyTorch's functions, for given images (N,) that are kept, or what it adds.

    Running statistics are not updated.
    """
    dtype = rows.dtype
    wide = torch.promote_types(dtype, torch.float32)  # of the sums over an image
    y = F.gelu(F.linear(rows[..., : weight1.shape[1]], weight1.to(dtype), bias1.to(dtype)))
    y = global_response_norm(y.to(wide), gamma.to(wide), None if beta is None else beta.to(wide)).to(dtype)
    y = F.linear(y, weight2.to(dtype), None if bias2 is None else bias2.to(dtype)).permute(0, 3, 1, 2)
    if norm is not None:
        mean, var, weight, bias = (t[0].to(wide) for t in (norm.running_means, norm.running_vars, *norm[:2]))
        of_batch = None if norm.training else mean, None if norm.training else var
        y = F.batch_norm(y.to(wide), *of_batch, weight, bias, norm.training, eps=norm.eps).to(dtype)
    y = y if scale is None else y * scale.view(-1, 1, 1)
    y = y if kept is None else y * kept.to(y.dtype).view(-1, 1, 1, 1) / keep
    return y if residual is None else residual + y


class _GRNMLP(torch.autograd.Function):
    """Takes (norm, kept, keep, *the tensors of :func:`grn_mlp`, weight and bias of the norm among them)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, norm: BranchNorms | None, kept: Tensor | None, keep: float, *tensors: Any
    ) -> Tensor:
        *inputs, residual = tensors
        rows, weight1, bias1, gamma, beta, weight2, bias2, _, norm_bias, scale = inputs
        n, h, w, columns = rows.shape
        any_bias = next((b for b in (bias2, norm_bias) if b is not None), weight2[:, 0])
        w1, b1, w2, b2 = aligned((weight1, bias1, weight2, any_bias), rows.dtype)
        hidden = torch.addmm(b1, in_memory(rows).contiguous().view(-1, columns), w1.t())
        of_images = _grn_responses(_gelu_squares(hidden, n), len(gamma))
        activation = _grn_rows(hidden, *of_images, gamma, beta)
        y = activation @ w2.t() if bias2 is None else torch.addmm(b2, activation, w2.t())
        coefficients = None
        if norm is not None:
            values = y.view(n, h, w, -1)[..., : len(weight2)]
            values = values.contiguous() if norm.training else values
            coefficients = batch_norm_coefficients([values.permute(0, 3, 1, 2)], norm)
        out = scaled_residual(y, in_memory(residual), scale, kept, 1 / keep, coefficients)
        ctx.save_for_backward(kept, hidden, *of_images, y, coefficients, w1, w2, *inputs)
        # Not the residual, which in float32 under autocast would be among the largest that a block keeps.
        ctx.norm, ctx.keep, ctx.layout, ctx.dtype = norm, keep, memory_format(residual), residual.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        # Once: a block that is computed again in the backward pass gives them only once.
        kept, hidden, responses, reciprocals, y, coefficients, w1, w2, *inputs = ctx.saved_tensors
        of_images = responses, reciprocals
        norm, needs = ctx.norm, ctx.needs_input_grad[3:]

        def fused() -> list[Tensor | None]:
            nonlocal grad  # which is that of the residual as well, in its layout
            rows, weight1, bias1, gamma, beta, weight2, bias2, norm_weight, norm_bias, scale = inputs
            g = grad = in_memory(grad).contiguous(memory_format=ctx.layout)
            known = coefficients
            if norm is None:  # the gradients are those behind a norm that changes nothing
                known = g.new_zeros(5, g.shape[1], dtype=torch.float32)
                known[1:3].fill_(1)
                norm_weight, norm_bias = known[1], known[0]
            sums = _norm_sums(g, y, known)
            totals, factors, *of_tail = _norm_totals(sums, known, norm_weight, norm_bias, scale, kept, 1 / ctx.keep)
            training = norm is not None and norm.training
            if training and norm.group is not None:
                dist.all_reduce(totals, group=norm.group)
            grad_y = _normed_residual_gradients(g, y, known, totals, factors, training)
            grad_hidden = grad_y @ w2
            of_grn, means = _grn_totals(_grn_sums(hidden, grad_hidden, len(rows)), *of_images, gamma)
            activation, sums = _grn_gradients(hidden, grad_hidden, *of_images, of_grn, means, gamma, beta)
            products = [
                grad_hidden.t() @ rows.reshape(-1, rows.shape[-1]) if needs[1] else None,
                grad_y.t() @ activation if needs[5] else None,
            ]
            like = (bias1, gamma, beta, weight1, weight2)
            of_bias1, of_gamma, of_beta, *cut = _parameter_gradients(sums, of_grn, *of_images, *products, *like)
            of_weight1, of_weight2 = (t if t.numel() else product for t, product in zip(cut, products))
            of_weight, of_bias, of_scale = of_tail
            return [
                (grad_hidden @ w1).view(rows.shape) if needs[0] else None,
                *(of_weight1, of_bias1, of_gamma, of_beta if beta is not None else None, of_weight2),
                None if bias2 is None else of_bias.to(bias2.dtype),
                *((None, None) if norm is None else (of_weight, of_bias)),
                None if scale is None else of_scale,
            ]

        def plain(*tensors: Any) -> Tensor:
            if norm is not None and norm.training and norm.group is not None:
                raise NotImplementedError('SyncBN has no gradients of gradients')
            *linear, weight, bias, scale = tensors
            own = None if norm is None else norm._replace(weights=(weight,), biases=(bias,))
            return reference(*linear, own, scale, None, kept, ctx.keep).to(grad.dtype)  # type: ignore[call-arg]

        return None, None, None, *gradients(fused, plain, inputs, grad), grad.to(ctx.dtype)


# ---------------------------------------------------------------------------- kernels' launches


def _split(images: int, pixels: int, blocks: int) -> tuple[int, int]:
    """Number of programs that share an image, and tiles of each."""
    tiles = -(-pixels // TILE['T'])
    steps = -(-tiles // min(tiles, _MOST_SPLITS, -(-_PROGRAMS // (images * blocks))))
    return -(-tiles // steps), steps


def _blocks(channels: int) -> int:
    return -(-channels // TILE['CB'])


@visible('(Tensor hidden, int images) -> Tensor')
def _gelu_squares(hidden: Tensor, images: int) -> Tensor:
    """Sums of the squares of GELU(hidden) (pixels, D) over parts of the images, (N, splits, D) in float32."""
    d, pixels = hidden.shape[1], len(hidden) // images
    splits, steps = _split(images, pixels, _blocks(d))
    sums = hidden.new_empty(images, splits, d, dtype=torch.float32)
    if not hidden.is_meta:
        from .backends import _triton_grn

        grid = (images * splits, _blocks(d))
        _triton_grn.gelu_squares[grid](hidden, sums, pixels, splits, steps, d // 8, **TILE)
    return sums


@visible('(Tensor sums, int d) -> (Tensor, Tensor)')
def _grn_responses(sums: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Responses (N, D), and the reciprocals (N,) of their means over the first ``d`` channels."""
    images, splits, columns = sums.shape
    responses, reciprocals = sums.new_empty(images, columns), sums.new_empty(images)
    if not sums.is_meta:
        from .backends import _triton_grn

        _triton_grn.grn_responses[(images,)](
            sums, responses, reciprocals, d, splits, columns // 8, R=8, CB=512, num_warps=8
        )
    return responses, reciprocals


@visible('(Tensor hidden, Tensor responses, Tensor reciprocals, Tensor gamma, Tensor? beta) -> Tensor')
def _grn_rows(hidden: Tensor, responses: Tensor, reciprocals: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    """GRN(GELU(hidden)), (pixels, D)."""
    (images, d), pixels = responses.shape, len(hidden) // len(responses)
    activation = torch.empty_like(hidden)
    if not hidden.is_meta:
        from .backends import _triton_grn

        tiles = -(-pixels // TILE['T'])
        _triton_grn.grn_rows[(images * tiles, _blocks(d))](
            *(hidden, responses, reciprocals, gamma, gamma if beta is None else beta, activation),
            *(len(gamma), pixels, tiles, d // 8),
            HAS_BETA=beta is not None,
            **TILE,
        )
    return activation


@visible('(Tensor grad, Tensor y, Tensor coefficients) -> Tensor')
def _norm_sums(grad: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    """Sums of ``grad`` and of it times the normalized ``y`` over parts of the images, (N, splits, 2, E)."""
    n, e, h, w = grad.shape
    splits, steps = _split(n, h * w, _blocks(e))
    sums = grad.new_empty(n, splits, 2, e, dtype=torch.float32)
    if not grad.is_meta:
        from .backends import _triton_grn

        _triton_grn.norm_sums[(n * splits, _blocks(e))](
            y, coefficients, grad, sums, e, h * w, splits, steps, y.shape[1] // 8, **launch_layout(grad), **TILE
        )
    return sums


@visible(
    '(Tensor sums, Tensor coefficients, Tensor weight, Tensor bias, Tensor? scale, Tensor? kept, float share) '
    '-> Tensor[]'
)
def _norm_totals(
    sums: Tensor,
    coefficients: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    kept: Tensor | None,
    share: float,
) -> list[Tensor]:
    """Sums (2, E) and factors (N, E) for :func:`_normed_residual_gradients`; gradients of weight, bias and scale."""
    images, splits, _, e = sums.shape
    results = [sums.new_empty(2, e), sums.new_empty(images, e)]
    results += [torch.empty_like(t) for t in (weight, bias, weight if scale is None else scale)]
    if not sums.is_meta:
        from .backends import _triton_grn

        _triton_grn.norm_totals[(-(-e // 16),)](
            *(
                sums,
                coefficients,
                weight,
                bias,
                weight if scale is None else scale,
                coefficients if kept is None else kept,
            ),
            *(*results, images, splits, e, share),
            HAS_SCALE=scale is not None,
            R=64,
            CB=16,
            num_warps=4,
        )
    return results


@visible('(Tensor grad, Tensor y, Tensor coefficients, Tensor totals, Tensor factors, bool training) -> Tensor')
def _normed_residual_gradients(
    grad: Tensor, y: Tensor, coefficients: Tensor, totals: Tensor, factors: Tensor, training: bool
) -> Tensor:
    """Gradient of ``y``."""
    n, e, h, w = grad.shape
    grad_y = torch.empty_like(y)
    if not grad.is_meta:
        from .backends import _triton_grn

        tiles, columns = -(-h * w // TILE['T']), y.shape[1]
        _triton_grn.normed_residual_gradients[(n * tiles, _blocks(columns))](
            *(y, coefficients, grad, totals, factors, grad_y, e, h * w, tiles, columns // 8, int(training)),
            **launch_layout(grad),
            **TILE,
        )
    return grad_y


@visible('(Tensor hidden, Tensor grad, int images) -> Tensor')
def _grn_sums(hidden: Tensor, grad: Tensor, images: int) -> Tensor:
    """Sums of ``grad * GELU(hidden)`` and of ``grad`` over parts of the images, (N, splits, 2, D)."""
    d, pixels = hidden.shape[1], len(hidden) // images
    splits, steps = _split(images, pixels, _blocks(d))
    sums = hidden.new_empty(images, splits, 2, d, dtype=torch.float32)
    if not hidden.is_meta:
        from .backends import _triton_grn

        grid = (images * splits, _blocks(d))
        _triton_grn.grn_sums[grid](hidden, grad, sums, pixels, splits, steps, d // 8, **TILE)
    return sums


@visible('(Tensor sums, Tensor responses, Tensor reciprocals, Tensor gamma) -> (Tensor, Tensor)')
def _grn_totals(sums: Tensor, responses: Tensor, reciprocals: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of whole images, (N, 2, D), and what the mean over the channels has in their gradients, (N,)."""
    images, splits, _, columns = sums.shape
    totals, means = sums.new_empty(images, 2, columns), sums.new_empty(images)
    if not sums.is_meta:
        from .backends import _triton_grn

        _triton_grn.grn_totals[(images,)](
            *(sums, responses, reciprocals, gamma, totals, means, len(gamma), splits, columns // 8),
            R=8,
            CB=512,
            num_warps=8,
        )
    return totals, means


@visible(
    '(Tensor hidden, Tensor(a!) grad, Tensor responses, Tensor reciprocals, Tensor totals, Tensor means, '
    'Tensor gamma, Tensor? beta) -> (Tensor, Tensor)'
)
def _grn_gradients(
    hidden: Tensor,
    grad: Tensor,
    responses: Tensor,
    reciprocals: Tensor,
    totals: Tensor,
    means: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """GRN(GELU(hidden)), and sums (programs, D) of the gradient of ``hidden``, which takes the place of ``grad``."""
    (images, d), pixels = responses.shape, len(hidden) // len(responses)
    splits, steps = _split(images, pixels, _blocks(d))
    activation, sums = torch.empty_like(hidden), responses.new_empty(images * splits, d)
    if not hidden.is_meta:
        from .backends import _triton_grn

        _triton_grn.grn_gradients[(images * splits, _blocks(d))](
            *(hidden, grad, responses, reciprocals, totals, means, gamma, gamma if beta is None else beta),
            *(activation, sums, len(gamma), pixels, splits, steps, d // 8),
            HAS_BETA=beta is not None,
            **TILE,
        )
    return activation, sums


@visible(
    '(Tensor sums, Tensor totals, Tensor responses, Tensor reciprocals, Tensor? product1, Tensor? product2, '
    'Tensor bias1, Tensor gamma, Tensor? beta, Tensor weight1, Tensor weight2) -> Tensor[]'
)
def _parameter_gradients(
    sums: Tensor,
    totals: Tensor,
    responses: Tensor,
    reciprocals: Tensor,
    product1: Tensor | None,
    product2: Tensor | None,
    bias1: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    weight1: Tensor,
    weight2: Tensor,
) -> list[Tensor]:
    """Gradients of (b1, gamma, beta, W1, W2); the last two cut and cast of products, or empty if they need not be."""
    results = [torch.empty_like(t) for t in (bias1, gamma, gamma if beta is None else beta)]
    rows = []
    for product, weight in ((product1, weight1), (product2, weight2)):
        is_done = product is None or (product.shape == weight.shape and product.dtype is weight.dtype)
        rows.append(0 if is_done else len(weight))
        results.append(weight.new_empty(0 if is_done else weight.shape))
    if not sums.is_meta:
        from .backends import _triton_grn

        d, c = weight1.shape
        _triton_grn.parameter_gradients[(-(-d // 16) + sum(rows),)](
            *(sums, totals, responses, reciprocals),
            *(sums if product is None else product for product in (product1, product2)),
            *(*results, rows[0], c, eights(c) // 8, d, sums.shape[1] // 8, len(sums), len(totals)),
            HAS_BETA=beta is not None,
            R=64,
            KB=16,
            CB=512,
            num_warps=4,
        )
    return results
