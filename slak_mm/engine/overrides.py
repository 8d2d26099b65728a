"""Changes to a config that everyone makes, without knowing its nested keys.

Each function changes the given :class:`mmengine.config.Config` in place, reaches every place
that the change concerns, and logs what is not obvious. A change that cannot be made is a
:class:`ConfigOverrideError` with a sentence for the user, raised before the config is touched.
"""

import inspect
import json
import logging
import math
import mmap
import os
import os.path as osp
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from slak_mm.sparsity import MODES, PRESETS

from . import prepare_data

__all__ = [
    'SPARSE_CHOICES',
    'ConfigOverrideError',
    'adapt_to_device',
    'check_data',
    'dataset_class',
    'datasets_of',
    'masks_from_scratch',
    'model_of',
    'named_weights',
    'remove_weights',
    'set_batch_size',
    'set_crop_size',
    'set_data_root',
    'set_img_scale',
    'set_max_iters',
    'set_num_workers',
    'set_sparse',
    'set_sparsity',
]

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
EVALUATORS = ('val_evaluator', 'test_evaluator')


class ConfigOverrideError(ValueError):
    """A change that was asked for does not fit the config or the machine."""


def _log(message: str, level: int = logging.INFO) -> None:
    print_log(message, logger='current', level=level)


def _walk(node: Any) -> Iterator[ConfigDict]:
    """Every dict inside a node, the node first."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _walk(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _walk(value)


def model_of(cfg: Config) -> ConfigDict:
    """The model that has the weights: inside a test-time augmentation wrapper, its module."""
    model = cfg.model
    return model.module if 'module' in model and 'backbone' not in model else model


def datasets_of(cfg: Config, loaders: tuple[str, ...] = LOADERS) -> Iterator[tuple[str, ConfigDict]]:
    """The innermost datasets of data loaders.

    Args:
        cfg: A whole config.
        loaders: Names of the loaders to look into.

    Yields:
        Where the data set stands in the config, and its config. Wrapping
        data sets (``dataset=``, ``datasets=``) are opened, not yielded.
    """

    def leaves(path: str, node: Any) -> Iterator[tuple[str, ConfigDict]]:
        if not isinstance(node, dict):
            return
        if isinstance(node.get('dataset'), dict):
            yield from leaves(f'{path}.dataset', node['dataset'])
        elif isinstance(node.get('datasets'), (list, tuple)):
            for index, inner in enumerate(node['datasets']):
                yield from leaves(f'{path}.datasets[{index}]', inner)
        else:
            yield path, node

    for name in loaders:
        loader = cfg.get(name)
        if loader:
            yield from leaves(f'{name}.dataset', loader.get('dataset'))


# --------------------------------------------------------------------------------------- data


def set_data_root(cfg: Config, root: str) -> None:
    """Let every data set and evaluator read below another folder.

    Args:
        cfg: Changed in place: ``data_root`` at the top and in every data set of every
            loader, wrapped or not, and all paths in loaders and evaluators (``ann_file``) that
            are written out below the old root.
        root: Folder with the layout that the data sets of the config expect.

    Raises:
        ConfigOverrideError: The folder does not exist, or the config has no or several roots.
    """
    old_roots = {osp.normpath(dataset['data_root']) for _, dataset in datasets_of(cfg) if dataset.get('data_root')}
    if not old_roots:
        raise ConfigOverrideError('--data-root has no effect on this config: none of its data sets has a data_root.')
    if len(old_roots) > 1:
        raise ConfigOverrideError(
            f'--data-root cannot replace several roots at once, this config has '
            f'{", ".join(sorted(old_roots))}; set each with --cfg-options.'
        )
    if not osp.isdir(root):
        layout = ', '.join(sorted({entry for _, dataset in datasets_of(cfg) for entry in _entries(dataset)}))
        known = next(dataset for _, dataset in datasets_of(cfg) if dataset.get('data_root'))
        raise ConfigOverrideError(
            f'The data root "{root}" does not exist; this config expects a folder that has '
            f'{layout}.{prepare_data.hint(known)}'
        )
    old = old_roots.pop()

    def replace(node: Any) -> Any:
        # Makes new dicts: loaders for validation and testing often share theirs, and a new root
        # below the old one would be put in twice.
        if isinstance(node, dict):
            return ConfigDict({key: replace(value) for key, value in node.items()})
        if isinstance(node, (list, tuple)):
            return type(node)(replace(value) for value in node)
        if isinstance(node, str):
            path = osp.normpath(node)
            if path == old or path.startswith(old + osp.sep):
                return osp.join(root, osp.relpath(path, old)) if path != old else root
        return node

    for name in LOADERS + EVALUATORS:
        if cfg.get(name) is not None:
            cfg[name] = replace(cfg[name])
    if isinstance(cfg.get('data_root'), str):
        cfg.data_root = root


def _entries(dataset: dict) -> list[str]:
    """Files and folders below its root that a data set needs, as written in the config."""
    entries = [value for key, value in (dataset.get('data_prefix') or {}).items() if isinstance(value, str) and value]
    ann_file = dataset.get('ann_file')
    if isinstance(ann_file, str) and ann_file:
        entries.append(ann_file)
    return entries


def check_data(cfg: Config, loaders: tuple[str, ...] = LOADERS) -> None:
    """Look for the data before anything is built.

    Args:
        cfg: A whole config; not changed.
        loaders: The loaders that are going to be used.

    Raises:
        ConfigOverrideError: Names the first folder or file that is missing, the first folder
            without images, or the first image without its annotation; for VOC and COCO, also the
            first image that is listed and missing, and a list of images that ends in the middle.
            For a known data set the command that gets it is added.
    """
    for where, dataset in datasets_of(cfg, loaders):
        try:
            _check_dataset(where, dataset, cfg.get('default_scope'))
        except ConfigOverrideError as error:
            raise ConfigOverrideError(f'{error}{prepare_data.hint(dataset)}') from error


def _check_dataset(where: str, dataset: dict, scope: str | None) -> None:
    """Check one data set; see :func:`check_data`."""
    root = dataset.get('data_root') or ''
    entries = _entries(dataset)
    remedy = f'give the folder that has {" and ".join(entries)} with --data-root' if root else f'set {where}'
    if root and not osp.isdir(root):
        raise ConfigOverrideError(f'The data root "{root}" does not exist ({where}): {remedy}.')
    for entry in entries:
        if not osp.exists(osp.join(root, entry)):
            raise ConfigOverrideError(f'"{osp.join(root, entry)}" does not exist ({where}): {remedy}.')
    _check_pairs(where, root, dataset, scope)
    _check_listed(where, root, dataset, scope)


def _check_pairs(where: str, root: str, dataset: dict, scope: str | None) -> None:
    """Check a folder-based segmentation data set: has images, each with its annotation."""
    prefix = dataset.get('data_prefix') or {}
    if not prefix.get('img_path') or dataset.get('ann_file'):
        return
    image_suffix, label_suffix = _suffixes(dataset, scope)
    if image_suffix is None:
        return
    folder = Path(root, prefix['img_path'])
    names = sorted(
        path.relative_to(folder).as_posix()[: -len(image_suffix)] for path in folder.rglob(f'*{image_suffix}')
    )
    if not names:
        raise ConfigOverrideError(f'"{folder}" has no *{image_suffix} images ({where}).')
    if not prefix.get('seg_map_path') or label_suffix is None:
        return
    labels = Path(root, prefix['seg_map_path'])
    lacking = [name for name in names if not (labels / f'{name}{label_suffix}').is_file()]
    if lacking:
        raise ConfigOverrideError(
            f'{len(lacking)} of {len(names)} images of "{folder}" have no annotation, the first '
            f'is "{labels / (lacking[0] + label_suffix)}" ({where}).'
        )


def _check_listed(where: str, root: str, dataset: dict, scope: str | None) -> None:
    """Check a detection data set with a list of images in VOC's or COCO's format."""
    kind = dataset_class(dataset, scope) if dataset.get('ann_file') else None
    bases = {cls.__name__: cls for cls in inspect.getmro(kind)} if kind is not None else {}
    base = bases.get('XMLDataset') or bases.get('CocoDataset')
    # A class that reads its list in a way of its own knows itself what it needs.
    if base is None or any(
        getattr(kind, name) is not getattr(base, name) for name in ('load_data_list', 'parse_data_info')
    ):
        return
    listing = Path(root, dataset['ann_file'])
    prefix = dataset.get('data_prefix') or {}
    if base.__name__ == 'CocoDataset':
        folder = Path(root, prefix.get('img', ''))
        images = _coco_images(listing, where)
        needed = [('missing', folder, images)]
    else:
        folder = Path(root, prefix.get('sub_data_root', ''))
        images = [line for line in listing.read_text().split('\n') if line]
        needed = [
            ('missing', folder / dataset.get('img_subdir', 'JPEGImages'), [f'{name}.jpg' for name in images]),
            (
                'without annotation',
                folder / dataset.get('ann_subdir', 'Annotations'),
                [f'{name}.xml' for name in images],
            ),
        ]
    if not images:
        raise ConfigOverrideError(f'"{listing}" lists no images ({where}).')
    for lack, folder, names in needed:
        # One listing of a folder is much faster than as many questions, above all over a network.
        present: dict[Path, set[str]] = {}
        for parent in {(folder / name).parent for name in names}:
            present[parent] = set(os.listdir(parent)) if parent.is_dir() else set()
        lacking = [path for path in (folder / name for name in names) if path.name not in present[path.parent]]
        if lacking:
            raise ConfigOverrideError(
                f'{len(lacking)} of {len(names)} images that "{listing}" lists are {lack}, the '
                f'first is "{lacking[0]}" ({where}).'
            )


def _coco_images(listing: Path, where: str) -> list[str]:
    """File names in a COCO annotation file, without the many seconds that parsing COCO takes."""
    if listing.stat().st_size == 0:
        raise ConfigOverrideError(f'"{listing}" is empty ({where}).')
    with listing.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if not text[-64:].rstrip().endswith(b'}'):
            raise ConfigOverrideError(
                f'"{listing}" ends in the middle, as after an interrupted download or unpacking ({where}).'
            )
        return [json.loads(name) for name in re.findall(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', text)]


def dataset_class(dataset: dict, scope: str | None) -> type | None:
    """The class of a data set.

    Args:
        dataset: Its config.
        scope: Framework whose registry is asked, 'mmseg' or 'mmdet'.

    Returns:
        The class; None if nothing is registered under that name.
    """
    kind = dataset.get('type')
    if not isinstance(kind, str):
        return kind
    with DATASETS.switch_scope_and_registry(scope) as registry:
        return registry.get(kind)


def _suffixes(dataset: dict, scope: str | None) -> tuple[str | None, str | None]:
    """Image and label suffix of a segmentation data set: its own, else its class's default."""
    suffixes = dict(img_suffix=dataset.get('img_suffix'), seg_map_suffix=dataset.get('seg_map_suffix'))
    kind = dataset_class(dataset, scope) if None in suffixes.values() else None
    # A class that passes **kwargs on inherits the defaults of its base.
    for cls in inspect.getmro(kind) if kind is not None else ():
        parameters = inspect.signature(vars(cls)['__init__']).parameters if '__init__' in vars(cls) else {}
        for key in suffixes:
            if suffixes[key] is None and key in parameters:
                suffixes[key] = parameters[key].default
    return suffixes['img_suffix'], suffixes['seg_map_suffix']


def set_batch_size(cfg: Config, batch_size: int) -> None:
    """Set the number of training images per process.

    Args:
        cfg: Changed in place. The learning rate is not touched: see ``auto_scale_lr``.
        batch_size: At least 1.

    Raises:
        ConfigOverrideError: The config has no training data loader.
    """
    if not cfg.get('train_dataloader'):
        raise ConfigOverrideError('--batch-size has no effect: this config does not train.')
    cfg.train_dataloader.batch_size = batch_size


def set_num_workers(cfg: Config, num_workers: int) -> None:
    """Set the number of worker processes of every data loader.

    Args:
        cfg: Changed in place. With 0 workers the options that need workers
            (``persistent_workers``, ``prefetch_factor``, ``timeout``) are switched off.
        num_workers: At least 0.
    """
    for name in LOADERS:
        loader = cfg.get(name)
        if loader:
            loader.num_workers = num_workers
            if num_workers == 0:
                loader.persistent_workers = False
                for key in ('prefetch_factor', 'timeout', 'multiprocessing_context'):
                    loader.pop(key, None)


# ----------------------------------------------------------------------------------- schedule


def _scaled(value: Any, factor: float, least: int = 0) -> int:
    return max(least, round(value * factor))


def set_max_iters(cfg: Config, max_iters: int) -> None:
    """Train for another number of iterations, with the schedule keeping its proportions.

    The intervals of validation and checkpoints and every boundary of every learning-rate
    schedule are scaled alike, so that each of them happens at the same fraction of the run. A
    config that counts epochs becomes one that counts iterations.

    Args:
        cfg: Changed in place.
        max_iters: Number of optimization steps, at least 1.

    Raises:
        ConfigOverrideError: The config does not train, or its loop is not one of mmengine's.
    """
    loop = cfg.get('train_cfg')
    if not loop:
        raise ConfigOverrideError('--max-iters has no effect: this config does not train.')
    by_epoch = loop.get('by_epoch', 'max_epochs' in loop)
    old = loop.get('max_epochs') if by_epoch else loop.get('max_iters')
    if loop.get('type') not in ('IterBasedTrainLoop', 'EpochBasedTrainLoop', None) or not old:
        raise ConfigOverrideError(
            f'--max-iters cannot change the training loop "{loop.get("type")}" of this config; use --cfg-options.'
        )
    factor = max_iters / old

    if by_epoch:
        cfg.train_cfg = ConfigDict(
            {key: value for key, value in loop.items() if key in ('val_begin', 'val_interval', 'dynamic_intervals')}
        )
        cfg.train_cfg.type = 'IterBasedTrainLoop'
        _count_iterations(cfg)
        loop = cfg.train_cfg
        # EpochBasedTrainLoop validates after every epoch unless told otherwise.
        loop.setdefault('val_interval', 1)
    loop.max_iters = max_iters
    loop.val_interval = _scaled(loop.get('val_interval', 1000), factor, 1)
    if 'val_begin' in loop:
        loop.val_begin = _scaled(loop.val_begin, factor, 1)
    if loop.get('dynamic_intervals'):
        loop.dynamic_intervals = [
            (_scaled(begin, factor), _scaled(interval, factor, 1)) for begin, interval in loop.dynamic_intervals
        ]

    schedulers = cfg.get('param_scheduler') or []
    schedulers = [schedulers] if isinstance(schedulers, dict) else schedulers
    for scheduler in schedulers:
        _rescale(scheduler, by_epoch, factor, max_iters)
    if schedulers:
        # mmengine's ramps take one step less than their length: one of a single step would hold
        # the learning rate at the start of the warm-up for ever.
        cfg.param_scheduler = [
            scheduler
            for scheduler in schedulers
            if not scheduler.get('type', '').startswith(('LinearLR', 'ConstantLR'))
            or scheduler.get('end', math.inf) - scheduler.get('begin', 0) >= 2
        ]

    hooks = cfg.get('default_hooks') or {}
    checkpoint = hooks.get('checkpoint')
    if checkpoint and checkpoint.get('interval', -1) > 0:
        checkpoint.interval = _scaled(checkpoint.interval, factor, 1)
    logger = hooks.get('logger')
    if logger:
        # A short run still shows some ten lines with its loss.
        logger.interval = max(1, min(logger.get('interval', 10), max_iters // 10))


def _count_iterations(cfg: Config) -> None:
    """Switch what counts epochs beside the training loop to iterations."""
    cfg.log_processor = ConfigDict(cfg.get('log_processor') or dict(type='LogProcessor'))
    cfg.log_processor.by_epoch = False
    cfg.setdefault('default_hooks', ConfigDict())
    hooks = cfg.default_hooks
    for name, hook in (('checkpoint', 'CheckpointHook'), ('logger', 'LoggerHook')):
        if hooks.get(name) is None:
            hooks[name] = ConfigDict(type=hook)
    hooks.checkpoint.by_epoch = False
    hooks.checkpoint.setdefault('interval', 1)
    hooks.logger.log_metric_by_epoch = False
    sampler = cfg.train_dataloader.get('sampler')
    if sampler and sampler.get('type') == 'DefaultSampler':
        cfg.train_dataloader.sampler = ConfigDict(type='InfiniteSampler', shuffle=sampler.get('shuffle', True))
    _log(
        '--max-iters: this config counts epochs; it is run by iterations instead, with its '
        'schedule in the same proportions.'
    )


def _rescale(scheduler: ConfigDict, loop_by_epoch: bool, factor: float, max_iters: int) -> None:
    """Scale one parameter scheduler, which may count iterations in a loop that counts epochs."""
    if loop_by_epoch and not scheduler.get('by_epoch', True):
        # A warm-up in iterations of a run in epochs: how long that run is in iterations depends
        # on the data. Kept as it is, but never more than a tenth of the new run.
        end = scheduler.get('end')
        if end is not None and not math.isinf(end):
            scheduler.end = max(scheduler.get('begin', 0) + 1, min(end, max_iters // 10))
        return
    if loop_by_epoch:
        scheduler.by_epoch = False
        scheduler.pop('convert_to_iter_based', None)
    for key in ('begin', 'end', 'T_max', 'total_steps', 'step_size'):
        value = scheduler.get(key)
        if value is not None and not math.isinf(value):
            scheduler[key] = _scaled(value, factor, 0 if key == 'begin' else 1)
    for key in ('milestones', 'periods', 'restarts'):
        if scheduler.get(key) is not None:
            scheduler[key] = [_scaled(value, factor, 0 if key == 'restarts' else 1) for value in scheduler[key]]
    begin, end = scheduler.get('begin', 0), scheduler.get('end')
    if end is not None and end <= begin:
        scheduler.end = begin + 1


# --------------------------------------------------------------------------------------- size


def _pipelines(cfg: Config) -> Iterator[ConfigDict]:
    """Every transform of every pipeline, nested ones included, each once."""
    seen: set[int] = set()
    nodes = [cfg.get(name) for name in LOADERS]
    nodes += [cfg.get(name) for name in ('train_pipeline', 'test_pipeline', 'val_pipeline', 'tta_pipeline')]
    for node in nodes:
        for transform in _walk(node):
            if id(transform) not in seen:
                seen.add(id(transform))
                yield transform


#: Transforms that resize images to what their ``scale`` or ``scales`` say.
_RESIZES = ('Resize', 'RandomResize', 'RandomChoiceResize', 'ResizeShortestEdge', 'FixScaleResize')
#: What else has a size in pixels in detection, and under which names.
_AREAS = {
    'RandomCrop': ('crop_size',),
    'Pad': ('size',),
    'FixShapeResize': ('width', 'height'),
    'Mosaic': ('img_scale',),
    'CachedMosaic': ('img_scale',),
    'MixUp': ('img_scale',),
    'CachedMixUp': ('img_scale',),
    'BatchFixedSizePad': ('size',),
    'BatchResize': ('scale',),
    'BatchSyncRandomResize': ('random_size_range',),
}


def set_crop_size(cfg: Config, size: tuple[int, int]) -> None:
    """Train and test a semantic segmentation config at another resolution.

    The crop changes and everything in proportion with it: the scales that images are resized to
    in training, testing and test-time augmentation, the size that batches are padded to, and
    crop and stride of the sliding window.

    Args:
        cfg: Changed in place.
        size: Height and width in pixels. Scales follow the shorter side.

    Raises:
        ConfigOverrideError: The config does not crop, or crops to several sizes.
    """
    if cfg.get('default_scope') == 'mmdet':
        raise ConfigOverrideError(
            '--crop-size is for semantic segmentation; detection trains on whole images, whose size --img-scale sets.'
        )
    crops = {
        _pair(transform['crop_size'])
        for _, dataset in datasets_of(cfg, ('train_dataloader',))
        for transform in _walk(dataset)
        if transform.get('type') == 'RandomCrop'
    }
    if len(crops) != 1:
        found = f'crops to {len(crops)} different sizes' if crops else 'has no RandomCrop'
        raise ConfigOverrideError(f'--crop-size needs a config that crops to one size in training; this one {found}.')
    old = crops.pop()
    factor = min(size) / min(old)

    def scale(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(scale(item) for item in value)
        return _scaled(value, factor, 1)

    for transform in _pipelines(cfg):
        kind = transform.get('type')
        if kind == 'RandomCrop' and 'crop_size' in transform:
            transform.crop_size = size
        elif kind in _RESIZES:
            for key in ('scale', 'scales', 'max_size'):
                if transform.get(key) is not None:
                    transform[key] = scale(transform[key])
        elif kind == 'Pad' and transform.get('size') is not None:
            transform.size = size if _pair(transform.size) == old else scale(transform.size)

    model = model_of(cfg)
    for preprocessor in (cfg.get('data_preprocessor'), model.get('data_preprocessor')):
        if preprocessor and preprocessor.get('size') is not None:
            preprocessor['size'] = size
    test_cfg = model.get('test_cfg') or {}
    if test_cfg.get('mode') == 'slide':
        test_cfg['stride'] = tuple(
            max(1, min(crop, _scaled(stride, crop / old_crop)))
            for stride, crop, old_crop in zip(_pair(test_cfg['stride']), size, _pair(test_cfg['crop_size']))
        )
        test_cfg['crop_size'] = size
    if cfg.get('crop_size') is not None:
        cfg.crop_size = size


def set_img_scale(cfg: Config, size: tuple[int, int]) -> None:
    """Train and test a detection config on images of another size.

    The scale of the test images becomes the given one, and everything in proportion with it: the
    scales of training and of test-time augmentation, crops, paddings, and what the data
    preprocessor pads or resizes batches to.

    Args:
        cfg: Changed in place.
        size: Most that the longer side and the shorter side may have, in
            pixels; a longer side of 0 is in proportion to the shorter one.

    Raises:
        ConfigOverrideError: The config is not one of detection, or does not resize test images to
            one scale.
    """
    if cfg.get('default_scope') == 'mmseg':
        raise ConfigOverrideError('--img-scale is for detection; a segmentation config follows --crop-size.')
    scales = {
        tuple(sorted(_pair(transform['scale']), reverse=True))
        for _, dataset in datasets_of(cfg, ('test_dataloader', 'val_dataloader'))
        for transform in _walk(dataset.get('pipeline'))
        if transform.get('type') in _RESIZES and transform.get('scale') is not None
    }
    if len(scales) != 1:
        found = f'to {len(scales)} different scales' if scales else 'to no scale'
        raise ConfigOverrideError(
            f'--img-scale needs a config that resizes all test images to one scale; this one resizes them {found}.'
        )
    old_long, old_short = scales.pop()
    short_factor = size[1] / old_short
    long_factor = size[0] / old_long if size[0] else short_factor

    def sides(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and isinstance(value[0], (list, tuple)):
            return type(value)(sides(item) for item in value)
        if not isinstance(value, (list, tuple)):
            return _scaled(value, short_factor, 1)
        # Configs write (width, height) as well as (short, long).
        factors = (long_factor, short_factor)
        return type(value)(
            _scaled(side, factor, 1) for side, factor in zip(value, factors if value[0] >= value[1] else factors[::-1])
        )

    def area(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(area(item) for item in value)
        return _scaled(value, short_factor, 1)

    preprocessors = [cfg.get('data_preprocessor'), model_of(cfg).get('data_preprocessor')]
    batch_augments = [node.get('batch_augments') for node in preprocessors if node]
    for transform in [*_pipelines(cfg), *_walk(batch_augments)]:
        kind = transform.get('type')
        keys, change = (('scale', 'scales'), sides) if kind in _RESIZES else (_AREAS.get(str(kind), ()), area)
        # The size of a relative crop is a share of the image.
        if str(transform.get('crop_type', '')).startswith('relative'):
            continue
        for key in keys:
            if transform.get(key) is not None:
                transform[key] = change(transform[key])


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (list, tuple)) else (value, value)
    return int(first), int(second)


# ------------------------------------------------------------------------------------ weights


def named_weights(cfg: Config) -> list[tuple[str, str]]:
    """The pretrained weights that a config names.

    Returns:
        Place in the config and source of each, without ``load_from``.
    """
    found: list[tuple[str, str]] = []

    def visit(path: str, node: Any) -> None:
        if isinstance(node, dict):
            if node.get('type') == 'Pretrained' and path.split('[')[0].endswith('init_cfg'):
                found.append((path, str(node.get('checkpoint'))))
                return
            if isinstance(node.get('pretrained'), str):
                found.append((f'{path}.pretrained', node['pretrained']))
            for key, value in node.items():
                visit(f'{path}.{key}', value)
        elif isinstance(node, (list, tuple)):
            for index, value in enumerate(node):
                visit(f'{path}[{index}]', value)

    visit('model', cfg.model)
    return found


def remove_weights(cfg: Config) -> list[tuple[str, str]]:
    """Remove every mention of pretrained weights, ``load_from`` included.

    Args:
        cfg: Changed in place.

    Returns:
        What was removed, as :func:`named_weights`.
    """
    removed = named_weights(cfg)
    if cfg.get('load_from'):
        removed.append(('load_from', str(cfg.load_from)))
        cfg.load_from = None
    for node in _walk(cfg.model):
        if isinstance(node.get('pretrained'), str):
            node['pretrained'] = None
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            node['init_cfg'] = None
        elif isinstance(init_cfg, (list, tuple)):
            node['init_cfg'] = [
                item for item in init_cfg if not (isinstance(item, dict) and item.get('type') == 'Pretrained')
            ] or None
    return removed


# ----------------------------------------------------------------------------------- sparsity

#: What ``--sparse`` takes: no sparsity, a mode of ``SparsityHook``, or one of its presets.
SPARSE_CHOICES = ('off', *MODES, *PRESETS)


def _sparsity_hooks(cfg: Config) -> list[ConfigDict]:
    return [hook for hook in cfg.get('custom_hooks') or [] if hook.get('type') == 'SparsityHook']


def set_sparse(cfg: Config, choice: str) -> None:
    """Add, change or remove the ``SparsityHook`` of a config.

    Masks come from the zeros of the weights that the config names, and with ``--from-scratch``
    from what the hook of the config says under ``from_scratch``, else from ERK at a sparsity of
    0.4, or for a preset from its own distribution.

    Args:
        cfg: Changed in place.
        choice: One of :data:`SPARSE_CHOICES`.
    """
    present = _sparsity_hooks(cfg)
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook not in present]
    if choice in PRESETS:
        published = PRESETS[choice]
        hooks.append(
            ConfigDict(
                type='SparsityHook',
                preset=choice,
                distribution='from_weights',
                from_scratch={key: published[key] for key in ('distribution', 'sparsity')},
            )
        )
    elif choice != 'off':
        hook = (
            present[0]
            if present
            else ConfigDict(
                type='SparsityHook', distribution='from_weights', from_scratch=dict(distribution='erk', sparsity=0.4)
            )
        )
        hooks.append(ConfigDict(hook, mode=choice))
    cfg.custom_hooks = hooks


def set_sparsity(cfg: Config, sparsity: float) -> None:
    """Let the ``SparsityHook`` of a config draw masks of a sparsity, whatever the weights are.

    Args:
        cfg: Changed in place.
        sparsity: Share of weights to set to zero, 0 < sparsity < 1.

    Raises:
        ConfigOverrideError: The config has no such hook.
    """
    hooks = _sparsity_hooks(cfg)
    if not hooks:
        raise ConfigOverrideError(
            f'--sparsity needs a config with a SparsityHook; add one with --sparse {"|".join(SPARSE_CHOICES[1:])}.'
        )
    for hook in hooks:
        own = hook.get('distribution', 'from_weights')
        drawn = dict(distribution='erk' if own == 'from_weights' else own)
        hook.from_scratch = dict(hook.get('from_scratch') or drawn, sparsity=sparsity)
    masks_from_scratch(cfg)


def masks_from_scratch(cfg: Config) -> None:
    """Let the ``SparsityHook`` of a config draw masks, for weights without zeros.

    Args:
        cfg: Changed in place: what the hook has under ``from_scratch`` replaces its
            arguments of the same names.

    Raises:
        ConfigOverrideError: The hook has nothing under ``from_scratch`` and takes its masks from
            the weights, which would be random.
    """
    for hook in _sparsity_hooks(cfg):
        if hook.get('from_scratch'):
            hook.update(hook.pop('from_scratch'))
        elif hook.get('distribution', 'from_weights') == 'from_weights' and not hook.get('preset'):
            raise ConfigOverrideError(
                'The SparsityHook of this config takes its masks from the zeros of pretrained '
                'weights, which a run from scratch has not: add --sparse off to train densely, '
                'or --sparsity 0.4 to draw masks.'
            )


# ------------------------------------------------------------------------------------- device


#: Backbones of this package, whose ``norm_cfg`` is SyncBN where the config says nothing.
OUR_BACKBONES = ('SLaK', 'ShiftWise')


def adapt_to_device(cfg: Config, has_gpu: Callable[[], bool] = torch.cuda.is_available) -> None:
    """Make a config run where there is no GPU; without effect where there is one.

    SyncBN becomes BN (it exists for GPUs only; in a distributed run each process then has its
    own statistics), processes talk through gloo instead of nccl, and the model wrapper is told
    that there is no device to put the model on.

    Args:
        cfg: Changed in place.
        has_gpu: Says whether there is a GPU. Defaults to
            ``torch.cuda.is_available``.

    Raises:
        ConfigOverrideError: Mixed precision was asked for, which mmengine has for GPUs only.
    """
    if has_gpu():
        return
    wrapper = cfg.get('optim_wrapper') or {}
    if wrapper.get('type') == 'AmpOptimWrapper':
        raise ConfigOverrideError(
            "Mixed precision (--amp, AmpOptimWrapper) needs a GPU: mmengine's wrapper does not "
            'work on the CPU. Run without it.'
        )
    changed = 0
    for node in _walk(model_of(cfg)):
        if node.get('type') in OUR_BACKBONES:
            node.setdefault('norm_cfg', ConfigDict(type='SyncBN', requires_grad=True))
    for node in _walk([cfg.model, cfg.get('norm_cfg')]):
        if node.get('type') in ('SyncBN', 'MMSyncBN'):
            node['type'] = 'BN'
            changed += 1
    if changed:
        _log(f'No GPU here: SyncBN is replaced by BN in {changed} places of the config.')
    env_cfg = cfg.get('env_cfg') or {}
    if (env_cfg.get('dist_cfg') or {}).get('backend', 'nccl') == 'nccl':
        cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
    if cfg.get('launcher', 'none') != 'none':
        wrapper_cfg = ConfigDict(
            cfg.get('model_wrapper_cfg')
            or dict(
                type='MMDistributedDataParallel',
                broadcast_buffers=False,
                find_unused_parameters=cfg.get('find_unused_parameters', False),
            )
        )
        wrapper_cfg.device_ids = None
        cfg.model_wrapper_cfg = wrapper_cfg
