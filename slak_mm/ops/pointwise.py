"""The pointwise half of a block: norm, linear layer, GELU, linear layer, scale and residual.

``reference`` is plain PyTorch. On the CPU there are two reasons for something else. In float32
PyTorch's linear layer calls MKL; on an AMD processor with AVX-512 oneDNN reaches twice its rate,
forward and backward (docs/benchmarks.md). And the hidden layer of all pixels is many times larger
than the caches: without autograd some pixels are taken at a time. On CUDA matrix products in half
precision are 2.5 to 4.3 times slower where a row is no multiple of 16 bytes (docs/benchmarks.md), as
with most of the widths of width factor 1.3: there the rows are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._context import autocast_dtype, is_autocast_enabled, is_observed, is_transformed
from .backends.layout import eights

PIXELS_AT_ONCE = 1024
"""Pixels whose hidden layer fits into a CPU's cache; fewer make matrix products slower."""

_SQUARES_AT_ONCE = 1 << 16  # they are added up while they are in the second-level cache of one core
# With fewer rows, transposing the weight for the input gradient costs more than oneDNN saves.
_LEAST_ROWS_OF_GRADIENTS = 64
# To lay out a weight as oneDNN wants it takes about as long as it saves with half as many.
_LEAST_PIXELS_TO_PACK = 4 * PIXELS_AT_ONCE

Norm = tuple[Tensor | None, Tensor | None, float]
Grn = tuple[Tensor, Tensor | None]


def pointwise_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    gate: Tensor | None = None,
    norm: Norm | None = None,
    grn: Grn | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute ``residual + scale * (W2 GRN(GELU(W1 LayerNorm(gate * x) + b1)) + b2)`` for each pixel.

    What is None is left out. All backends do this arithmetic; sums are rounded in another order.

    Args:
        x: (N, C, H, W).
        weight1: W1, (D, C).
        bias1: b1, (D,).
        weight2: W2, (E, D).
        bias2: b2, (E,).
        gate: Factor of each channel of each image, (N, C, 1, 1). Default: None.
        norm: Weight (C,), bias (C,) and epsilon of a LayerNorm over the channels. Default: None.
        grn: ``gamma`` and ``beta`` of :func:`global_response_norm`, both (D,). Default: None.
        scale: Layer scale, (E,). Default: None.
        residual: (N, E, H, W). Default: None.

    Returns:
        Shape (N, E, H, W), channels-last.
    """
    tensors = [x, weight1, bias1, weight2, bias2, gate, *(norm or ())[:2], *(grn or ()), scale, residual]
    given = [t for t in tensors if t is not None]
    # First what torch.compile evaluates while it records: it cannot look into the others.
    is_on_cpu = (
        not torch.jit.is_tracing()
        and not is_observed(*given)
        and not is_transformed(*given)
        and all(t.device.type == 'cpu' for t in given)
        and not is_autocast_enabled('cpu')
        and x.numel() > 0
    )
    operands = (x, weight1, bias1, weight2, bias2, gate, norm, grn, scale, residual)
    if not is_on_cpu:
        return _aligned(*operands) if _wants_alignment(x, weight1, weight2, grn) else reference(*operands)
    in_parts = not torch.is_grad_enabled() and all(
        t.is_contiguous(memory_format=torch.channels_last) for t in (x, residual) if t is not None
    )
    return _in_parts(*operands) if in_parts else reference(*operands, linear=linear)


def reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    gate: Tensor | None = None,
    norm: Norm | None = None,
    grn: Grn | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Tensor:
    """Compute :func:`pointwise_mlp` by PyTorch's functions, on whole maps."""
    y = (x if gate is None else x * gate).permute(0, 2, 3, 1)
    if norm is not None:
        weight, bias, eps = norm
        y = F.layer_norm(y, y.shape[-1:], weight, bias, eps)
    y = F.gelu(linear(y, weight1, bias1))
    if grn is not None:
        y = global_response_norm(y, *grn)
    y = linear(y, weight2, bias2).permute(0, 3, 1, 2)
    return scaled_sum(y, None if scale is None else scale.view(-1, 1, 1), residual)


def scaled_sum(y: Tensor, scale: Tensor | None, residual: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Compute ``residual + scale * y``; what is None is left out."""
    if residual is None:
        return y if scale is None else torch.mul(scale, y, out=out)
    return torch.add(residual, y, out=out) if scale is None else torch.addcmul(residual, y, scale, out=out)


def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    """Compute ``(gamma * G / (mean over channels of G + 1e-6) + 1) * x + beta`` for (N, H, W, C) maps.

    G is the norm of each channel over the pixels, ``gamma`` and ``beta`` have C elements. Woo et
    al., CVPR 2023, https://arxiv.org/abs/2301.00808, as Ding et al. (CVPR 2024) write it.
    """
    y = _grn_factor(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True), gamma) * x
    return y if beta is None else y + beta


def _grn_factor(norm: Tensor, gamma: Tensor) -> Tensor:
    return gamma * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)) + 1


# ------------------------------------------------------------------------------- aligned rows


def _wants_alignment(x: Tensor, weight1: Tensor, weight2: Tensor, grn: Grn | None) -> bool:
    """Whether tensor cores would meet rows that are no multiple of 16 bytes; GRN has a mean over them."""
    is_half = torch.promote_types(x.dtype, weight1.dtype).itemsize == 2 or is_autocast_enabled('cuda')
    sizes = (*weight1.shape, len(weight2))
    return x.device.type == 'cuda' and is_half and grn is None and any(size != eights(size) for size in sizes)


def _aligned(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    gate: Tensor | None,
    norm: Norm | None,
    grn: Grn | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Compute :func:`pointwise_mlp` with C, D and E rounded up to multiples of 8.

    What is added is zero and stays zero, forward and backward: GELU(0) is 0, and the gradients of the padding
    are dropped.
    """
    more_c, more_d, more_e = (eights(size) - size for size in (weight1.shape[1], len(weight1), len(weight2)))
    bias1, bias2 = (b if b is None else F.pad(b, (0, more)) for b, more in ((bias1, more_d), (bias2, more_e)))
    y = (x if gate is None else x * gate).permute(0, 2, 3, 1)
    if norm is not None:
        y = F.layer_norm(y, y.shape[-1:], *norm)
    if is_autocast_enabled(x.device.type):
        y = y.to(autocast_dtype(x.device.type))  # as the linear layer would, before the copy that pads
    y = F.gelu(F.linear(F.pad(y, (0, more_c)), F.pad(weight1, (0, more_c, 0, more_d)), bias1))
    y = F.linear(y, F.pad(weight2, (0, more_d, 0, more_e)), bias2)[..., : len(weight2)].permute(0, 3, 1, 2)
    return scaled_sum(y, None if scale is None else scale.view(-1, 1, 1), residual)


# ----------------------------------------------------------------------- some pixels at a time


def _in_parts(*operands: Any) -> Tensor:
    """Compute :func:`pointwise_mlp` of channels-last maps on the CPU, without autograd.

    The norms that GRN depends on are taken of pixels that are still in the cache, and its factors
    are multiplied with them shortly before the second layer.
    """
    x, weight1, bias1, weight2, bias2, gate, norm, grn, scale, residual = operands
    n, _, h, w = x.shape
    channels = len(weight2)
    out = x.new_empty(n, h, w, channels)
    # What belongs to one image is done image by image.
    images = 1 if gate is None and grn is None else n
    if n * h * w >= _LEAST_PIXELS_TO_PACK:
        weight1, weight2 = (_packed(weight, x.dtype) for weight in (weight1, weight2))

    def hidden(part: Tensor, image: int) -> Tensor:
        part = part if gate is None else part * gate[image].view(-1)
        if norm is not None:
            part = F.layer_norm(part, part.shape[-1:], *norm)
        return linear(part, weight1, bias1, gelu=True)

    pixels, results = (t.reshape(images, -1, t.shape[-1]) for t in (x.permute(0, 2, 3, 1), out))
    residuals = None if residual is None else residual.permute(0, 2, 3, 1).reshape(images, -1, channels)
    for image in range(images):
        parts: Any = (hidden(part, image) for part in pixels[image].split(PIXELS_AT_ONCE))
        if grn is not None:
            gamma, beta = grn
            parts = list(parts)
            squares = torch.stack([sum_of_squares(part) for part in parts]).sum(0)
            factor = _grn_factor(squares.sqrt().to(x.dtype), gamma)
        for i, (part, result) in enumerate(zip(parts, results[image].split(PIXELS_AT_ONCE))):
            if grn is not None:
                part = part.mul_(factor) if beta is None else torch.addcmul(beta, part, factor)
            y = linear(part, weight2, bias2)
            if residuals is not None:
                added = residuals[image, i * PIXELS_AT_ONCE :][: len(y)]
                scaled_sum(y, scale, added, out=result)
            else:
                result.copy_(scaled_sum(y, scale, None))
    return out.permute(0, 3, 1, 2)


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum over the rows of (P, C) of the squares, (C,), in float32 at least; without autograd."""
    # A few rows at a time: their squares do not leave the cache.
    scratch = x.new_empty(max(1, min(len(x), _SQUARES_AT_ONCE // x.shape[1])), x.shape[1])
    total = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    for part in x.split(len(scratch)):
        total += torch.mul(part, part, out=scratch[: len(part)]).sum(0, dtype=total.dtype)
    return total


# ------------------------------------------------------------------------------ linear layers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Compute a linear layer, (..., C) to (..., D), on the CPU, in float32 by oneDNN where PyTorch has it.

    ``weight`` is (D, C); without autograd it may be packed. With ``gelu`` an exact GELU follows.
    """
    rows = x.reshape(-1, x.shape[-1])
    needs_grad = torch.is_grad_enabled()
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32 or not has_onednn_linear():
        y = F.linear(x, weight, bias)
    elif not needs_grad:
        return _product(rows, weight, bias, gelu).view(*x.shape[:-1], -1)
    elif len(rows) < _LEAST_ROWS_OF_GRADIENTS:
        y = F.linear(x, weight, bias)
    else:
        y = _Linear.apply(x, weight, bias)
    return F.gelu(y) if gelu else y


def has_onednn_linear() -> bool:
    """Whether PyTorch has the operators that oneDNN's linear layer needs here."""
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
        and hasattr(torch.ops.mkldnn, '_reorder_linear_weight')
    )


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in oneDNN's own layout, if it will compute with it. Never kept: weights change in unseen ways."""
    if not dtype is weight.dtype is torch.float32 or not has_onednn_linear():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PIXELS_AT_ONCE)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias``; ``weight`` (D, C) may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu' if gelu else 'none', [], 'none' if gelu else '')


class _Linear(torch.autograd.Function):
    """Takes x (..., C), weight (D, C) and bias (D,) or None."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        y = _product(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if torch.is_grad_enabled() or is_transformed(grad):  # e.g. the gradients are to be differentiated again
            grad_x = grad_rows @ weight if needs_x else None
            grad_weight = grad_rows.t() @ rows if needs_weight else None
        else:  # oneDNN wants the axis that is summed over to be the last one in memory
            if needs_x:
                grad_x = _product(grad_rows, weight.t().contiguous(), None)
            if needs_weight:
                grad_weight = _product(grad_rows.t().contiguous(), rows.t().contiguous(), None)
        return (None if grad_x is None else grad_x.view(x.shape), grad_weight, grad_rows.sum(0) if needs_bias else None)
