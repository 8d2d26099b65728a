"""Backends of the cross convolution and the choice between them.

A backend is a module with these functions. They compute on plain tensors and record nothing for
autograd; whoever calls them does that.

``unavailable_reason(x, kernels) -> str | None``
    A phrase which says why the backend cannot run on these tensors, or None if it can.
``is_preferred(x, kernels) -> bool``
    Optional: whether the automatic choice may take it here. Without this function it may.
``forward(x, kernels, bias, reduce) -> tuple[Tensor, ...]``
    One result (N, C, H, W) per kernel (C, kh, kw), or with ``reduce`` a tuple of one: their sum
    and the bias (C,), if there is one. kh and kw are odd, and there are one to three kernels.
``backward(x, kernels, grads, needs_x, needs_kernels) -> (Tensor | None, tuple | None)``
    The gradient with respect to ``x``, summed over the branches, and one gradient per kernel,
    each if it is needed. ``grads`` has one entry per kernel, or a single one for their sum.

Tensors are not empty, have one dtype and device and any strides, and no lazy bits: their memory
holds their values. Results have the dtype of ``x`` and any memory format. What is added up,
products, branches and bias, is added in float32 at least and rounded once.

The first backend of :data:`BACKENDS` that can run and is preferred is taken; nothing is timed. On a GPU
one that fails is left out for the rest of the process, with a warning. The environment variable
``SLAK_MM_BACKEND`` or :func:`use_backend` names another.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType

from torch import Tensor

from . import cpu, cpu_native, gemm, reference, triton

BACKENDS: dict[str, ModuleType] = {
    'cpu_native': cpu_native,
    'triton': triton,
    'gemm': gemm,
    'cpu': cpu,
    'reference': reference,
}
"""Backends by name, in the order of preference."""

ENVIRONMENT_VARIABLE = 'SLAK_MM_BACKEND'

_failed: dict[str, str] = {}  # backend: why

# Names in the order of the open blocks, each a tuple of its own. A block takes out its own entry and
# no other, since generators may end in another order than they began, or in another context.
_forced: ContextVar[tuple[tuple[str], ...]] = ContextVar('forced backends', default=())


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f'{source} names the unknown backend {name!r}; choose from {", ".join(BACKENDS)}')
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend within a ``with`` block.

    The block holds for the thread or asynchronous task that it is opened in, and not for threads
    that are started within it; ``SLAK_MM_BACKEND`` holds for all. A backward pass runs on the
    backend that was forced in its forward pass, if there was one.

    A graph that ``torch.compile`` or ``torch.export`` records within ``use_backend('reference')``
    has plain convolutions in place of the operator of this package, and runs without it.

    Args:
        name: A key of :data:`BACKENDS`.

    Raises:
        ValueError: The name is unknown.
    """
    entry = (_check_name(name, 'use_backend'),)
    _forced.set((*_forced.get(), entry))
    try:
        yield
    finally:
        _forced.set(tuple(other for other in _forced.get() if other is not entry))


def forced_backend() -> str | None:
    """Name of the backend that :func:`use_backend` or else ``SLAK_MM_BACKEND`` asks for.

    Raises:
        ValueError: ``SLAK_MM_BACKEND`` names an unknown backend.
    """
    if _forced.get():
        return _forced.get()[-1][0]
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _check_name(name, ENVIRONMENT_VARIABLE) if name else None


# torch.compile cannot trace a ContextVar: it calls the function, and takes the result as constant.
forced_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(x: Tensor, kernels: Sequence[Tensor]) -> str:
    """Name the backend that runs on these tensors.

    Args:
        x: Input, (N, C, H, W).
        kernels: Kernels, (C, kh, kw).

    Returns:
        A key of :data:`BACKENDS`.

    Raises:
        ValueError: ``SLAK_MM_BACKEND`` names an unknown backend.
        RuntimeError: The forced backend cannot run; the message says why.
    """
    name = forced_backend()
    if name is not None:
        reason = BACKENDS[name].unavailable_reason(x, kernels)
        if reason is not None:
            raise RuntimeError(f'backend {name!r} was asked for but cannot run: {reason}')
        return name
    return next(
        name
        for name, backend in BACKENDS.items()
        if name not in _failed
        and backend.unavailable_reason(x, kernels) is None
        and getattr(backend, 'is_preferred', _always)(x, kernels)
    )


def failure(name: str) -> str | None:
    """Why a backend was left out after a failure, or None if it was not."""
    return _failed.get(name)


def leave_out(name: str, reason: str) -> None:
    """Take a backend, or the fused passes, out of the choice for the rest of the process, with a warning."""
    if name not in _failed:
        _failed[name] = reason
        logging.getLogger('slak_mm').warning('The backend %r of cross_dwconv2d is not used any more: %s', name, reason)


def _always(x: Tensor, kernels: Sequence[Tensor]) -> bool:
    return True
