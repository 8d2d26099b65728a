"""The linear layers of a block on aligned rows, with layer scale, drop path and residual in one pass behind them.

``reference`` is plain PyTorch. On GPUs the weights are brought to the dtype of the rows and filled up with zeros to
multiples of 8 by one launch, the hidden layer is kept once (GELU is computed again in the backward pass, in the pass
that gives its gradient and that of the bias), and what follows the second layer is one pass, forward and backward. The
padding stays zero: GELU(0) is 0, and its gradients are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._fused import PARTS, TILE, gradients, visible
from .backends.layout import eights, in_memory, memory_format


def row_mlp(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale: Tensor | None,
    keep: float,
    residual: Tensor,
) -> Tensor:
    """Compute ``residual + kept * scale * (W2 GELU(W1 rows + b1) + b2)`` by fused passes.

    Args:
        rows: (N, H, W, C rounded up to a multiple of 8).
        weight1: W1, (D, C).
        bias1: b1, (D,).
        weight2: W2, (E, D).
        bias2: b2, (E,).
        scale: Layer scale, (E,), or None.
        keep: Probability to keep an image; what is kept is divided by it (drop path).
        residual: (N, E, H, W).

    Returns:
        Shape, and memory format, of the residual; in the widest dtype of rows, scale and residual.
    """
    kept = None if keep == 1 else torch.empty(len(rows), dtype=rows.dtype, device=rows.device).bernoulli_(keep)
    return _RowMLP.apply(kept, keep, rows, weight1, bias1, weight2, bias2, scale, residual)


def reference(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale: Tensor | None,
    residual: Tensor | None = None,
    kept: Tensor | None = None,
    keep: float = 1.0,
) -> Tensor:
    """Compute :func:`row_mlp` by PyTorch's functions, for given images (N,) that are kept, or what it adds."""
    weight1, bias1, weight2, bias2 = (t.to(rows.dtype) for t in (weight1, bias1, weight2, bias2))
    y = F.gelu(F.linear(rows[..., : weight1.shape[1]], weight1, bias1))
    y = F.linear(y, weight2, bias2).permute(0, 3, 1, 2)
    y = y if scale is None else y * scale.view(-1, 1, 1)
    y = y if kept is None else y * kept.view(-1, 1, 1, 1) / keep
    return y if residual is None else residual + y


class _RowMLP(torch.autograd.Function):
    """Takes (kept, keep, *the tensors of :func:`row_mlp`)."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor | None, keep: float, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        *inputs, residual = tensors
        rows, weight1, bias1, weight2, bias2, scale = inputs
        flat = in_memory(rows).contiguous().view(-1, rows.shape[-1])
        resized = aligned((weight1, bias1, weight2, bias2), rows.dtype)
        w1, b1, w2, b2 = resized
        hidden = torch.addmm(b1, flat, w1.t())
        y = torch.addmm(b2, F.gelu(hidden), w2.t())
        ctx.save_for_backward(kept, hidden, y if scale is not None and scale.requires_grad else None, w1, w2, *inputs)
        # The residual itself, in float32 under autocast, would be among the largest that a block keeps.
        ctx.keep, ctx.layout, ctx.dtype = keep, memory_format(residual), residual.dtype
        return scaled_residual(y, in_memory(residual), scale, kept, 1 / keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        kept, hidden, y, w1, w2, *inputs = ctx.saved_tensors

        def fused() -> list[Tensor | None]:
            nonlocal grad  # which is that of the residual as well, in its layout
            rows, weight1, bias1, weight2, bias2, scale = inputs
            grad = in_memory(grad).contiguous(memory_format=ctx.layout)
            grad_y, sums2 = _scaled_residual_gradients(grad, y, w2.shape[0], scale, kept, 1 / ctx.keep, rows.dtype)
            grad_hidden = grad_y @ w2
            activation, sums1 = _gelu_gradients(hidden, grad_hidden)
            flat = rows.reshape(-1, rows.shape[-1])
            grad_rows = (grad_hidden @ w1).view(rows.shape) if ctx.needs_input_grad[2] else None
            products = grad_hidden.t() @ flat, grad_y.t() @ activation
            parameters = [weight1, bias1, weight2, bias2, *([] if y is None else [scale])]
            of_parameters = _weight_gradients(products, sums1, sums2, parameters)
            return [grad_rows, *of_parameters, *([None] if y is None else [])]

        def plain(*tensors: Any) -> Tensor:
            return reference(*tensors, None, kept, ctx.keep).to(grad.dtype)  # type: ignore[call-arg]

        return None, None, *gradients(fused, plain, inputs, grad), grad.to(ctx.dtype)


def aligned(weights: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Weights and biases in a dtype, with all sizes rounded up to multiples of 8."""
    (d, c), e = weights[0].shape, len(weights[2])
    sizes = eights(c), eights(d), eights(e)
    if sizes == (c, d, e) and all(t.dtype is dtype and t.is_contiguous() for t in weights):
        return weights
    return _resize_weights([t.contiguous() for t in weights], *sizes, dtype)


# ---------------------------------------------------------------------------- kernels' launches


@visible('(Tensor[] weights, int c, int d, int e, ScalarType dtype) -> Tensor[]')
def _resize_weights(weights: Sequence[Tensor], c: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    """Copies of W1, b1, W2 and b2 in a dtype, filled up with zeros."""
    out = [weights[0].new_empty(shape, dtype=dtype) for shape in ((d, c), (d,), (e, d), (e,))]
    if not out[0].is_meta:
        weight1, bias1, weight2, bias2 = weights
        _launch_resizing((weight1, weight2), bias1, bias2, out, True)
    return out


@visible('(Tensor[] products, Tensor sums1, Tensor sums2, Tensor[] parameters) -> Tensor[]')
def _weight_gradients(
    products: Sequence[Tensor], sums1: Tensor, sums2: Tensor, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of W1, b1, W2, b2 and, if given, the layer scale.

    Args:
        products: Those of W1 and W2 with all sizes rounded up.
        sums1: Partial sums of that of b1, (programs, D).
        sums2: Those of b2 and the layer scale, (programs, 1 or 2, E).
        parameters: The parameters.

    Returns:
        Gradients like the parameters, each with memory of its own; products that are such gradients already.
    """
    weights = parameters[0], parameters[2]
    cut = any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(products, weights))
    weight1, weight2 = [products[0].new_empty(t.shape, dtype=t.dtype) for t in weights] if cut else products
    vectors = [t.new_empty(t.shape) for t in (parameters[1], *parameters[3:])]
    out = [weight1, vectors[0], weight2, *vectors[1:]]
    if not sums1.is_meta:
        _launch_resizing(products, sums1, sums2, out, cut)
    return out


def _launch_resizing(
    weights: Sequence[Tensor], sums1: Tensor, sums2: Tensor, out: Sequence[Tensor], resized: bool
) -> None:
    """Weights, and biases or their partial sums, into weights, biases and layer scale of other sizes."""
    from .backends import _triton_passes

    (d, c), e = weights[0].shape, len(weights[1])
    to1, to_bias1, to2, to_bias2, *to_scale = out
    (to_d, to_c), to_e = to1.shape, len(to2)
    rows = to_d + to_e if resized else 0
    vectors = -(-to_d // PARTS['CB']) + -(-to_e // PARTS['CB']) * (1 + len(to_scale))
    stride2 = e * (1 + len(to_scale))
    _triton_passes.resize_weights[(rows + vectors,)](
        *(*weights, sums1, sums2, to1, to2, to_bias1, to_bias2, *(to_scale or [to_bias2])),
        *(c, d, e, to_c, to_d, to_e, rows, sums1.numel() // d, sums2.numel() // stride2, stride2),
        ROW=512,
        **PARTS,
    )


@visible('(Tensor y, Tensor residual, Tensor? scale, Tensor? kept, float share, Tensor? coefficients=None) -> Tensor')
def scaled_residual(
    y: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    kept: Tensor | None,
    share: float,
    coefficients: Tensor | None = None,
) -> Tensor:
    """``residual + kept * share * scale * y``, with coefficients (5, E) of a batch norm ``norm(y)`` for y."""
    n, e, h, w = residual.shape
    layout = memory_format(residual)
    dtype = torch.promote_types(residual.dtype, y.dtype if scale is None else torch.promote_types(y.dtype, scale.dtype))
    out = torch.empty_like(residual, dtype=dtype, memory_format=layout)
    if not y.is_meta:
        from .backends import _triton_passes

        tiles = -(-h * w // TILE['T'])
        _triton_passes.scaled_residual[(n * tiles, -(-e // TILE['CB']))](
            *(y, unused := y if coefficients is None else coefficients),
            *(unused if scale is None else scale, unused if kept is None else kept),
            *(residual.contiguous(memory_format=layout), out, e, h * w, tiles, y.shape[-1] // 8, share),
            NORMED=coefficients is not None,
            HAS_SCALE=scale is not None,
            LAST=layout is torch.channels_last,
            **TILE,
        )
    return out


@visible(
    '(Tensor grad, Tensor? y, int columns, Tensor? scale, Tensor? kept, float share, ScalarType dtype) '
    '-> (Tensor, Tensor)'
)
def _scaled_residual_gradients(
    grad: Tensor,
    y: Tensor | None,
    columns: int,
    scale: Tensor | None,
    kept: Tensor | None,
    share: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``y`` (pixels, columns), and sums of the pixels of each program, of it and of that of ``scale``."""
    n, e, h, w = grad.shape
    tiles = -(-h * w // TILE['T'])
    grad_y = grad.new_empty(n * h * w, columns, dtype=dtype)
    sums = grad.new_empty(n * tiles, 1 if y is None else 2, columns, dtype=torch.float32)
    if not grad.is_meta:
        from .backends import _triton_passes

        _triton_passes.scaled_residual_gradients[(n * tiles, -(-columns // TILE['CB']))](
            *(grad_y if y is None else y, grad if scale is None else scale, grad_y if kept is None else kept),
            *(grad, grad_y, sums, e, h * w, tiles, columns // 8, share),
            HAS_SCALE=scale is not None,
            NEEDS_SCALE=y is not None,
            LAST=memory_format(grad) is torch.channels_last,
            **TILE,
        )
    return grad_y, sums


@visible('(Tensor hidden, Tensor(a!) grad) -> (Tensor, Tensor)')
def _gelu_gradients(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of ``hidden`` (pixels, D), and sums of its gradient, which takes the place of ``grad``."""
    pixels, d = hidden.shape
    blocks = -(-pixels // TILE['T'])
    activation, sums = torch.empty_like(hidden), hidden.new_empty(blocks, d, dtype=torch.float32)
    if not hidden.is_meta:
        from .backends import _triton_passes

        _triton_passes.gelu_gradients[(blocks, -(-d // TILE['CB']))](
            hidden, grad, activation, sums, pixels, d // 8, **TILE
        )
    return activation, sums
