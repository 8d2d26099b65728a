"""Backends of the cross convolution and the choice between them.

A backend is a module with two functions: ``unavailable_reason(x, kernels)`` returns a sentence
which says why it cannot run on these tensors, or None, and ``run(x, kernels)`` returns one result
per kernel. The first backend of :data:`BACKENDS` that can run is taken, unless the environment
variable ``SLAK_MM_BACKEND`` or :func:`use_backend` names one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from types import ModuleType

from torch import Tensor

from . import cpu, reference

BACKENDS: dict[str, ModuleType] = {'cpu': cpu, 'reference': reference}
"""Backends by name, in the order of preference."""

ENVIRONMENT_VARIABLE = 'SLAK_MM_BACKEND'

_forced: str | None = None


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f'{source} names the unknown backend {name!r}; choose from {", ".join(BACKENDS)}')
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend within a ``with`` block.

    Args:
        name: A key of :data:`BACKENDS`.

    Raises:
        ValueError: The name is unknown.
    """
    global _forced
    previous, _forced = _forced, _check_name(name, 'use_backend')
    try:
        yield
    finally:
        _forced = previous


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
    name = _forced
    if name is None and ENVIRONMENT_VARIABLE in os.environ:
        name = _check_name(os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE)
    if name is not None:
        reason = BACKENDS[name].unavailable_reason(x, kernels)
        if reason is not None:
            raise RuntimeError(f'backend {name!r} was asked for but cannot run: {reason}')
        return name
    return next(
        name for name, backend in BACKENDS.items()
        if backend.unavailable_reason(x, kernels) is None)  # fmt: skip
