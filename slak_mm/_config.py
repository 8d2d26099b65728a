"""Configs by name, and nodes of an mmengine config: its model, data sets and hooks."""

import difflib
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject

from .bases import own_folder

#: Folder of this package's configs.
CONFIGS = own_folder() / 'configs'

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
EVALUATORS = ('val_evaluator', 'test_evaluator')

_of_frameworks = Config._get_cfg_path

# Classes that are registered under another name.
_REGISTERED_AS = {'PretrainedInit': 'Pretrained', 'SyncBatchNorm': 'SyncBN'}


def config_names() -> list[str]:
    """Names of this package's configs."""
    return sorted(path.stem for path in CONFIGS.glob('*.py'))


def config_path(name: str) -> str:
    """Path of one of this package's configs by its name, with or without ``.py``.

    A config of yours inherits from it, in tools that do not import this package before they read it, by
    ``_base_ = __import__('slak_mm').config_path(NAME)``.

    Raises:
        FileNotFoundError: There is none of that name; says which are like it.
    """
    path = CONFIGS / f'{name.removesuffix(".py")}.py'
    if path.is_file():
        return str(path)
    close = difflib.get_close_matches(path.stem, config_names(), 3)
    hint = f'Did you mean {" or ".join(close)}?' if close else f'Its configs are in {CONFIGS}.'
    raise FileNotFoundError(f'slak_mm has no config "{name}". {hint}')


def register_configs() -> None:
    """Have mmengine read ``slak_mm::NAME`` in ``_base_`` of a config as :func:`config_path`.

    Its own ``package::`` knows a fixed list of packages, and only configs that are in a folder of theirs. Called when
    this package is imported.
    """
    Config._get_cfg_path = staticmethod(_find_config)


def _find_config(path: str, filename: str) -> tuple[str, str | None]:
    package, _, name = path.partition('::')
    return (config_path(name), None) if package == 'slak_mm' else _of_frameworks(path, filename)


def type_name(node: Any) -> str:
    """Registered name of what a node of a config builds.

    Configs spell it as a name, as a name with its scope (``mmengine.SparsityHook``), as a dotted path, or in
    pure-Python configs as the class or function itself. Gives the name without scope or path, '' without a type.
    """
    kind = node.get('type') if isinstance(node, dict) else None
    if isinstance(kind, (LazyObject, LazyAttr)):
        kind = kind.build()
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    name = name.rpartition('.')[2]
    return _REGISTERED_AS.get(name, name)


def framework(cfg: Config) -> str:
    """Scope of a config: its ``default_scope``, else where its model comes from, else 'mmseg'."""
    scope = cfg.get('default_scope', 'mmengine') or 'mmengine'
    if scope != 'mmengine':
        return scope
    kind = model_of(cfg).get('type')
    paths = [kind] if isinstance(kind, str) else [base.__module__ for base in getattr(kind, '__mro__', ())]
    return next((root for root in (path.partition('.')[0] for path in paths) if root in ('mmseg', 'mmdet')), 'mmseg')


def walk(node: Any) -> Iterator[ConfigDict]:
    """Every dict inside a node, the node first."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from walk(value)


def model_of(cfg: Config) -> ConfigDict:
    """The model that has the weights: inside a test-time augmentation wrapper, its module."""
    model = cfg.model
    return model.module if 'module' in model and 'backbone' not in model else model


def datasets_of(cfg: Config, loaders: tuple[str, ...] = LOADERS) -> Iterator[tuple[str, ConfigDict]]:
    """Place and config of the innermost data sets of loaders, inside of wrapping ones (``dataset=``, ``datasets=``)."""

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


def add_hook(cfg: Config, kind: str, **arguments: Any) -> None:
    """Add a custom hook, by its registered name without a scope, to a config unless it has one of that type."""
    hooks = list(cfg.get('custom_hooks') or [])
    if all(type_name(hook) != kind for hook in hooks):
        hooks.append(ConfigDict(type=kind, **arguments))
    cfg.custom_hooks = hooks
