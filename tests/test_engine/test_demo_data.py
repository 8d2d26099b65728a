import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slak_mm.engine.demo_data import DEMO_CLASSES, draw_scene, write_demo_data


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_demo_data(tmp_path_factory.mktemp('data'), num_train=30, num_val=4, size=128)


def labels_of(root, split):
    return [np.asarray(Image.open(path))
            for path in sorted((root / 'annotations' / split).glob('*.png'))]


def test_layout_is_ade20ks(root):
    from mmseg.datasets import ADE20KDataset
    dataset = ADE20KDataset(data_root=str(root), data_prefix=dict(
        img_path='images/training', seg_map_path='annotations/training'))
    assert len(dataset) == 30
    for index in range(30):
        info = dataset.get_data_info(index)
        assert Path(info['img_path']).is_file() and Path(info['seg_map_path']).is_file()
    for value, name in DEMO_CLASSES.items():
        assert ADE20KDataset.METAINFO['classes'][value - 1] == name


def test_all_classes_occur_in_both_splits_and_some_pixels_are_unlabelled(root):
    seen = set(np.concatenate([labels.ravel() for labels in labels_of(root, 'training')]))
    assert seen == {0, *DEMO_CLASSES}
    held_out = set(np.concatenate([labels.ravel() for labels in labels_of(root, 'validation')]))
    assert held_out - {0} == set(DEMO_CLASSES)


def test_scenes_are_a_function_of_the_seed(tmp_path, root):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = write_demo_data(tmp_path / 'again', num_train=2, num_val=1, size=128)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    for path in again.rglob('*.*'):
        assert path.read_bytes() == (root / path.relative_to(again)).read_bytes()
    other = write_demo_data(tmp_path / 'other', num_train=1, num_val=1, size=128, seed=1)
    name = 'images/training/demo_training_0000.jpg'
    assert (other / name).read_bytes() != (root / name).read_bytes()


def test_no_class_is_a_colour(root):
    """Nearest mean colour, the best that a pixel's colour alone can roughly do, is not enough."""
    pixels, truth = [], []
    for path in sorted((root / 'images' / 'training').glob('*.jpg')):
        pixels.append(np.asarray(Image.open(path), float).reshape(-1, 3))
        truth.append(np.asarray(Image.open(
            root / 'annotations' / 'training' / f'{path.stem}.png')).ravel())
    pixels, truth = np.concatenate(pixels), np.concatenate(truth)
    classes = np.array(list(DEMO_CLASSES))
    means = np.stack([pixels[truth == value].mean(0) for value in classes])
    guess = classes[((pixels[:, None] - means) ** 2).sum(-1).argmin(1)]
    ious = [((guess == value) & (truth == value)).sum()
            / ((guess == value) | (truth == value)).sum() for value in classes]
    assert np.mean(ious) < 0.4


@pytest.mark.parametrize('size', [64, 97, 200])
def test_any_size(size):
    image, labels = draw_scene(np.random.default_rng(0), size)
    assert image.shape == (size, size, 3) and labels.shape == (size, size)
    assert image.dtype == labels.dtype == np.uint8
