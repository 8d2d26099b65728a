"""Pretrained weights and the checkpoint to resume from."""

import logging
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.runner import find_latest_checkpoint

from slak_mm._config import model_of, type_name, walk
from slak_mm.checkpoints import CheckpointNotFound, read_checkpoint
from slak_mm.checkpoints.reader import resolve

from .device import OUR_BACKBONES
from .errors import PRETRAINED, ConfigOverrideError


def named_weights(cfg: Config) -> list[tuple[str, str]]:
    """The pretrained weights that a config names.

    Returns:
        Place in the config and source of each, without ``load_from``.
    """
    found: list[tuple[str, str]] = []

    def visit(path: str, node: Any) -> None:
        if isinstance(node, dict):
            if type_name(node) == 'Pretrained' and path.split('[')[0].endswith('init_cfg'):
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
    for node in walk(cfg.model):
        if isinstance(node.get('pretrained'), str):
            node['pretrained'] = None
        init_cfg = node.get('init_cfg')
        if type_name(init_cfg) == 'Pretrained':
            node['init_cfg'] = None
        elif isinstance(init_cfg, (list, tuple)):
            node['init_cfg'] = [item for item in init_cfg if type_name(item) != 'Pretrained'] or None
    return removed


# Addresses that mmengine's own loader knows and this package does not.
_FRAMEWORK_SCHEMES = (
    'torchvision://',
    'open-mmlab://',
    'openmmlab://',
    'mmcls://',
    'modelzoo://',
    'pavi://',
    's3://',
    'petrel://',
    'local://',
)


def check_weights(cfg: Config, config_path: str) -> None:
    """Fetch the weights that a config names, before anything is built.

    Args:
        cfg: Changed in place: ``load_from`` becomes the path of a local file.
        config_path: For messages.

    Raises:
        ConfigOverrideError: The config names no weights, or has ``pretrained`` beside our backbone.
        CheckpointError: They are not here and cannot be fetched.
    """
    model, backbone = model_of(cfg), model_of(cfg).get('backbone') or {}
    ours = type_name(backbone) in OUR_BACKBONES
    if ours and (model.get('pretrained') or backbone.get('pretrained')):
        raise ConfigOverrideError(PRETRAINED)
    advice = 'To train from random weights on purpose, add --from-scratch.'
    sources = named_weights(cfg)
    load_from = cfg.get('load_from')
    if not sources and not load_from:
        raise ConfigOverrideError(
            f'{config_path} names no pretrained weights (init_cfg of the backbone, or load_from), '
            f'so this run would start from random ones. {advice}'
        )
    for place, source in sources:
        foreign = not (ours and '.backbone.' in place)
        if source.startswith(_FRAMEWORK_SCHEMES) or (foreign and '://' in source):
            continue
        try:
            resolve(source)
        except CheckpointNotFound as error:
            raise CheckpointNotFound(f'{error}\n{advice}') from error
    if load_from and not load_from.startswith(_FRAMEWORK_SCHEMES):
        path = resolve(load_from)
        read_checkpoint(path)
        cfg.load_from = str(path)


def prepare_resume(cfg: Config, resume: str) -> str | None:
    """Find and check the checkpoint to resume from.

    Args:
        cfg: Changed in place: ``resume``, ``load_from``, the seed of the earlier run,
            and no pretrained weights any more, since all weights come from the checkpoint.
        resume: A file, or 'auto' for the newest checkpoint of the work dir.

    Returns:
        The file; None if the work dir has no checkpoint ('auto' only): the run then
        begins at the beginning.

    Raises:
        CheckpointError: The file is missing or unreadable.
        ConfigOverrideError: It is not from a training run.
    """
    if resume == 'auto':
        found = find_latest_checkpoint(cfg.work_dir)
        if found is None:
            print_log(
                f'--resume: {cfg.work_dir} has no checkpoint, training starts at the beginning.',
                logger='current',
                level=logging.WARNING,
            )
            return None
    else:
        found = resume
    found = str(resolve(found))
    checkpoint = read_checkpoint(found)
    meta = checkpoint.get('meta') or {}
    if 'optimizer' not in checkpoint or 'iter' not in meta or 'message_hub' not in checkpoint:
        raise ConfigOverrideError(
            f'{found} has weights but no state of a training run, so there is nothing to resume; '
            f'to start from its weights use --cfg-options load_from={found}'
        )
    seed = meta.get('seed')
    randomness = ConfigDict(cfg.get('randomness') or {})
    if seed is not None:
        if randomness.get('seed') not in (None, seed):
            print_log(
                f'The run to resume has the seed {seed}; it goes on with that one.',
                logger='current',
                level=logging.WARNING,
            )
        # mmengine takes the seed over itself, but only after the samplers were built.
        randomness.seed = seed
        cfg.randomness = randomness
    remove_weights(cfg)
    cfg.resume = True
    cfg.load_from = found
    return found
