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
    ((2, 1, 5, 42), [(13, 5), (5, 13), (5, 5)]),
]

def sliced(t):  # of a larger map
    wide = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), float('nan'), dtype=t.dtype)
    wide[:, 2:-1] = t
    return wide

LAYOUTS = [
    lambda t: t,
    lambda t: t.contiguous(memory_format=torch.channels_last),
    lambda t: sliced(t)[:, 2:-1],
    lambda t: sliced(t).contiguous(memory_format=torch.channels_last)[:, 2:-1],
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
    lay_out = LAYOUTS[count // 2 % 4]
    c = shape[1]
    tensors = [randn(*shape), *(None if s is None else randn(c, *s) for s in sizes),
               randn(c) if reduce else None]
    tensors = [t if t is None else t.to(dtype) for t in tensors]
    grads = [randn(*shape).to(dtype) for _ in range(3)]
    want = evaluate(convolutions, [t if t is None else t.double() for t in tensors],
                    [t.double() for t in grads], reduce)
    tensors[0] = lay_out(tensors[0])
    grads = [lay_out(t) for t in grads]
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
    assert 'checked 18' in done.stdout


LAUNCHES = """
import torch
from triton.runtime.interpreter import GridExecutor
from slak_mm.ops import cross_dwconv2d, use_backend

launched, launch = [], GridExecutor.__call__
GridExecutor.__call__ = lambda self, *args, **kwargs: launched.append(self.fn.__name__) or launch(self, *args, **kwargs)

def count(x, reduce=False):
    kernels = [torch.ones(2, *size, requires_grad=True) for size in ((9, 5), (5, 9), (5, 5))]
    with use_backend('triton'):
        ys = cross_dwconv2d(x.requires_grad_(), *kernels, torch.ones(2) if reduce else None, reduce=reduce)
    forward, launched[:] = launched[:], []
    torch.autograd.backward(ys, torch.ones_like(x) if reduce else [torch.ones_like(x)] * 3)
    backward, launched[:] = launched[:], []
    return ' '.join(forward), ' '.join(backward)

FORWARD = 'stage lay_out_taps convolve_rows'
BACKWARD = FORWARD + ' {} kernel_gradient_rows sum_diagonals'
PAIR = FORWARD, BACKWARD.format('add_up')
assert count(torch.ones(2, 2, 5, 8)) == PAIR
assert count(torch.ones(2, 4, 5, 8)[:, :2]) == PAIR, 'a slice of channels'
assert count(torch.ones(2, 2, 5, 7)) == PAIR, 'rows that are not aligned'
single = torch.ones(1, 2, 5, 8).contiguous(memory_format=torch.channels_last)
assert count(single) == (FORWARD + ' unstage', BACKWARD.format('unstage')), 'channels-last'
PAIR = FORWARD + ' add_up', BACKWARD.format('add_up')
assert count(torch.ones(2, 2, 5, 8), reduce=True) == PAIR, 'the sum of all branches'
print('counted')
"""


@needs_triton
def test_launches_of_a_pass(tmp_path):
    """What the module and docs/operator.md say: three forward and six backward."""
    done = run_program(tmp_path, LAUNCHES, TRITON_INTERPRET='1')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'counted' in done.stdout


COMPILED = r"""
import os, re, subprocess, sys, tempfile
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slak_mm.ops.backends import _triton_kernels as kernels, triton as backend

capability = int(sys.argv[1])
DUMP = os.path.join(os.path.dirname(nvidia.__file__), 'bin', 'cuobjdump')

def compile(name, warps=4, y='*bf16', products=False, **constants):
    function = getattr(kernels, name)
    names = function.arg_names
    half = ('x', 'k', 'g', 'bias', 'table')
    kind = lambda n: ('constexpr' if n in constants else '*fp32' if n == 'out' or n[0] == 'p' and n[1:].isdigit() else
                      y if n.rstrip('012345') == 'y' else '*bf16' if n.rstrip('012345') in half else 'i32')
    types = {n: kind(n) for n in names}
    # Pointers are aligned, and maps have a multiple of 16 pixels.
    aligned = {(i,): [['tt.divisibility', 16]] for i, n in enumerate(names)
               if types[n].startswith('*') or n in ('total', 'HW')}
    source = ASTSource(fn=function, signature=types, attrs=aligned,
                       constexprs={(names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(num_warps=warps))
    ptx = re.sub(r'L1::[a-z_]*[.]', '', compiled.asm['ptx'])
    if products:
        assert re.search(r'wgmma|mma\.sync', ptx), 'no tensor cores'
    if name not in ('sum_diagonals', 'lay_out_taps'):
        assert re.search(r'ld\.global\.v4\.b32|cp\.async\.cg', ptx), f'{name}: loads narrower than 16 bytes'
    if name not in ('sum_diagonals', 'kernel_gradient_rows', 'unstage'):
        assert 'st.global.v4.b32' in ptx and 'st.global.b16' not in ptx, f'{name}: stores narrower than 16 bytes'
    # One load, of the bias, is narrow: the banded matrices are read in whole vectors.
    assert name != 'convolve_rows' or len(re.findall(r'ld[.]global[.]b16', ptx)) <= 1, 'bands are read entry by entry'
    # What a multiprocessor of each has for one program.
    assert compiled.metadata.shared <= {80: 99, 90: 227}[capability] << 10
    if os.path.exists(DUMP):
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(compiled.asm['cubin'])
            file.flush()
            usage = subprocess.run([DUMP, '-res-usage', file.name], capture_output=True, text=True).stdout
        registers, stack = map(int, re.search(r'REG:([0-9]+) STACK:([0-9]+)', usage).groups())
        # Where registers are left, of 255, a few bytes on the stack are not spilled ones.
        assert stack == 0 or registers < 255 and stack <= 16, f'{name} {constants}: registers are spilled: {usage}'

for length, kh, kw in ((128, 5, 51), (64, 5, 49), (32, 3, 47), (128, 31, 31), (14, 27, 27), (14, 13, 13)):
    blocks = backend._blocks(length, kh, kw, 2)
    keeps = backend._keeps(blocks, 2)
    warps = backend._warps(blocks, keeps)
    for y in ('*bf16', '*fp32'):  # results, and partial sums
        compile('convolve_rows', warps, y, products=True, KEEP=keeps, ALIGNED=True, PRECISION='tf32', **blocks)
    compile('kernel_gradient_rows', products=True, PRECISION='tf32', **blocks)
compile('sum_diagonals', B=64)
compile('lay_out_taps', 8, B=4096)
for last in (False, True):
    compile('stage', LAST=last, ALIGNED=True, R=64, B=64)
compile('add_up', B=3, T=4096)
compile('unstage', B=3, T=64, CB=64)
print('compiled')
"""


@needs_triton
@pytest.mark.parametrize('capability', [80, 90])
def test_kernels_compile_for_gpus_with_tensor_cores(tmp_path, capability):
    """Without a GPU: tensor cores, loads and stores of 16 bytes, and shared memory and registers that are there."""
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
