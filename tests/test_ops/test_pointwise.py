"""The pointwise half of a block against the same arithmetic in float64."""

import pytest
import torch
import torch.nn.functional as F
from op_helpers import lay_out
from torch.utils.flop_counter import FlopCounterMode

from slak_mm.ops import pointwise, pointwise_mlp
from slak_mm.ops.pointwise import has_onednn_linear, linear, sum_of_squares

EPS = 1e-6
FORMS = {
    'slak': ('bias1', 'bias2', 'norm_weight', 'norm_bias', 'scale', 'residual'),
    'shiftwise': ('bias1', 'grn_gamma', 'grn_beta'),
    'shiftwise deployed': ('bias1', 'bias2', 'gate', 'grn_gamma', 'residual'),
    'norm without weights': ('norm', 'scale'),
    'gate alone': ('gate', 'bias2', 'residual'),
    'bare': (),
}
SHAPES = [(1, 1, 1, 1), (2, 6, 5, 9), (3, 17, 8, 16), (5, 4, 30, 40)]
by_form = pytest.mark.parametrize('form', FORMS)


def draw(form, shape, layout='channels_last', dtype=torch.float32):
    """Operands by name; the hidden layer is three times as wide as the map."""
    n, c, h, w = shape
    shapes = dict(
        bias1=(3 * c,),
        bias2=(c,),
        norm_weight=(c,),
        norm_bias=(c,),
        scale=(c,),
        residual=shape,
        gate=(n, c, 1, 1),
        grn_gamma=(3 * c,),
        grn_beta=(3 * c,),
    )
    wanted = dict(x=shape, weight1=(3 * c, c), weight2=(c, 3 * c))
    wanted |= {name: shapes[name] for name in FORMS[form] if name in shapes}
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(size, generator=generator).to(dtype) for name, size in wanted.items()}
    for name in {'x', 'residual'} & set(drawn):
        drawn[name] = lay_out(drawn[name], layout)
    return drawn


def compute(form, operands):
    t = operands.get
    return pointwise_mlp(
        t('x'),
        t('weight1'),
        t('bias1'),
        t('weight2'),
        t('bias2'),
        gate=t('gate'),
        norm=(t('norm_weight'), t('norm_bias'), EPS) if any('norm' in name for name in FORMS[form]) else None,
        grn=(t('grn_gamma'), t('grn_beta')) if 'grn_gamma' in operands else None,
        scale=t('scale'),
        residual=t('residual'),
    )


def by_definition(form, operands):
    """Written out in float64, over a matrix of pixels for each image."""
    t = {name: value.double() for name, value in operands.items()}
    n, c, h, w = t['x'].shape
    y = (t['x'] * t.get('gate', 1)).flatten(2).transpose(1, 2)
    if any('norm' in name for name in FORMS[form]):
        variance, mean = torch.var_mean(y, -1, correction=0, keepdim=True)
        y = (y - mean) / (variance + EPS).sqrt() * t.get('norm_weight', 1) + t.get('norm_bias', 0)
    y = y @ t['weight1'].T + t.get('bias1', 0)
    y = y * (1 + torch.erf(y / 2**0.5)) / 2
    if 'grn_gamma' in t:
        norm = y.square().sum(1, keepdim=True).sqrt()
        y = y + t['grn_gamma'] * y * norm / (norm.mean(-1, keepdim=True) + 1e-6) + t.get('grn_beta', 0)
    y = (y @ t['weight2'].T + t.get('bias2', 0)) * t.get('scale', 1)
    return y.transpose(1, 2).reshape(n, c, h, w) + t.get('residual', 0)


def assert_close(got, want, tolerance=1e-5):
    largest = max(1.0, want.detach().abs().max().item())
    torch.testing.assert_close(got.detach().double(), want.detach(), rtol=0, atol=tolerance * largest)


@by_form
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_forward_and_backward(form, shape, layout):
    operands = draw(form, shape, layout)
    exact = {name: value.double().requires_grad_() for name, value in operands.items()}
    operands = {name: value.requires_grad_() for name, value in operands.items()}
    want, got = by_definition(form, exact), compute(form, operands)
    assert_close(got, want)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    want.backward(grad.double())
    got.backward(grad)
    for name, value in operands.items():
        assert_close(value.grad, exact[name].grad, 1e-4)


@by_form
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('at_once', [7, 40, 1024])
@torch.no_grad()
def test_some_pixels_at_a_time(form, dtype, at_once, monkeypatch):
    """Without autograd; the last part may be smaller, and weights are packed for many parts."""
    monkeypatch.setattr(pointwise, 'PIXELS_AT_ONCE', at_once)
    monkeypatch.setattr(pointwise, '_LEAST_PIXELS_TO_PACK', 100)
    for shape in SHAPES:
        operands = draw(form, shape, dtype=dtype)
        got = compute(form, operands)
        assert_close(got, by_definition(form, operands), 1e-5 if dtype is torch.float32 else 1e-12)
        assert got.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_the_hidden_layer_of_all_pixels_is_not_made(monkeypatch):
    rows = []
    monkeypatch.setattr(
        pointwise, 'linear', lambda x, *args, **kwargs: rows.append(len(x)) or linear(x, *args, **kwargs)
    )
    compute('slak', draw('slak', (1, 4, 45, 67)))
    assert rows == [1024, 1024, 1024, 1024, 967, 967]


@by_form
def test_gradients_can_be_differentiated_again(form):
    operands = draw(form, (2, 3, 6, 7))
    exact = {name: value.double() for name, value in operands.items()}

    def penalty(call, operands):
        leaves = [value.requires_grad_() for value in operands.values()]
        grads = torch.autograd.grad(call(form, operands).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().mean() for grad in grads), leaves)

    for got, want in zip(penalty(compute, operands), penalty(by_definition, exact)):
        assert_close(got, want, 1e-3)


@by_form
def test_transforms(form):
    """Forward-mode AD, a further axis, gradients of each sample, several gradients at once."""
    operands = draw(form, (2, 6, 5, 9))
    x, others = operands.pop('x'), operands
    exact = {name: value.double() for name, value in others.items()}

    def call(x):
        return compute(form, dict(others, x=x))

    def want(x):
        return by_definition(form, dict(exact, x=x))

    tangent = torch.ones_like(x)
    for a, b in zip(torch.func.jvp(call, (x,), (tangent,)), torch.func.jvp(want, (x,), (tangent,))):
        assert_close(a, b, 1e-4)
    stack = torch.stack([x, 2 * x])
    assert_close(torch.func.vmap(call)(stack), torch.stack([want(x), want(2 * x)]))
    gradients = torch.func.vmap(torch.func.grad(lambda x: call(x).square().sum()))(stack)
    single = torch.func.grad(lambda x: want(x).square().sum())
    assert_close(gradients, torch.stack([single(x.double()), single(2 * x.double())]), 1e-4)
    x.requires_grad_()
    batched = torch.autograd.grad(call(x), x, torch.stack([tangent, -tangent]), is_grads_batched=True)[0]
    (alone,) = torch.autograd.grad(want(x), x, tangent.double())
    assert_close(batched, torch.stack([alone, -alone]).double(), 1e-4)


@pytest.mark.parametrize('needed', ['x', 'weight1', 'bias1', 'weight2', 'scale'])
def test_one_gradient_alone(needed):
    operands = draw('slak', (2, 3, 9, 8))
    operands[needed].requires_grad_()
    exact = {name: value.detach().double() for name, value in operands.items()}
    exact[needed].requires_grad_()
    (got,) = torch.autograd.grad(compute('slak', operands).sum(), operands[needed])
    assert_close(got, torch.autograd.grad(by_definition('slak', exact).sum(), exact[needed])[0], 1e-4)


@by_form
def test_autocast_and_half_precision(form):
    operands = draw(form, (2, 6, 5, 9))
    want = by_definition(form, operands)
    with torch.autocast('cpu', torch.bfloat16):
        got = compute(form, operands)
    assert got.dtype is (torch.float32 if {'scale', 'residual'} & set(operands) else torch.bfloat16)
    assert_close(got, want, 0.03)
    with torch.no_grad():
        assert_close(compute(form, {name: value.bfloat16() for name, value in operands.items()}), want, 0.03)


def test_a_flop_counter_sees_both_layers():
    with FlopCounterMode(display=False) as counter:
        compute('slak', draw('slak', (2, 6, 5, 9)))
    assert counter.get_total_flops() == 2 * 2 * (2 * 5 * 9) * 6 * 18


class Scaled(torch.Tensor):
    """Stands for a quantized weight: linear layers know it, raw kernels do not."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                x, weight, bias = args
                return F.linear(x, 2 * weight, bias)
            return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_weights_of_other_classes_are_left_to_pytorch():
    operands = draw('slak', (2, 6, 5, 9))
    want = by_definition('slak', dict(operands, weight1=2 * operands['weight1']))
    assert_close(compute('slak', dict(operands, weight1=operands['weight1'].as_subclass(Scaled))), want)


@by_form
def test_inference_mode_and_empty_maps(form):
    with torch.inference_mode():
        operands = draw(form, (2, 6, 5, 9))
        assert_close(compute(form, operands), by_definition(form, operands))
    assert compute(form, draw(form, (0, 6, 5, 9))).shape == (0, 6, 5, 9)


@pytest.mark.parametrize('grad', [False, True])
def test_without_onednn(grad, monkeypatch):
    monkeypatch.setattr(pointwise, 'has_onednn_linear', lambda: False)
    operands = draw('slak', (2, 6, 5, 9))
    with torch.set_grad_enabled(grad):
        assert_close(compute('slak', operands), by_definition('slak', operands))


@pytest.mark.skipif(not has_onednn_linear(), reason='this PyTorch has no linear layer of oneDNN')
@pytest.mark.parametrize('grad', [False, True])
def test_onednn_computes_in_float32(grad, monkeypatch):
    monkeypatch.setattr(F, 'linear', None)
    with torch.set_grad_enabled(grad):
        compute('shiftwise', draw('shiftwise', (5, 4, 30, 40)))


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-3)], ids=str
)
@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (5000, 7), (1000, 300), (2, 70000)])
def test_sum_of_squares(shape, dtype, tolerance):
    """Thousands of terms are not rounded to half precision one after the other."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 1
    want = x.double().square().sum(0)
    # A square alone is rounded to the dtype.
    single = 2**-8 if dtype is torch.bfloat16 else 0
    worst = float(((sum_of_squares(x).double() - want) / want).abs().max())
    assert worst <= max(tolerance, single if shape[0] < 100 else 0)


@pytest.mark.parametrize('form', ['slak', 'norm without weights', 'gate alone', 'bare'])
@pytest.mark.parametrize('channels', [5, 8])
def test_padded_rows_change_nothing(form, channels, monkeypatch):
    """As on CUDA in half precision; in float64 the zeros leave only the order of sums."""
    operands = draw(form, (2, channels, 5, 9), dtype=torch.float64)
    operands = {name: value.requires_grad_() for name, value in operands.items()}
    want = compute(form, operands)
    grads = torch.autograd.grad(want.square().sum(), list(operands.values()))
    monkeypatch.setattr(pointwise, 'is_observed', lambda *tensors: True)
    monkeypatch.setattr(pointwise, '_wants_alignment', lambda *operands: True)
    got = compute(form, operands)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(got.square().sum(), list(operands.values())), grads):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(('width', 'wants'), [(124, True), (128, False)])
def test_rows_are_padded_where_tensor_cores_need_it(width, wants):
    meta = dict(device='meta', dtype=torch.bfloat16)
    x, weight1, weight2 = (torch.empty(*s, **meta) for s in ((1, width, 2, 2), (4 * width, width), (width, 4 * width)))
    on_cuda = type('OnCuda', (), dict(device=torch.device('cuda'), dtype=x.dtype))()
    assert pointwise._wants_alignment(on_cuda, weight1, weight2, None) is wants
    assert not pointwise._wants_alignment(x, weight1, weight2, None)
