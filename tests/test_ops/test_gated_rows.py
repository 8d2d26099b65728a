"""The passes around squeeze-excite on GPUs: their arithmetic in Triton's interpreter, and their code."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from slak_mm.models.layers import Branches
from slak_mm.models.shiftwise import SqueezeExcite
from slak_mm.ops import _fused, gated_rows
from slak_mm.ops.backends import triton as backend

IS_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, in another process")
needs_triton = pytest.mark.skipif(not backend.is_installed(), reason='Triton 3 or later is not installed')
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason='would start itself')
def test_arithmetic_in_the_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET='1')
    command = [sys.executable, '-W', 'ignore', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-5000:]
    assert ' passed' in done.stdout


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(_fused, 'forced_backend', lambda: 'triton')


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Block(nn.Module):
    """What stands behind a block's convolutions, up to the linear layers, with drawn weights."""

    def __init__(self, kind, branches, c, channels):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(branches if kind != 'bare' else 0))
        self.norm, self.se = nn.BatchNorm2d(channels), SqueezeExcite(channels)
        for i, t in enumerate(self.state_dict().values()):
            if t.dtype is torch.float32:
                t.copy_(randn(*t.shape, seed=i) * (t[0].numel() ** -0.5 if t.dim() > 1 else 1))
        for bn in (*self.norms, self.norm):
            bn.running_var.square_().add_(0.5)
        self.train(kind != 'evaluation')

    def plain(self, extra, *maps):
        ys = [bn(y) for bn, y in zip(self.norms, maps)] if self.norms else maps
        width = maps[0].shape[1] if maps else 0
        z = torch.cat([extra[:, :width] + sum(ys), extra[:, width:]], 1) if maps else extra
        y = self.norm(z)
        return (y * self.se.gate(y)).permute(0, 2, 3, 1)

    def forward(self, extra, *maps):
        norms = Branches(maps, list(self.norms)).tensors_of_norms()
        norm = Branches([extra], [self.norm]).tensors_of_norms()
        down, up = self.se.down, self.se.up
        gates = gated_rows.Gates(down.weight.flatten(1), down.bias, up.weight.flatten(1), up.bias)
        assert not gated_rows.why_not_fused(maps, norms, extra, norm, gates)
        rows = gated_rows.gated_rows(maps, norms, extra, norm, gates)
        assert not rows[..., extra.shape[1] :].any()
        return rows[..., : extra.shape[1]]


def evaluate(function, block, maps, grad):
    maps = [y.detach().requires_grad_() for y in maps]
    result = function(*maps)
    return [result, *torch.autograd.grad(result, [*maps, *block.parameters()], grad.to(result.dtype)), *block.buffers()]


def assert_close(got, want, tolerance):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        scale = max(float(b.detach().double().abs().max()), 1e-1)
        torch.testing.assert_close(
            a.detach().double(), b.detach().double(), rtol=0, atol=tolerance * scale, msg=lambda m: f'{i} {m}'
        )


def draw(shape, c, branches, dtype, layout):
    n, _, h, w = shape
    maps = [randn(*shape, seed=50), *(randn(n, c, h, w, seed=60 + i) * (i + 1) for i in range(branches))]
    n, channels, h, w = shape
    return [y.to(dtype).contiguous(memory_format=layout) for y in maps], randn(n, h, w, channels, seed=70).to(dtype)


CASES = [  # shape, channels of the branches, norms, branches, dtype
    ((2, 12, 3, 5), 9, 'training', 3, torch.float32),
    ((3, 16, 9, 8), 12, 'training', 2, torch.float16),
    ((1, 70, 1, 67), 66, 'training', 3, torch.bfloat16),
    ((2, 8, 2, 42), 6, 'evaluation', 3, torch.float32),
    ((2, 8, 6, 7), 5, 'bare', 1, torch.float32),
    ((2, 8, 6, 7), 0, 'training', 0, torch.float32),
    ((17, 5, 2, 1), 5, 'training', 1, torch.float32),
]


@interpreted
@pytest.mark.parametrize('layout', LAYOUTS, ids=['nchw', 'channels_last'])
@pytest.mark.parametrize(('shape', 'c', 'kind', 'branches', 'dtype'), CASES, ids=str)
def test_results_and_gradients(fused, shape, c, kind, branches, dtype, layout):
    block = Block(kind, branches, c, shape[1]).to(dtype)
    maps, grad = draw(shape, c, branches, dtype, layout)
    exact = copy.deepcopy(block).double()
    want = evaluate(exact.plain, exact, [y.double() for y in maps], grad)
    again = copy.deepcopy(block)
    got = evaluate(block, block, maps, grad)
    assert got[0].dtype is dtype and got[1].is_contiguous(memory_format=layout)
    assert_close(got, want, TOLERANCE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(got, evaluate(again, again, maps, grad))), 'the same bits'
