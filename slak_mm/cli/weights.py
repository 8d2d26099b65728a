"""Pretrained weights and the checkpoint to resume from."""

import logging
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from slak_mm._config import model_of, type_name, walk
from slak_mm.checkpoints import CheckpointError, CheckpointNotFound, read_checkpoint
from slak_mm.checkpoints.reader import resolve
from slak_mm.engine.checkpoint_hook import checkpoint_pattern
from slak_mm.engine.resume import check_state
from slak_mm.engine.sparsity_hook import SPARSITY_KEY
from slak_mm.models import registered_backbones

from .errors import PRETRAINED, ConfigOverrideError
from .sparse import sparsity_hooks


def named_weights(cfg: Config) -> list[tuple[str, str]]:
    """Place in the config and source of the pretrained weights that it names, without ``load_from``."""
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
    """Remove every mention of pretrained weights, ``load_from`` included; returns them as :func:`named_weights`."""
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
_FRAMEWORK_SCHEMES = tuple(
    f'{name}://' for name in 'torchvision open-mmlab openmmlab mmcls modelzoo pavi s3 petrel local'.split()
)


def check_weights(cfg: Config, config_path: str) -> None:
    """Fetch the weights that a config names, before anything is built; ``load_from`` becomes a local file.

    Raises:
        ConfigOverrideError: The config names no weights, or has ``pretrained`` beside our backbone.
        CheckpointError: They are not here and cannot be fetched.
    """
    model, backbone = model_of(cfg), model_of(cfg).get('backbone') or {}
    ours = type_name(backbone) in registered_backbones()
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
    """Find and check the checkpoint to resume from, a file or 'auto' for the newest of the work dir that can be read.

    Args:
        cfg: Changed in place: ``resume``, ``load_from``, the seed of the earlier run, what it had from ``from_scratch``
            of its ``SparsityHook``, and no pretrained weights any more, since all come from the checkpoint.
        resume: As above.

    Returns:
        The file; None if the work dir has no checkpoint ('auto' only): the run then begins at the beginning.

    Raises:
        CheckpointError: The file is missing, unreadable, or not from a training run.
        ConfigOverrideError: The work dir has checkpoints, and none can be read.
    """
    if resume == 'auto':
        newest = _newest_checkpoint(cfg)
        if newest is None:
            text = f'{cfg.work_dir} has no checkpoint, training starts at the beginning.'
            print_log(text, logger='current', level=logging.WARNING)
            cfg.resume = False
            return None
        found, checkpoint = newest
    else:
        found = str(resolve(resume))
        checkpoint = _read_run(found)
    seed = checkpoint['meta'].get('seed')
    randomness = ConfigDict(cfg.get('randomness') or {})
    if seed is not None:
        if randomness.get('seed') not in (None, seed):
            text = f'The run to resume has the seed {seed}; it goes on with that one.'
            print_log(text, logger='current', level=logging.WARNING)
        # mmengine takes the seed over itself, but only after the samplers were built.
        randomness.seed = seed
        cfg.randomness = randomness
    if _drew_masks(checkpoint):
        for hook in sparsity_hooks(cfg):
            hook.update(hook.pop('from_scratch', None) or {})
    remove_weights(cfg)
    cfg.resume = True
    cfg.load_from = found
    return found


def _newest_checkpoint(cfg: Config) -> tuple[str, dict[str, Any]] | None:
    """The newest checkpoint that a run can go on from, whatever ``last_checkpoint`` says of it."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folder = Path(cfg.work_dir)
    if '://' in (hook.get('out_dir') or ''):
        raise ConfigOverrideError(f'The checkpoints of this run are kept at {hook["out_dir"]}: name one by --resume.')
    if hook.get('out_dir') and Path(hook['out_dir']) != folder:
        folder = Path(hook['out_dir'], folder.absolute().name)
    own = hook.get('filename_tmpl') or ('epoch_{}.pth' if hook.get('by_epoch', True) else 'iter_{}.pth')
    # Those named as this config names them come first: other numbers cannot be compared with theirs.
    candidates = []
    for rank, template in enumerate(dict.fromkeys((own, 'iter_{}.pth', 'epoch_{}.pth'))):
        for path in folder.iterdir() if folder.is_dir() else ():
            if match := checkpoint_pattern(template).fullmatch(path.name):
                candidates.append((-rank, int(match['step']), path))
    passed = []
    for *_, path in sorted(candidates, reverse=True):
        try:
            checkpoint = _read_run(str(path))
        except (CheckpointError, OSError) as error:
            passed.append(f'{path.name} ({str(error).splitlines()[0]})')
            continue
        others = f' Passed over, because they cannot be resumed: {"; ".join(passed)}' if passed else ''
        level = logging.WARNING if passed else logging.INFO
        print_log(f'The run goes on from {path}.{others}', logger='current', level=level)
        return str(path), checkpoint
    if passed:
        raise ConfigOverrideError(
            f'None of the checkpoints in {folder} can be resumed: {"; ".join(passed)}. To start from the beginning '
            'leave out --resume; they are then moved aside.'
        )
    return None


def _read_run(path: str) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    check_state(checkpoint, path)
    return checkpoint


def _drew_masks(checkpoint: dict[str, Any]) -> bool:
    """Whether the run drew its masks, which a config takes from the zeros of weights unless from scratch."""
    state = checkpoint.get(SPARSITY_KEY)
    settings = state.get('settings') if isinstance(state, dict) else None
    return isinstance(settings, dict) and settings.get('distribution', 'from_weights') != 'from_weights'
