"""Data sets and loaders of a config: another root, batch size, number of workers; checks."""

import inspect
import json
import mmap
import os
import os.path as osp
import re
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS

from slak_mm._config import EVALUATORS, LOADERS, datasets_of, framework

from . import prepare_data
from .errors import ConfigOverrideError


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
            _check_dataset(where, dataset, framework(cfg))
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
