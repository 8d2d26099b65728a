"""Data that the frameworks read is not refused, wherever it lies; data that is missing there is."""

import os
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.fileio import BaseStorageBackend, LocalBackend, register_backend

from slak_mm import cli


@register_backend('toy', prefixes='toy', force=True)
class ToyBackend(LocalBackend):
    """A folder under the address toy://; asks for a key."""

    def __init__(self, key=None):
        assert key == 'open'

    def local(self, path):
        return str(path).replace('toy:/', '', 1)

    def isdir(self, path):
        return os.path.isdir(self.local(path))

    def exists(self, path):
        return os.path.exists(self.local(path))

    def get_text(self, path, encoding='utf-8'):
        return Path(self.local(path)).read_text(encoding)

    def get_local_path(self, path):
        return super().get_local_path(self.local(path))

    def list_dir_or_file(self, path, *args, **kwargs):
        return super().list_dir_or_file(self.local(path), *args, **kwargs)


@register_backend('blind', prefixes='blind', force=True)
class BlindBackend(BaseStorageBackend):
    """Gives what is asked for and lists nothing."""

    def get(self, path, encoding=None):
        raise FileNotFoundError(path)

    get_text = get


LAYOUTS = dict(  # config, fixture with the data, a file without which it is refused
    upernet_slak_t_ade20k=('demo_data', 'images/training', 'annotations/training/{}.png'),
    faster_rcnn_slak_t_voc07=('demo_voc', 'VOC2007/JPEGImages', 'VOC2007/JPEGImages/{}.jpg'),
    cascade_mask_rcnn_slak_t_coco=('demo_coco', 'train2017', 'train2017/{}.jpg'),
)


def absolute(cfg, root):
    for _, dataset in cli.datasets_of(cfg):
        dataset.data_root = None if dataset.get('ann_file') else '/somewhere/else'
        for key, value in dataset.data_prefix.items():
            dataset.data_prefix[key] = f'{root}/{value}'
        if dataset.get('ann_file'):
            dataset.ann_file = f'{root}/{dataset.ann_file}'


def at_address(cfg, root):
    for _, dataset in cli.datasets_of(cfg):
        dataset.backend_args = dict(key='open')
    cli.set_data_root(cfg, f'toy:/{root}')


PLACES = dict(
    path=lambda cfg, root: cli.set_data_root(cfg, str(root)),
    relative=lambda cfg, root: cli.set_data_root(cfg, os.path.relpath(root)),
    absolute=absolute,
    address=at_address,
)


@pytest.fixture(params=LAYOUTS)
def case(request, config_path, tmp_path):
    """A config, its data with one folder behind links, and a file that is needed."""
    fixture, linked, needed = LAYOUTS[request.param]
    if fixture != 'demo_data':
        pytest.importorskip('mmdet')
    root = shutil.copytree(request.getfixturevalue(fixture), tmp_path / 'data')
    (root / linked).rename(tmp_path / 'elsewhere')
    if fixture == 'demo_data':  # the images in a linked folder below their own
        (root / linked).mkdir()
        (root / 'annotations/training').rename(root / 'annotations/x')
        (root / 'annotations/training').mkdir()
        (root / 'annotations/x').rename(root / 'annotations/training/sub')
        linked, needed = f'{linked}/sub', needed.replace('{}', 'sub/{}')
    (root / linked).symlink_to(tmp_path / 'elsewhere')
    name = sorted((tmp_path / 'elsewhere').glob('*.jpg'))[0].stem
    return Config.fromfile(Path(config_path).with_name(f'{request.param}.py')), root, root / needed.format(name)


@pytest.mark.parametrize('place', PLACES)
def test_what_is_there_is_found_and_what_lacks_is_named(case, place):
    cfg, root, needed = case
    PLACES[place](cfg, root)
    cli.check_data(cfg, ('train_dataloader',))
    needed.unlink()
    with pytest.raises(cli.ConfigOverrideError, match=f'1 of .* the first is ".*{needed.name}"'):
        cli.check_data(cfg, ('train_dataloader',))


def test_what_cannot_be_listed_is_not_asked_for(case):
    cfg, *_ = case
    cli.set_data_root(cfg, 'blind://bucket')
    cli.check_data(cfg)


def test_a_storage_that_fails_is_named(case):
    cfg, root, _ = case
    with pytest.raises(cli.ConfigOverrideError, match='toy:/.*cannot be read: AssertionError'):
        cli.set_data_root(cfg, f'toy:/{root}')


def test_labels_that_no_transform_loads_are_not_needed(config_path, demo_data):
    cfg = Config.fromfile(config_path)
    cli.set_data_root(cfg, demo_data)
    dataset = cfg.test_dataloader.dataset
    dataset.data_prefix.seg_map_path = 'nowhere'
    with pytest.raises(cli.ConfigOverrideError, match='nowhere" does not exist'):
        cli.check_data(cfg, ('test_dataloader',))
    dataset.pipeline = [step for step in dataset.pipeline if step.type != 'LoadAnnotations']
    cli.check_data(cfg, ('test_dataloader',))
