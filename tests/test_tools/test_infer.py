"""``tools/infer.py``: overlays with legends."""

import re

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope='module')
def checkpoint(build_tiny, tmp_path_factory):
    """A tiny model that calls everything sky (class 2), as a file."""
    model = build_tiny()
    with torch.no_grad():
        model.decode_head.conv_seg.weight.zero_()
        model.decode_head.conv_seg.bias.zero_()
        model.decode_head.conv_seg.bias[2] = 1
    path = tmp_path_factory.mktemp('weights') / 'sky.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.fixture
def run(call_tool, config_path, checkpoint, tiny, tmp_path):
    def run(*images, **options):
        extra = [word for key, value in options.items() for word in (f'--{key}', value)]
        # Small scales, or the images would be enlarged to 512 pixels.
        return call_tool(
            'infer',
            config_path,
            checkpoint,
            *images,
            '--out-dir',
            tmp_path / 'out',
            '--device',
            'cpu',
            *extra,
            '--cfg-options',
            *tiny,
            'test_pipeline.1.scale=(256,64)',
            'model.test_cfg.mode=whole',
        )

    return run


def test_overlay_of_images_of_any_size(run, tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / 'in'
    (folder / 'deeper').mkdir(parents=True)
    sizes = {'a.jpg': (40, 71), 'deeper/b.png': (97, 33), 'a.png': (64, 64)}
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / 'notes.txt').write_text('no image')
    result = run(folder)
    assert result.code == 0, result.text
    found = sorted(path.relative_to(tmp_path / 'out').as_posix() for path in (tmp_path / 'out').rglob('*.png'))
    # a.jpg and a.png have one name but for the suffix.
    assert found == ['a.png', 'a_2.png', 'deeper/b.png']
    assert '[3/3]' in result.out and result.out.count('sky 100.0%') == 3
    from mmseg.datasets import ADE20KDataset

    sky = np.array(ADE20KDataset.METAINFO['palette'][2])
    picture = np.asarray(Image.open(tmp_path / 'out' / 'deeper' / 'b.png')).astype(int)
    image = np.asarray(Image.open(folder / 'deeper' / 'b.png')).astype(int)
    assert picture.shape[0] >= 97 and picture.shape[1] > 33
    assert np.abs(picture[:97, :33] - (image + sky) / 2).max() <= 1
    assert (picture[:, 33:] == sky).all(-1).any()


def test_opacity(run, tmp_path):
    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(tmp_path / 'gray.png')
    assert run(tmp_path / 'gray.png', opacity='0').code == 0
    picture = np.asarray(Image.open(tmp_path / 'out' / 'gray.png'))
    assert (picture[:50, :60] == 90).all()
    assert run(tmp_path / 'gray.png', opacity='1.5').code == 2


def test_unreadable_images_are_named_and_skipped(run, tmp_path):
    (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8 no image')
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / 'fine.jpg')
    result = run(tmp_path / 'broken.jpg', tmp_path / 'fine.jpg')
    assert result.code == 1
    assert re.search(r'error: 1 of 2 images could not be read: .*broken.jpg', result.err)
    assert (tmp_path / 'out' / 'fine.png').is_file()
    assert not (tmp_path / 'out' / 'broken.png').exists()


def test_nothing_to_do_is_an_error(run, tmp_path):
    (tmp_path / 'empty').mkdir()
    result = run(tmp_path / 'empty')
    assert result.code == 1 and 'has no images' in result.err
    result = run(tmp_path / 'nowhere.jpg')
    assert result.code == 1 and 'no image or folder' in result.err
