"""Linear layers that oneDNN computes on the CPU.

In float32 PyTorch's own layer calls MKL. On an AMD processor with AVX-512 oneDNN reaches twice its
rate, forward and backward (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from slak_mm.ops._context import is_autocast_enabled, is_observed

# Rows for which a packed weight is laid out.
_ROWS = 1024
# With fewer, transposing the weight for the input gradient costs more than oneDNN saves.
_LEAST_ROWS_OF_GRADIENTS = 64

# Layer -> what its weight was, and the copy that oneDNN takes.
_packed: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Tensor]] = WeakKeyDictionary()


def linear(layer: nn.Module, x: Tensor, act: nn.Module | None = None, keep: bool = False) -> Tensor:
    """Call a linear layer, in float32 on the CPU by oneDNN where PyTorch has it.

    The arithmetic is that of the layer; sums are rounded in another order. A layer that is not
    exactly ``nn.Linear`` (an adapter, a quantized layer) or has hooks is called as it is. So is
    any under autocast, and where a graph is recorded or a mode such as a FLOP counter looks on.

    Args:
        layer: The layer, C to D.
        x: (..., C).
        act: Called with the result; without autograd an exact GELU is fused. Default: None.
        keep: Without autograd, keep a copy of the weight in oneDNN's own layout for the next
            calls, which are faster by a twentieth. It is kept as long as the layer lives and its
            weight is neither replaced nor changed in place. Default: False.

    Returns:
        Shape (..., D).
    """
    fuses = False
    if not _is_taken(layer, x):
        y = layer(x)
    elif torch.is_grad_enabled():
        y = (
            _Linear.apply(x, layer.weight, layer.bias)
            if x.numel() >= _LEAST_ROWS_OF_GRADIENTS * x.shape[-1]
            else layer(x)
        )
    else:
        assert isinstance(layer, nn.Linear)
        fuses = type(act) is nn.GELU and act.approximate == 'none' and not has_hooks(act)
        weight = _packed_weight(layer) if keep else layer.weight
        y = _product(x.reshape(-1, layer.in_features), weight, layer.bias, gelu=fuses)
        y = y.view(*x.shape[:-1], layer.out_features)
    return y if act is None or fuses else act(y)


def _is_taken(layer: nn.Module, x: Tensor) -> bool:
    # First what torch.compile evaluates while it records: it cannot look into the others.
    return (
        not torch.jit.is_tracing()
        and not is_observed(x)
        and x.device.type == 'cpu'
        and x.dtype is torch.float32
        and x.numel() > 0
        and type(layer) is nn.Linear
        and layer.weight.dtype is torch.float32
        and not is_autocast_enabled('cpu')
        and has_onednn_linear()
        and not has_hooks(layer)
    )


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody looks at the inputs or results of any of the modules themselves."""
    of_all = nn.modules.module
    return bool(
        of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
        or any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
    )


def _packed_weight(layer: nn.Linear) -> Tensor:
    weight = layer.weight.detach()
    if weight.is_inference():  # it has no version to compare
        return weight
    state = (weight.data_ptr(), weight._version)
    if layer not in _packed or _packed[layer][0] != state:
        copy = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        _packed[layer] = (state, copy)
    return _packed[layer][1]


def has_onednn_linear() -> bool:
    """Whether PyTorch has the operators that oneDNN's linear layer needs here."""
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
        and hasattr(torch.ops.mkldnn, '_reorder_linear_weight')
    )


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
        rows, of_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        of_x = of_weight = None
        if torch.is_grad_enabled():  # the gradients are to be differentiated again
            of_x = of_rows @ weight if needs_x else None
            of_weight = of_rows.t() @ rows if needs_weight else None
        else:  # oneDNN wants the axis that is summed over to be the last one in memory
            if needs_x:
                of_x = _product(of_rows, weight.t().contiguous(), None)
            if needs_weight:
                of_weight = _product(of_rows.t().contiguous(), rows.t().contiguous(), None)
        return (None if of_x is None else of_x.view(x.shape), of_weight, of_rows.sum(0) if needs_bias else None)
