"""Linear layers that oneDNN computes."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slak_mm.models import linear as module
from slak_mm.models import switch_to_deploy
from slak_mm.models.linear import has_onednn_linear, linear
from slak_mm.models.shiftwise import ShiftWise
from slak_mm.models.slak import SLaK

needs_onednn = pytest.mark.skipif(not has_onednn_linear(), reason='this PyTorch has no linear layer of oneDNN')
GELU = nn.GELU()


def make(channels, width, bias=True):
    generator = torch.Generator().manual_seed(channels)
    layer = nn.Linear(channels, width, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer, generator


def exact(layer, x, act=None):
    """In float64, by PyTorch's functions."""
    y = copy.deepcopy(layer).double()(x.double())
    return y if act is None else act(y)


def assert_close(got, want):
    want = want.detach()
    largest = max([1.0, *want.abs().flatten().tolist()])
    torch.testing.assert_close(got.detach().double(), want, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize('act', [None, GELU, nn.GELU('tanh'), nn.ReLU()], ids=str)
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize(
    'shape,width', [((1, 1), 1), ((3, 17), 5), ((1024, 31), 124), ((2, 3, 5, 124), 31), ((0, 4), 3)]
)
def test_it_is_the_layer(shape, width, bias, act):
    layer, generator = make(shape[-1], width, bias)
    x = torch.randn(shape, generator=generator)
    want = exact(layer, x, act)
    assert_close(linear(layer, x, act), want)
    with torch.no_grad():
        for keep in (False, True, True):  # packs, then uses what was packed
            assert_close(linear(layer, x, act, keep), want)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape,width', [((1, 1), 1), ((3, 17), 5), ((64, 17), 5), ((2, 8, 5, 40), 31)])
def test_gradients(shape, width, bias):
    layer, generator = make(shape[-1], width, bias)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    grad = torch.randn(*shape[:-1], width, generator=generator)
    linear(layer, x).backward(grad)
    double = copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_()
    double(x64).backward(grad.double())
    assert_close(x.grad, x64.grad)
    for got, want in zip(layer.parameters(), double.parameters()):
        assert_close(got.grad, want.grad)


@pytest.mark.parametrize('needs', ['x', 'weight', 'bias'])
def test_one_gradient_alone(needs):
    layer, generator = make(7, 3)
    x = torch.randn(80, 7, generator=generator)
    leaves = dict(x=x, weight=layer.weight, bias=layer.bias)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == needs)
    got = torch.autograd.grad(linear(layer, x).square().sum(), leaves[needs])[0]
    assert_close(got, torch.autograd.grad(layer(x).square().sum(), leaves[needs])[0].double())


def test_gradients_can_be_differentiated_again():
    layer, generator = make(7, 3)
    x = torch.randn(80, 7, generator=generator, requires_grad=True)

    def penalty(call):
        (grad,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, layer.weight))

    for got, want in zip(penalty(lambda x: linear(layer, x)), penalty(layer)):
        assert_close(got, want.double())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_pytorch(dtype):
    layer, generator = make(24, 7)
    layer.to(dtype)
    x = torch.randn(9, 24, generator=generator).to(dtype)
    assert torch.equal(linear(layer, x, GELU), GELU(layer(x)))


def test_autocast_is_left_to_pytorch():
    layer, generator = make(24, 7)
    x = torch.randn(9, 24, generator=generator)
    with torch.autocast('cpu', torch.bfloat16):
        assert linear(layer, x).dtype is torch.bfloat16


def test_a_flop_counter_sees_the_layer():
    layer, _ = make(24, 7)
    with FlopCounterMode(display=False) as counter:
        linear(layer, torch.ones(9, 24)).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 24 * 7  # forward, and the weight's gradient


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_layer_of_another_class_is_called():
    layer, generator = make(24, 7)
    other = Adapter(24, 7)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(9, 24, generator=generator)
    with torch.no_grad():
        assert_close(linear(other, x), exact(layer, x) + 1)


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('family', [SLaK, ShiftWise])
def test_hooks_see_whole_maps(family, deploy):
    """A hook in a block gets what it gets with gradients on, once."""
    arch = dict(depths=(1,), dims=(8,))
    net = family(arch=arch, kernel_sizes=(7,), out_indices=(0,), width_factor=1.0, norm_cfg=dict(type='BN')).eval()
    if deploy:
        switch_to_deploy(net)
    layer = next(m for m in net.modules() if isinstance(m, nn.Linear))
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    net(x)
    with torch.no_grad():
        net(x)
    assert [y.shape for y in seen] == [(2, 40, 40, 32)] * 2
    assert_close(seen[1], seen[0].double())


@torch.no_grad()
def test_changed_weights_are_packed_again():
    layer, generator = make(40, 12)
    x = torch.randn(33, 40, generator=generator)
    other = {name: torch.randn(value.shape, generator=generator) for name, value in layer.state_dict().items()}

    def check():
        assert_close(linear(layer, x, keep=True), exact(layer, x))

    check()
    layer.weight.mul_(-2)
    check()
    layer.load_state_dict(other)
    check()
    layer.weight = nn.Parameter(torch.ones(12, 40))
    check()
    layer = copy.deepcopy(layer)
    layer.weight.add_(1)
    check()


@needs_onednn
@torch.no_grad()
def test_packed_weights_go_with_their_layer():
    layer, generator = make(40, 12)
    linear(layer, torch.randn(3, 40, generator=generator), keep=True)
    packed = weakref.ref(module._packed[layer][1])
    del layer
    gc.collect()
    assert packed() is None


@pytest.mark.parametrize('keep', [False, True])
def test_inference_mode(keep):
    with torch.inference_mode():
        layer, generator = make(8, 4)
        x = torch.randn(5, 8, generator=generator)
        assert_close(linear(layer, x, keep=keep), exact(layer, x))


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(module, 'has_onednn_linear', lambda: False)
    layer, generator = make(8, 4)
    x = torch.randn(5, 8, generator=generator)
    assert torch.equal(linear(layer, x, GELU), GELU(layer(x)))
