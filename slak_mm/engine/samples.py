"""Checks while a run goes on: of what is loaded, and of the loss."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from PIL import Image
from torch import nn

from slak_mm.checkpoints import unwrap_model


class DataError(ValueError):
    """A file of the data cannot be used; the message has its name and the remedy."""


class CheckedLoad:
    """A loading transform whose errors name the file, and whose result is compared with itself.

    Image and annotation must be of one size, label maps must have one channel and known classes,
    and boxes to train on must have an area within the image.

    Args:
        load: Transform that reads an image or its annotation.
        training: Whether boxes are checked. Defaults to False.
        num_classes: Number of classes that label maps may have. Defaults to any.
        ignore_index: Label of what belongs to no class. Defaults to 255.

    Raises:
        DataError: When called, for a file that cannot be read or used.
    """

    def __init__(
        self, load: Any, training: bool = False, num_classes: int | None = None, ignore_index: int = 255
    ) -> None:
        self.load = load
        self.training = training
        self.num_classes = num_classes
        # Metrics ignore 255 in any case.
        self.ignored = [ignore_index] if training else [ignore_index, 255]

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load, then check."""
        try:
            loaded = self.load(results)
        except Exception as error:  # decoders raise what they like on damaged files
            is_image = 'img' not in results
            path = results.get('img_path') if is_image else results.get('seg_map_path') or results.get('img_path')
            lines = [type(error).__name__, *str(error).split('\n')]
            raise DataError(
                f'The {"image" if is_image else "annotation"} {path} cannot be read: damaged, empty, missing or '
                f'without what is asked for ({": ".join(lines[:2])}).'
            ) from error
        if loaded is None or 'ori_shape' not in loaded:
            return loaded
        if not any(base.__name__ == 'LoadAnnotations' for base in type(self.load).__mro__):
            if _ends_early(loaded.get('img_path')):
                raise DataError(f'The image {loaded["img_path"]} cannot be read: it ends in the middle.')
            if loaded.get('height') and loaded.get('width'):
                self._check_size(loaded, (loaded['height'], loaded['width']), 'its annotation is for an image of')
            return loaded
        if 'gt_seg_map' in loaded:
            self._check_labels(loaded)
        if self.training and 'gt_bboxes' in loaded:
            self._check_boxes(loaded)
        return loaded

    def __repr__(self) -> str:
        return repr(self.load)

    def _check_size(self, results: dict[str, Any], annotated: tuple[int, int], text: str) -> None:
        height, width = results['ori_shape'][:2]
        if (height, width) == tuple(annotated):
            return
        hint = ' Bring one of them to the size of the other.'
        if (width, height) == tuple(annotated) and _is_rotated(results['img_path']):
            hint = (
                ' The EXIF orientation of the file turns the image: set the color_type of LoadImageFromFile to '
                "'color_ignore_orientation' where the annotation is of the image as it is stored, to 'color' where it "
                'is of the image as it is shown, with imdecode_backend cv2 or pillow.'
            )
        raise DataError(
            f'"{results["img_path"]}" is loaded {width}x{height} (width x height), and {text} '
            f'{annotated[1]}x{annotated[0]}.{hint}'
        )

    def _check_labels(self, results: dict[str, Any]) -> None:
        labels, path = results['gt_seg_map'], results.get('seg_map_path')
        if labels.ndim != 2:
            raise DataError(
                f'"{path}" has {labels.shape[-1]} channels; a label map has one, with the index of a class in every '
                'pixel: convert its colors to indices.'
            )
        self._check_size(results, labels.shape, f'its label map "{path}" is')
        if self.num_classes is None:
            return
        first = int(bool(results.get('reduce_zero_label')))
        unknown = labels[(labels >= self.num_classes) & ~np.isin(labels, self.ignored)]
        value = int(unknown.max()) + first if unknown.size else _large_label(path)
        if value is not None:
            raise DataError(
                f'"{path}" has the label {value}, but the model has {self.num_classes} classes (labels {first} to '
                f'{self.num_classes - 1 + first}; {self.ignored[0]} is ignored): correct it, or set num_classes of '
                'every head and the metainfo.classes of the data set; reduce_zero_label=True of the data set is for '
                'labels that count from 1.'
            )

    def _check_boxes(self, results: dict[str, Any]) -> None:
        boxes = results['gt_bboxes']
        boxes = torch.as_tensor(getattr(boxes, 'tensor', boxes))
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            return
        height, width = results['ori_shape'][:2]
        inside = torch.min(boxes, boxes.new_tensor([width, height, width, height])).clamp(min=0)
        ignored = torch.as_tensor(results.get('gt_ignore_flags', np.zeros(len(boxes), bool)))
        # A comparison with NaN is false.
        bad = ~((inside[:, 2:] > inside[:, :2]).all(1) & boxes.isfinite().all(1)) & ~ignored
        if bad.any():
            box = ', '.join(f'{value:g}' for value in boxes[bad][0].tolist())
            raise DataError(
                f'The annotation of "{results["img_path"]}" has the box ({box}), which has no area within the '
                f'image of {width}x{height}: correct or remove it.'
            )


def _ends_early(path: Any) -> bool:
    """Whether a local JPEG or PNG file ends in the middle; decoders fill the rest with gray, and say nothing."""
    try:
        with open(path, 'rb') as file:
            content = file.read()
    except (OSError, TypeError, ValueError):
        return False
    if content.startswith(b'\xff\xd8'):
        # The end marker cannot occur in the data of a scan, but in a thumbnail before it.
        return content.rfind(b'\xff\xd9') < content.rfind(b'\xff\xda')
    return content.startswith(b'\x89PNG') and b'IEND' not in content


def _is_rotated(path: str) -> bool:
    """Whether the EXIF orientation of a local image exchanges its sides."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(0x0112, 1) >= 5
    except OSError:
        return False


def _large_label(path: Any) -> int | None:
    """The largest label of a local file where it needs more than the 8 bits that mmseg takes, else None."""
    try:
        with Image.open(path) as image:
            if image.mode not in ('I', 'I;16', 'I;16B', 'F'):
                return None
            largest = int(np.asarray(image).max())
    except (OSError, AttributeError):
        return None
    return largest if largest > 255 else None


def check_samples(runner: Any) -> None:
    """Let every loading transform of a runner's data sets check what it loads.

    Args:
        runner: With those loops built that are going to run; its data sets are changed.
    """
    head = getattr(unwrap_model(runner.model), 'decode_head', None)
    if isinstance(head, nn.ModuleList):
        head = head[-1]
    num_classes = getattr(head, 'num_classes', None)
    if num_classes == 1 or getattr(head, 'out_channels', None) == 1:
        num_classes = 2  # one channel tells two classes apart
    ignore_index = getattr(head, 'ignore_index', None)

    def check(dataset: Any) -> None:
        inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
        if inner[0] is None:  # it wraps no other
            training = not getattr(dataset, 'test_mode', False)
            pipeline = getattr(dataset, 'pipeline', None)
            check_loads(pipeline, training, num_classes, 255 if ignore_index is None else ignore_index)
            return
        for part in inner:
            check(part)

    for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
        check(getattr(getattr(loop, 'dataloader', None), 'dataset', None))


def check_loads(node: Any, *arguments: Any) -> None:
    """Replace every loading transform in a pipeline, at any depth, by a :class:`CheckedLoad`.

    Args:
        node: A pipeline, or a transform that has others; changed.
        arguments: Further arguments of :class:`CheckedLoad`.
    """
    if isinstance(node, list):
        for index, part in enumerate(node):
            if type(part).__name__.startswith('Load'):
                node[index] = CheckedLoad(part, *arguments)
            else:
                check_loads(part, *arguments)
    else:
        for name in ('transforms', 'subroutines'):
            check_loads(getattr(node, name, []), *arguments)


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops a run, with all its processes, as soon as a loss is infinite or not a number.

    Raises:
        FloatingPointError: After that iteration, with the images of its batch, and of the batch before,
            which is where weights that are not numbers come from.
    """

    def __init__(self) -> None:
        self._before: list[str] = []

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Look at the losses of an iteration."""
        losses = {
            name: float(torch.as_tensor(value).detach()) for name, value in (outputs or {}).items() if 'loss' in name
        }
        bad = [f'{name} is {value}' for name, value in losses.items() if not math.isfinite(value)]
        images = sorted(set(_image_paths(data_batch)))
        any_bad = torch.tensor(float(bool(bad)))
        all_reduce(any_bad, 'max')
        if any_bad:
            found = [item for item in all_gather_object((bad, images, self._before)) if item[0]]
            raise FloatingPointError(
                f'The loss is not finite in iteration {runner.iter + 1} ({", ".join(found[0][0])}). '
                f'Images of that batch: {_listed(item[1] for item in found)}; of the batch before, whose step may '
                f'have spoiled the weights: {_listed(item[2] for item in found)}. Look at their annotations; '
                'where these are right, lower the learning rate or train without mixed precision.'
            )
        self._before = images


def _image_paths(batch: Any) -> Iterator[str]:
    """Paths of the images in a batch."""
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for item in batch:
            yield from _image_paths(item)
    elif isinstance(path := getattr(batch, 'img_path', None), str):
        yield path


def _listed(groups: Any) -> str:
    return ', '.join(f'"{path}"' for group in groups for path in group) or 'none'
