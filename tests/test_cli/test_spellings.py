"""Every override on a config whose types are names, names with a scope, classes, or dotted paths."""

import copy
import functools
import importlib
import re

import mmengine.registry
import pytest
from mmengine.config import Config
from mmengine.registry import Registry

from slak_mm import cli
from slak_mm._config import type_name, walk
from slak_mm.engine.reproducible import make_reproducible

CONFIGS = dict(mmseg='upernet_slak_t_ade20k', mmdet='cascade_mask_rcnn_slak_t_coco')
FORMS = ('scope', 'class', 'dumped')
OVERRIDES = dict(
    data_root=lambda cfg: cli.set_data_root(cfg, '/'),
    max_iters=lambda cfg: cli.set_max_iters(cfg, 3),
    batch_size=lambda cfg: cli.set_batch_size(cfg, 7),
    num_workers=lambda cfg: cli.set_num_workers(cfg, 0),
    crop_size=lambda cfg: cli.set_crop_size(cfg, (128, 192)),
    img_scale=lambda cfg: cli.set_img_scale(cfg, (0, 200)),
    **{f'sparse {how}': lambda cfg, how=how: cli.set_sparse(cfg, how) for how in cli.SPARSE_CHOICES},
    sparsity=lambda cfg: cli.set_sparsity(cfg, 0.5),
    masks_from_scratch=cli.masks_from_scratch,
    remove_weights=cli.remove_weights,
    amp=cli.set_amp,
    tta=cli.use_test_time_augmentation,
    no_gpu=lambda cfg: cli.adapt_to_device(cfg, has_gpu=lambda: False),
    reproducible=make_reproducible,
)


@functools.cache
def registered(framework):
    """Scope and class of every name that mmengine and a framework know."""
    importlib.import_module(f'{framework}.utils').register_all_modules()
    found = {}
    for root in vars(mmengine.registry).values():
        if isinstance(root, Registry):
            for registry in filter(None, (root, root.children.get(framework))):
                found.update({name: (registry.scope, kind) for name, kind in registry.module_dict.items()})
    return found


def as_python(node, imports):
    """Source of a config in mmengine's pure-Python style; collects what it imports."""
    if isinstance(node, dict):
        return f'dict({", ".join(f"{key}={as_python(value, imports)}" for key, value in node.items())})'
    if isinstance(node, (list, tuple)):
        inner = ', '.join(as_python(item, imports) for item in node)
        return f'[{inner}]' if isinstance(node, list) else f'({inner},)'
    if isinstance(node, type) or callable(node):
        name = f'K{len(imports)}'
        imports.append(f'from {node.__module__} import {node.__name__} as {name}')
        return name
    return repr(node)


@pytest.fixture(scope='session')
def forms(config_path, tmp_path_factory):
    """Reads one of the two configs in one of the spellings."""
    folder = tmp_path_factory.mktemp('forms')

    @functools.cache
    def read(framework, form):
        pytest.importorskip(framework)
        cfg = Config.fromfile(config_path.replace(CONFIGS['mmseg'], CONFIGS[framework]))
        if form == 'name':
            return cfg
        known = registered(framework)
        tree = cfg.to_dict()
        for node in walk(tree):
            if node.get('type') in known:
                scope, kind = known[node['type']]
                node['type'] = kind if form != 'scope' else f'{scope}.{node["type"]}'
        if form == 'scope':
            return Config(tree)
        tree.pop('default_scope')
        tree.pop('custom_imports')
        imports = []
        lines = [f'{key} = {as_python(value, imports)}' for key, value in tree.items()]
        path = folder / f'{framework}.py'
        path.write_text('\n'.join(['from mmengine.config import read_base as K', *imports, *lines]))
        cfg = Config.fromfile(path, lazy_import=True)
        if form == 'class':
            return cfg
        cfg.dump(folder / f'{framework}_dumped.py')
        return Config.fromfile(folder / f'{framework}_dumped.py')

    return lambda *key: copy.deepcopy(read(*key))


def plain(node, names):
    """A config with its types as names, and no difference between lists and tuples."""
    if isinstance(node, dict):
        kind = names.get(type_name(node), type_name(node))
        return {key: kind if key == 'type' else plain(value, names) for key, value in node.items()}
    return [plain(item, names) for item in node] if isinstance(node, (list, tuple)) else node


def outcome(change, framework, cfg):
    names = {kind.__name__: name for name, (_, kind) in registered(framework).items()}
    try:
        change(cfg)
    except cli.ConfigOverrideError as error:
        return str(error)
    kept = [key for key in cfg if not re.match('default_scope|custom_imports|K[0-9]*$', key)]
    return plain({key: cfg[key] for key in kept}, names)


@pytest.mark.parametrize('override', OVERRIDES)
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('framework', CONFIGS)
def test_every_spelling_gives_the_same(forms, framework, form, override):
    plain_name, other = (outcome(OVERRIDES[override], framework, forms(framework, each)) for each in ('name', form))
    assert other == plain_name
