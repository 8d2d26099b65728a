"""Predictions in COCO's result format."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.structures import InstanceData

from slak_mm._files import replacing

from .errors import ConfigOverrideError


def mask_api() -> Any:
    """``pycocotools.mask``.

    Raises:
        ConfigOverrideError: It is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ConfigOverrideError('Masks are encoded by pycocotools, which is not installed.') from error
    return mask


def _text(encoded: dict[str, Any]) -> dict[str, Any]:
    """An encoded mask as JSON has it."""
    return dict(size=list(map(int, encoded['size'])), counts=encoded['counts'].decode())


def rle(mask: np.ndarray, size: tuple[int, int], top: int = 0, left: int = 0) -> dict[str, Any]:
    """COCO's run-length encoding of a mask (h, w) that lies at a place in an image of a size (height, width)."""
    x, y = np.nonzero(np.asarray(mask).T)  # column by column
    places = (x + left) * size[0] + y + top
    breaks = np.flatnonzero(np.diff(places) > 1)
    begins = places[np.r_[0, breaks + 1]] if len(places) else places
    ends = places[np.r_[breaks, -1]] + 1 if len(places) else places
    counts = np.diff(np.r_[0, np.stack([begins, ends], 1).ravel(), size[0] * size[1]]).tolist()
    return _text(mask_api().frPyObjects(dict(counts=counts[:-1] if counts[-1] == 0 else counts, size=size), *size))


class CocoResults:
    """Collects predictions and writes them as ``pycocotools.coco.COCO.loadRes`` reads them.

    Without an annotation file images and classes are numbered from 1, in their order, and a data set of them without
    annotations is written beside the results.

    Args:
        classes: Names of the classes, in the order of their labels.
        annotation_file: Takes the ids of images and classes from this file of a data set. Default: None.
        images: Paths of images that will come, to be looked for in the file before anything is computed.

    Raises:
        ConfigOverrideError: The file is none of a data set, or lacks a class or an image; or pycocotools is missing.
    """

    def __init__(self, classes: Sequence[str], annotation_file: str | None = None, images: Sequence[str] = ()) -> None:
        self.encode = mask_api().encode
        self.results: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.known: dict[str, int] | None = None
        self.categories = {name: index for index, name in enumerate(classes, 1)}
        if annotation_file is not None:
            try:
                data = json.loads(Path(annotation_file).read_text())
                self.known = {image['file_name']: image['id'] for image in data['images']}
                ids = {category['name']: category['id'] for category in data['categories']}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigOverrideError(f'"{annotation_file}" is no annotation file in COCO\'s format.') from error
            missing = [name for name in classes if name not in ids]
            missing += [path for path in images if self._known_id(path) is None]
            if missing:
                raise ConfigOverrideError(f'"{annotation_file}" has no "{missing[0]}".')
            self.categories = {name: ids[name] for name in classes}
        self.category_ids = list(self.categories.values())

    def _known_id(self, path: str) -> int | None:
        """Id of the image with the longest name that the path ends with."""
        parts, known = Path(path).parts, self.known or {}
        names = ('/'.join(parts[start:]) for start in range(len(parts)))
        return next((known[name] for name in names if name in known), None)

    def _image(self, path: str, size: tuple[int, int], **more: Any) -> int:
        number = len(self.images) + 1
        self.images.append(dict(id=number, file_name=path, height=size[0], width=size[1], **more))
        return number if self.known is None else self._known_id(path)  # type: ignore[return-value]

    def add_labels(self, path: str, labels: np.ndarray, **more: Any) -> None:
        """Add a label map (H, W): one mask for each class in it. ``more`` is noted of the image."""
        image_id = self._image(path, labels.shape, **more)
        for label in np.flatnonzero(np.bincount(labels.ravel(), minlength=len(self.category_ids))):
            if label < len(self.category_ids):
                mask = np.asfortranarray(labels == label, np.uint8)
                segmentation = _text(self.encode(mask))
                self.results.append(
                    dict(image_id=image_id, category_id=self.category_ids[label], segmentation=segmentation)
                )

    def add_instances(self, path: str, instances: InstanceData, size: tuple[int, int], **more: Any) -> None:
        """Add all boxes, with their masks where there are some. ``more`` is noted of the image."""
        image_id = self._image(path, size, **more)
        for index, (x1, y1, x2, y2) in enumerate(instances.bboxes.tolist()):
            result = dict(
                image_id=image_id,
                category_id=self.category_ids[int(instances.labels[index])],
                bbox=[x1, y1, x2 - x1, y2 - y1],
                score=float(instances.scores[index]),
            )
            if 'masks' in instances:
                result['segmentation'] = instances.masks[index]
            self.results.append(result)

    def write(self, path: str) -> None:
        """Write the results, and ``<name>_dataset.json`` unless the ids are those of an annotation file.

        Without any image, what is there stays as it is.
        """
        if not self.images:
            return
        files: dict[Path, Any] = {Path(path): self.results}
        if self.known is None:
            categories = [dict(id=number, name=name) for name, number in self.categories.items()]
            data_set = dict(info={}, images=self.images, annotations=[], categories=categories)
            files[Path(path).with_name(f'{Path(path).stem}_dataset.json')] = data_set
        for target, content in files.items():
            os.makedirs(target.parent, exist_ok=True)
            with replacing(target) as part:
                part.write_text(json.dumps(content))
