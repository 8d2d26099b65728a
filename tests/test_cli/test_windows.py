"""Windows over large images: the same labels and objects as at once, with less memory."""

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.structures import InstanceData
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slak_mm.cli.coco import rle
from slak_mm.cli.predict import Predictor
from slak_mm.cli.windows import label_map, merged_instances, spans, windows_of


@pytest.mark.parametrize(
    'length, window, stride, expected',
    [
        (10, 4, 3, [(0, 4), (3, 7), (6, 10)]),
        (11, 4, 3, [(0, 4), (3, 7), (6, 10), (7, 11)]),  # the last one ends with the image
        (4, 4, 3, [(0, 4)]),
        (3, 4, 3, [(0, 3)]),
    ],
)
def test_windows_cover_a_side(length, window, stride, expected):
    assert spans(length, window, stride) == expected


@pytest.mark.parametrize(
    'size, stride, classes',
    [
        ((150, 211), (43, 43), 150),
        ((64, 130), (64, 64), 150),
        ((131, 64), (9, 50), 150),
        ((64, 128), (64, 64), 1),  # where windows overlap, mmseg averages logits and not probabilities
    ],
)
def test_labels_are_those_of_the_slide_mode_of_mmseg(build_tiny, size, stride, classes):
    pytest.importorskip('mmseg')
    threshold = {'model.decode_head.threshold': 0.5} if classes == 1 else {}
    model = build_tiny(**{'model.decode_head.out_channels': classes, **threshold}).eval()
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    pipeline = Compose([dict(type='mmseg.PackSegInputs')])
    model.test_cfg.update(mode='slide', crop_size=(64, 64), stride=stride)
    at_once = Predictor(model, pipeline)
    expected = at_once.labels(at_once.frame(image))
    model.test_cfg.update(mode='whole')
    in_windows = Predictor(model, pipeline, (64, 64), stride)
    labels = in_windows.labels(in_windows.frame(image))
    assert len(np.unique(expected)) > 1 and labels.dtype == np.uint8
    assert (labels == expected).all()


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(results) if torch.is_tensor(leaf)]
        self.elements = max([self.elements, *sizes])
        return results


@pytest.mark.parametrize('height', [64, 100, 3000])
def test_scores_of_one_row_of_windows_are_kept_however_high_the_image_is(height):
    classes, width, window = 20, 200, (64, 64)
    windows = windows_of((height, width), window, (40, 40))
    with Largest() as largest:
        labels = label_map(windows, (torch.rand(classes, 64, 64) for _ in windows), lambda scores: scores.argmax(0))
    assert labels.shape == (height, width)
    assert largest.elements == classes * window[0] * width


def cut(boxes, window):
    """What a perfect detector sees of boxes in a window, each with a mask of its box."""
    top, bottom, left, right = window
    corner = boxes.new_tensor([left, top, left, top])
    inside = torch.minimum((boxes - corner).clamp(min=0), boxes.new_tensor([right, bottom] * 2) - corner)
    seen = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    masks = torch.zeros(len(boxes), bottom - top, right - left, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, inside.int().tolist()):
        mask[y1:y2, x1:x2] = True
    labels, scores = torch.arange(len(boxes)) % 2, torch.full((len(boxes),), 0.9)
    found = InstanceData(bboxes=inside, labels=labels, scores=scores, masks=masks.numpy())
    return found[seen]


def test_objects_up_to_half_the_overlap_are_found_whole_and_once():
    size, window, stride = (211, 300), (64, 80), (40, 48)
    generator = np.random.default_rng(0)
    # In a grid, so that none overlaps another.
    corners = np.array([(x, y) for y in range(0, 196, 13) for x in range(0, 284, 17)])
    sides = np.c_[generator.integers(1, 17, len(corners)), generator.integers(1, 13, len(corners))]
    boxes = torch.tensor(np.c_[corners, corners + sides], dtype=torch.float32)
    windows = windows_of(size, window, stride)
    found = merged_instances(windows, (cut(boxes, window) for window in windows))
    everything = cut(boxes, (0, size[0], 0, size[1]))
    masks = [rle(mask, size) for mask in everything.masks]
    expected = {tuple(box): mask for box, mask in zip(everything.bboxes.tolist(), masks)}
    assert len(found) == len(expected)
    assert dict(zip(map(tuple, found.bboxes.tolist()), found.masks)) == expected
    labels = dict(zip(map(tuple, everything.bboxes.tolist()), everything.labels.tolist()))
    assert all(labels[tuple(box)] == label for box, label in zip(found.bboxes.tolist(), found.labels.tolist()))


class Bright:
    """A detector of bright regions."""

    test_cfg = None

    def test_step(self, data):
        import cv2
        from mmdet.structures import DetDataSample

        image = data['inputs'][0].amax(0).numpy()
        count, regions, boxes, _ = cv2.connectedComponentsWithStats((image > 128).astype(np.uint8))
        corners = torch.tensor(boxes[1:, :4], dtype=torch.float32)
        corners[:, 2:] += corners[:, :2]
        masks = torch.tensor(np.stack([regions == label for label in range(1, count)]) if count > 1 else np.empty(0))
        found = InstanceData(bboxes=corners, scores=torch.ones(count - 1), masks=masks.reshape(-1, *image.shape))
        found.labels = torch.zeros(count - 1, dtype=torch.long)
        return [DetDataSample(pred_instances=found)]


@pytest.mark.parametrize('left', [3, 50, 190])
def test_an_object_inside_a_window_is_found_as_in_the_whole_image(left):
    pytest.importorskip('mmdet')
    image = np.zeros((100, 220, 3), np.uint8)
    image[40:52, left : left + 10] = 255
    image[45:50, left : left + 5] = 0
    pipeline = Compose([dict(type='mmdet.PackDetInputs')])
    at_once, in_windows = Predictor(Bright(), pipeline), Predictor(Bright(), pipeline, (64, 64))
    expected, found = (p.instances(p.frame(image)).pred_instances for p in (at_once, in_windows))
    assert expected.bboxes.tolist() == [[left, 40, left + 10, 52]]
    assert found.bboxes.tolist() == expected.bboxes.tolist()
    assert found.masks == expected.masks
    assert len(in_windows.instances(in_windows.frame(np.zeros_like(image))).pred_instances) == 0
