"""What annotation files, data sets and heads say about classes and boxes, compared before a run."""

import json
import logging
import math
import os.path as osp
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from mmengine import fileio
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS

from slak_mm._config import EVALUATORS, datasets_of, framework, model_of, type_name, walk
from slak_mm.checkpoints.errors import shown

from .data import dataset_class, default_of
from .errors import ConfigOverrideError, reason


def check_annotations(cfg: Config, loaders: Sequence[str]) -> None:
    """Compare the classes in annotation files, data sets and heads, and check the boxes.

    Files are read for data sets that read VOC's or COCO's format as mmdet does, and must exist. What the
    framework ignores is counted in the log.

    Raises:
        ConfigOverrideError: Classes do not fit each other, a file or an annotation in it cannot be used, or
            no box is left to train on or to judge by.
    """
    scope = framework(cfg)
    known: tuple[str, list[str]] | None = None
    # A model that reads the names themselves has no number of classes.
    open_vocabulary = 'language_model' in model_of(cfg)
    heads = [] if open_vocabulary else list(_heads('model', model_of(cfg), scope))
    for where, dataset in datasets_of(cfg, tuple(loaders)):
        kind = dataset_class(dataset, scope)
        bases = {base.__name__: base for base in getattr(kind, '__mro__', ())}
        if not bases.keys() & {'BaseDetDataset', 'BaseSegDataset'}:
            continue
        meta = kind._load_metainfo(dataset.get('metainfo'))  # type: ignore[union-attr]
        classes = meta.get('classes')
        if isinstance(classes, str):
            raise ConfigOverrideError(
                f'{where}.metainfo.classes must be a list of names, got the text "{classes}"; a single '
                f'class is written ("{classes}",).'
            )
        if not classes:
            continue
        classes = list(classes)
        file = _read_boxes(where, dataset, kind, bases)
        if file is not None:
            _check_file(where, dataset, classes, file, heads, _is_judged(cfg, where))
        elif 'BaseSegDataset' in bases:
            own = kind.METAINFO.get('classes')  # type: ignore[union-attr]
            if own and not set(classes) <= set(own):
                raise ConfigOverrideError(
                    f'{where}.metainfo.classes are {_names(classes)}, but {kind.__name__} has '  # type: ignore[union-attr]
                    f'{_names(own)}, of which it can only take some: use type="BaseSegDataset" for other classes.'
                )
        _check_heads(where, classes, meta, heads, binary='BaseSegDataset' in bases)
        if known is not None and known[1] != classes and not open_vocabulary:
            raise ConfigOverrideError(
                f'{known[0]} has the classes {_names(known[1])}, and {where} has {_names(classes)}: '
                'set metainfo.classes of both to the same names in the same order.'
            )
        known = (where, classes)


def _names(names: Sequence[str]) -> str:
    """Names for a message, the first ones of many."""
    first = ', '.join(map(shown, names[:6]))
    return f'{first}, ... ({len(names)})' if len(names) > 6 else f'{first} ({len(names)})' if names else 'none (0)'


# Their classes are not those of the data set: objects in general, stuff, borders.
_OTHER_CLASSES = ('rpn_head', 'semantic_head', 'STDCHead')


def _heads(path: str, node: Any, scope: str) -> Iterator[tuple[str, int]]:
    """Where the heads of a model say how many classes they tell apart, and the number."""
    for key, value in node.items():
        parts = [(f'{path}.{key}', value)]
        if isinstance(value, (list, tuple)):
            parts = [(f'{path}.{key}.{index}', part) for index, part in enumerate(value)]
        for place, part in parts:
            if not isinstance(part, dict) or key in _OTHER_CLASSES or type_name(part) in _OTHER_CLASSES:
                continue
            if key.endswith('head') and not part.get('class_agnostic'):
                with MODELS.switch_scope_and_registry(scope) as registry:
                    kind = registry.get(part['type']) if isinstance(part.get('type'), str) else part.get('type')

                def number(name: str, part: dict = part, kind: Any = kind) -> Any:
                    return part.get(name, default_of(kind, name))

                if 'num_classes' not in part and number('num_things_classes') is not None:
                    yield f'{place}.num_things_classes', number('num_things_classes') + number('num_stuff_classes')
                elif number('num_classes') is not None:
                    yield f'{place}.num_classes', number('num_classes')
            yield from _heads(place, part, scope)


def _check_heads(where: str, classes: list[str], meta: dict, heads: list[tuple[str, int]], binary: bool) -> None:
    """Compare the number of classes of a data set with those of the heads."""
    # Heads for things alone, of panoptic data; one channel of a segmentor tells two classes apart.
    fitting = {len(classes), len(meta.get('thing_classes', classes)), 1 if binary and len(classes) == 2 else None}
    wrong = [(place, number) for place, number in heads if number not in fitting]
    if wrong:
        raise ConfigOverrideError(
            f'{where} has {len(classes)} classes ({_names(classes)}), but {wrong[0][0]} is {wrong[0][1]}: '
            f'set {", ".join(place for place, _ in wrong)} to {len(classes)}, or {where}.metainfo.classes to the '
            'names that the model is for.'
        )


@dataclass
class _Boxes:
    """What an annotation file has."""

    source: str
    ordered: bool  # whether mmdet numbers the classes by their order in the file
    dropped: bool  # whether mmdet leaves unusable boxes out by itself
    names: list[str] = field(default_factory=list)  # classes that the file declares or uses
    # Class, image, whether it can be used, whether it is to be ignored, whether it has a mask.
    boxes: list[tuple[str, str, bool, bool, bool]] = field(default_factory=list)


def _read_boxes(where: str, dataset: dict, kind: Any, bases: dict[str, type]) -> _Boxes | None:
    """Read the annotations of a data set in VOC's or COCO's format; None for any other."""
    base = bases.get('XMLDataset') or bases.get('CocoDataset')
    # A class that reads its files in a way of its own knows itself what it needs.
    own = base and any(getattr(kind, n) is not getattr(base, n) for n in ('load_data_list', 'parse_data_info'))
    if base is None or own or not dataset.get('ann_file'):
        return None
    path = osp.join(dataset.get('data_root') or '', dataset['ann_file'])
    return (_read_coco if base.__name__ == 'CocoDataset' else _read_voc)(where, dataset, path)


def _read(path: str, dataset: dict, parse: Any, what: str) -> Any:
    """Read and parse one file of a data set."""
    try:
        content = fileio.get(path, backend_args=dataset.get('backend_args'))
    except Exception as error:  # a backend raises what it likes
        raise ConfigOverrideError(f'"{path}" cannot be read: {reason(error)}') from error
    try:
        return parse(content)
    except (ValueError, ElementTree.ParseError) as error:
        text = f'"{path}" is not valid {what}, it is damaged or ends in the middle: {error}.'
        raise ConfigOverrideError(text) from error


def _is_usable(box: Sequence[float], width: float, height: float) -> bool:
    """Whether a box (left, upper, right, lower) has an area within its image, whose size may be unknown (0)."""
    left, upper, right, lower = box
    is_there = min(right, width or math.inf) > max(left, 0) and min(lower, height or math.inf) > max(upper, 0)
    return is_there and all(map(math.isfinite, box))


def _read_coco(where: str, dataset: dict, path: str) -> _Boxes:
    content = _read(path, dataset, json.loads, 'JSON')
    item: dict = {}
    try:
        categories = {category['id']: category['name'] for category in content['categories']}
        images = {i['id']: (i['file_name'], int(i['width']), int(i['height'])) for i in content['images']}
        found = _Boxes(path, ordered=True, dropped=True, names=list(categories.values()))
        for item in content.get('annotations', ()):
            name, width, height = images.get(item['image_id'], (None, 0, 0))
            if name is None or item.get('ignore'):
                continue
            left, upper, box_width, box_height = map(float, item['bbox'])
            if not all(map(math.isfinite, item['bbox'])):
                raise ValueError(f'the box {item["bbox"]}')
            usable = box_width >= 1 and box_height >= 1 and item['area'] > 0
            usable &= _is_usable((left, upper, left + box_width, upper + box_height), width, height)
            kind = categories.get(item['category_id'], f'category {item["category_id"]}')
            ignored = bool(item.get('iscrowd')) or _is_small(dataset, width, height)
            found.boxes.append((kind, name, usable, ignored, bool(item.get('segmentation'))))
    except (KeyError, TypeError, ValueError) as error:
        annotation = f'Annotation {item.get("id")} of ' if item else ''
        lack = f'lacks {error}' if isinstance(error, KeyError) else f'is wrong: {error}'
        raise ConfigOverrideError(
            f'{annotation}"{path}" {lack} ({where}); COCO\'s format has images (id, file_name, width, height), '
            'annotations (id, image_id, category_id, bbox, area) and categories (id, name).'
        ) from error
    return found


def _read_voc(where: str, dataset: dict, path: str) -> _Boxes:
    found = _Boxes(path, ordered=False, dropped=False)
    folder = osp.join(dataset.get('data_root') or '', (dataset.get('data_prefix') or {}).get('sub_data_root', ''))
    folder = osp.join(folder, dataset.get('ann_subdir', 'Annotations'))
    smallest = (dataset.get('filter_cfg') or {}).get('bbox_min_size') or 0
    for line in fileio.list_from_file(path, backend_args=dataset.get('backend_args')):
        file = osp.join(folder, f'{line}.xml')
        root = _read(file, dataset, ElementTree.fromstring, 'XML')
        try:
            width, height = (int(root.findtext(f'size/{side}', '0')) for side in ('width', 'height'))
            for item in root.findall('object'):
                # In whole pixels, as mmdet reads them.
                box = [
                    int(float(item.find('bndbox').find(side).text)) - 1  # type: ignore[union-attr,arg-type]
                    for side in ('xmin', 'ymin', 'xmax', 'ymax')
                ]
                ignored = item.findtext('difficult', '0') != '0' or _is_small(dataset, width, height)
                ignored |= 0 < smallest > min(box[2] - box[0], box[3] - box[1])
                name = item.find('name').text  # type: ignore[union-attr]
                found.boxes.append((name, file, _is_usable(box, width, height), ignored, False))  # type: ignore
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ConfigOverrideError(
                f'"{file}" has an object without a name or a finite box, or a size that is not one ({where}).'
            ) from error
    found.names = list(dict.fromkeys(box[0] for box in found.boxes))
    return found


def _is_small(dataset: dict, width: int, height: int) -> bool:
    """Whether training leaves an image out for its size."""
    smallest = (dataset.get('filter_cfg') or {}).get('min_size', 0)
    return bool(width and height) and not dataset.get('test_mode') and min(width, height) < smallest


def _is_judged(cfg: Config, where: str) -> bool:
    """Whether results on a data set are compared with its annotations."""
    name = where.replace('_dataloader', '_evaluator').partition('.')[0]
    return name in EVALUATORS and not any(node.get('format_only') for node in walk(cfg.get(name)))


def _check_file(
    where: str, dataset: dict, classes: list[str], file: _Boxes, heads: list[tuple[str, int]], judged: bool
) -> None:
    """Compare a file with the classes of its data set, and look for boxes that cannot be used."""
    numbers = f', and {", ".join(place for place, _ in heads)} to their number' if heads else ''
    remedy = f'set metainfo.classes of all data sets to the names to learn{numbers}'
    trains = where.startswith('train')
    if file.names and not set(file.names) & set(classes):
        raise ConfigOverrideError(
            f'"{file.source}" has the classes {_names(file.names)}, and {where} looks for {_names(classes)}, none of '
            f'which is there: {remedy}.'
        )
    taken = [name for name in file.names if name in classes]
    if file.ordered and taken != classes[: len(taken)]:
        raise ConfigOverrideError(
            f'"{file.source}" has the classes {_names(taken)} in this order, by which mmdet numbers them, and {where} '
            f'has {_names(classes)}: write metainfo.classes in the order of the categories in the file, without others.'
        )
    unknown = Counter(box[0] for box in file.boxes if box[0] not in classes)
    wanted = [box for box in file.boxes if box[0] in classes]
    unusable = [box for box in wanted if not box[2] and (file.dropped or not box[3])]
    if unusable and trains and not file.dropped:
        raise ConfigOverrideError(
            f'{len(unusable)} boxes of "{file.source}" have no area within their image, the first is in '
            f'"{unusable[0][1]}" ({where}): correct or remove them.'
        )
    lost = len(unusable) if file.dropped else 0
    for count, text in (
        (sum(unknown.values()), f'of classes that {where} does not name: {dict(unknown.most_common(6))}'),
        (lost, f'without an area within their image: {sorted({box[1] for box in unusable})[:6]}'),
    ):
        if count:
            message = f'{count} of {len(file.boxes)} boxes in "{file.source}" are ignored, {text}.'
            print_log(message, logger='current', level=logging.WARNING)
    usable = [box for box in wanted if box[2]]
    if (trains or judged) and not any(not box[3] for box in usable):
        raise ConfigOverrideError(
            f'"{file.source}" has no box to {"train on" if trains else "judge by"} ({where}), of {len(file.boxes)} '
            f'boxes in it: its classes are {_names(file.names)}, those of the data set are {_names(classes)}; boxes '
            'marked as crowd or difficult and those in images below filter_cfg.min_size do not count.'
        )
    if any(node.get('with_mask') for node in walk(dataset.get('pipeline'))):
        lacking = [box for box in usable if not box[4]]
        if lacking:
            raise ConfigOverrideError(
                f'{len(lacking)} of {len(usable)} boxes in "{file.source}" have no segmentation, the first is in '
                f'"{lacking[0][1]}" ({where}), which a model with masks needs: annotate them, or train a detector '
                'without a mask head.'
            )
