"""Data that cannot be used ends a run with a sentence that names the file."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image


def fill(path, value, size=None):
    Image.new('L', size or Image.open(path).size, value).save(path)


def colors(path):
    Image.open(path).convert('RGB').save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b'')


@pytest.fixture
def data(demo_data, tmp_path):
    return shutil.copytree(demo_data, tmp_path / 'data')


@pytest.fixture
def run(train, data):
    """Train on a copy of the data, with a data worker."""
    how = '--from-scratch --max-iters 3 --num-workers 1'
    return lambda *options: train('--data-root', data, how, options=options, code=1).err


@pytest.mark.parametrize(
    'kind,change,message',
    [
        ('annotations', lambda path: fill(path, 200), 'has the label 200'),
        ('annotations', lambda path: fill(path, 1, (20, 30)), 'is 20x30'),
        ('annotations', colors, 'has 3 channels'),
        ('annotations', empty, 'cannot be read'),
        ('images', cut, 'cannot be read'),
        ('images', empty, 'cannot be read'),
    ],
)
def test_one_sentence_with_the_file(run, data, kind, change, message):
    for path in (data / kind / 'training').iterdir():
        change(path)
    errors = [line for line in run().splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and str(data / kind / 'training') in errors[0] and message in errors[0]


def test_a_rotated_image_with_boxes(call_tool, demo_voc, tiny_detector, tmp_path):
    pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")
    config = Path(__file__).parents[2] / 'configs' / 'faster_rcnn_slak_t_voc07.py'
    data = tmp_path / 'data'
    shutil.copytree(demo_voc, data)
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (data / 'VOC2007' / 'JPEGImages').iterdir():
        image = Image.open(path)
        image.resize((96, 64)).save(path, exif=exif)
    for path in (data / 'VOC2007' / 'Annotations').iterdir():
        path.write_text(path.read_text().replace('<height>96</height>', '<height>64</height>'))
    arguments = [config, '--data-root', data, '--from-scratch --max-iters 1 --img-scale 64 --batch-size 2']
    arguments += ['--num-workers 1', '--work-dir', tmp_path, '--cfg-options', *tiny_detector(config.stem)]
    result = call_tool('train', *arguments, code=1)
    assert re.search(r'error: ".*jpg" is loaded 64x96 .* 96x64.*color_ignore_orientation', result.err)
    color = 'dataset.pipeline.0.color_type=color_ignore_orientation'
    seldom = ['train_cfg.val_begin=9', 'train_cfg.val_interval=9']
    call_tool('train', *arguments, f'train_dataloader.{color}', f'val_dataloader.{color}', *seldom, code=0)


def test_a_run_stops_when_its_loss_is_not_a_number(run, data):
    err = run('optim_wrapper.optimizer.lr=1e30', 'param_scheduler=[]', 'custom_hooks=[]')
    names = [str(path) for path in (data / 'images' / 'training').iterdir()]
    error = err[err.index('error: ') :]
    assert 'The loss is not finite in iteration' in error and sum(name in error for name in names) >= 2
