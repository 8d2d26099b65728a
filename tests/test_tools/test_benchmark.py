import importlib.util
import json
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / 'tools' / 'benchmark.py'


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location('benchmark_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(tool, monkeypatch):
    """The tool with a few channels."""
    monkeypatch.setattr(tool, 'CHANNELS', dict(slak=(4,) * 4, shiftwise=(6,) * 4))
    return tool


@pytest.mark.parametrize('family', ['slak', 'shiftwise'])
@pytest.mark.parametrize('dtype', ['float32', 'float64', 'bfloat16'])
def test_table_and_json(small, family, dtype, capsys, tmp_path):
    out = tmp_path / 'out.json'
    assert small.main([
        'op', '--family', family, '--size', '64x96', '--stages', '0', '3', '--repeats', '1',
        '--dtype', dtype, '--no-memory', '--json', str(out)]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert 'disagrees' not in printed and f'dtype {dtype}' in printed
    assert f'threads {torch.get_num_threads()}' in printed
    assert printed.count('| 64x96 ') == 4  # two stages, forward, and forward and backward
    data = json.loads(out.read_text())
    assert data['machine']['torch'] == torch.__version__ and data['machine']['date']
    maps = [(16, 24), (16, 24), (2, 3), (2, 3)]
    assert [tuple(row['map']) for row in data['rows']] == maps
    for row in data['rows']:
        assert set(row['seconds']) == set(small.CONTENDERS[family])
        assert min(row['seconds'].values()) > 0


@pytest.mark.parametrize('family', ['slak', 'shiftwise'])
def test_no_figure_for_a_wrong_result(small, family, monkeypatch, capsys, tmp_path):
    original = small.cross_dwconv2d
    monkeypatch.setattr(
        small, 'cross_dwconv2d',
        lambda x, *a, **k: tuple(y * 1.01 for y in original(x, *a, **k)))
    out = tmp_path / 'out.json'
    assert small.main(['op', '--family', family, '--size', '64x64', '--stages', '3', '--repeats',
                       '1', '--no-memory', '--json', str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count('disagrees') == 2 and 'its figures are left out' in captured.err
    for row in json.loads(out.read_text())['rows']:
        assert row['disagrees'] == ['ours'] and 'ours' not in row['seconds']


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs Linux')
def test_peak_memory_is_that_of_the_arithmetic(tool):
    """60 channels become 1020 maps of 130 x 130 pixels in one formulation, 3 x 60 in the other."""
    case = dict(family='shiftwise', stage=0, size=(512, 512), batch=1, dtype='float32',
                device='cpu')
    maps = 1020 * 130 * 130 * 4 / 2**20
    shifted = tool.measure_peak(case, 'shifted, own adjoint', False)
    assert maps < shifted < 3 * maps
    results = 3 * 60 * 128 * 128 * 4 / 2**20
    ours = tool.measure_peak(case, 'ours', False)
    assert results * 0.9 < ours < shifted / 4


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--size', '512'], 'a size is HxW, such as 512x512, got 512'),
    (['--size', '16x512'], 'at least 32x32'),
    (['--batch', '0'], 'must be a positive integer, got 0'),
    (['--repeats', '-1'], 'must be a positive integer, got -1'),
    (['--family', 'convnext'], 'invalid choice'),
])
def test_bad_arguments(tool, arguments, message, capsys):
    with pytest.raises(SystemExit):
        tool.main(['op', *arguments])
    assert message in capsys.readouterr().err


def test_what_is_not_there_is_named(tool, capsys, tmp_path):
    assert tool.main(['op', '--json', str(tmp_path / 'no' / 'out.json')]) == 1
    assert 'there is no folder' in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert tool.main(['op', '--device', 'cuda']) == 1
        assert 'needs a CUDA device' in capsys.readouterr().err
