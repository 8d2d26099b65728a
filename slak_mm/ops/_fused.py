"""Fused passes of a block on GPUs: when they run, how modes see them, and what takes their place.

They belong to the backend ``triton`` of :func:`slak_mm.ops.cross_dwconv2d`, and run where it may run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._context import is_compiling, is_counted, is_observed, is_transformed
from .backends import failure, forced_backend, leave_out, triton
from .backends.layout import memory_format

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_NAME = 'fused passes'
_PLAIN = (Tensor, torch.nn.Parameter)

TILE = dict(T=64, CB=32, num_warps=8)
"""Pixels and channels that a program takes at a time."""

PARTS = dict(R=256, CB=16, num_warps=8)
"""Rows of partial sums and their columns that a program takes at a time."""


def launch_layout(x: Tensor) -> dict[str, Any]:
    """What kernels are told of the layout of maps (N, C, H, W)."""
    return dict(LAST=memory_format(x) is torch.channels_last)


_library = torch.library.Library('slak_mm', 'FRAGMENT')


def why_not(*tensors: Tensor | None) -> str | None:
    """Say why fused passes cannot take the place of PyTorch's functions for these tensors, or None if they can.

    Tensors without data (the meta device) take the way that they would on a GPU, so that its costs can be estimated.
    """
    # First what torch.compile evaluates while it records: it cannot look into the others.
    if is_compiling() or torch.jit.is_tracing():
        return 'a graph is recorded'
    given = [t for t in tensors if t is not None]
    x = given[0]
    if is_transformed() or torch._C._functorch.peek_interpreter_stack() is not None:
        return 'a transform of torch.func is at work'
    if is_counted() or (is_observed(*given) and not all(t.is_meta and type(t) in _PLAIN for t in given)):
        return 'something looks at the operators'
    forced = forced_backend()
    if forced not in (None, 'triton'):
        return f'the backend {forced!r} was asked for'
    if forced is None and x.device.type not in ('cuda', 'meta'):
        return f'the input is on {x.device.type}, not on cuda'
    if any(t.dtype not in DTYPES or t.device != x.device for t in given):
        return 'a tensor is on another device, or not float16, bfloat16 or float32'
    if x.numel() == 0:
        return 'the map is empty'
    return failure(_NAME) or (None if x.is_meta else triton.unavailable_reason(x, ()))


def visible(schema: str) -> Callable[[Callable], Callable]:
    """Register a function that launches a kernel as an operator, which modes see on tensors without data.

    The function allocates its results and launches nothing if they have no data. Elsewhere it is called as it is,
    which takes the host a fraction of the time.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__.lstrip('_')
        _library.define(name + schema)
        _library.impl(name, function, 'CompositeExplicitAutograd')
        operator = getattr(torch.ops.slak_mm, name)

        @functools.wraps(function)
        def call(x: Any, *args: Any) -> Any:
            return (operator if (x if isinstance(x, Tensor) else x[0]).is_meta else function)(x, *args)

        return call

    return register


def attempt(fused: Callable[[], Any], x: Tensor) -> Any:
    """The result of fused passes, or None if they fail on a GPU; then PyTorch's functions are used from now on."""
    try:
        return fused()
    except Exception as error:
        if x.device.type != 'cuda' or isinstance(error, torch.cuda.OutOfMemoryError) or forced_backend() is not None:
            raise
        leave_out(_NAME, f'{type(error).__name__}: {error}')
        return None


def gradients(
    fused: Callable[[], Sequence[Tensor | None]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    *grads: Tensor,
) -> Sequence[Tensor | None]:
    """Gradients of inputs by a fused backward pass, or by autograd through ``reference(*inputs)``.

    The latter where they are to be differentiated again, or carry a further axis, or the fused pass fails.
    """
    again = torch.is_grad_enabled()
    if not again and not is_transformed(*grads):
        found = attempt(fused, grads[0])
        if found is not None:
            return found
    if not again:
        inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        result = reference(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    results = iter(torch.autograd.grad(result, wanted, grads, create_graph=again, allow_unused=True))
    return [next(results) if t is not None and t.requires_grad else None for t in inputs]
