"""`tools/benchmark.py sparse` on a network of a few channels."""

import json

import pytest

from benchmarks import sparse
from slak_mm.models import ShiftWise, SLaK
from slak_mm.sparsity import SparseTraining

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for backbone in (SLaK, ShiftWise):
        monkeypatch.setitem(backbone.arch_settings, 'tiny', TINY)


@pytest.mark.parametrize('backbone, mode', [('SLaK', 'rigl'), ('ShiftWise', 'set')])
def test_table_and_json(call_tool, tmp_path, backbone, mode):
    out = tmp_path / 'out.json'
    options = f'--backbone {backbone} --mode {mode} --size 64x96 --batch 1 2 --repeats 2 --intervals 1 10'
    files = ['--json', out, '--plot', tmp_path / 'out.png']
    result = call_tool('benchmark', 'sparse', options, *files, code=0)
    assert result.out.count('| 64x96, ') == 2 and 'every 10 steps' in result.out
    rows = json.loads(out.read_text())['rows']
    assert [row['batch'] for row in rows] == [1, 2]
    for row in rows:
        assert set(row['seconds']) == set(sparse.CONTENDERS)
        assert 0 < row['masks']['static'] < row['seconds']['static']
        share = row['overhead']
        assert share['every 1'] == pytest.approx(row['masks']['update'] / row['seconds']['dense'])
        assert share['every 10'] == pytest.approx(0.9 * share['static'] + 0.1 * share['every 1'])


def test_no_figure_for_masks_that_leak(call_tool, monkeypatch):
    monkeypatch.setattr(SparseTraining, 'step', lambda self, optimizer: False)
    result = call_tool('benchmark', 'sparse', '--size', '64x64', '--repeats', '1')
    assert result.code == 1 and '| 64x64' not in result.out
    assert 'error: static: pruned entries of' in result.err
