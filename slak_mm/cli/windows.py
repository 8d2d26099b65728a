"""Windows that slide over images too large to be predicted at once, and the merging of what is found in them.

A window is (top, bottom, left, right) in pixels of the image.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from mmengine.structures import InstanceData
from torch import Tensor

from .coco import mask_api, rle

Window = tuple[int, int, int, int]


def spans(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Begin and end of the windows along a side, as mmsegmentation lays them: the last one ends where the side ends."""
    count = max(length - window + stride - 1, 0) // stride + 1
    ends = [min(index * stride + window, length) for index in range(count)]
    return [(max(end - window, 0), end) for end in ends]


def windows_of(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> list[Window]:
    """The windows over an image, row by row."""
    rows, columns = (spans(*sides) for sides in zip(size, window, stride))
    return [(*row, *column) for row in rows for column in columns]


def label_map(windows: Sequence[Window], scores: Iterable[Tensor], classify: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Label map (H, W) of the mean scores of all windows, uint8 up to 256 classes, otherwise int32.

    The arithmetic is that of mmsegmentation's ``slide_inference``, in its order. But rows that no later window reaches
    are classified at once and their scores dropped, so that the scores of one row of windows are kept, not those of
    the image.

    Args:
        windows: Of :func:`windows_of`.
        scores: The scores (C, h, w) of each, taken one by one.
        classify: Labels (h, W) of mean scores (C, h, W).
    """
    _, height, _, width = windows[-1]
    tops = sorted({top for top, *_ in windows})
    below = dict(zip(tops, [*tops[1:], height]))
    labels: Any = None
    band: Any = None
    counts: Any = None
    for part, (top, bottom, left, right) in zip(scores, windows):
        if band is None:
            band = part.new_zeros(len(part), bottom - top, width)
            counts = part.new_zeros(bottom - top, width)
            labels = np.empty((height, width), np.uint8 if len(part) <= 256 else np.int32)
        band[:, :, left:right] += part
        counts[:, left:right] += 1
        if right == width:
            done = below[top] - top
            labels[top : below[top]] = classify(band[:, :done].div_(counts[:done])).cpu().numpy()
            for plane in (*band, counts):
                kept = plane[done:].clone()
                plane[: len(kept)] = kept
                plane[len(kept) :] = 0
    return labels


def _own_parts(sides: Iterable[tuple[int, int]]) -> dict[tuple[int, int], tuple[float, float]]:
    """Where the centers of a window's own objects are along an axis: all but a quarter of each overlap."""
    ordered = sorted(set(sides))
    parts = {}
    for before, (begin, end), behind in zip([None, *ordered], ordered, [*ordered[1:], None]):
        # Boxes may reach beyond the image.
        first = -math.inf if before is None else begin + (before[1] - begin) / 4
        last = math.inf if behind is None else end - (end - behind[0]) / 4
        parts[begin, end] = first, last
    return parts


def placed(instances: InstanceData, window: Window, size: tuple[int, int]) -> InstanceData:
    """Objects of a window in pixels of an image of a size (height, width), with masks in COCO's run-length encoding.

    Where a model has masks alone, they give the boxes.
    """
    top, _, left, _ = window
    boxes = instances.bboxes + instances.bboxes.new_tensor([left, top, left, top])
    if 'masks' not in instances:
        return InstanceData(bboxes=boxes, scores=instances.scores, labels=instances.labels)
    masks = [rle(mask, size, top, left) for mask in np.asarray(instances.masks)]
    if masks and not instances.bboxes.any():
        boxes = boxes.new_tensor(mask_api().toBbox(masks))
        boxes[:, 2:] += boxes[:, :2]
    return InstanceData(bboxes=boxes, scores=instances.scores, labels=instances.labels, masks=masks)


def merged_instances(
    windows: Sequence[Window], found: Iterable[InstanceData], iou_threshold: float = 0.5
) -> InstanceData:
    """Objects of all windows, each once.

    An object at the edge of a window is cut there, and its neighbor sees more of it: a window keeps the boxes whose
    center is no nearer to its edge than a quarter of the overlap. Where two windows keep the same object,
    non-maximum suppression within the class decides. So objects up to half the overlap are found whole and once.

    Args:
        windows: Of :func:`windows_of`.
        found: ``bboxes`` (n, 4), ``scores``, ``labels`` and maybe ``masks`` (n, h, w) of each window, in its pixels.
        iou_threshold: Boxes of a class that overlap by more are one object. Defaults to 0.5.

    Returns:
        The same in pixels of the image, the surest first, as :func:`placed` gives them.
    """
    from mmcv.ops import batched_nms

    size = windows[-1][1], windows[-1][3]
    kept = []
    own_rows = _own_parts(window[:2] for window in windows)
    own_columns = _own_parts(window[2:] for window in windows)
    for instances, window in zip(found, windows):
        instances = placed(instances, window, size)
        x, y = (instances.bboxes[:, :2] + instances.bboxes[:, 2:]).T / 2
        (top, bottom), (left, right) = own_rows[window[:2]], own_columns[window[2:]]
        kept.append(instances[(x >= left) & (x <= right) & (y >= top) & (y <= bottom)])
    everything = InstanceData.cat(kept)
    if not len(everything):  # which mmcv cannot compare
        return everything
    nms = dict(type='nms', iou_threshold=iou_threshold)
    _, best = batched_nms(everything.bboxes, everything.scores, everything.labels, nms)
    return everything[best]
