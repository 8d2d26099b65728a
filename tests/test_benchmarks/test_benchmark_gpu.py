"""`tools/benchmark.py gpu`, on the CPU and with tiny networks: what it reports, not how fast that is."""

import json

import pytest
from conftest import TINY_ARCH

from benchmarks import gpu, model, op


@pytest.fixture
def small(monkeypatch):
    for family, config in model.CONFIGS.items():
        monkeypatch.setitem(model.CONFIGS, family, dict(config, arch=TINY_ARCH))
    monkeypatch.setattr(op, 'CHANNELS', dict(slak=(4,) * 4, shiftwise=(6,) * 4))
    monkeypatch.setattr(gpu, 'IMAGE', (64, 64))
    monkeypatch.setattr(gpu, 'OPERATOR_BATCHES', (1,))
    monkeypatch.setattr(gpu, 'WORKLOADS', [(name, form, (64, 64), 2) for name, form, *_ in gpu.WORKLOADS[:2]])


def test_every_result_is_written_as_it_is_known(small, call_tool, config_path, tmp_path):
    call_tool('benchmark', 'gpu', '--out', tmp_path, '--device cpu --repeats 1', '--config', config_path, code=0)
    rows = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    parts = ['correctness'] * 4 + ['networks'] * 4 + ['operator'] * 4 + ['host_time'] * 2 + ['start_up'] * 4
    parts += ['segmentor']
    assert [row['part'] for row in rows] == parts
    for row in rows[4:8]:
        assert row['ratios']['seconds'] == row['figures']['seconds'] / row['baseline']['seconds']
    assert (tmp_path / 'table.md').read_text().count('\n| ') == 1 + len(rows)


def test_a_wrong_operator_ends_it(small, call_tool, tmp_path, monkeypatch):
    original = op.cross_dwconv2d
    monkeypatch.setattr(op, 'cross_dwconv2d', lambda *a, **k: [1.1 * y for y in original(*a, **k)])
    result = call_tool('benchmark', 'gpu', '--out', tmp_path, '--device', 'cpu')
    assert result.code == 1 and 'differs from float64' in result.err
