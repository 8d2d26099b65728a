import json
from pathlib import Path

import pytest
import torch

from benchmarks import op
from benchmarks.common import plot_bars, worst_difference
from benchmarks.peak import measure_peak
from slak_mm.ops import BACKENDS


@pytest.fixture
def run(call_tool, monkeypatch):
    """Run the tool with a few channels."""
    monkeypatch.setattr(op, 'CHANNELS', dict.fromkeys(op.CHANNELS, (6,) * 4))
    monkeypatch.setattr(op, 'MATRIX_SIZE', 128)
    return lambda *arguments, code=0: call_tool('benchmark', 'op', *arguments, code=code)


@pytest.mark.parametrize('family', op.CHANNELS)
@pytest.mark.parametrize('dtype', ['float32', 'float64', 'bfloat16'])
def test_table_and_json(run, family, dtype, tmp_path):
    out, plot = tmp_path / 'out.json', tmp_path / 'out.png'
    options = f'--family {family} --size 64x96 --stages 0 3 --repeats 1 --dtype {dtype} --no-memory'
    printed = run(options, '--json', out, '--plot', plot).out
    assert 'disagrees' not in printed and f'dtype {dtype}' in printed
    assert f'threads {torch.get_num_threads()}' in printed
    passes = op.PASSES[family]
    assert printed.count('| 64x96, ') == 2 * len(passes)  # two stages
    data = json.loads(out.read_text())
    assert data['machine']['torch'] == torch.__version__ and data['machine']['date']
    maps = [(16, 24)] * len(passes) + [(2, 3)] * len(passes)
    assert [tuple(row['map']) for row in data['rows']] == maps
    for row in data['rows']:
        assert set(row['seconds']) - set(BACKENDS) == set(op.CONTENDERS[family])
        assert min(row['seconds'].values()) > 0
    assert plot.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('family', ['slak', 'shiftwise'])
def test_no_figure_for_a_wrong_result(run, family, monkeypatch, tmp_path):
    original, scale = op.cross_dwconv2d, lambda y: y * 1.01
    monkeypatch.setattr(op, 'cross_dwconv2d', lambda *a, **k: torch.utils._pytree.tree_map(scale, original(*a, **k)))
    out = tmp_path / 'out.json'
    options = f'--family {family} --size 64x64 --stages 3 --repeats 1 --no-memory'
    assert 'its figures are left out' in run(options, '--json', out, code=1).err
    for row in json.loads(out.read_text())['rows']:
        # All that goes through the operator, and nothing else.
        assert set(row['disagrees']) - set(BACKENDS) == {'ours'}
        assert set(row['seconds']) == set(op.CONTENDERS[family]) - {'ours'}
        assert row['of_matrix_product'] is None


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs Linux')
def test_peak_memory_is_that_of_the_arithmetic():
    """60 channels become 1020 maps of 130 x 130 pixels in one formulation, 3 x 60 in the other."""

    def peak(contender):
        case = dict(family='shiftwise', stage=0, size=(512, 512), batch=1, dtype='float32', device='cpu')
        return measure_peak(op.__name__, dict(case, contender=contender, passing='fwd'))

    maps = 1020 * 130 * 130 * 4 / 2**20
    shifted = peak('shifted, own adjoint')
    assert maps < shifted < 3 * maps
    results = 3 * 60 * 128 * 128 * 4 / 2**20
    ours = peak('ours')
    assert results * 0.9 < ours < shifted / 4


@pytest.mark.parametrize(
    ('arguments', 'message', 'code'),
    [
        ('--size 512', 'a size is HxW, such as 512x512, got 512', 2),
        ('--size 16x512', 'at least 32x32', 2),
        ('--batch 0', 'must be at least 1, got 0', 2),
        ('--repeats -1', 'must be at least 1, got -1', 2),
        ('--family convnext', 'invalid choice', 2),
        ('--plot out.abc', 'writes no "abc" files', 1),
        ('--device abacus', '--device is cpu or cuda, got abacus', 1),
        *[('--device cuda', 'needs a CUDA device', 1)] * (not torch.cuda.is_available()),
    ],
)
def test_bad_arguments(run, arguments, message, code):
    assert message in run(arguments, code=code).err


def test_a_nan_is_a_difference():
    nan, one = torch.tensor([1.0, float('nan')]), torch.ones(2)
    for got in ([nan, one], [one, nan]):
        assert not worst_difference(got, [one, one]) <= 1e9
    assert worst_difference([torch.tensor([2.0, 4.0])], [torch.tensor([2.0, 5.0])]) == 0.2


def test_a_plot_leaves_out_what_is_missing(tmp_path):
    path = tmp_path / 'plot.svg'
    plot_bars(str(path), ['one', 'two'], {'ours': [1.0, 2.0], 'theirs': [None, float('nan')]}, 'title', 'ms')
    assert path.read_text().count('id="patch_') >= 4


def test_operations_of_taps_within_the_map():
    """Counted by convolving ones; and the small kernel is part of the wide one when deployed."""
    case = op.Case('slak', 3, (224, 320), 2, 'float64', 'cpu', channels=3)
    case.x = torch.ones_like(case.x)
    case.weights = [torch.ones_like(w) for w in case.weights]
    results = case.step('NCHW', 'fwd')()
    assert case.flops('fwd') == 2 * sum(int(y.sum()) for y in results)
    assert case.flops('f+b') == 3 * case.flops('fwd')
    assert case.flops('sum') == 2 * sum(int(y.sum()) for y in results[:2])


def test_best_mix_takes_each_branch_in_its_faster_layout(run, tmp_path):
    out = tmp_path / 'out.json'
    assert '%)' in run('--size 64x64 --stages 3 --repeats 1 --skip gemm cpu', '--json', out).out
    for row in json.loads(out.read_text())['rows']:
        layouts = row['branch_seconds']
        fastest = [min(pair) for pair in zip(*layouts.values())]
        if row['passing'] == 'sum':
            fastest.pop()
        assert row['seconds']['best mix'] == sum(fastest)
        assert set(layouts) < set(row['seconds'])  # as a whole, too
        assert not {'gemm', 'cpu'} & set(row['seconds'])
