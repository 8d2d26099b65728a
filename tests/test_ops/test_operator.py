"""The operator as torch.compile, torch.export, tracers, FLOP counters and autograd see it."""

import subprocess
import sys

import pytest
import torch
from op_helpers import convolution
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from slak_mm.ops import BACKENDS, _operator, cross_dwconv2d, use_backend

HAS_COMPILED_TRANSFORMS = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 4)
needs_library = pytest.mark.skipif(not _operator.HAS_LIBRARY, reason='operators are registered from torch 2.4 on')


def make(channels_last=False, requires_grad=True, n=2):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 9, 8, generator=g)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    kernels = [torch.randn(3, *size, generator=g) for size in ((7, 3), (3, 7), (3, 3))]
    return [t.requires_grad_(requires_grad) for t in (x, *kernels)]


class Recorder(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_library
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('reduce', [False, True])
def test_registration(channels_last, reduce):
    """Schema, fake tensors, autograd and AOT dispatch, as PyTorch checks them."""
    x, *kernels = make(channels_last)
    bias = torch.ones(3, requires_grad=True) if reduce else None
    result = torch.library.opcheck(torch.ops.slak_mm.cross_dwconv2d.default, (x, kernels, bias, reduce))
    assert set(result.values()) == {'SUCCESS'}
    x, *kernels = make(channels_last, requires_grad=False)
    grads = [x] if reduce else [x, x + 1, x + 2]
    result = torch.library.opcheck(torch.ops.slak_mm.cross_dwconv2d_backward.default, (x, kernels, grads, True, True))
    assert set(result.values()) == {'SUCCESS'}


@pytest.mark.parametrize('backend', ['cpu_native', 'gemm', 'cpu', 'reference'])
@pytest.mark.parametrize('reduce', [False, True])
def test_a_flop_counter_counts_what_it_counts_of_convolutions(backend, reduce):
    x, *kernels = make()
    reason = BACKENDS[backend].unavailable_reason(x, kernels)
    if reason is not None:
        pytest.skip(reason)
    k_v, k_h, k_s = kernels
    if reduce:
        kernels = [k_v, k_h]

    def flops(run, of_kernels):
        for kernel in kernels:
            kernel.requires_grad_(of_kernels)
        with FlopCounterMode(display=False) as forward:
            y = run()
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y.sum(), [x, *kernels] if of_kernels else [x])
        return forward.get_total_flops(), backward.get_total_flops()

    def ours():
        with use_backend(backend):
            return sum(cross_dwconv2d(x, *kernels, reduce=reduce))

    def convolutions():
        return sum(convolution(x, kernel) for kernel in kernels)

    for of_kernels in (False, True):
        assert flops(ours, of_kernels) == flops(convolutions, of_kernels)


@needs_library
def test_a_mode_sees_one_operator_each_way():
    inputs = make()
    with Recorder() as recorder:
        y = cross_dwconv2d(*inputs, reduce=True)
        y.sum().backward()
    assert recorder.names.count('slak_mm.cross_dwconv2d.default') == 1
    assert recorder.names.count('slak_mm.cross_dwconv2d_backward.default') == 1
    assert not any('convolution' in name for name in recorder.names)


@needs_library
def test_gradients_through_the_registered_operator():
    """The same bits as without it, and a second derivative."""

    def gradients():
        inputs = make()
        ys = cross_dwconv2d(*inputs)
        return torch.autograd.grad(sum(y.square().sum() for y in ys), inputs)

    with Recorder():
        got = gradients()
    for a, b in zip(got, gradients(), strict=True):
        assert torch.equal(a, b)
    inputs = [t.detach().double().requires_grad_() for t in make(n=1)]

    def operator(x, *kernels):
        return torch.ops.slak_mm.cross_dwconv2d(x, list(kernels), None, True)[0]

    assert torch.autograd.gradcheck(operator, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator, inputs, fast_mode=True)


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_compiling'), reason='needs torch 2.3')
def test_tracing_gives_plain_convolutions():
    """mmengine's FLOP counter and TorchScript know nothing else."""
    x, k_v, k_h, k_s = make(requires_grad=False)
    traced = torch.jit.trace(lambda x: cross_dwconv2d(x, k_v, k_h, k_s, reduce=True), (x,))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert 'aten::_convolution' in kinds and not any('slak' in kind for kind in kinds)
    torch.testing.assert_close(traced(x), cross_dwconv2d(x, k_v, k_h, k_s, reduce=True))


@needs_library
def test_forced_reference_exports_plain_convolutions():
    class Cross(torch.nn.Module):
        def forward(self, *inputs):
            return cross_dwconv2d(*inputs, reduce=True)

    inputs = tuple(make(requires_grad=False))

    def names():
        program = torch.export.export(Cross(), inputs)
        return {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}

    assert 'slak_mm.cross_dwconv2d.default' in names()
    with use_backend('reference'):
        assert not any('slak' in name for name in names())


def test_older_torch_has_autograd_without_registration(monkeypatch):
    def gradients():
        inputs = make()
        return torch.autograd.grad(cross_dwconv2d(*inputs, reduce=True).square().sum(), inputs)

    want = gradients()
    monkeypatch.setattr(_operator, 'HAS_LIBRARY', False)
    assert all(map(torch.equal, gradients(), want))
    with Recorder() as recorder:  # who looks on sees plain convolutions
        torch.testing.assert_close(gradients(), want, rtol=0, atol=1e-3)
    assert not any('slak' in name for name in recorder.names)


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x + 1))).tangent


def batched_gradients(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, torch.stack([y.detach(), torch.ones_like(y)]), is_grads_batched=True)[0]


def loss(f):
    return lambda x: f(x).pow(3).sum()


TRANSFORMS = dict(
    vmap=lambda f, x: torch.func.vmap(f)(x.expand(2, *x.shape)),
    jvp=lambda f, x: torch.func.jvp(f, (x,), (x + 1,))[1],
    linearize=lambda f, x: torch.func.linearize(f, x)[1](x + 1),
    forward_ad=dual,
    jacrev=lambda f, x: torch.func.jacrev(f)(x),
    jacfwd=lambda f, x: torch.func.jacfwd(f)(x),
    hessian=lambda f, x: torch.func.hessian(loss(f))(x),
    grad=lambda f, x: torch.func.grad(loss(f))(x),
    grad_of_grad=lambda f, x: torch.func.grad(lambda x: torch.func.grad(loss(f))(x).sum())(x),
    per_sample=lambda f, x: torch.func.vmap(torch.func.grad(lambda x: loss(f)(x[None])))(x),
    functionalize=lambda f, x: torch.func.functionalize(f)(x),
    batched_gradients=batched_gradients,
    vectorized=lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    compiled=lambda f, x: torch.compile(torch.func.vmap(f), backend='eager', fullgraph=True)(x[None]),
)


@pytest.mark.parametrize('name', TRANSFORMS)
def test_transforms_are_those_of_convolutions(name):
    """Forward-mode AD and torch.func, with respect to the input and the kernels."""
    if name == 'compiled' and not HAS_COMPILED_TRANSFORMS:
        pytest.skip('this torch does not compile torch.func.vmap')
    x, k_v, k_h, _ = (t.detach().double() for t in make(n=2))
    x = x[..., :3, :2]

    def convolutions(x, k_v):
        return convolution(x, k_v) + convolution(x, k_h)

    def ours(x, k_v):
        return cross_dwconv2d(x, k_v, k_h, reduce=True)

    def transformed_in_input(f):
        return TRANSFORMS[name](lambda x: f(x, k_v), x)

    def transformed_in_kernel(f):
        return TRANSFORMS[name](lambda k: f(x, k), k_v)

    for evaluate in (transformed_in_input,) if name == 'per_sample' else (transformed_in_input, transformed_in_kernel):
        torch.testing.assert_close(evaluate(ours), evaluate(convolutions))


@needs_library
def test_graph_of_a_forced_backend_is_compiled_whole():
    """A ContextVar, which torch.compile cannot look into, does not break it."""
    inputs = make()
    with use_backend('reference'):
        compiled = torch.compile(lambda *t: cross_dwconv2d(*t, reduce=True), backend='aot_eager', fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), cross_dwconv2d(*inputs, reduce=True))


class Wrapper(torch.Tensor):
    """A tensor that has no memory of its own, as distributed and quantized ones are."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


@needs_library
@pytest.mark.parametrize('place', [0, 1, 2, 3, 4])
def test_a_tensor_without_memory_in_any_place(place):
    inputs = [*make(requires_grad=False), torch.ones(3)]
    want = cross_dwconv2d(*inputs, reduce=True)
    inputs[place] = Wrapper(inputs[place])
    assert torch.equal(cross_dwconv2d(*inputs, reduce=True), want)


def test_import_is_light():
    """Triton and the export packages are imported when they are needed."""
    code = "import sys, slak_mm; sys.exit(bool({'triton', 'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code]).returncode == 0
