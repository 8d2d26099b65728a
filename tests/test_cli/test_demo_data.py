import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from slak_mm.cli import demo_data, set_data_root
from slak_mm.cli.demo_data import DEMO_CLASSES, DEMO_OBJECTS, write_demo_coco, write_demo_data, write_demo_voc


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_demo_data(tmp_path_factory.mktemp('data'), num_train=30, num_val=4, size=128)


def labels_of(root, split):
    return [np.asarray(Image.open(path)) for path in sorted((root / 'annotations' / split).glob('*.png'))]


def test_layout_is_ade20ks(root):
    from mmseg.datasets import ADE20KDataset

    prefix = dict(img_path='images/training', seg_map_path='annotations/training')
    dataset = ADE20KDataset(data_root=str(root), data_prefix=prefix)
    assert len(dataset) == 30
    for index in range(30):
        info = dataset.get_data_info(index)
        assert Path(info['img_path']).is_file() and Path(info['seg_map_path']).is_file()
    for value, name in DEMO_CLASSES.items():
        assert ADE20KDataset.METAINFO['classes'][value - 1] == name


def test_all_classes_occur_in_both_splits_and_some_pixels_are_unlabeled(root):
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


def test_no_class_is_a_color(root):
    """Nearest mean color, the best that a pixel's color alone can roughly do, is not enough."""
    pixels, truth = [], []
    for path in sorted((root / 'images' / 'training').glob('*.jpg')):
        pixels.append(np.asarray(Image.open(path), float).reshape(-1, 3))
        truth.append(np.asarray(Image.open(root / 'annotations' / 'training' / f'{path.stem}.png')).ravel())
    pixels, truth = np.concatenate(pixels), np.concatenate(truth)
    classes = np.array(list(DEMO_CLASSES))
    means = np.stack([pixels[truth == value].mean(0) for value in classes])
    guess = classes[((pixels[:, None] - means) ** 2).sum(-1).argmin(1)]
    pairs = [(guess == value, truth == value) for value in classes]
    ious = [(a & b).sum() / (a | b).sum() for a, b in pairs]
    assert np.mean(ious) < 0.4


@pytest.mark.parametrize('size', [64, 97, 200])
def test_any_size(size):
    image, labels = demo_data.draw_scene(np.random.default_rng(0), size)
    assert image.shape == (size, size, 3) and labels.shape == (size, size)
    assert image.dtype == labels.dtype == np.uint8


def dataset_and_metric(name, root, loader='test_dataloader'):
    """What a detection config reads a data set with, and measures it by."""
    pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")
    from mmdet.registry import DATASETS, METRICS

    cfg = Config.fromfile(Path(__file__).resolve().parents[2] / 'configs' / f'{name}.py')
    set_data_root(cfg, str(root))
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg[loader].dataset)
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    return dataset, metric


def score(name, root, keep, shift_masks=0):
    """The metrics of detections that are the annotated objects with ``keep(label)``."""
    from mmdet.models.utils import samplelist_boxtype2tensor

    dataset, metric = dataset_and_metric(name, root)
    for index in range(len(dataset)):
        sample = dataset[index]['data_samples']
        samplelist_boxtype2tensor([sample])
        truth = sample.gt_instances
        found = truth[torch.tensor([keep(int(label)) for label in truth.labels], dtype=torch.bool)]
        found.scores = torch.ones(len(found))
        if 'masks' in found:
            masks = torch.from_numpy(found.masks.to_ndarray()).bool()
            del found.masks
            found.masks = masks.roll(shift_masks, -1)
        sample.pred_instances = found
        metric.process({}, [sample.to_dict()])
    return metric.compute_metrics(metric.results)


def test_voc_layout_and_metric(tmp_path):
    name = 'faster_rcnn_slak_t_voc07'
    root = write_demo_voc(tmp_path, num_train=6, num_test=20, size=96, years=(2007, 2012))
    dataset, _ = dataset_and_metric(name, root)
    assert len(dataset) == 20
    instances = [item for index in range(20) for item in dataset.get_data_info(index)['instances']]
    counts = Counter(item['bbox_label'] for item in instances)
    assert {dataset.metainfo['classes'][label] for label in counts} == set(DEMO_OBJECTS)
    assert score(name, root, lambda label: True)['mAP'] == 1

    # Some of a class at precision 1: of the recalls 0, 0.1, ... 1 the metric of 2007 finds those
    # up to theirs. (The area below the curve, the metric of 2012, would be the recall itself.)
    number = {
        label: next(k for k in range(1, count + 1) if 2 * k >= count and (10 * k % count or k in (count, count / 2)))
        for label, count in counts.items()
    }
    assert any(number[label] < count for label, count in counts.items())
    left = dict(number)

    def first_ones(label):
        left[label] -= 1
        return left[label] >= 0

    assert score(name, root, first_ones)['mAP'] == pytest.approx(
        np.mean([(10 * number[label] // count + 1) / 11 for label, count in counts.items()])
    )

    both, _ = dataset_and_metric('faster_rcnn_slak_t_voc0712', root, 'train_dataloader')
    assert len(both) == 12
    assert 'VOC2012' in both.get_data_info(11)['img_path']


def test_coco_layout_and_metric(tmp_path):
    pytest.importorskip('mmdet')
    name, root = ('cascade_mask_rcnn_slak_t_coco', write_demo_coco(tmp_path, num_train=4, num_val=12, size=96))
    result = score(name, root, lambda label: True)
    assert result['bbox_mAP'] == result['segm_mAP'] == 1
    # The masks count: elsewhere they are worth nothing, the boxes as much as before.
    result = score(name, root, lambda label: True, shift_masks=48)
    assert result['bbox_mAP'] == 1 and result['segm_mAP_50'] < 0.05
    dataset, _ = dataset_and_metric(name, root, 'train_dataloader')
    assert len(dataset) == 4
    assert 'tv' in dataset.metainfo['classes'] and len(dataset.cat_ids) == 80


def test_objects_are_whole_apart_and_a_function_of_the_seed(tmp_path):
    seen = set()
    for seed in range(30):
        image, objects = demo_data.draw_objects(np.random.default_rng(seed), 120)
        assert image.shape == (120, 120, 3) and image.dtype == np.uint8
        assert 1 <= len(objects) <= 3
        cover = np.zeros((120, 120), int)
        for item in objects:
            seen.add(item.name)
            left, top, right, bottom = item.box
            assert 0 <= left < right <= 120 and 0 <= top < bottom <= 120
            points = np.concatenate(item.polygons)
            np.testing.assert_allclose(points.min(0), (left, top), atol=1)
            np.testing.assert_allclose(points.max(0), (right, bottom), atol=1)
            cover[round(top) : round(bottom), round(left) : round(right)] += 1
        assert (cover > 1).sum() <= 240  # boxes touch at most at their rims
    assert seen == set(DEMO_OBJECTS)
    first = write_demo_voc(tmp_path / 'a', 2, 1, size=64, seed=5)
    again = write_demo_voc(tmp_path / 'b', 2, 1, size=64, seed=5)
    files = [path for path in first.rglob('*') if path.is_file()]
    assert len(files) == 8
    for path in files:
        assert path.read_bytes() == (again / path.relative_to(first)).read_bytes()
