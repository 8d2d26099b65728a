"""Curves of training runs, read and drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from slak_mm.cli.curves import choose_keys, draw_curves, read_scalars, smoothed


def write(folder, lines, start='20260101_000000', tail=''):
    path = folder / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines) + tail)


def train(step, loss, **more):
    return dict(lr=0.1, data_time=0.1, loss=loss, time=0.2, iter=step, memory=5, step=step, **more)


def test_numbers_are_those_of_the_file(tmp_path):
    metrics = [dict(mIoU=10.0, time=1.0, step=2), dict(mIoU=20.0, time=1.0, step=4)]
    write(tmp_path, [train(2, 3.5), metrics[0], train(4, 2.5), metrics[1]])
    curves = read_scalars(tmp_path)
    assert {key: (steps.tolist(), values.tolist()) for key, (steps, values) in curves.items()} == {
        'lr': ([2, 4], [0.1, 0.1]),
        'loss': ([2, 4], [3.5, 2.5]),
        'mIoU': ([2, 4], [10.0, 20.0]),
    }


def test_a_resumed_run_replaces_what_it_did_again(tmp_path):
    # Killed in the middle of writing step 6, resumed from step 3.
    write(tmp_path, [train(2, 1.0), train(4, 2.0), train(5, 3.0)], '20260101_000000', '{"lr": 0.')
    write(tmp_path, [train(4, 7.0), train(6, 8.0)], '20260102_000000')
    steps, values = read_scalars(tmp_path)['loss']
    assert steps.tolist() == [2, 4, 6] and values.tolist() == [1.0, 7.0, 8.0]


def test_metrics_of_epochs_stand_at_iterations(tmp_path):
    first = [train(50, 1.0, epoch=1), train(100, 1.0, epoch=1), {'coco/bbox_mAP': 0.1, 'step': 1}]
    write(tmp_path, [*first, train(200, 1.0, epoch=2), {'coco/bbox_mAP': 0.2, 'step': 2}])
    steps, values = read_scalars(tmp_path)['coco/bbox_mAP']
    assert steps.tolist() == [100, 200] and values.tolist() == [0.1, 0.2]


def test_what_is_drawn_unasked(tmp_path):
    sparse = {'sparsity/density': 0.6, 'sparsity/churn': 0.0, 'sparsity/exploration': 0.6}
    sparse |= {'decode.loss_ce': 0.5, 'base_lr': 0.1, 'decode.acc_seg': 9.0}
    write(tmp_path, [train(2, 1.0, **sparse), train(4, 1.0, **sparse), dict(mIoU=1.0, step=4)])
    runs = dict(a=read_scalars(tmp_path))
    # Churn is zero throughout; parts of the loss and training accuracy are no metrics.
    assert choose_keys(runs) == ['loss', 'sparsity/density', 'sparsity/exploration', 'lr', 'mIoU']
    assert choose_keys(runs, ['sparsity/*', 'mIoU']) == [*list(sparse)[:3], 'mIoU']
    with pytest.raises(ValueError, match='no_such.*there are .*mIoU'):
        choose_keys(runs, ['no_such'])


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=23)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(23)]
    np.testing.assert_allclose(smoothed(values, 5), expected, rtol=1e-12)
    assert (smoothed(values, 1) == values).all() or np.allclose(smoothed(values, 1), values)


def test_each_run_and_panel_is_in_the_picture():
    steps = np.arange(1, 101)
    runs = {f'run {i}': dict(loss=(steps, i + 1 / steps), lr=(steps, np.ones(100))) for i in range(2)}
    one, two = draw_curves(runs, ['loss']), draw_curves(runs)
    assert one.dtype == np.uint8 and one.shape[2] == 3 and two.shape[1] > 1.5 * one.shape[1]
    # The colors of both runs.
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (one == color).all(-1).sum() > 50
    assert not (draw_curves({'a': runs['run 0']}, ['loss']) == (0xD5, 0x5E, 0)).all(-1).any()


def test_tool(call_tool, tmp_path):
    for name in ('dense', 'sparse'):
        write(tmp_path / name, [train(step, 1 / step) for step in range(1, 30)])
    out = tmp_path / 'new' / 'picture.png'
    result = call_tool('curves', tmp_path / 'dense', f'forty={tmp_path / "sparse"}', '--out', out, code=0)
    assert '2 runs' in result.out and Image.open(out).mode == 'RGB'
    for arguments, message in (
        ([tmp_path / 'nowhere'], 'nowhere has no scalars.json'),
        ([tmp_path / 'dense', '--keys', 'mIoU'], 'No run has a scalar "mIoU"'),
        ([tmp_path / 'dense', '--out', tmp_path / 'x.xyz'], 'no suffix of a picture format'),
    ):
        assert message in call_tool('curves', *arguments, code=1).err
