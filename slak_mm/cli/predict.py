"""Predictions of a segmentor or detector for images and frames of videos, at once or in windows."""

from collections.abc import Iterator
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from slak_mm.engine.samples import CheckedLoad, DataError

from .windows import Window, label_map, merged_instances, placed, windows_of


class Predictor:
    """A model and the test pipeline that leads to it.

    Args:
        model: Segmentor of mmseg or detector of mmdet, in eval mode.
        pipeline: The transforms, without those that load annotations.
        window: Height and width of windows that slide over larger images. Each is prepared by the pipeline like an
            image of its own. Default: None, images are predicted at once.
        stride: Of the windows. Defaults to two thirds of their size.
    """

    def __init__(
        self,
        model: nn.Module,
        pipeline: Compose,
        window: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
    ) -> None:
        self.model: Any = model
        self.transforms = list(pipeline.transforms)
        self.window = window
        self.stride = stride or (window and (max(window[0] * 2 // 3, 1), max(window[1] * 2 // 3, 1)))

    def read(self, path: str) -> dict[str, Any]:
        """An image as the pipeline reads it: ``img`` and what it notes beside it.

        Raises:
            DataError: The image cannot be read.
        """
        results: Any = dict(img_path=path, img_id=0, seg_fields=[])
        for number, transform in enumerate(self.transforms):
            results = transform(results)
            if results is None:
                break
            if 'img' in results:
                return dict(results, next_transform=number + 1)
        raise DataError(f'"{path}" cannot be read.')

    def frame(self, image: np.ndarray) -> dict[str, Any]:
        """A frame (H, W, 3), BGR, as if the pipeline had read it from a file."""
        number = next((n for n, transform in enumerate(self.transforms) if isinstance(transform, CheckedLoad)), -1)
        loader = getattr(self.transforms[number], 'load', None)
        if str(getattr(loader, 'color_type', '')).startswith('gray'):
            image = mmcv.bgr2gray(image)
        if getattr(loader, 'to_float32', False):
            image = image.astype(np.float32)
        shapes = dict.fromkeys(('img_shape', 'ori_shape'), image.shape[:2])
        return dict(shapes, img=image, img_path=None, img_id=0, seg_fields=[], next_transform=number + 1)

    def labels(self, image: dict[str, Any], what: str | None = None) -> np.ndarray:
        """Label map (H, W) of what :meth:`read` or :meth:`frame` gave; ``what`` names a progress bar of windows."""
        windows = self._windows(image)
        if len(windows) == 1:
            return self._sample(image).pred_sem_seg.data[0].long().cpu().numpy()

        def classify(scores: Tensor) -> Tensor:
            # With one channel the framework gives probabilities, whose mean it then is.
            return scores.argmax(0) if len(scores) > 1 else scores[0] > self.model.decode_head.threshold

        samples = self._samples(image, windows, what)
        return label_map(windows, (sample.seg_logits.data for sample in samples), classify)

    def instances(self, image: dict[str, Any], what: str | None = None) -> Any:
        """As :meth:`labels`, but a data sample with ``pred_instances``, whose masks are COCO's run-length encodings."""
        windows = self._windows(image)
        samples = self._samples(image, windows, what)
        if len(windows) > 1:
            from mmdet.structures import DetDataSample

            test_cfg = self.model.test_cfg or {}
            nms = (test_cfg.get('rcnn') or test_cfg).get('nms') or {}
            found = (sample.cpu().pred_instances for sample in samples)
            return DetDataSample(pred_instances=merged_instances(windows, found, nms.get('iou_threshold', 0.5)))
        (sample,) = samples
        sample = sample.cpu()
        sample.pred_instances = placed(sample.pred_instances, windows[0], image['img'].shape[:2])
        return sample

    def _windows(self, image: dict[str, Any]) -> list[Window]:
        size = image['img'].shape[:2]
        return windows_of(size, self.window or size, self.stride or size)

    def _samples(self, image: dict[str, Any], windows: list[Window], what: str | None) -> Iterator[Any]:
        """The model's data samples of windows."""
        is_hidden = what is None or len(windows) == 1
        for top, bottom, left, right in track(windows, what or '', console=Console(stderr=True), disable=is_hidden):
            part = np.ascontiguousarray(image['img'][top:bottom, left:right])
            yield self._sample(dict(image, img=part, img_shape=part.shape[:2], ori_shape=part.shape[:2]))

    def _sample(self, image: dict[str, Any]) -> Any:
        """The model's data sample of an image."""
        results: Any = dict(image)
        for transform in self.transforms[results.pop('next_transform') :]:
            results = transform(results)
            if results is None:
                raise DataError(f'"{image["img_path"]}" cannot be prepared by the test pipeline.')
        with torch.no_grad():
            return self.model.test_step(pseudo_collate([results]))[0]
