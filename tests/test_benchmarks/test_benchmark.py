import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import exit_code, tool_main

from benchmarks import op
from benchmarks.common import plot_bars, worst_difference
from benchmarks.peak import measure_peak
from slak_mm.ops import BACKENDS


@pytest.fixture
def tool():
    """Runs the tool with a list of arguments; gives the exit code."""
    return functools.partial(exit_code, tool_main('benchmark'))


@pytest.fixture
def small(tool, monkeypatch):
    """The tool with a few channels."""
    monkeypatch.setattr(op, 'CHANNELS', dict(slak=(4,) * 4, shiftwise=(6,) * 4))
    monkeypatch.setattr(op, 'MATRIX_SIZE', 128)
    return tool


@pytest.mark.parametrize('family', ['slak', 'shiftwise'])
@pytest.mark.parametrize('dtype', ['float32', 'float64', 'bfloat16'])
def test_table_and_json(small, family, dtype, capsys, tmp_path):
    out, plot = tmp_path / 'out.json', tmp_path / 'out.png'
    options = f'op --family {family} --size 64x96 --stages 0 3 --repeats 1 --dtype {dtype} --no-memory'
    assert small([*options.split(), '--json', str(out), '--plot', str(plot)]) == 0
    printed = capsys.readouterr().out
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
def test_no_figure_for_a_wrong_result(small, family, monkeypatch, capsys, tmp_path):
    original = op.cross_dwconv2d
    monkeypatch.setattr(
        op, 'cross_dwconv2d', lambda x, *a, **k: torch.utils._pytree.tree_map(lambda y: y * 1.01, original(x, *a, **k))
    )
    out = tmp_path / 'out.json'
    options = f'op --family {family} --size 64x64 --stages 3 --repeats 1 --no-memory'
    assert small([*options.split(), '--json', str(out)]) == 1
    captured = capsys.readouterr()
    assert 'its figures are left out' in captured.err
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
    ('arguments', 'message'),
    [
        (['--size', '512'], 'a size is HxW, such as 512x512, got 512'),
        (['--size', '16x512'], 'at least 32x32'),
        (['--batch', '0'], 'must be at least 1, got 0'),
        (['--repeats', '-1'], 'must be at least 1, got -1'),
        (['--family', 'convnext'], 'invalid choice'),
    ],
)
def test_bad_arguments(tool, arguments, message, capsys):
    assert tool(['op', *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_not_there_is_named(tool, capsys, tmp_path):
    assert tool(['op', '--plot', str(tmp_path / 'out.abc')]) == 1
    assert 'writes no "abc" files' in capsys.readouterr().err
    assert tool(['op', '--device', 'abacus']) == 1
    assert '--device is cpu or cuda, got abacus' in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert tool(['op', '--device', 'cuda']) == 1
        assert 'needs a CUDA device' in capsys.readouterr().err


def test_a_nan_is_a_difference():
    nan, one = torch.tensor([1.0, float('nan')]), torch.ones(2)
    for got in ([nan, one], [one, nan]):
        assert not worst_difference(got, [one, one]) <= 1e9
    assert worst_difference([torch.tensor([2.0, 4.0])], [torch.tensor([2.0, 5.0])]) == 0.2


def test_a_plot_leaves_out_what_is_missing(tmp_path):
    path = tmp_path / 'plot.svg'
    plot_bars(str(path), ['one', 'two'], {'ours': [1.0, 2.0], 'theirs': [None, float('nan')]}, 'title', 'ms')
    assert path.read_text().count('id="patch_') >= 4


def test_operations_of_taps_within_the_map(small):
    """Counted by convolving ones; and the small kernel is part of the wide one when deployed."""
    case = op.Case('slak', 3, (224, 320), 2, 'float64', 'cpu', channels=3)
    case.x = torch.ones_like(case.x)
    case.weights = [torch.ones_like(w) for w in case.weights]
    results = case.step('NCHW', 'fwd')()
    assert case.flops('fwd') == 2 * sum(int(y.sum()) for y in results)
    assert case.flops('f+b') == 3 * case.flops('fwd')
    assert case.flops('sum') == 2 * sum(int(y.sum()) for y in results[:2])


def test_best_mix_takes_each_branch_in_its_faster_layout(small, tmp_path, capsys):
    out = tmp_path / 'out.json'
    options = 'op --size 64x64 --stages 3 --repeats 1 --skip gemm cpu'
    assert small([*options.split(), '--json', str(out)]) == 0
    for row in json.loads(out.read_text())['rows']:
        layouts = row['branch_seconds']
        fastest = [min(pair) for pair in zip(*layouts.values())]
        if row['passing'] == 'sum':
            fastest.pop()
        assert row['seconds']['best mix'] == sum(fastest)
        assert set(layouts) < set(row['seconds'])  # as a whole, too
        assert not {'gemm', 'cpu'} & set(row['seconds'])
    assert '%)' in capsys.readouterr().out
