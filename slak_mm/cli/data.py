"""Data sets and loaders of a config: another root, batch size, number of workers; checks."""

import contextlib
import inspect
import json
import mmap
import os
import os.path as osp
import re
from typing import Any

from mmengine import fileio
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS
from mmengine.utils import is_abs

from slak_mm._config import EVALUATORS, LOADERS, datasets_of, framework, type_name, walk

from . import prepare_data
from .errors import ConfigOverrideError, reason


def set_data_root(cfg: Config, root: str) -> None:
    """Let every data set and evaluator read below another folder.

    Args:
        cfg: Changed in place: ``data_root`` at the top and in every data set of every loader, wrapped or not,
            and all paths in loaders and evaluators (``ann_file``) that are written out below the old root.
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
    if any(_Files(dict(dataset, data_root=root)).ask('isdir', root) is False for _, dataset in datasets_of(cfg)):
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
    pipeline = dataset.get('pipeline')
    labels_unread = pipeline and not any('Annotations' in type_name(node) for node in walk(pipeline))
    prefix = {k: v for k, v in (dataset.get('data_prefix') or {}).items() if k != 'seg_map_path' or not labels_unread}
    entries = [value for value in prefix.values() if isinstance(value, str) and value]
    ann_file = dataset.get('ann_file')
    if isinstance(ann_file, str) and ann_file:
        entries.append(ann_file)
    return entries


def check_data(cfg: Config, loaders: tuple[str, ...] = LOADERS) -> None:
    """Look for the data of some loaders before anything is built.

    Raises:
        ConfigOverrideError: Names the first folder or file that is missing, the first folder without images, or
            the first image without its annotation; for VOC and COCO, also the first image that is listed and
            missing, and a list of images that ends in the middle. For a known data set the command that gets it
            is added.
    """
    for where, dataset in datasets_of(cfg, loaders):
        try:
            _check_dataset(where, dataset, framework(cfg))
        except ConfigOverrideError as error:
            raise ConfigOverrideError(f'{error}{prepare_data.hint(dataset)}') from error


def _check_dataset(where: str, dataset: dict, scope: str) -> None:
    """Check one data set; see :func:`check_data`."""
    files = _Files(dataset)
    entries = _entries(dataset)
    remedy = f'give the folder that has {" and ".join(entries)} with --data-root' if files.root else f'set {where}'
    uses_root = not entries or not all(map(is_abs, entries))
    if files.root and uses_root and files.ask('isdir', files.root) is False:
        raise ConfigOverrideError(f'The data root "{files.root}" does not exist ({where}): {remedy}.')
    for path in map(files.path, entries):
        if files.ask('exists', path) is False:
            raise ConfigOverrideError(f'"{path}" does not exist ({where}): {remedy}.')
    kind = dataset_class(dataset, scope)
    if kind is None:
        return
    bases = {base.__name__: base for base in inspect.getmro(kind)}
    # A class that reads its list in a way of its own knows itself what it needs.
    own = ('load_data_list', 'parse_data_info', '_join_prefix')
    for name, check in dict(BaseSegDataset=_check_pairs, XMLDataset=_check_listed, CocoDataset=_check_listed).items():
        if name in bases and all(getattr(kind, n, None) is getattr(bases[name], n, None) for n in own):
            check(where, files, dataset, kind)


class _Files:
    """Asks a data set's storage as the data set itself does: its root, its backend, links followed."""

    def __init__(self, dataset: dict) -> None:
        self.root = dataset.get('data_root') or ''
        self.backend_args = dataset.get('backend_args')

    def path(self, entry: str) -> str:
        """An entry below the root, or as it is where it is absolute."""
        return entry if is_abs(entry) else osp.join(self.root, entry)

    def ask(self, question: str, path: str, **arguments: Any) -> Any:
        """Call a function of :mod:`mmengine.fileio`; None where the backend has no answer."""
        try:
            answer = getattr(fileio, question)(path, backend_args=self.backend_args, **arguments)
            return set(answer) if question == 'list_dir_or_file' else answer
        except (AttributeError, NotImplementedError):
            return None
        except FileNotFoundError:
            return set() if question == 'list_dir_or_file' else None
        except Exception as error:  # a backend raises what it likes
            raise ConfigOverrideError(f'"{path}" cannot be read: {reason(error)}') from error

    def lines(self, path: str) -> list[str] | None:
        """Lines of a text file that are not empty; None where the backend cannot give it."""
        text = self.ask('get_text', path)
        return None if text is None else [line for line in text.split('\n') if line]

    def names(self, folder: str, suffix: str | None = None, recursive: bool = False) -> set[str] | None:
        """Files in a folder, relative to it; None where the backend cannot list."""
        return self.ask('list_dir_or_file', folder, list_dir=False, suffix=suffix, recursive=recursive)


def _check_pairs(where: str, files: _Files, dataset: dict, kind: type) -> None:
    """Check a folder-based segmentation data set: has images, each with its annotation."""
    prefix = dataset.get('data_prefix') or {}
    image_suffix, label_suffix = (
        default_of(kind, k) if dataset.get(k) is None else dataset[k] for k in ('img_suffix', 'seg_map_suffix')
    )
    if not prefix.get('img_path') or dataset.get('ann_file') or not isinstance(image_suffix, str):
        return
    folder = files.path(prefix['img_path'])
    found = files.names(folder, image_suffix, recursive=True)
    if found is None:
        return
    if not found:
        raise ConfigOverrideError(f'"{folder}" has no *{image_suffix} images ({where}).')
    if prefix.get('seg_map_path') not in _entries(dataset) or not isinstance(label_suffix, str):
        return
    labels = files.path(prefix['seg_map_path'])
    present = files.names(labels, label_suffix, recursive=True)
    needed = {name[: -len(image_suffix)] + label_suffix for name in found}
    lacking = sorted(needed - present) if present is not None else []
    if lacking:
        raise ConfigOverrideError(
            f'{len(lacking)} of {len(found)} images of "{folder}" have no annotation, the first '
            f'is "{osp.join(labels, lacking[0])}" ({where}).'
        )


def _check_listed(where: str, files: _Files, dataset: dict, kind: type) -> None:
    """Check a detection data set with a list of images in VOC's or COCO's format."""
    if not dataset.get('ann_file'):
        return
    listing = files.path(dataset['ann_file'])
    prefix = dataset.get('data_prefix') or {}
    is_coco = any(base.__name__ == 'CocoDataset' for base in inspect.getmro(kind))
    images = _coco_images(listing, files, where) if is_coco else files.lines(listing)
    if images is None:
        return
    if is_coco:
        needed = [('missing', files.path(prefix.get('img', '')), images)]
    else:
        folder = files.path(prefix.get('sub_data_root', ''))
        image_folder = osp.join(folder, dataset.get('img_subdir', 'JPEGImages'))
        label_folder = osp.join(folder, dataset.get('ann_subdir', 'Annotations'))
        needed = [('missing', image_folder, [f'{name}.jpg' for name in images])]
        needed.append(('without annotation', label_folder, [f'{name}.xml' for name in images]))
    if not images:
        raise ConfigOverrideError(f'"{listing}" lists no images ({where}).')
    for lack, folder, names in needed:
        paths = [osp.join(folder, name) for name in names]
        # One listing of a folder is much faster than as many questions, above all over a network.
        present = {parent: files.names(parent) for parent in {osp.dirname(path) for path in paths}}

        def is_missing(path: str, present: dict[str, set[str] | None] = present) -> bool:
            known = present[osp.dirname(path)]
            # Listings leave hidden files out.
            return known is not None and osp.basename(path) not in known and osp.basename(path)[:1] != '.'

        lacking = [path for path in paths if is_missing(path)]
        if lacking:
            raise ConfigOverrideError(
                f'{len(lacking)} of {len(names)} images that "{listing}" lists are {lack}, the '
                f'first is "{lacking[0]}" ({where}).'
            )


def _coco_images(listing: str, files: _Files, where: str) -> list[str] | None:
    """File names in a COCO annotation file, without the many seconds that parsing takes; None if it cannot be had."""
    try:
        with fileio.get_local_path(listing, backend_args=files.backend_args) as path, open(path, 'rb') as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ConfigOverrideError(f'"{listing}" is empty ({where}).')
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                if not text[-64:].rstrip().endswith(b'}'):
                    raise ConfigOverrideError(
                        f'"{listing}" ends in the middle, as after an interrupted download ({where}).'
                    )
                return [json.loads(name) for name in re.findall(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', text)]
    except (AttributeError, NotImplementedError):  # the backend gives no files
        return None
    except OSError as error:
        raise ConfigOverrideError(f'"{listing}" cannot be read ({where}): {error.strerror}.') from error


def dataset_class(dataset: dict, scope: str | None) -> type | None:
    """The class of a data set in the registry of a framework; None if nothing has that name."""
    kind = dataset.get('type')
    if not isinstance(kind, str):
        return kind
    with DATASETS.switch_scope_and_registry(scope) as registry, contextlib.suppress(RuntimeError):
        return registry.get(kind)
    return None


def default_of(kind: Any, name: str) -> Any:
    """Default of a class's argument, None without one; a class that passes ``**kwargs`` on inherits its bases'."""
    for base in inspect.getmro(kind) if isinstance(kind, type) else ():
        parameters = inspect.signature(vars(base)['__init__']).parameters if '__init__' in vars(base) else {}
        if name in parameters:
            default = parameters[name].default
            return None if default is inspect.Parameter.empty else default
    return None


def set_batch_size(cfg: Config, batch_size: int) -> None:
    """Set the number of training images per process; the learning rate stays, see ``auto_scale_lr``.

    Raises:
        ConfigOverrideError: The config has no training data loader.
    """
    if not cfg.get('train_dataloader'):
        raise ConfigOverrideError('--batch-size has no effect: this config does not train.')
    cfg.train_dataloader.batch_size = batch_size


def set_num_workers(cfg: Config, num_workers: int) -> None:
    """Set the number of worker processes of every data loader; with none, options that need them go."""
    for name in LOADERS:
        loader = cfg.get(name)
        if loader:
            loader.num_workers = num_workers
            if num_workers == 0:
                loader.persistent_workers = False
                for key in ('prefetch_factor', 'timeout', 'multiprocessing_context'):
                    loader.pop(key, None)
