"""Checks of what is loaded, and of the loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image
from torch.utils.data import DataLoader

from slak_mm.cli.errors import explain
from slak_mm.engine import DataError, FiniteLossHook
from slak_mm.engine.samples import check_loads

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def pipeline(scope, *annotations):
    """Loads an image and its annotations as a training pipeline for 20 classes does."""
    with DefaultScope.overwrite_default_scope(scope):
        transforms = Compose([dict(type='LoadImageFromFile'), *annotations])
    check_loads(transforms, True, 20)
    return transforms


@pytest.fixture
def load_labels(tmp_path):
    """Load an image and its label map, given as an array or as bytes of a file."""

    def load(labels, image=PIXELS, orientation=1, **results):
        exif = Image.Exif()
        exif[0x0112] = orientation
        paths = dict(img_path=str(tmp_path / 'a.jpg'), seg_map_path=str(tmp_path / 'a.png'))
        for path, content in zip(paths.values(), (image, labels)):
            if isinstance(content, bytes):
                (tmp_path / path).write_bytes(content)
            else:
                Image.fromarray(content).save(path, exif=exif if path.endswith('jpg') else None)
        results = dict(paths, seg_fields=[], reduce_zero_label=False) | results
        return pipeline('mmseg', dict(type='LoadAnnotations'))(results)

    return load


def labels(value=0, shape=(48, 64), dtype=np.uint8):
    return np.full(shape, value, dtype)


def test_what_fits_passes(load_labels):
    for kept in (labels(19), labels(255), labels(19, dtype=np.uint16)):
        assert (load_labels(kept)['gt_seg_map'] == kept).all()
    assert (load_labels(labels(20), reduce_zero_label=True)['gt_seg_map'] == 19).all()
    assert (load_labels(labels(0), reduce_zero_label=True)['gt_seg_map'] == 255).all()


@pytest.mark.parametrize(
    'arguments,message',
    [
        (dict(labels=labels(20)), r'a.png" has the label 20, .* 20 classes \(labels 0 to 19'),
        (dict(labels=labels(21), reduce_zero_label=True), r'a.png" has the label 21, .*\(labels 1 to 20'),
        (dict(labels=labels(257, dtype=np.uint16)), 'a.png" has the label 257'),
        (dict(labels=labels(0, (48, 64, 3))), 'a.png" has 3 channels.*colors'),
        (dict(labels=labels(0, (64, 48))), 'a.jpg" is loaded 64x48 .*a.png" is 48x64'),
        (dict(labels=labels(0, (24, 32))), 'a.jpg" is loaded 64x48 .*a.png" is 32x24'),
        (dict(labels=labels(), orientation=6), 'a.jpg" is loaded 48x64 .* 64x48.*color_ignore_orientation'),
        (dict(labels=b''), 'The annotation .*a.png cannot be read'),
        (dict(labels=b'\x89PNG\r\n\x1a\n'), 'The annotation .*a.png cannot be read'),
        (dict(labels=labels(), image=b''), 'The image .*a.jpg cannot be read'),
        (dict(labels=labels(), image=b'\xff\xd8 no image'), 'The image .*a.jpg cannot be read'),
    ],
)
def test_label_maps_are_refused_by_name(load_labels, arguments, message):
    with pytest.raises(DataError, match=message):
        load_labels(**arguments)


def load_boxes(path, *boxes, ignore_flag=0, **results):
    instances = [dict(bbox=list(box), bbox_label=0, ignore_flag=ignore_flag) for box in boxes]
    load = pipeline('mmdet', dict(type='LoadAnnotations', with_bbox=True))
    return load(dict(dict(img_path=str(path), instances=instances, height=48, width=64), **results))


@pytest.mark.parametrize(
    'boxes,results,message',
    [
        ([(1, 2, 30, 40), (5, 5, 5, 40)], {}, r'a.jpg" has the box \(5, 5, 5, 40\), which has no area'),
        ([(5, 30, 20, 10)], {}, 'no area'),
        ([(70, 5, 90, 40)], {}, 'within the image of 64x48'),
        ([(float('nan'), 5, 20, 40)], {}, 'nan'),
        ([(5, 5, float('inf'), 40)], {}, 'inf'),
        ([], dict(height=64, width=48), 'a.jpg" is loaded 64x48 .* 48x64'),
    ],
)
def test_boxes_are_refused_by_name(tmp_path, boxes, results, message):
    pytest.importorskip('mmdet')
    path = tmp_path / 'a.jpg'
    Image.fromarray(PIXELS).save(path)
    assert len(load_boxes(path, (0, 0, 64, 48), (-5, 3, 90, 40))['gt_bboxes']) == 2
    load_boxes(path, (5, 5, 5, 40), ignore_flag=1)
    with pytest.raises(DataError, match=message):
        load_boxes(path, *boxes, **results)


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.95])
def test_images_that_end_in_the_middle_are_refused(tmp_path, suffix, share):
    path = tmp_path / f'a.{suffix}'
    exif = Image.Exif()
    exif[0x010E] = 'with an end marker as of a thumbnail: \xff\xd9'
    Image.fromarray(PIXELS).save(path, exif=exif, progressive=True)
    pipeline('mmseg')(dict(img_path=str(path)))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=f'The image .*a.{suffix} cannot be read'):
        pipeline('mmseg')(dict(img_path=str(path)))


@pytest.mark.parametrize('color_type,passes', [('color', False), ('color_ignore_orientation', True)])
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_the_advice_for_rotated_images_works(tmp_path, color_type, passes, backend):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / 'a.jpg', exif=exif)
    load = Compose([dict(type='LoadImageFromFile', color_type=color_type, imdecode_backend=backend)])
    check_loads(load)
    results = dict(img_path=str(tmp_path / 'a.jpg'), height=48, width=64)
    if passes:
        assert load(results)['img'].shape == (48, 64, 3)
    else:
        with pytest.raises(DataError, match="set the color_type .* 'color_ignore_orientation'"):
            load(results)


def test_a_data_worker_says_the_sentence(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(b'')
    transforms = pipeline('mmseg')
    samples = [dict(img_path=str(tmp_path / 'a.jpg'))]

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return transforms(samples[index])

    for workers in (0, 1):
        with pytest.raises(DataError) as error:
            list(DataLoader(Samples(), num_workers=workers))
        message = explain(error.value)
        assert message.startswith(f'The image {tmp_path / "a.jpg"} cannot be read') and '\n' not in message


def test_a_loss_that_is_not_finite_stops_the_run():
    hook, runner = FiniteLossHook(), SimpleNamespace(iter=7)
    for name in ('first', 'second'):
        batch = dict(inputs=[torch.zeros(1)], data_samples=[SimpleNamespace(img_path=f'{name}.jpg')])
        if name == 'first':
            hook.after_train_iter(runner, 0, batch, dict(loss=torch.tensor(1.0), acc=torch.tensor(float('nan'))))
    for value in ('nan', 'inf'):
        with pytest.raises(
            FloatingPointError, match=rf'iteration 8 \(loss is {value}\).*second.jpg.*before.*first.jpg'
        ):
            hook.after_train_iter(runner, 1, batch, dict(loss=torch.tensor(float(value))))
