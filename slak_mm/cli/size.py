"""Image size of a config."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, ConfigDict

from slak_mm._config import LOADERS, datasets_of, framework, model_of, type_name, walk

from .errors import ConfigOverrideError
from .schedule import scaled


def _pipelines(cfg: Config) -> Iterator[ConfigDict]:
    """Every transform of every pipeline, nested ones included, each once."""
    seen: set[int] = set()
    nodes = [cfg.get(name) for name in LOADERS]
    nodes += [cfg.get(name) for name in ('train_pipeline', 'test_pipeline', 'val_pipeline', 'tta_pipeline')]
    for node in nodes:
        for transform in walk(node):
            if id(transform) not in seen:
                seen.add(id(transform))
                yield transform


#: Transforms that resize images to what their ``scale`` or ``scales`` say.
RESIZES = ('Resize', 'RandomResize', 'RandomChoiceResize', 'ResizeShortestEdge', 'FixScaleResize')


#: What else has a size in pixels in detection, and under which names.
_AREAS = {
    **dict.fromkeys(('Mosaic', 'CachedMosaic', 'MixUp', 'CachedMixUp'), ('img_scale',)),
    **dict.fromkeys(('Pad', 'BatchFixedSizePad'), ('size',)),
    'RandomCrop': ('crop_size',),
    'FixShapeResize': ('width', 'height'),
    'BatchResize': ('scale',),
    'BatchSyncRandomResize': ('random_size_range',),
}


def set_crop_size(cfg: Config, size: tuple[int, int]) -> None:
    """Train and test a semantic segmentation config at another resolution, (height, width).

    The crop changes and everything in proportion with its shorter side: the scales that images are resized to in
    training, testing and test-time augmentation, the size that batches are padded to, and crop and stride of the
    sliding window.

    Raises:
        ConfigOverrideError: The config does not crop, or crops to several sizes.
    """
    if framework(cfg) == 'mmdet':
        raise ConfigOverrideError('--crop-size is for segmentation; detection trains on whole images, see --img-scale.')
    crops = {
        pair(transform['crop_size'])
        for _, dataset in datasets_of(cfg, ('train_dataloader',))
        for transform in walk(dataset)
        if type_name(transform) == 'RandomCrop'
    }
    if len(crops) != 1:
        found = f'crops to {len(crops)} different sizes' if crops else 'has no RandomCrop'
        raise ConfigOverrideError(f'--crop-size needs a config that crops to one size in training; this one {found}.')
    old = crops.pop()
    factor = min(size) / min(old)

    def scale(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(scale(item) for item in value)
        return scaled(value, factor, 1)

    for transform in _pipelines(cfg):
        kind = type_name(transform)
        if kind == 'RandomCrop' and 'crop_size' in transform:
            transform.crop_size = size
        elif kind in RESIZES:
            for key in ('scale', 'scales', 'max_size'):
                if transform.get(key) is not None:
                    transform[key] = scale(transform[key])
        elif kind == 'Pad' and transform.get('size') is not None:
            transform.size = size if pair(transform.size) == old else scale(transform.size)

    model = model_of(cfg)
    for preprocessor in (cfg.get('data_preprocessor'), model.get('data_preprocessor')):
        if preprocessor and preprocessor.get('size') is not None:
            preprocessor['size'] = size
    test_cfg = model.get('test_cfg') or {}
    if test_cfg.get('mode') == 'slide':
        test_cfg['stride'] = tuple(
            max(1, min(crop, scaled(stride, crop / old_crop)))
            for stride, crop, old_crop in zip(pair(test_cfg['stride']), size, pair(test_cfg['crop_size']))
        )
        test_cfg['crop_size'] = size
    if cfg.get('crop_size') is not None:
        cfg.crop_size = size


def set_img_scale(cfg: Config, size: tuple[int, int]) -> None:
    """Train and test a detection config on images of another size.

    The scale of the test images becomes the given one, and everything in proportion with it: the scales of training and
    of test-time augmentation, crops, paddings, and what the data preprocessor pads or resizes batches to.

    Args:
        cfg: Changed in place.
        size: Most pixels of the longer side (0: in proportion) and of the shorter side.

    Raises:
        ConfigOverrideError: The config is not one of detection, or does not resize test images to one scale.
    """
    if framework(cfg) == 'mmseg':
        raise ConfigOverrideError('--img-scale is for detection; a segmentation config follows --crop-size.')
    scales = {
        tuple(sorted(pair(transform['scale']), reverse=True))
        for _, dataset in datasets_of(cfg, ('test_dataloader', 'val_dataloader'))
        for transform in walk(dataset.get('pipeline'))
        if type_name(transform) in RESIZES and transform.get('scale') is not None
    }
    if len(scales) != 1:
        found = f'to {len(scales)} different scales' if scales else 'to no scale'
        raise ConfigOverrideError(
            f'--img-scale needs a config with one scale of test images; this one resizes them {found}.'
        )
    old_long, old_short = scales.pop()
    short_factor = size[1] / old_short
    long_factor = size[0] / old_long if size[0] else short_factor

    def sides(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and isinstance(value[0], (list, tuple)):
            return type(value)(sides(item) for item in value)
        if not isinstance(value, (list, tuple)):
            return scaled(value, short_factor, 1)
        # Configs write (width, height) as well as (short, long).
        factors = (long_factor, short_factor)[:: 1 if value[0] >= value[1] else -1]
        return type(value)(scaled(side, factor, 1) for side, factor in zip(value, factors))

    def area(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(area(item) for item in value)
        return scaled(value, short_factor, 1)

    preprocessors = [cfg.get('data_preprocessor'), model_of(cfg).get('data_preprocessor')]
    batch_augments = [node.get('batch_augments') for node in preprocessors if node]
    for transform in [*_pipelines(cfg), *walk(batch_augments)]:
        kind = type_name(transform)
        keys, change = (('scale', 'scales'), sides) if kind in RESIZES else (_AREAS.get(kind, ()), area)
        # The size of a relative crop is a share of the image.
        if str(transform.get('crop_type', '')).startswith('relative'):
            continue
        for key in keys:
            if transform.get(key) is not None:
                transform[key] = change(transform[key])


def pair(value: Any) -> tuple[int, int]:
    """Two numbers, of which a single one stands for both."""
    first, second = value if isinstance(value, (list, tuple)) else (value, value)
    return int(first), int(second)
