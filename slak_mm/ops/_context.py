"""What surrounds a computation: autocast, graphs that are recorded, modes. For torch 2.1 up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode, _get_current_dispatch_mode_stack


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type, such as ``'cpu'`` or ``'cuda'``."""
    if device_type == 'meta':
        return False
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # torch < 2.4 takes no device type
        return torch.is_autocast_cpu_enabled() if device_type == 'cpu' else (torch.is_autocast_enabled())


def autocast_dtype(device_type: str) -> torch.dtype:
    """The dtype that autocast computes in on a device type."""
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype(device_type)
    return (
        torch.get_autocast_cpu_dtype()
        if device_type == 'cpu'
        # torch < 2.4
        else (torch.get_autocast_gpu_dtype())
    )


def result_dtype(x: Tensor) -> torch.dtype:
    """That of autocast where it is on, else that of a map."""
    kind = x.device.type
    return autocast_dtype(kind) if is_autocast_enabled(kind) else x.dtype


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` records a graph."""
    # From torch 2.3 on; before, nothing here was tried under torch.compile.
    return bool(getattr(torch.compiler, 'is_compiling', bool)())


def is_observed(*tensors: Tensor) -> bool:
    """Whether something other than the computation itself looks at the operators.

    ``torch.compile`` and ``torch.export``, subclasses of tensors, tensors without data, and modes
    such as FLOP counters do; ``torch.jit.trace`` does as well, and is not asked about here.
    """
    return (
        is_compiling()
        or any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta for t in tensors)
        or _get_current_dispatch_mode() is not None
    )


def is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd, or ``torch.func.grad``, records what is computed from some tensors."""
    return torch._C._functorch.peek_interpreter_stack() is not None or (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    )


def is_transformed(*tensors: Tensor) -> bool:
    """Whether forward-mode AD or a transform of ``torch.func`` other than ``grad`` is at work.

    Tensors then carry tangents or a further axis, which only PyTorch's own operators know about.

    Args:
        tensors: Gradients, which carry a further axis under ``is_grads_batched`` of ``torch.autograd.grad``.
    """
    functorch = torch._C._functorch
    is_batched = getattr(functorch, 'is_legacy_batchedtensor', _is_batched)  # from torch 2.2 on
    if forward_ad._current_level >= 0 or any(map(is_batched, tensors)):
        return True
    if functorch.peek_interpreter_stack() is None:
        return False
    if is_compiling() or not hasattr(functorch, 'get_interpreter_stack'):
        return True  # torch.compile cannot look into the stack
    return any(level.key() != functorch.TransformType.Grad for level in functorch.get_interpreter_stack())


def _is_batched(t: Tensor) -> bool:
    return 'Batched' in str(torch._C._dispatch_keys(t))  # the only trace of it in torch 2.1


def is_counted() -> bool:
    """Whether a ``torch.utils.flop_counter.FlopCounterMode`` looks on, outside of graphs."""
    # By name: the module imports Triton, and warns where there is none.
    return not is_compiling() and any(
        type(mode).__module__ == 'torch.utils.flop_counter' for mode in _get_current_dispatch_mode_stack()
    )
