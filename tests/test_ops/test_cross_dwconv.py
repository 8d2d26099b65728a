"""The cross convolution against scipy's correlation, and its backends against each other."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d

from slak_mm.ops import BACKENDS, choose_backend, cross_dwconv2d, use_backend

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
    out = np.zeros(x.shape)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            rows, columns = (s // 2 for s in kernel.shape[1:])
            padded = np.pad(x[i, j].double().numpy(), ((rows, rows), (columns, columns)))
            out[i, j] = correlate2d(padded, kernel[j].double().numpy(), mode='valid')
    return torch.from_numpy(out)


def assert_near(got, want, dtype):
    scale = max(float(want.abs().max()), 1e-30) if want.numel() else 1.0
    error = float((got.double() - want).abs().max()) / scale if want.numel() else 0.0
    assert got.shape == want.shape and got.dtype == dtype
    assert error <= TOLERANCE[dtype], f'relative error {error:.2e}'


shapes = st.tuples(
    st.integers(0, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20),
    st.sampled_from([3, 7, 13, 15, 31, 51]), st.sampled_from([1, 3, 5]),
).filter(lambda s: s[5] <= s[4])  # fmt: skip
layouts = st.sampled_from(['nchw', 'channels_last', 'transposed', 'strided'])


def lay_out(x, layout):
    """The same values in another memory layout."""
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'transposed':
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == 'strided':
        return torch.stack([x, torch.full_like(x, float('nan'))], dim=-1)[..., 0]
    return x


@settings(max_examples=60, deadline=None)
@given(shape=shapes, layout=layouts, dtype=st.sampled_from(list(TOLERANCE)))
@pytest.mark.parametrize('backend', BACKENDS)
def test_forward_is_scipys_correlation(backend, shape, layout, dtype):
    x, kernels = make(*shape, small=shape[5], dtype=dtype)
    with use_backend(backend):
        results = cross_dwconv2d(lay_out(x, layout), *kernels)
    for got, kernel in zip(results, kernels, strict=True):
        assert_near(got, scipy_dwconv2d(x, kernel), dtype)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, layout=layouts, dtype=st.sampled_from(list(TOLERANCE)))
def test_gradients_are_autograds(shape, layout, dtype):
    """The CPU backend's own backward against float64 autograd through F.conv2d."""
    x, kernels = make(*shape, small=shape[5], dtype=dtype)
    want_inputs = [t.double().requires_grad_() for t in (x, *kernels)]
    inputs = [lay_out(x, layout).requires_grad_(), *(k.requires_grad_() for k in kernels)]
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
             for i in range(3)]  # fmt: skip
    with use_backend('reference'):
        want = torch.autograd.grad(
            cross_dwconv2d(*want_inputs), want_inputs, [g.double() for g in grads])
    with use_backend('cpu'):
        got = torch.autograd.grad(
            cross_dwconv2d(*inputs), inputs, [lay_out(g, layout) for g in grads])
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, dtype)


@pytest.mark.parametrize('size', [(80, 9), (9, 80), (40, 50)], ids=str)
@pytest.mark.parametrize('short', [1, 3, 5, 7])
def test_kernel_gradient_on_maps_larger_than_the_kernel(size, short):
    """There float32 takes another way than float64 and smaller maps; it has to agree."""
    x, kernels = make(2, 3, *size, 13, short, dtype=torch.float32)
    exact = [k.double().requires_grad_() for k in kernels]
    kernels = [k.requires_grad_() for k in kernels]
    with use_backend('reference'):
        cross_dwconv2d(x.double(), *exact, reduce=True).square().sum().backward()
    with use_backend('cpu'):
        cross_dwconv2d(x, *kernels, reduce=True).square().sum().backward()
    for got, want in zip(kernels, exact, strict=True):
        assert_near(got.grad, want.grad, torch.float32)


@pytest.mark.parametrize('backend', BACKENDS)
def test_gradcheck(backend):
    x, kernels = make(2, 2, 4, 5, 7, 3, small=3)
    inputs = [t.requires_grad_() for t in (x, *kernels)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(cross_dwconv2d, inputs)
        assert torch.autograd.gradgradcheck(
            lambda *t: cross_dwconv2d(*t, reduce=True), inputs)


@pytest.mark.parametrize(
    'length, center, offsets',
    # Tap offsets of ShiftWise kernels, reference/semantics.md section 4.
    [(51, 24, (-24, 26)), (48, 23, (-23, 24)), (15, 6, (-6, 8)), (55, 25, (-25, 29))])
@pytest.mark.parametrize('backend', BACKENDS)
def test_off_centre_kernels(backend, length, center, offsets):
    """Asymmetric extents equal a convolution after asymmetric padding."""
    assert offsets == (-center, length - 1 - center)
    x, (k_v, k_h) = make(1, 3, 20, 17, length, 3)
    with use_backend(backend):
        y_v, y_h, _ = cross_dwconv2d(x, k_v, k_h, center=center)
    behind = length - 1 - center
    want_v = F.conv2d(F.pad(x, (1, 1, center, behind)), k_v.unsqueeze(1), groups=3)
    want_h = F.conv2d(F.pad(x, (center, behind, 1, 1)), k_h.unsqueeze(1), groups=3)
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
def test_layout_of_the_input_is_kept(layout, long):
    x, kernels = make(2, 8, 20, 24, long, 5, small=5, dtype=torch.float32)
    x = lay_out(x, layout).requires_grad_()
    memory_format = (
        torch.contiguous_format if layout == 'nchw' else torch.channels_last)
    for y in cross_dwconv2d(x, *kernels):
        assert y.is_contiguous(memory_format=memory_format)


def test_two_runs_give_the_same_bits():
    x, kernels = make(2, 32, 40, 40, 31, 5, small=5, dtype=torch.float32)

    def run():
        inputs = [t.clone().requires_grad_() for t in (x, *kernels)]
        y = cross_dwconv2d(*inputs, reduce=True)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_autocast_chooses_the_precision():
    """Under autocast the operator behaves as F.conv2d does."""
    x, kernels = make(1, 2, 6, 6, 7, 3, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert choose_backend(x, kernels) == 'reference'
        y = cross_dwconv2d(x, *kernels, reduce=True)
    assert y.dtype == torch.bfloat16
    exact = sum(scipy_dwconv2d(x, k) for k in kernels)
    assert_near(y, exact, torch.bfloat16)


class TestBackendChoice:
    x, kernels = make(1, 2, 6, 6, 7, 3, dtype=torch.float32)

    def test_cpu_is_the_default_there(self):
        assert choose_backend(self.x, self.kernels) == 'cpu'

    def test_environment_variable(self, monkeypatch):
        monkeypatch.setenv('SLAK_MM_BACKEND', 'reference')
        assert choose_backend(self.x, self.kernels) == 'reference'
        with use_backend('cpu'):  # the block is nearer than the environment
            assert choose_backend(self.x, self.kernels) == 'cpu'

    def test_context_ends_with_an_error(self):
        with pytest.raises(KeyError), use_backend('reference'):
            raise KeyError
        assert choose_backend(self.x, self.kernels) == 'cpu'

    def test_unknown_name(self, monkeypatch):
        with pytest.raises(ValueError, match="unknown backend 'cuda'.*cpu, reference"):
            with use_backend('cuda'):
                pass
        monkeypatch.setenv('SLAK_MM_BACKEND', 'fast')
        with pytest.raises(ValueError, match="SLAK_MM_BACKEND names the unknown backend 'fast'"):
            cross_dwconv2d(self.x, *self.kernels)

    def test_forced_backend_that_cannot_run(self):
        with use_backend('cpu'), pytest.raises(RuntimeError, match='dtype torch.float16'):
            cross_dwconv2d(self.x.half(), *[k.half() for k in self.kernels])


@pytest.mark.parametrize('change, message', [
    (dict(x=torch.ones(2, 6, 6)), r'x must have shape \(N, C, H, W\)'),
    (dict(k_v=torch.ones(3, 7, 3)), r'k_v must have shape \(2, height, width\)'),
    (dict(k_h=torch.ones(2, 1, 3, 7)), 'k_h must have shape'),
    (dict(k_v=torch.ones(2, 7, 3).double()), 'k_v has dtype torch.float64'),
    (dict(k_v=torch.ones(2, 3, 7)), 'k_v must be tall or square'),
    (dict(k_v=torch.ones(2, 7, 4)), 'odd width'),
    (dict(k_h=torch.ones(2, 3, 9)), 'k_h must be the transposed shape'),
    (dict(k_s=torch.ones(2, 2, 2)), 'k_s must be square and odd'),
    (dict(k_v=torch.ones(2, 8, 3), k_h=torch.ones(2, 3, 8)), 'give center, 0 to 7'),
    (dict(center=7), 'center must lie within the kernel, 0 to 6, got 7'),
    (dict(bias=torch.ones(2)), 'needs reduce=True'),
    (dict(bias=torch.ones(3), reduce=True), r'bias must have shape \(2,\)'),
])  # fmt: skip
def test_bad_arguments(change, message):
    arguments = dict(x=torch.ones(1, 2, 6, 6), k_v=torch.ones(2, 7, 3), k_h=torch.ones(2, 3, 7))
    with pytest.raises(ValueError, match=message):
        cross_dwconv2d(**{**arguments, **change})
