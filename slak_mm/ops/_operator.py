"""Execution of the cross convolution: backend, autograd and registration with PyTorch.

From torch 2.4 on it is the operator ``slak_mm::cross_dwconv2d``, with rules for tensors without
data and for autograd, which ``torch.compile``, ``torch.export`` and modes (fake tensors) see as
one node. Called outside of them, an ``autograd.Function`` does the same at a third of the overhead.
PyTorch's FLOP counter sees the plain convolutions, which it has formulas for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._context import is_compiling, is_counted, is_observed, is_recorded, is_transformed
from .backends import BACKENDS, choose_backend, forced_backend, leave_out, reference, use_backend
from .backends.layout import in_memory, memory_format

HAS_LIBRARY = hasattr(torch.library, 'register_autograd')
"""Whether this torch can register the operator (from 2.4 on)."""


def apply(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> Sequence[Tensor]:
    """Convolve ``x`` with every kernel, or sum up; see :mod:`slak_mm.ops.backends`."""
    if _wants_plain_graph():
        return reference.forward(x, kernels, bias, reduce)
    if is_observed(x, *kernels, *(() if bias is None else (bias,))):
        if not HAS_LIBRARY:
            return reference.forward(x, kernels, bias, reduce)
        return torch.ops.slak_mm.cross_dwconv2d(x, list(kernels), bias, reduce)
    if is_recorded(x, *kernels, *(() if bias is None else (bias,))):
        function = _CrossDwconv2d if torch._C._functorch.peek_interpreter_stack() is None else _Transformed
        return function.apply(x, bias, reduce, *kernels)
    return forward(x, kernels, bias, reduce)  # on small maps autograd's share of the time is that of the arithmetic


def _wants_plain_graph() -> bool:
    """Whether something looks on that knows PyTorch's convolutions only."""
    if is_transformed() or torch.jit.is_tracing() or is_counted():
        return True
    return HAS_LIBRARY and is_compiling() and (torch.onnx.is_in_onnx_export() or forced_backend() == 'reference')


# --------------------------------------------------------------------------------- computation


def forward(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> list[Tensor]:
    """Run the chosen backend."""
    layout = memory_format(x)
    x, *kernels = (in_memory(t) for t in (x, *kernels))
    bias = None if bias is None else in_memory(bias)
    if x.numel() == 0:
        return [torch.empty_like(x, memory_format=layout) for _ in range(_count(kernels, reduce))]
    name = _chosen(x, kernels)
    try:
        results = BACKENDS[name].forward(x, kernels, bias, reduce)
    except Exception as error:
        if not _may_replace(name, x, error):
            raise
        results = reference.forward(x, kernels, bias, reduce)
    return [y.contiguous(memory_format=layout) for y in results]


def backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run the chosen backend's backward; what is not needed is an empty tensor or list."""
    layout = memory_format(x)
    grads = [in_memory(grad) for grad in grads]
    x, *kernels = (in_memory(t) for t in (x, *kernels))
    if x.numel() == 0:
        grad_x: Tensor | None = torch.empty_like(x, memory_format=layout)
        grad_kernels: Sequence[Tensor] | None = [torch.zeros_like(k) for k in kernels]
    else:
        name = _chosen(x, kernels)
        operands = (x, kernels, grads, needs_x, needs_kernels)
        try:
            grad_x, grad_kernels = BACKENDS[name].backward(*operands)
        except Exception as error:
            if not _may_replace(name, x, error):
                raise
            grad_x, grad_kernels = reference.backward(*operands)
    return (
        grad_x.contiguous(memory_format=layout) if needs_x and grad_x is not None else x.new_empty(0),
        [k.contiguous() for k in grad_kernels or ()] if needs_kernels else [],
    )


def _count(kernels: Sequence[Tensor], reduce: bool) -> int:
    return 1 if reduce else len(kernels)


def _may_replace(name: str, x: Tensor, error: Exception) -> bool:
    """Whether ``reference`` may take the place of a backend that failed; it warns once."""
    if x.device.type != 'cuda' or name == 'reference' or forced_backend() is not None:
        return False
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        leave_out(name, f'{type(error).__name__}: {error}')
    return True


_named: set[tuple[str, torch.dtype, str]] = set()
_named_lock = threading.Lock()


def _chosen(x: Tensor, kernels: Sequence[Tensor]) -> str:
    """Choose the backend, and say at INFO which it is, once for each device type and dtype."""
    name = choose_backend(x, kernels)
    key = (x.device.type, x.dtype, name)
    if key not in _named:
        with _named_lock:
            if key in _named:
                return name
            _named.add(key)
        reasons = []
        for other, backend in BACKENDS.items():
            if other == name:
                break
            reason = backend.unavailable_reason(x, kernels)
            reasons.append(f'not {other}: {reason or "slower for these shapes"}')
        logging.getLogger('slak_mm').info(
            'cross_dwconv2d runs on the backend %r for %s on %s%s',
            name,
            x.dtype,
            x.device.type,
            f' ({"; ".join(reasons)})' if reasons else '',
        )
    return name


# ------------------------------------------------------------------------------------ autograd


class _CrossDwconv2d(torch.autograd.Function):
    """:func:`forward` and :func:`backward`; takes (x, bias, reduce, *kernels)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, bias: Tensor | None, reduce: bool, *kernels: Tensor
    ) -> tuple[Tensor, ...]:
        _setup_context(ctx, (x, kernels), None)
        ctx.set_materialize_grads(False)
        return tuple(forward(x, kernels, bias, reduce))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        needs_x, needs_bias, _, *needs_kernels = ctx.needs_input_grad
        grad_x, grad_kernels, grad_bias = _gradients(ctx, grads, needs_x, any(needs_kernels), needs_bias, backward)
        return grad_x, grad_bias, None, *grad_kernels


class _Transformed(_CrossDwconv2d):
    """The same for ``torch.func.grad``, which asks for a ``setup_context``; that takes the host some 40 us more."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, bias: Tensor | None, reduce: bool, *kernels: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(forward(x, kernels, bias, reduce))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, _, *kernels = inputs
        _setup_context(ctx, (x, kernels), output)
        ctx.set_materialize_grads(False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, kernels, *_ = inputs
    ctx.save_for_backward(x, *kernels)
    ctx.forced = forced_backend()  # autograd may run the backward pass in a thread of its own


def _gradients(
    ctx: Any, grads: Sequence[Tensor | None], needs_x: bool, needs_kernels: bool, needs_bias: bool, run: Any
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """Gradients of the input, of every kernel and of the bias.

    Branches whose result is not used have no gradient and are left out.
    """
    x, *kernels = ctx.saved_tensors
    is_sum = len(grads) < len(kernels)
    used = [i for i in range(len(kernels)) if grads[0 if is_sum else i] is not None]
    given = [g for g in grads if g is not None]
    grad_x: Tensor | None = None
    grad_kernels: list[Tensor | None] = [None] * len(kernels)
    if used and (needs_x or needs_kernels):
        if torch.is_grad_enabled() or is_transformed(*given):  # the gradients are to be differentiated again
            run = reference.backward
        with use_backend(ctx.forced) if ctx.forced else contextlib.nullcontext():
            grad_x, some = run(x, [kernels[i] for i in used], given, needs_x, needs_kernels)
        for i, grad_kernel in zip(used, some if needs_kernels else ()):
            grad_kernels[i] = grad_kernel
    return (grad_x if needs_x else None, grad_kernels, given[0].sum((0, 2, 3)) if used and needs_bias else None)


# -------------------------------------------------------------------------------- registration


def _fake_forward(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> list[Tensor]:
    layout = memory_format(x)
    return [torch.empty_like(x, memory_format=layout) for _ in range(_count(kernels, reduce))]


def _fake_backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor, list[Tensor]]:
    return (
        torch.empty_like(x, memory_format=memory_format(x)) if needs_x else x.new_empty(0),
        [torch.empty_like(k, memory_format=torch.contiguous_format) for k in kernels] if needs_kernels else [],
    )


def _backward_of_operator(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    needs_x, needs_kernels, needs_bias, _ = ctx.needs_input_grad
    run = torch.ops.slak_mm.cross_dwconv2d_backward
    return *_gradients(ctx, grads, needs_x, any(needs_kernels), needs_bias, run), None


def _register() -> torch.library.Library:
    library = torch.library.Library('slak_mm', 'DEF')
    # The memory format of an input decides which code runs and the format of the results.
    tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
    library.define('cross_dwconv2d(Tensor x, Tensor[] kernels, Tensor? bias, bool reduce) -> Tensor[]', tags=tags)
    library.define(
        'cross_dwconv2d_backward(Tensor x, Tensor[] kernels, Tensor[] grads, bool needs_x, '
        'bool needs_kernels) -> (Tensor, Tensor[])',
        tags=tags,
    )
    for name, run, fake in (
        ('cross_dwconv2d', forward, _fake_forward),
        ('cross_dwconv2d_backward', backward, _fake_backward),
    ):
        library.impl(name, run, 'CompositeExplicitAutograd')
        torch.library.register_fake(f'slak_mm::{name}', fake, lib=library)
    torch.library.register_autograd(
        'slak_mm::cross_dwconv2d', _backward_of_operator, setup_context=_setup_context, lib=library
    )
    return library


_library = _register() if HAS_LIBRARY else None  # lives as long as the operators
