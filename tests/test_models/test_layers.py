"""Layers which the backbones share."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slak_mm.models import layers
from slak_mm.models.layers import packed_linear


def exact(layer, x, gelu):
    """In float64, by PyTorch's functions."""
    bias = None if layer.bias is None else layer.bias.double()
    y = F.linear(x.double(), layer.weight.double(), bias)
    return F.gelu(y) if gelu else y


def make(channels, width, bias=True):
    generator = torch.Generator().manual_seed(channels)
    layer = nn.Linear(channels, width, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer, generator


@pytest.mark.parametrize('gelu', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('pixels,channels,width', [
    (1, 1, 1), (3, 17, 5), (1024, 31, 124), (1500, 124, 31), (7, 640, 33)])
@torch.no_grad()
def test_packed_linear_is_linear(pixels, channels, width, bias, gelu):
    layer, generator = make(channels, width, bias)
    x = torch.randn(pixels, channels, generator=generator)
    want = exact(layer, x, gelu)
    for _ in range(2):  # packs, then uses what was packed
        torch.testing.assert_close(
            packed_linear(layer, x, gelu).double(), want, rtol=0,
            atol=1e-5 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes_are_left_to_pytorch(dtype):
    layer, generator = make(24, 7)
    layer.to(dtype)
    x = torch.randn(9, 24, generator=generator).to(dtype)
    assert torch.equal(packed_linear(layer, x, True), F.gelu(layer(x)))


@torch.no_grad()
def test_changed_weights_are_packed_again():
    layer, generator = make(40, 12)
    x = torch.randn(33, 40, generator=generator)
    other = {name: torch.randn(value.shape, generator=generator)
             for name, value in layer.state_dict().items()}

    def check():
        torch.testing.assert_close(
            packed_linear(layer, x).double(), exact(layer, x, False), rtol=0, atol=1e-4)

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


@torch.no_grad()
def test_packed_weights_go_with_their_layer():
    layer, generator = make(40, 12)
    packed_linear(layer, torch.randn(3, 40, generator=generator))
    if not layers._has_packed_linear():
        assert layer not in layers._packed
        return
    packed = weakref.ref(layers._packed[layer][1])
    del layer
    gc.collect()
    assert packed() is None


def test_inference_mode():
    with torch.inference_mode():
        layer, generator = make(8, 4)
        x = torch.randn(5, 8, generator=generator)
        assert torch.equal(packed_linear(layer, x), layer(x))
