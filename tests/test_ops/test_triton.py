"""The Triton kernels: their arithmetic in Triton's interpreter, and that they compile.

The interpreter must be chosen before Triton is imported, hence a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slak_mm.ops import choose_backend, use_backend
from slak_mm.ops.backends import triton as backend

needs_triton = pytest.mark.skipif(not backend.is_installed(), reason='Triton 3 or later is not installed')

INTERPRETED = """
import itertools, sys, torch
import torch.nn.functional as F
from slak_mm.ops import cross_dwconv2d, use_backend
from slak_mm.ops.backends import triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Input, and sizes of the kernels: one tile and several, maps smaller than the kernel, kernels
# without a small one, square and single ones, one channel, and no power of two.
CASES = [
    ((2, 3, 9, 40), [(13, 5), (5, 13), (5, 5)]),
    ((1, 2, 70, 5), [(11, 3), (3, 11), None]),
    ((2, 1, 6, 7), [(21, 3), (3, 21), (3, 3)]),
    ((1, 1, 12, 15), [(9, 9), None, (3, 3)]),
    ((1, 2, 1, 1), [(7, 7), None, None]),
]
g = torch.Generator().manual_seed(0)

def randn(*shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)

def evaluate(function, tensors, grads, reduce):
    tensors = [t if t is None else t.detach().requires_grad_() for t in tensors]
    ys = function(*tensors, reduce)
    ys = [ys] if reduce else [y for y in ys if y is not None]
    given = [t for t in tensors if t is not None]
    return ys + list(torch.autograd.grad(ys, given, grads[:len(ys)]))

def convolutions(x, k_v, k_h, k_s, bias, reduce):
    ys = [F.conv2d(x, k.unsqueeze(1), padding=(k.shape[1] // 2, k.shape[2] // 2),
                   groups=x.shape[1]) for k in (k_v, k_h, k_s) if k is not None]
    return sum(ys) + bias.view(-1, 1, 1) if reduce else ys

def ours(x, k_v, k_h, k_s, bias, reduce):
    with use_backend('triton'):
        y = cross_dwconv2d(x, k_v, k_h, k_s, bias, reduce=reduce)
    memory_format = (torch.channels_last if x.is_contiguous(memory_format=torch.channels_last)
                     else torch.contiguous_format)
    for t in [y] if reduce else y:
        assert t is None or t.is_contiguous(memory_format=memory_format)
    return y

count = 0
for (shape, sizes), reduce in itertools.product(CASES, (False, True)):
    dtype = list(TOLERANCE)[count % 3]
    channels_last = count % 2 == 1
    c = shape[1]
    tensors = [randn(*shape), *(None if s is None else randn(c, *s) for s in sizes),
               randn(c) if reduce else None]
    tensors = [t if t is None else t.to(dtype) for t in tensors]
    grads = [randn(*shape).to(dtype) for _ in range(3)]
    want = evaluate(convolutions, [t if t is None else t.double() for t in tensors],
                    [t.double() for t in grads], reduce)
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    got = evaluate(ours, tensors, grads, reduce)
    assert all(a.dtype == dtype and a.shape == b.shape for a, b in zip(got, want))
    errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, want)]
    assert max(errors) <= TOLERANCE[dtype], (shape, sizes, dtype, reduce, errors)
    if dtype is torch.float16:  # rounded once; the interpreter cuts bfloat16 off
        assert all(float((a != b.to(dtype)).float().mean()) < 0.02 for a, b in zip(got, want))
    # The same values behind a lazy negation give the same bits.
    views = [t if t is None else torch._neg_view(-t) for t in tensors]
    again = evaluate(ours, views, [torch._neg_view(-g) for g in grads], reduce)
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    count += 1

# Smaller blocks than the map in both directions, and several partial sums.
triton._CONVOLVE_BLOCKS = ((16, 16, 16, 4),)
triton._GRADIENT_BLOCKS = ((16, 4),)
tensors = [randn(2, 2, 20, 37).float(), randn(2, 9, 3).float(), randn(2, 3, 9).float(), None, None]
grads = [randn(2, 2, 20, 37).float() for _ in range(2)]
want = evaluate(convolutions, [t if t is None else t.double() for t in tensors],
                [t.double() for t in grads], False)
for a, b in zip(evaluate(ours, tensors, grads, False), want):
    assert float((a.double() - b).abs().max() / b.abs().max()) < 1e-5
print('checked', count + 1)
"""


@needs_triton
def test_results_and_gradients_in_the_interpreter():
    root = Path(__file__).resolve().parents[2]
    env = dict(
        os.environ,
        TRITON_INTERPRET='1',
        PYTHONPATH=os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])]),
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', INTERPRETED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'checked 11' in done.stdout


COMPILED = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slak_mm.ops.backends import _triton_kernels as kernels

def compile(function, types, constants, capability):
    names = function.arg_names
    source = ASTSource(
        fn=function, signature={n: types.get(n, 'constexpr') for n in names},
        constexprs={(names.index(k),): v for k, v in constants.items()})
    ptx = triton.compile(source, target=GPUTarget('cuda', capability, 32)).asm['ptx']
    assert re.search(r'w?g?mma', ptx), 'no tensor cores'

sizes = dict(KH0=51, KW0=5, KH1=5, KW1=51)
for dtype, capability in (('bf16', 80), ('fp32', 90)):
    pointers = {n: '*' + dtype for n in 'x0 x1 x2 k0 k1 k2 bias y0 y1 y2 x grad'.split()}
    numbers = {n: 'i32' for n in 'N C H W R L stride_r stride_l items_per_program'.split()}
    types = dict(**pointers, **numbers, partial='*fp32')
    blocks = dict(BLOCK_K=32, PRECISION='tf32')
    for reduce, small in ((False, 5), (True, 0)):
        compile(kernels.convolve_kernel, types, dict(
            **sizes, KH2=small, KW2=small, HAS_BIAS=reduce, REDUCE=reduce, BLOCK_H=64,
            BLOCK_W=64, **blocks), capability)
    compile(kernels.gradient_kernel, types, dict(
        TAPS=5, LENGTH=51, ALONG_R=reduce, BLOCK_I=16, BLOCK_M=64, **blocks), capability)
print('compiled')
"""


@needs_triton
def test_kernels_compile_for_gpus_with_tensor_cores(tmp_path):
    """Without a GPU, as far as Triton's own compiler goes."""
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    env.update(
        TRITON_CACHE_DIR=str(tmp_path),
        PYTHONPATH=os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [env.get('PYTHONPATH')])]),
    )
    program = tmp_path / 'compile.py'
    program.write_text(COMPILED)
    done = subprocess.run([sys.executable, '-W', 'ignore', str(program)], env=env, capture_output=True, text=True)
    if 'ASTSource' in done.stderr and 'ImportError' in done.stderr:
        pytest.skip('this Triton has another compiler interface')
    assert done.returncode == 0, done.stderr[-3000:]


def test_says_why_not():
    x, kernel = torch.ones(1, 2, 6, 6), torch.ones(2, 7, 3)
    assert backend.unavailable_reason(x, [kernel]) == 'the input is on cpu, not on cuda'
    assert choose_backend(x, [kernel]) != 'triton'
    with use_backend('triton'), pytest.raises(RuntimeError, match='is on cpu, not on cuda'):
        choose_backend(x, [kernel])
