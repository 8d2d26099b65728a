"""Choice of a backend on a GPU by a measurement at the first call of each kind.

Which way is fastest there depends on the GPU, the dtype, the batch and the map. The candidates
are timed once for each operation, dtype, layout, set of kernels and size class (batch, height
and width rounded up to powers of two) of the process. A candidate that fails, or whose result
differs from that of ``reference``, is left out with a warning.

Timings differ between runs, and with them the choice and the last bits of results. The choice is
always ``reference`` where ``torch.use_deterministic_algorithms`` or
``torch.backends.cudnn.deterministic`` is on, or the environment variable ``SLAK_MM_AUTOTUNE`` is
0. While a CUDA graph is captured nothing is measured, and ``reference`` runs unless a choice was
made before.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .layout import memory_format

ENVIRONMENT_VARIABLE = 'SLAK_MM_AUTOTUNE'
_REPEATS = 3
# Largest difference to the reference, as a fraction of its largest value. TF32 may be on.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_choices: dict[tuple[Any, ...], str] = {}
_excluded: dict[str, str] = {}  # backend: why
_lock = threading.RLock()  # one measurement at a time, or they would slow each other down


def fastest(candidates: dict[str, ModuleType], x: Tensor, kernels: Sequence[Tensor], operation: str) -> str:
    """Name the fastest candidate for these tensors.

    Args:
        candidates: Backends by name, ``reference`` among them.
        x: Input, (N, C, H, W).
        kernels: Kernels, (C, kh, kw).
        operation: 'forward' or 'backward'.
    """
    candidates = {name: b for name, b in candidates.items() if name not in _excluded}
    if len(candidates) == 1 or is_fixed():
        return 'reference'
    key = (
        operation,
        x.device,
        x.dtype,
        memory_format(x),
        x.shape[1],
        *((n - 1).bit_length() for n in (x.shape[0], *x.shape[2:])),
        *(tuple(k.shape[1:]) for k in kernels),
    )
    choice = _choices.get(key)
    if choice is not None:
        return choice
    if not may_measure(x.device):
        return 'reference'
    with _lock, torch.no_grad():
        if key not in _choices:
            _choices[key] = _measure(candidates, x, kernels, operation)
        return _choices[key]


def exclude(name: str, reason: str) -> None:
    """Take a backend out of the automatic choice for the rest of the process, with a warning."""
    with _lock:
        if name not in _excluded:
            _excluded[name] = reason
            logging.getLogger('slak_mm').warning(
                'The backend %r of cross_dwconv2d is not used any more: %s', name, reason
            )
        for key in [key for key, choice in _choices.items() if choice == name]:
            del _choices[key]


def is_fixed() -> bool:
    """Whether nothing may depend on timings."""
    return (
        os.environ.get(ENVIRONMENT_VARIABLE) == '0'
        or torch.are_deterministic_algorithms_enabled()
        or torch.backends.cudnn.deterministic
    )


def _measure(candidates: dict[str, ModuleType], x: Tensor, kernels: Sequence[Tensor], operation: str) -> str:
    def run(backend: ModuleType) -> Sequence[Tensor]:
        if operation == 'forward':
            return backend.forward(x, kernels, None, False)
        grad_x, grad_kernels = backend.backward(x, kernels, [x] * len(kernels), True, True)
        return [grad_x, *grad_kernels]

    want = run(candidates['reference'])
    times: dict[str, float] = {}
    for name, backend in candidates.items():
        try:
            differences = [_difference(a, b) for a, b in zip(run(backend), want, strict=True)]
            # Not their maximum: max() may lose a NaN.
            wrong = [d for d in differences if not d <= _TOLERANCE[x.dtype]]
            if wrong:
                exclude(
                    name,
                    f'its {operation} result differs from that of reference by '
                    f'{wrong[0]:.1e} for an input of shape {tuple(x.shape)}',
                )
                continue
            times[name] = _seconds(partial(run, backend))
        except torch.cuda.OutOfMemoryError:
            continue
        except Exception as error:  # a compiler or driver may raise what it likes
            exclude(name, f'{type(error).__name__}: {error}')
    return min(times, key=times.__getitem__, default='reference')


def _difference(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def may_measure(device: torch.device) -> bool:
    """Whether work on this device may be timed now."""
    return device.type == 'cuda' and not is_fixed() and not (torch.cuda.is_current_stream_capturing())


def fastest_of(run: Callable[[Any], Any], choices: Sequence[Any], device: torch.device) -> Any:
    """The argument with which ``run`` takes the shortest time on a GPU.

    Choices with which it fails are passed over, unless all do.

    Raises:
        Exception: What the last choice raised, if every one failed.
    """
    best, shortest, failure = None, float('inf'), None
    for choice in choices:
        try:
            run(choice)  # compiles
            with _lock:
                seconds = _seconds(partial(run, choice))
        except Exception as error:  # too large for this GPU, say
            failure = error
            continue
        if seconds < shortest:
            best, shortest = choice, seconds
    if best is None and failure is not None:
        raise failure
    return best


def _seconds(run: Callable[[], Any]) -> float:
    """Shortest time of a call on a GPU."""
    shortest = float('inf')
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        shortest = min(shortest, begin.elapsed_time(end) / 1000)
    return shortest
