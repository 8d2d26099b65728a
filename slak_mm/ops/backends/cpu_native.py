"""CPU backend: the project's own vectorized kernel, compiled on first use.

All branches are computed in one pass over the input, which any memory layout may have; see
``slak_mm/ops/csrc/cross_dwconv.cpp``. bfloat16 is accumulated in float32, and where the processor
multiplies pairs of it (AVX512_BF16) the forward pass and the input gradient do; an infinite or NaN
pixel then also reaches results whose kernel ends one column before it.

The work is divided over ``torch.get_num_threads()`` threads of PyTorch's own OpenMP runtime, since
the idle threads of a second one would compete with it. The sums are divided by shape and not by
thread: any number of threads gives the same bits.

Rows and columns of taps that are zero in all channels at the rim of a kernel, as the padding of an
off-center kernel is, are left out of the forward pass.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..csrc import CompileError, load_library
from . import cpu
from .layout import memory_format

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_MAX_BRANCHES = 3
_FAILURES = {1: 'there is not enough memory for the scratch space of the cross convolution'}


class _Tensor(ctypes.Structure):
    _fields_ = [('data', ctypes.c_void_p), *((s, ctypes.c_int64) for s in 'nchw')]


class _Branch(ctypes.Structure):
    _fields_ = [
        ('weight', ctypes.c_void_p),
        *((s, ctypes.c_int64) for s in 'chw'),
        *((s, ctypes.c_int32) for s in ('rows', 'columns', 'row', 'column', 'source', 'target', 'flip', 'reserved')),
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((s, ctypes.c_int64) for s in ('images', 'channels', 'height', 'width')),
        *((s, ctypes.c_int32) for s in ('dtype', 'threads', 'sources', 'targets', 'branches', 'reserved')),
        ('source', _Tensor * (_MAX_BRANCHES + 1)),
        ('target', _Tensor * _MAX_BRANCHES),
        ('branch', _Branch * _MAX_BRANCHES),
        ('bias', ctypes.c_void_p),
        ('parallel', ctypes.c_void_p),
    ]


def unavailable_reason(x: Tensor, kernels: Sequence[Tensor]) -> str | None:
    """Say why this backend cannot run on these tensors, or None if it can."""
    reason = cpu.unavailable_reason(x, kernels)
    if reason is not None:
        return reason
    if len(kernels) > _MAX_BRANCHES:
        return f'{len(kernels)} kernels are more than {_MAX_BRANCHES}'
    library = _library()
    return library if isinstance(library, str) else None


def forward(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, reduce: bool) -> tuple[Tensor, ...]:
    """See :mod:`slak_mm.ops.backends`."""
    layout = memory_format(x)
    results = [torch.empty_like(x, memory_format=layout) for _ in range(1 if reduce else len(kernels))]
    _run(
        'slak_cross_forward',
        x,
        [x],
        results,
        [(kernel, 0, 0 if reduce else i) for i, kernel in enumerate(kernels)],
        bias=None if bias is None else bias.contiguous(),
    )
    return tuple(results)


def backward(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """See :mod:`slak_mm.ops.backends`."""
    sources = [0 if len(grads) == 1 else i for i in range(len(kernels))]
    grad_x = grad_kernels = None
    if needs_x:
        grad_x = torch.empty_like(x, memory_format=memory_format(x))
        _run(
            'slak_cross_forward',
            x,
            grads,
            [grad_x],
            [(kernel, source, 0) for kernel, source in zip(kernels, sources)],
            flip=True,
        )
    if needs_kernels:
        grad_kernels = tuple(torch.empty_like(kernel, memory_format=torch.contiguous_format) for kernel in kernels)
        _run(
            'slak_cross_kernel_gradient',
            x,
            [x, *grads],
            [],
            [(grad, source + 1, 0) for grad, source in zip(grad_kernels, sources)],
        )
    return grad_x, grad_kernels


def _run(
    function: str,
    x: Tensor,
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    branches: Sequence[tuple[Tensor, int, int]],
    bias: Tensor | None = None,
    flip: bool = False,
) -> None:
    """Call the library: branch (kernel, source, target) reads one tensor and adds to another."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    # The library cannot tell: it reads and writes where it is told to.
    for t in (*sources, *targets):
        if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f'maps must be like x, {x.dtype} {tuple(x.shape)}, got {t.dtype} {tuple(t.shape)}')
    for t in (*(k for k, *_ in branches), *(() if bias is None else (bias,))):
        if len(t) != x.shape[1] or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f'kernels and bias must be {x.dtype} of {x.shape[1]} channels, got {t.dtype}, {len(t)}')
    described = [
        _Branch(
            k.data_ptr(), *k.stride(), k.shape[1], k.shape[2], k.shape[1] // 2, k.shape[2] // 2, source, target, flip
        )
        for k, source, target in branches
    ]
    problem = _Problem(
        *x.shape,
        _DTYPES[x.dtype],
        torch.get_num_threads(),
        len(sources),
        len(targets),
        len(branches),
        0,
        tuple(_Tensor(t.data_ptr(), *t.stride()) for t in sources),
        tuple(_Tensor(t.data_ptr(), *t.stride()) for t in targets),
        tuple(described),
        None if bias is None else bias.data_ptr(),
        _parallel(),
    )
    # ctypes releases the interpreter lock during the call.
    status = getattr(library, function)(ctypes.byref(problem))
    if status != 0:
        raise MemoryError(_FAILURES.get(status, f'{function} failed with status {status}'))


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    try:
        library = load_library('cross_dwconv')
    except CompileError as error:
        return str(error)
    if library.slak_problem_bytes() != ctypes.sizeof(_Problem):
        return 'the compiled operator does not fit this version of the package'
    return library


@functools.lru_cache(maxsize=1)
def _parallel() -> Any:
    """Address of the function of PyTorch's OpenMP runtime that starts its threads.

    GNU's, Intel's and LLVM's runtimes all have it. Asked for through PyTorch's library, it is that
    of the runtime which PyTorch itself uses. Where it is missing the library starts threads itself.
    """
    folder = Path(torch.__file__).parent / 'lib'
    for name in ('libtorch_cpu.so', 'libtorch_cpu.dylib'):
        try:
            function = ctypes.CDLL(str(folder / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
