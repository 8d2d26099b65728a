"""`tools/benchmark.py segmentor` on tiny networks."""

import json
from pathlib import Path

import pytest

from benchmarks import segmentor
from benchmarks.model import OfficialSLaK

pytest.importorskip('mmseg')

CONFIGS = Path(__file__).parents[2] / 'configs'
OPTIONS = ['--size 64x96 --batch 2 --repeats 1']


@pytest.mark.parametrize('name', ['upernet_slak_t_ade20k', 'upernet_shiftwise_t_ade20k'])
def test_table_and_json(call_tool, tiny, tmp_path, name):
    options = tiny if 'slak' in name else [o for o in tiny if 'small_kernel' not in o]
    out = tmp_path / 'out.json'
    files = ['--json', out, '--plot', tmp_path / 'out.png']
    arguments = [CONFIGS / f'{name}.py', *OPTIONS, *files, '--cfg-options', *options]
    result = call_tool('benchmark', 'segmentor', *arguments, code=0)
    assert result.out.count('| 64x96, ') == 1
    [row] = json.loads(out.read_text())['rows']
    assert set(row['seconds']) == set(segmentor.CONTENDERS)
    assert min(row['seconds'].values()) > 0


def test_no_figure_for_a_backbone_that_differs(call_tool, tiny, monkeypatch):
    forward = OfficialSLaK.forward
    monkeypatch.setattr(OfficialSLaK, 'forward', lambda self, x: tuple(1.1 * y for y in forward(self, x)))
    result = call_tool('benchmark', 'segmentor', CONFIGS / 'upernet_slak_t_ade20k.py', *OPTIONS, '--cfg-options', *tiny)
    assert result.code == 1 and '| 64x96' not in result.out
    assert 'error: ours disagrees with the official backbone' in result.err


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('upernet_convnext_t_ade20k', 'neither a decomposed SLaK nor ShiftWise'),
        ('cascade_mask_rcnn_slak_t_coco', 'no config of a segmentor'),
        ('no_such_config', 'no_such_config.py'),
    ],
)
def test_errors_are_one_sentence(call_tool, name, message):
    result = call_tool('benchmark', 'segmentor', CONFIGS / f'{name}.py', *OPTIONS)
    errors = [line for line in result.err.splitlines() if line.startswith('error: ')]
    assert result.code == 1 and len(errors) == 1 and message in errors[0]
