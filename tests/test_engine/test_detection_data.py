"""What a detector is trained on, beside the annotation files and images themselves."""

from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from slak_mm import cli
from slak_mm.engine.reproducible import make_reproducible

pytest.importorskip('mmdet')

CONFIG = Path(__file__).parents[2] / 'configs' / 'faster_rcnn_slak_t_voc07.py'


def drawn(root, num_workers, epochs):
    """Images and samples of some epochs, as tools/train.py draws them."""
    cfg = cli.load_config(str(CONFIG))
    cli.set_data_root(cfg, str(root))
    cli.set_img_scale(cfg, (160, 120))
    cli.set_num_workers(cfg, num_workers)
    cfg.randomness = dict(seed=1)
    make_reproducible(cfg)
    init_default_scope('mmdet')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=1)
    for epoch in range(epochs):
        loader.batch_sampler.sampler.set_epoch(epoch)
        for batch in loader:
            yield from zip(batch['inputs'], batch['data_samples'])


def annotated(image):
    """Boxes in the file of an image, pixels counted from 0, and the image's size."""
    path = Path(image)
    root = ElementTree.parse(path.parents[1] / 'Annotations' / f'{path.stem}.xml').getroot()
    boxes = [
        [float(o.find('bndbox').find(k).text) - 1 for k in ('xmin', 'ymin', 'xmax', 'ymax')]
        for o in root.iter('object')
    ]
    return np.array(boxes), [int(root.find(f'size/{k}').text) for k in ('width', 'height')]


def test_boxes_and_pixels_follow_the_augmentation(demo_voc):
    """Scaled and mirrored by hand, with another library for the images."""
    epochs = 12
    states = defaultdict(list)
    for image, sample in drawn(demo_voc, 0, epochs):
        height, width = image.shape[1:]
        boxes, (w, h) = annotated(sample.img_path)
        boxes *= np.tile([width / w, height / h], 2)
        if sample.flip:
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        np.testing.assert_allclose(np.sort(sample.gt_instances.bboxes.tensor.numpy(), 0), np.sort(boxes, 0), atol=1e-3)
        with Image.open(sample.img_path) as file:
            pixels = np.asarray(file.convert('RGB').resize((width, height), Image.BILINEAR))
        found = image.numpy().transpose(1, 2, 0)[:, :, ::-1].astype(float)
        same, mirrored = (np.abs(found - p).mean() for p in (pixels, pixels[:, ::-1]))
        assert mirrored < same if sample.flip else same < mirrored
        states[sample.img_path].append((sample.flip, min(height, width)))
    assert len(states) > 1
    for seen in states.values():
        assert len(seen) == epochs
        flips, sides = zip(*seen)
        assert set(flips) == {False, True}  # all alike once in 2048 seeds
        assert len(set(sides)) > 2
        # 480 to 800 in eleven steps, for a shorter side of 120 in place of 800.
        assert set(sides) <= {round(short * 120 / 800) for short in range(480, 801, 32)}


def test_workers_draw_the_same(demo_voc):
    def stream(num_workers):
        return [(sample.img_path, sample.flip, image.shape) for image, sample in drawn(demo_voc, num_workers, 2)]

    assert stream(2) == stream(0)
