"""The cross convolution against scipy's correlation, and its backends against each other."""

import asyncio
import functools
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from op_helpers import convolution, lay_out, relative_error
from scipy.ndimage import correlate

from slak_mm.ops import BACKENDS, _operator, choose_backend, cross_dwconv2d, use_backend

# Triton has its own tests, in its interpreter.
CPU_BACKENDS = [name for name in BACKENDS if name != 'triton']

# Largest error relative to the largest value of the exact result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(n, c, h, w, long, short, small=None, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    kernels = [randn(c, long, short), randn(c, short, long)]
    if small is not None:
        kernels.append(randn(c, small, small))
    return randn(n, c, h, w), kernels


def scipy_dwconv2d(x, kernel):
    """Same-size depthwise correlation with zero padding, by scipy."""
    taps = kernel.double().numpy()
    planes = [[correlate(p, k, mode='constant') for p, k in zip(image, taps)] for image in x.double().numpy()]
    return torch.from_numpy(np.array(planes).reshape(x.shape))


def assert_near(got, want, dtype, summands=None):
    """Compare as a fraction of the largest value, or where it nearly cancels, of the sums of absolute values."""
    assert got.shape == want.shape and got.dtype == dtype
    error, rounded = relative_error(got, want), torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    cancelled = (
        0.0 if summands is None or not want.numel() else float(summands.max() / want.abs().max().clamp_min(1e-30))
    )
    assert error <= max(TOLERANCE[dtype], 4 * rounded * cancelled)


shapes = st.tuples(
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([3, 7, 13, 15, 31, 51]),
    st.sampled_from([1, 3, 5]),
).filter(lambda s: s[5] <= s[4])
layouts = st.sampled_from(['nchw', 'channels_last', 'transposed', 'strided'])


@settings(max_examples=50, deadline=None)
@given(shape=shapes, layout=layouts, dtype=st.sampled_from(list(TOLERANCE)))
@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_forward_is_scipys_correlation(backend, shape, layout, dtype):
    x, kernels = make(*shape, small=shape[5], dtype=dtype)
    with use_backend(backend):
        results = cross_dwconv2d(lay_out(x, layout), *kernels)
    for got, kernel in zip(results, kernels, strict=True):
        assert_near(got, scipy_dwconv2d(x, kernel), dtype)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, layout=layouts, dtype=st.sampled_from(list(TOLERANCE)), reduce=st.booleans())
@example((1, 1, 1, 1, 7, 1), 'nchw', torch.bfloat16, False)  # branches that nearly cancel
@pytest.mark.parametrize('backend', [name for name in CPU_BACKENDS if name != 'reference'])
def test_gradients_are_autograds(backend, shape, layout, dtype, reduce):
    """The backends' own backward against float64 autograd through F.conv2d."""
    x, kernels = make(*shape, small=shape[5], dtype=dtype)
    bias = [torch.linspace(-1, 1, shape[1]).to(dtype)] if reduce else []
    want_inputs = [t.double().requires_grad_() for t in (x, *kernels, *bias)]
    inputs = [t.requires_grad_() for t in (lay_out(x, layout), *kernels, *bias)]
    grads = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(1 if reduce else 3)
    ]
    magnitudes = [t.detach().abs().requires_grad_() for t in want_inputs]
    want, summands = (
        torch.autograd.grad(three_convolutions(*tensors, reduce=reduce), tensors, given)
        for tensors, given in (
            (want_inputs, [g.double() for g in grads]),
            (magnitudes, [g.double().abs() for g in grads]),
        )
    )
    with use_backend(backend):
        results = cross_dwconv2d(*inputs, reduce=reduce)
        got = torch.autograd.grad(results, inputs, [lay_out(g, layout) for g in grads])
    for a, b, of_b in zip(got, want, summands, strict=True):
        assert_near(a, b, dtype, of_b)


def three_convolutions(x, k_v, k_h, k_s, bias=None, reduce=False):
    ys = [convolution(x, k) for k in (k_v, k_h, k_s)]
    return sum(ys) + bias.view(-1, 1, 1) if reduce else ys


@pytest.mark.parametrize('wanted', [(0,), (1, 2), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_some_gradients_of_some_results(backend, wanted):
    """Branches that are not used and inputs that need no gradient are left out."""
    x, kernels = make(2, 3, 9, 8, 7, 3, small=3)
    inputs = [t.requires_grad_(i in wanted) for i, t in enumerate((x, *kernels))]
    grad = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    asked = [inputs[i] for i in wanted]

    def gradients(results):
        return torch.autograd.grad(results[1], asked, grad, allow_unused=True)

    want = gradients(three_convolutions(*inputs)) if 0 in wanted or 2 in wanted else None
    with use_backend(backend):
        results = cross_dwconv2d(*inputs)
        if want is None:  # the kernel of another branch
            assert gradients(results) == (None,) * len(wanted)
            return
        for a, b in zip(gradients(results), want, strict=True):
            assert a is b if b is None else torch.allclose(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize('size', [(130, 9), (9, 130), (40, 50)], ids=str)
@pytest.mark.parametrize('short', [1, 3, 5, 7])
@pytest.mark.parametrize('backend', ['cpu', 'gemm'])
def test_kernel_gradient_on_maps_larger_than_the_kernel(backend, size, short):
    """There both take another way than on smaller maps; it has to agree."""
    x, kernels = make(2, 3, *size, 13, short, dtype=torch.float32)
    exact = [k.double().requires_grad_() for k in kernels]
    kernels = [k.requires_grad_() for k in kernels]
    with use_backend('reference'):
        cross_dwconv2d(x.double(), *exact, reduce=True).square().sum().backward()
    with use_backend(backend):
        cross_dwconv2d(x, *kernels, reduce=True).square().sum().backward()
    for got, want in zip(kernels, exact, strict=True):
        assert_near(got.grad, want.grad, torch.float32)


@functools.lru_cache
def cases_of_all_sides(sizes):
    """Inputs, gradients of results, and results and gradients in float64, of lines of pixels and other narrow maps."""
    g = torch.Generator().manual_seed(0)
    kernels = [torch.randn(2, *size, generator=g) for size in sizes]
    shapes = [shape for side in range(1, 68) for shape in ((1, 2, side, 1), (1, 2, 1, side))]
    shapes += [(1, 2, side, 68 - side) for side in (2, 9, 23, 34, 50, 66)]
    cases = []
    for shape in shapes:
        x, grads = torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in sizes]
        exact = [t.double().requires_grad_() for t in (x, *kernels)]
        want = [convolution(exact[0], k) for k in exact[1:]]
        want = [t.detach() for t in (*want, *torch.autograd.grad(want, exact, [g.double() for g in grads]))]
        cases.append(((x, *kernels), grads, want))
    return cases


@pytest.mark.parametrize('backend', CPU_BACKENDS)
@pytest.mark.parametrize(
    'sizes',
    [((9, 9),), ((13, 5), (5, 13), (5, 5)), ((51, 3), (3, 51), (3, 3)), ((31, 1), (1, 31)), ((31, 31),)],
    ids=lambda sizes: f'{sizes[0][0]}x{sizes[0][1]}',
)
def test_every_side_of_a_map_from_1_to_67(backend, sizes):
    """Also lines of pixels, and kernels longer or wider than the map."""
    for tensors, grads, want in cases_of_all_sides(sizes):
        inputs = [t.detach().requires_grad_() for t in tensors]
        with use_backend(backend):
            got = [y for y in cross_dwconv2d(*inputs) if y is not None]
            got += torch.autograd.grad(got, inputs, grads)
        for a, b in zip(got, want, strict=True):
            assert_near(a, b, torch.float32)


@pytest.mark.parametrize('channels', [1, 3, 17])
@pytest.mark.parametrize('length', [37, 39, 47, 51, 63])
@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_gradients_of_long_narrow_kernels(backend, length, channels):
    """PyTorch's own are wrong by a fifth for one layout (oneDNN, AVX-512); differentiated twice as well."""
    x, kernels = make(1, channels, 78, 64, length, 3, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (x, *kernels)]
    exact = [t.detach().double().requires_grad_() for t in inputs]

    def gradients(results, inputs, **kwargs):
        return torch.autograd.grad(sum(y.square().sum() for y in results), inputs[1:], **kwargs)

    want = gradients([convolution(exact[0], k) for k in exact[1:]], exact)
    with use_backend(backend):
        once, twice = (gradients(cross_dwconv2d(*inputs)[:2], inputs, create_graph=twice) for twice in (False, True))
    for a, b, exactly in zip(once, twice, want, strict=True):
        assert_near(a, exactly, torch.float32)
        assert_near(b.detach(), exactly, torch.float32)


@pytest.mark.parametrize('shape', [(0, 3, 9, 8), (2, 3, 0, 8), (2, 0, 9, 8)], ids=str)
@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_nothing_to_convolve(backend, shape):
    inputs = [torch.ones(s, requires_grad=True) for s in (shape, (shape[1], 7, 3), (shape[1], 3, 7))]
    with use_backend(backend):
        y = cross_dwconv2d(*inputs, reduce=True)
        grads = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == shape and all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs))


def negated(t):
    return torch._neg_view(-t)


def imaginary(t):
    """The imaginary part of a conjugate, whose memory holds the opposite numbers."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def expanded(t):
    """A stride of 0, as gradients of sums have."""
    return t.flatten()[0].expand(t.shape)


def overlapping(t):
    """Neighbors share memory."""
    return t.flatten().as_strided(t.shape, [1] * t.dim())


def inside(t):
    """A part of a larger tensor, which begins at an odd place."""
    whole = t.new_full([n + 3 for n in t.shape], float('nan'))
    part = whole[tuple(slice(1, 1 + n) for n in t.shape)]
    return part.copy_(t)


def zeros(t):
    """As forward-mode AD makes them, without memory."""
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


VIEWS = [
    (change, dtype) for change in (negated, imaginary, expanded, overlapping, inside, zeros) for dtype in TOLERANCE
]
VIEWS.remove((imaginary, torch.bfloat16))  # there are no such complex numbers


@pytest.mark.parametrize('change, dtype', VIEWS)
@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_values_and_not_memory_are_read(backend, change, dtype):
    """Input, kernels, bias and incoming gradient may be any view."""
    x, kernels = make(2, 3, 9, 8, 7, 3, small=3, dtype=dtype)
    plain = [x, *kernels, torch.linspace(-1, 1, 3).to(dtype), x + 1]
    views = [change(t) for t in plain]

    def compute(tensors):
        *inputs, grad = tensors
        inputs = [t.requires_grad_() for t in inputs]
        y = cross_dwconv2d(*inputs, reduce=True)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    with use_backend(backend):
        for got, want in zip(compute([t.detach() for t in views]), compute([t.detach().clone() for t in views])):
            torch.testing.assert_close(got, want)


HALVES = [
    (backend, dtype)
    for backend in CPU_BACKENDS
    for dtype in (torch.float16, torch.bfloat16)
    if BACKENDS[backend].unavailable_reason(torch.ones(1, 1, 1, 1, dtype=dtype), []) is None
]


@pytest.mark.parametrize('small', [None, 5])
@pytest.mark.parametrize('backend, dtype', HALVES)
def test_half_precision_is_rounded_once(backend, small, dtype):
    """Sums of branches, bias and gradients are the numbers nearest to the exact ones, but for near ties."""
    x, kernels = make(2, 8, 20, 24, 13, 5, small=small, dtype=dtype)
    bias, grad = (torch.randn(s, generator=torch.Generator().manual_seed(1)).to(dtype) for s in ((8,), x.shape))
    inputs = [t.requires_grad_() for t in (x, *kernels, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = sum(convolution(exact[0], k) for k in exact[1:-1]) + exact[-1].view(-1, 1, 1)
    want = [want, *torch.autograd.grad(want, exact, grad.double())]
    with use_backend(backend):
        got = cross_dwconv2d(*inputs[:-1], bias=bias, reduce=True)
        got = [got, *torch.autograd.grad(got, inputs, grad)]
    for a, b in zip(got, want, strict=True):
        assert float((a != b.to(dtype)).double().mean()) < 0.01


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_what_is_not_finite_reaches_all_that_it_enters(backend, value):
    """And nothing beyond the lines of the map on which it lies, if kernels have a rim of zeros."""
    x, (k_v, k_h) = make(1, 2, 20, 20, 9, 3, dtype=torch.float32)
    for k in (k_v, k_h):
        k[:, [0, -1]] = 0
        k[:, :, [0, -1]] = 0
    x[0, :, 10, 12] = value
    with use_backend(backend):
        y_v, y_h, _ = cross_dwconv2d(x, k_v, k_h)
    assert not y_v[0, :, 7:14, 12].isfinite().any() and not y_h[0, :, 10, 9:16].isfinite().any()
    assert y_v[0, :, :, [*range(9), *range(16, 20)]].isfinite().all()
    assert y_h[0, :, [*range(7), *range(14, 20)]].isfinite().all()


@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_gradcheck(backend):
    x, kernels = make(1, 2, 3, 4, 9, 3, small=3)
    inputs = [t.requires_grad_() for t in (x, *kernels)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(cross_dwconv2d, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *t: cross_dwconv2d(*t, reduce=True), inputs, fast_mode=True)


@pytest.mark.parametrize(
    'length, center, offsets',
    # Tap offsets of ShiftWise kernels, reference/semantics.md section 4; and the first tap in the middle.
    [(51, 24, (-24, 26)), (48, 23, (-23, 24)), (15, 6, (-6, 8)), (55, 25, (-25, 29)), (9, 0, (0, 8))],
)
@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_off_center_kernels(backend, length, center, offsets):
    """Asymmetric extents equal a convolution after asymmetric padding."""
    assert offsets == (-center, length - 1 - center)
    x, (k_v, k_h) = make(1, 17, 30, 33, length, 3)
    with use_backend(backend):
        y_v, y_h, _ = cross_dwconv2d(x, k_v, k_h, center=center)
    behind = length - 1 - center
    want_v = F.conv2d(F.pad(x, (1, 1, center, behind)), k_v.unsqueeze(1), groups=17)
    want_h = F.conv2d(F.pad(x, (center, behind, 1, 1)), k_h.unsqueeze(1), groups=17)
    assert_near(y_v, want_v, torch.float64)
    assert_near(y_h, want_h, torch.float64)


@pytest.mark.parametrize('small', [3, 5, 7], ids=lambda s: f'small{s}')
@pytest.mark.parametrize('center', [None, 4])
def test_reduce_is_the_sum(small, center):
    """Also where the small kernel is not covered by the wide one."""
    x, kernels = make(2, 3, 9, 8, 13, 5, small=small)
    bias = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    total = cross_dwconv2d(x, *kernels, bias, reduce=True, center=center)
    branches = cross_dwconv2d(x, *kernels, center=center)
    assert_near(total, sum(branches) + bias.view(-1, 1, 1), torch.float64)


def test_square_kernel_stands_alone():
    """RepLKNet's and ConvNeXt's operators are crosses without a wide kernel."""
    x, _ = make(1, 4, 10, 11, 3, 3)
    square, small = torch.randn(4, 9, 9).double(), torch.randn(4, 3, 3).double()
    y, none, y_s = cross_dwconv2d(x, square, None, small)
    assert none is None
    assert_near(y, scipy_dwconv2d(x, square), torch.float64)
    assert_near(cross_dwconv2d(x, square, None, small, reduce=True), y + y_s, torch.float64)


@pytest.mark.parametrize('layout', ['nchw', 'channels_last'])
@pytest.mark.parametrize('long', [7, 13, 31])
@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_layout_of_the_input_is_kept(backend, long, layout):
    x, kernels = make(2, 8, 20, 24, long, 5, small=5, dtype=torch.float32)
    x = lay_out(x, layout).requires_grad_()
    memory_format = torch.contiguous_format if layout == 'nchw' else torch.channels_last
    with use_backend(backend):
        results = cross_dwconv2d(x, *kernels)
    for y in results:
        assert y.is_contiguous(memory_format=memory_format)


def test_two_runs_give_the_same_bits():
    x, kernels = make(2, 32, 40, 40, 31, 5, small=5, dtype=torch.float32)

    def run():
        inputs = [t.clone().requires_grad_() for t in (x, *kernels)]
        y = cross_dwconv2d(*inputs, reduce=True)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('backend', CPU_BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_autocast_chooses_the_precision(backend, dtype):
    """Under autocast the operator behaves as F.conv2d does, bias and gradients included."""
    x, kernels = make(1, 2, 6, 6, 7, 3, dtype=dtype)
    bias = torch.ones(2, dtype=dtype)
    inputs = [t.requires_grad_() for t in (x, *kernels, bias)]
    with torch.autocast('cpu', dtype=torch.bfloat16), use_backend(backend):
        y = cross_dwconv2d(x, *kernels, bias=bias, reduce=True)
        like = F.conv2d(x, kernels[0].unsqueeze(1), bias, padding=(3, 1), groups=2)
    assert y.dtype == like.dtype
    exact = sum(scipy_dwconv2d(x.detach(), k.detach()) for k in kernels) + 1
    assert_near(y.detach(), exact, like.dtype)
    for t, grad in zip(inputs, torch.autograd.grad(y.float().sum(), inputs), strict=True):
        assert grad.dtype == t.dtype


def test_every_size_of_a_kernel_alone():
    """Square kernels, from 1 x 1 to larger than the map."""
    for size in (1, 3, 9, 31):
        x, (kernel, _) = make(1, 3, 12, 14, size, size)
        want = scipy_dwconv2d(x, kernel)
        for backend in CPU_BACKENDS:
            with use_backend(backend):
                assert_near(cross_dwconv2d(x, kernel)[0], want, torch.float64)


class TestBackendChoice:
    x, kernels = make(1, 2, 6, 6, 7, 3, dtype=torch.float32)

    def test_the_first_that_can_run_and_is_preferred(self):
        want = next(
            name
            for name in CPU_BACKENDS
            if BACKENDS[name].unavailable_reason(self.x, self.kernels) is None
            and (name != 'gemm' or BACKENDS[name].is_preferred(self.x, self.kernels))
        )
        assert choose_backend(self.x, self.kernels) == want
        # CPUs have no kernels of their own for it but the slow ones of PyTorch, and products.
        halves = self.x.half(), [k.half() for k in self.kernels]
        assert choose_backend(*halves) in ('gemm', 'reference')

    def test_it_is_logged_once(self, caplog):
        _operator._named.clear()
        with caplog.at_level('INFO', logger='slak_mm'), use_backend('cpu'):
            for _ in range(2):
                cross_dwconv2d(self.x, *self.kernels)
        assert len(caplog.messages) == 1
        assert "runs on the backend 'cpu' for torch.float32 on cpu" in caplog.text
        assert 'not triton: the input is on cpu, not on cuda' in caplog.text

    def test_environment_variable(self, monkeypatch):
        monkeypatch.setenv('SLAK_MM_BACKEND', 'reference')
        assert choose_backend(self.x, self.kernels) == 'reference'
        with use_backend('cpu'):  # the block is nearer than the environment
            assert choose_backend(self.x, self.kernels) == 'cpu'

    def test_context_ends_with_an_error(self):
        before = choose_backend(self.x, self.kernels)
        with pytest.raises(KeyError), use_backend('reference'):
            raise KeyError
        assert choose_backend(self.x, self.kernels) == before != 'reference'

    def test_each_thread_has_its_own(self):
        both = threading.Barrier(3)
        seen = {}

        def force(name):
            both.wait()
            with use_backend(name):
                both.wait()
                seen[name] = choose_backend(self.x, self.kernels)
                both.wait()

        before = choose_backend(self.x, self.kernels)
        threads = [threading.Thread(target=force, args=(name,)) for name in ('gemm', 'cpu', 'reference')]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == dict(gemm='gemm', cpu='cpu', reference='reference')
        assert choose_backend(self.x, self.kernels) == before

    def test_a_thread_started_within_a_block_is_not_in_it(self, monkeypatch):
        monkeypatch.setenv('SLAK_MM_BACKEND', 'gemm')
        seen = []
        with use_backend('cpu'):
            thread = threading.Thread(target=lambda: seen.append(choose_backend(self.x, self.kernels)))
            thread.start()
            thread.join()
        assert seen == ['gemm']

    def test_each_asynchronous_task_has_its_own(self):
        async def force(name):
            with use_backend(name):
                await asyncio.sleep(0)
                return choose_backend(self.x, self.kernels)

        async def both():
            return await asyncio.gather(force('gemm'), force('cpu'))

        assert asyncio.run(both()) == ['gemm', 'cpu']

    def test_blocks_that_end_in_another_order_leave_nothing(self):
        """Generators may be closed in any order, and by another thread."""

        def force(name):
            with use_backend(name):
                yield

        before = choose_backend(self.x, self.kernels)
        one, two, three = (force(name) for name in ('gemm', 'cpu', 'reference'))
        next(one), next(two)
        one.close()
        assert choose_backend(self.x, self.kernels) == 'cpu'
        two.close()
        assert choose_backend(self.x, self.kernels) == before
        thread = threading.Thread(target=next, args=(three,))
        thread.start()
        thread.join()
        three.close()
        assert choose_backend(self.x, self.kernels) == before

    def test_a_backward_pass_follows_its_forward_pass(self, monkeypatch):
        """Autograd runs it in another thread on a GPU, which is in no block."""
        ran = []
        run = BACKENDS['gemm'].backward
        monkeypatch.setattr(BACKENDS['gemm'], 'backward', lambda *args: ran.append(args) or run(*args))
        x = self.x.clone().requires_grad_()
        with use_backend('gemm'):
            y = cross_dwconv2d(x, *self.kernels, reduce=True)
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
        assert len(ran) == 1 and x.grad is not None

    def test_unknown_name(self, monkeypatch):
        with pytest.raises(ValueError, match="unknown backend 'cuda'.*gemm, cpu, reference"):
            with use_backend('cuda'):
                pass
        monkeypatch.setenv('SLAK_MM_BACKEND', 'fast')
        with pytest.raises(ValueError, match="SLAK_MM_BACKEND names the unknown backend 'fast'.*gemm, cpu, reference"):
            cross_dwconv2d(self.x, *self.kernels)
        monkeypatch.setenv('SLAK_MM_BACKEND', '')  # as good as unset
        cross_dwconv2d(self.x, *self.kernels)

    def test_forced_backend_that_cannot_run(self):
        with use_backend('cpu'), pytest.raises(RuntimeError, match='dtype torch.float16'):
            cross_dwconv2d(self.x.half(), *[k.half() for k in self.kernels])


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(x=torch.ones(2, 6, 6)), r'x must have shape \(N, C, H, W\)'),
        (dict(k_v=torch.ones(3, 7, 3)), r'k_v must have shape \(2, height, width\)'),
        (dict(k_h=torch.ones(2, 1, 3, 7)), 'k_h must have shape'),
        (dict(k_v=torch.ones(2, 7, 3).double()), 'k_v has dtype torch.float64, but x has torch.float32'),
        (dict(bias=torch.ones(2).half(), reduce=True), 'bias has dtype torch.float16'),
        (dict(x=torch.ones(1, 2, 6, 6).int()), 'x must have dtype float16, .*, got torch.int32'),
        (dict(k_h=torch.ones(2, 3, 7).bool()), 'k_h must have dtype float16, .*, got torch.bool'),
        (dict(x=torch.ones(1, 2, 6, 6) * 1j), 'x must have dtype float16, .*, got torch.complex64'),
        (dict(x=torch.ones(1, 2, 6, 6).to_sparse()), 'x must be a dense tensor, got layout torch.sparse_coo'),
        (dict(k_h=torch.ones(2, 3, 7, device='meta')), 'k_h is on meta, but x is on cpu'),
        (dict(x=torch.ones(1, 2, 6, 6, device='meta')), 'k_v is on cpu, but x is on meta'),
        (dict(k_v=torch.ones(2, 3, 7)), 'k_v must be tall or square'),
        (dict(k_v=torch.ones(2, 7, 4)), 'odd width'),
        (dict(k_h=torch.ones(2, 3, 9)), 'k_h must be the transposed shape'),
        (dict(k_s=torch.ones(2, 2, 2)), 'k_s must be square and odd'),
        (dict(k_v=torch.ones(2, 8, 3), k_h=torch.ones(2, 3, 8)), 'give center, 0 to 7'),
        (dict(center=7), 'center must lie within the kernel, 0 to 6, got 7'),
        (dict(bias=torch.ones(2)), 'needs reduce=True'),
        (dict(bias=torch.ones(3), reduce=True), r'bias must have shape \(2,\)'),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(x=torch.ones(1, 2, 6, 6), k_v=torch.ones(2, 7, 3), k_h=torch.ones(2, 3, 7))
    with pytest.raises(ValueError, match=message):
        cross_dwconv2d(**{**arguments, **change})


def test_autocast_leaves_float64_alone():
    """As it does for F.conv2d, which then misses the common dtype."""
    x, k_v, k_h = torch.ones(1, 2, 6, 6), torch.ones(2, 7, 3), torch.ones(2, 3, 7)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert cross_dwconv2d(x, k_v.bfloat16(), k_h, reduce=True).dtype == torch.bfloat16
        for operands in ((x.double(), k_v, k_h), (x, k_v, k_h.double())):
            with pytest.raises(ValueError, match='dtype torch.float32.*float64|dtype torch.float64.*float32'):
                cross_dwconv2d(*operands)
