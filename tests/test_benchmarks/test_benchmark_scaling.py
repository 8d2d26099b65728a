"""`slak-mm cost scaling`."""

import json

import pytest
import torch
from conftest import TINY_ARCH
from torch import nn

from benchmarks import scaling
from slak_mm.cost import count_backbone, saved_for_backward

# Of the four stages at 224x224: blocks, channels, pixels.
STAGES = list(zip((3, 3, 9, 3), (96, 192, 384, 768), (56**2, 28**2, 14**2, 7**2)))


def counted(form, size):
    arguments, sparsity = scaling.FORMS[form]
    cost = count_backbone(dict(arguments, kernel_sizes=scaling.kernel_sizes(size)), sparsity=sparsity)
    return cost.parameters - cost.masked_parameters, cost.flops - cost.masked_flops


@pytest.mark.parametrize(
    ('form', 'weights'), [('square + small', lambda k: k * k), ('decomposed', lambda k: 2 * 5 * k)]
)
def test_growth_by_hand(form, weights):
    """Quadratic with a square kernel, linear with two rectangular ones."""
    small, large = counted(form, 31), counted(form, 101)
    added = [weights(b) - weights(a) for a, b in zip(scaling.kernel_sizes(31), scaling.kernel_sizes(101))]
    assert large[0] - small[0] == sum(depth * c * more for (depth, c, _), more in zip(STAGES, added))
    assert large[1] - small[1] == sum(depth * c * p * more for (depth, c, p), more in zip(STAGES, added))


def test_published_figures():
    """Table of ImageNet in SLaK's repository; 61x61 saves 55 % of the FLOPs of a square kernel."""
    published = {size: figures for size, *figures in scaling.published().values() if size > 7}
    assert published.keys() == {31, 51, 61}
    for size, (parameters, flops) in published.items():
        counts = counted('decomposed, width 1.3, sparse', size)
        assert counts[0] / 1e6 == pytest.approx(parameters, rel=0.03)
        assert counts[1] / 1e9 == pytest.approx(flops, rel=0.05)
    square = counted('square + small', 61)[1] / 1e9
    assert 1 - published[61][1] / square == pytest.approx(0.55, abs=0.005)


def test_activations_by_hand():
    """A convolution keeps its input, ReLU its output, and a batch norm its input, mean and deviation."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    with torch.device('meta'):
        on_meta = network.to('meta')
    kept = 3 * 64 + 4 * 64 + 2 * 4
    assert saved_for_backward(on_meta, torch.empty(1, 3, 8, 8, device='meta')) == 4 * kept
    assert saved_for_backward(network.to_empty(device='cpu'), torch.ones(1, 3, 8, 8)) == 4 * kept


def test_tool(call_tool, monkeypatch, tmp_path):
    for name, (arguments, sparsity) in scaling.FORMS.items():
        monkeypatch.setitem(scaling.FORMS, name, (dict(arguments, arch=TINY_ARCH), sparsity))
    out, plot = tmp_path / 'new' / 'out.json', tmp_path / 'out.png'
    options = ['--kernels 7 13 --size 64x64 --repeats 1', '--json', out, '--plot', plot]
    result = call_tool('cost', 'scaling', *options, code=0)
    rows = json.loads(out.read_text())['rows']
    assert [row['kernel'] for row in rows] == [7] * 6 + [13] * 6 and plot.stat().st_size > 10_000
    for row in rows:
        is_dense = not row['sparsity']
        assert bool(row['seconds']) == bool(row['activation_bytes']) == is_dense
        assert f'{row["flops"] / 1e9:.2f}' in result.out
    call_tool('cost', 'scaling', '--kernels 7 --size 64x64 --no-time', '--plot', tmp_path / 'three.png', code=0)
    assert 'odd and at least 7' in call_tool('cost', 'scaling', '--kernels 8', code=2).err
