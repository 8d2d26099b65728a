"""The Triton kernels: their arithmetic in Triton's interpreter, and that they compile.

The interpreter must be chosen before Triton is imported, hence a process of its own.
"""

import pytest
import torch
from op_helpers import run_program

from slak_mm.ops import choose_backend, use_backend
from slak_mm.ops.backends import triton as backend

needs_triton = pytest.mark.skipif(not backend.is_installed(), reason='Triton 3 or later is not installed')

INTERPRETED = """
import itertools, sys, torch
import torch.nn.functional as F
from slak_mm.ops import cross_dwconv2d, use_backend
from slak_mm.ops.backends import triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Input, and sizes of the kernels: rows of one tile and of several, padded and not, maps smaller than the
# kernel, kernels without a small one, square and single ones, one channel.
CASES = [
    ((2, 3, 9, 40), [(13, 5), (5, 13), (5, 5)]),
    ((1, 2, 70, 5), [(11, 3), (3, 11), None]),
    ((1, 1, 66, 84), [(51, 5), (5, 51), (5, 5)]),
    ((2, 1, 6, 7), [(21, 3), (3, 21), (3, 3)]),
    ((1, 1, 12, 15), [(9, 9), None, (3, 3)]),
    ((1, 2, 1, 1), [(7, 7), None, None]),
    ((1, 2, 7, 9), [(13, 13), None, (5, 5)]),
    ((1, 1, 5, 11), [(31, 31), None, None]),
]
g = torch.Generator().manual_seed(0)

def randn(*shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)

def turned(t):  # in memory as the transposed tensor
    return t.mT.contiguous().mT if t.dim() > 1 else t

VIEWS = [lambda t: torch._neg_view(-t), lambda t: torch.stack([t, t + 1], -1)[..., 0], turned]

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
    # The same values behind a lazy negation, or in memory of other strides, give the same bits.
    view = VIEWS[count % 3]
    views = [t if t is None else view(t) for t in tensors]
    views[0] = views[0] if views[0].is_neg() else tensors[0]  # its layout is that of the results
    again = evaluate(ours, views, [view(g) for g in grads], reduce)
    if reduce:  # PyTorch adds up the bias's gradient in the order of the memory
        assert torch.allclose(got.pop(), again.pop(), rtol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    count += 1
for shape in ((0, 2, 9, 8), (2, 2, 0, 8), (2, 0, 9, 8)):
    c = shape[1]
    tensors = [torch.ones(s) for s in (shape, (c, 7, 3), (c, 3, 7), (c, 3, 3), (c,))]
    y, *found = evaluate(ours, tensors, [torch.ones(shape)], True)
    assert y.shape == shape and all(g.shape == t.shape and not g.any() for g, t in zip(found, tensors))

print('checked', count)
"""


@needs_triton
def test_results_and_gradients_in_the_interpreter(tmp_path):
    done = run_program(tmp_path, INTERPRETED, TRITON_INTERPRET='1')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'checked 16' in done.stdout


COMPILED = """
import re, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slak_mm.ops.backends import _triton_kernels as kernels, triton as backend

def compile(function, constants, capability, warps=4):
    names = function.arg_names
    types = dict(x='*bf16', k='*bf16', bias='*bf16', y='*bf16', g='*bf16', addend='*fp32', out='*fp32')
    types = {n: 'constexpr' if n in constants else types.get(n, 'i32') for n in names}
    aligned = {(i,): [['tt.divisibility', 16]] for i, n in enumerate(names) if types[n].startswith('*')}
    source = ASTSource(fn=function, signature=types, attrs=aligned,
                       constexprs={(names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(num_warps=warps))
    ptx = compiled.asm['ptx']
    assert re.search(r'wgmma|mma\\.sync', ptx), 'no tensor cores'
    assert re.search(r'ld\\.global\\.v4\\.b32|cp\\.async\\.cg', ptx), 'loads narrower than 16 bytes'
    # What a multiprocessor of each has for one program.
    assert compiled.metadata.shared <= {80: 99, 90: 227}[capability] << 10

capability = int(sys.argv[1])
for length, kh, kw in ((128, 5, 51), (32, 3, 47), (128, 31, 31), (14, 27, 27), (14, 13, 13)):
    kernel = torch.empty(1, kh, kw, dtype=torch.bfloat16)
    blocks = backend._blocks(length, kernel, 2)
    keeps = backend._keeps(blocks, kernel)
    del blocks['KW']  # known at run time
    for tall in (False, True) if kh < kw else (False,):
        compile(kernels.convolve_rows, dict(
            blocks, KEEP=keeps, TRANSPOSED=tall, HAS_BIAS=not tall,
            HAS_ADDEND=not tall, PRECISION='tf32'), capability)
    compile(kernels.kernel_gradient_rows, dict(blocks, PRECISION='tf32'), capability)
print('compiled')
"""


@needs_triton
@pytest.mark.parametrize('capability', [80, 90])
def test_kernels_compile_for_gpus_with_tensor_cores(tmp_path, capability):
    """Without a GPU: tensor cores, loads of 16 bytes, and shared memory that is there."""
    done = run_program(tmp_path, COMPILED, str(capability), TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    if 'ASTSource' in done.stderr and 'ImportError' in done.stderr:
        pytest.skip('this Triton has another compiler interface')
    assert done.returncode == 0, done.stderr[-3000:]


def test_says_why_not():
    x, kernel = torch.ones(1, 2, 6, 6), torch.ones(2, 7, 3)
    assert backend.unavailable_reason(x, [kernel]) == 'the input is on cpu, not on cuda'
    assert choose_backend(x, [kernel]) != 'triton'
    with use_backend('triton'), pytest.raises(RuntimeError, match='is on cpu, not on cuda'):
        choose_backend(x, [kernel])
