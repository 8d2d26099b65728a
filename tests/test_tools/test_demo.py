"""``tools/demo.py`` with a tiny model: the way, not the quality."""

import re

import numpy as np
from PIL import Image


def test_demo(call_tool, tiny, tmp_path):
    sizes = '--max-iters 40 --crop-size 64 --batch-size 2 --num-train 6 --num-val 2'
    options = ['--cfg-options', *tiny, 'optim_wrapper.optimizer.lr=0.02']
    result = call_tool('demo', '--work-dir', tmp_path / 'demo', sizes, *options)
    assert 'eta: ' in result.out and 'FROM SCRATCH' in result.out, result.text
    rows = dict(re.findall(r'^  (UperNet.*?|always "\w+")  +([\d.]+) %$', result.out, re.M))
    assert len(rows) == 2, result.text
    model, trivial = (float(value) for value in rows.values())
    # Whether forty iterations of a tiny model are enough decides over the exit code only.
    assert result.code == int(model < 2 * trivial)
    assert ('not twice as good' in result.err) == bool(result.code)

    # The trivial predictor: one class everywhere, so its IoU is that class's share of the pixels.
    labels = [np.asarray(Image.open(path)) for path in (tmp_path / 'demo/data/annotations/validation').glob('*.png')]
    known = np.concatenate([label[label > 0] for label in labels])
    paths = (tmp_path / 'demo/data/annotations/training').glob('*.png')
    train = np.concatenate([np.asarray(Image.open(path)).ravel() for path in paths])
    constant = np.bincount(train[train > 0]).argmax()
    expected = 100 * (known == constant).mean() / len(set(known.tolist()) | {constant})
    assert abs(trivial - expected) < 0.06

    # The model's figure is that of the label maps which the pictures show.
    joint = np.zeros((151, 151))
    for path in (tmp_path / 'demo/data/annotations/validation').glob('*.png'):
        truth = np.asarray(Image.open(path)).ravel().astype(int)
        predicted = np.asarray(Image.open(tmp_path / 'demo/predictions' / path.name)).ravel()
        np.add.at(joint, (truth[truth > 0], predicted[truth > 0]), 1)
    union = joint.sum(0) + joint.sum(1) - np.diag(joint)
    assert abs(model - 100 * (np.diag(joint)[union > 0] / union[union > 0]).mean()) < 0.06

    pictures = sorted((tmp_path / 'demo/pictures').glob('*.png'))
    assert len(pictures) == 2
    assert np.asarray(Image.open(pictures[0])).shape[1] > 3 * 2 * 160
