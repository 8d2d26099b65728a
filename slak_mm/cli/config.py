"""Read a config and apply the changes of a command line."""

import argparse
import difflib
import importlib.util
import os
import os.path as osp
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config

from slak_mm._config import config_path, datasets_of, framework, model_of, type_name, walk

from .arguments import check_output
from .data import set_batch_size, set_data_root, set_num_workers
from .device import set_amp, set_compile
from .errors import ConfigOverrideError, reason
from .schedule import check_schedule, set_max_iters
from .size import RESIZES, set_crop_size, set_img_scale
from .sparse import set_sparse, set_sparsity
from .vis import set_vis


def load_config(path: str) -> Config:
    """Read a config: a file, or one of this package's by name; its ``_base_`` may have ``slak_mm::NAME``.

    Raises:
        ConfigOverrideError: The file is missing or cannot be read, or the framework it is for is not installed.
    """
    if not osp.isfile(path):
        folder = osp.dirname(path) or '.'
        names = [name for name in os.listdir(folder) if name.endswith('.py')] if osp.isdir(folder) else []
        close = difflib.get_close_matches(osp.basename(path), names, 3)
        hint = f' Did you mean {" or ".join(osp.join(folder, name) for name in close)}?' if close else ''
        try:
            path = config_path(path)
        except FileNotFoundError as error:
            raise ConfigOverrideError(f'There is no config file "{path}".{hint or f" {error}"}') from error
    try:
        cfg = Config.fromfile(path)
    except KeyboardInterrupt:
        raise
    except ImportError as error:
        raise ConfigOverrideError(f'{path} cannot be read: {error}') from error
    except BaseException as error:  # a config is a program: it can fail in any way, and leave
        raise ConfigOverrideError(f'{path} cannot be read: {reason(error)}') from error
    if 'model' not in cfg:
        raise ConfigOverrideError(f'{path} describes no model; is it a base config?')
    scope = cfg.get('default_scope')
    if scope and scope != 'mmengine' and importlib.util.find_spec(scope) is None:
        raise ConfigOverrideError(f'{path} is for "{scope}", which is not installed in this Python environment.')
    return cfg


def apply_overrides(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the work dir, :func:`add_override_arguments`, and last ``--cfg-options``; skip what a tool does not have.

    The options come last so that they mean what they say: an interval given by hand is not scaled by ``--max-iters``.

    Raises:
        ConfigOverrideError: An override or option does not fit the config, or the work dir cannot be written.
    """
    if getattr(args, 'work_dir', None) is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('./work_dirs', Path(cfg.filename or args.config).stem)
    changes = (set_data_root, set_max_iters, set_batch_size, set_num_workers, set_crop_size, set_img_scale)
    change: Callable[[Config, Any], None]
    for change in (*changes, set_sparse, set_sparsity, set_vis):
        value = getattr(args, change.__name__.removeprefix('set_'), None)
        if value is not None:
            change(cfg, value)
    for switch in (set_amp, set_compile):
        if getattr(args, switch.__name__.removeprefix('set_'), False):
            switch(cfg)
    if args.cfg_options:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except Exception as error:  # it meets whatever the config has at that key
            raise ConfigOverrideError(f'--cfg-options does not fit {args.config}: {reason(error)}') from error
    if hasattr(args, 'max_iters'):
        check_schedule(cfg)
    if hasattr(args, 'work_dir'):
        check_output(cfg.work_dir, is_folder=True)


def use_test_time_augmentation(cfg: Config) -> None:
    """Test with the config's ``tta_model`` and ``tta_pipeline``, unless its model is one for augmentation already.

    Images are read as the test pipeline reads them: frameworks' bases have a ``tta_pipeline`` for RGB.

    Raises:
        ConfigOverrideError: The config has no test-time augmentation.
    """
    if model_of(cfg) is not cfg.model:
        return
    if cfg.get('tta_model') is None or cfg.get('tta_pipeline') is None:
        raise ConfigOverrideError('--tta needs a config with tta_model and tta_pipeline; this one has none.')
    for _, dataset in datasets_of(cfg, ('test_dataloader',)):
        start = next((index for index, t in enumerate(cfg.tta_pipeline) if type_name(t) == 'TestTimeAug'), 0)
        dataset['pipeline'] = (_reading(dataset.get('pipeline') or []) if start else []) + cfg.tta_pipeline[start:]
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


def tests_boxes_alone(cfg: Config) -> bool:
    """Whether only the boxes of a model with masks are tested, under test-time augmentation.

    The mask head is then to be left out after the weights were loaded.

    Raises:
        ConfigOverrideError: Masks would be predicted, which mmdetection cannot merge over views.
    """
    model = model_of(cfg)
    if model is cfg.model or framework(cfg) != 'mmdet':
        return False
    judges_masks = 'segm' in str([node.get('metric') for node in walk(cfg.get('test_evaluator'))])
    removable = bool((model.get('roi_head') or {}).get('mask_head'))
    if not (judges_masks or removable or any(node.get('mask_head') or 'panoptic_head' in node for node in walk(model))):
        return False
    if judges_masks or not removable:
        boxes = 'add --cfg-options test_evaluator.metric=bbox to test its boxes alone'
        remedy = boxes if removable else 'test it without --tta'
        text = 'mmdetection has test-time augmentation for boxes only, and this model predicts masks'
        raise ConfigOverrideError(f'{text}: {remedy}.')
    return True


def _reading(pipeline: list) -> list:
    """The transforms that make the image: all before it is resized, annotated or packed."""
    ends = (*RESIZES, 'Pad', 'TestTimeAug')
    names = [type_name(transform) for transform in pipeline]
    stops = (i for i, name in enumerate(names) if name in ends or re.match('Load.*Annotation|Pack', name))
    return pipeline[: next(stops, None)]
