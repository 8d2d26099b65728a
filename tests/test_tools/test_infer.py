"""``tools/infer.py``: overlays with legends, of images as the config reads them."""

import importlib.util
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.fileio.backends import LocalBackend, backends, prefix_to_backends
from PIL import Image

from slak_mm.cli import ConfigOverrideError
from slak_mm.cli.overlay import displayable
from slak_mm.cli.video import Video, writing_video


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
def arguments(config_path, checkpoint, tiny, tmp_path):
    def arguments(*images, **options):
        out = ['--out-dir', tmp_path / 'out', '--device cpu']
        out += [f'--{key.replace("_", "-")} {value}' for key, value in options.items()]
        # Small scales, or the images would be enlarged to 512 pixels.
        scales = ['test_dataloader.dataset.pipeline.1.scale=(256,64)', 'model.test_cfg.mode=whole']
        return [config_path, checkpoint, *images, *out, '--cfg-options', *tiny, *scales]

    return arguments


@pytest.fixture
def run(call_tool, arguments):
    return lambda *images, **options: call_tool('infer', *arguments(*images, **options))


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
    assert re.search(r'error: 1 of 2 files could not be read: .*broken.jpg', result.err)
    assert (tmp_path / 'out' / 'fine.png').is_file()
    assert not (tmp_path / 'out' / 'broken.png').exists()


def test_nothing_to_do_is_an_error(run, tmp_path):
    (tmp_path / 'empty').mkdir()
    result = run(tmp_path / 'empty')
    assert result.code == 1 and 'has no images or videos' in result.err
    result = run(tmp_path / 'nowhere.jpg')
    assert result.code == 1 and 'no image, video or folder' in result.err


# Pixels (H, W, C) and EXIF orientation of an image, and how a config loads it.
LOADERS = {
    '16 bits': (np.uint16, (64, 64), 1, ['color_type=unchanged', 'to_float32=True']),
    'alpha': (np.uint8, (64, 64, 4), 1, ['color_type=unchanged']),
    'gray': (np.uint8, (64, 64, 3), 1, ['color_type=grayscale']),
    'rotated': (np.uint8, (64, 64, 3), 6, []),
    'as stored': (np.uint8, (64, 64, 3), 6, ['color_type=color_ignore_orientation']),
    'pillow': (np.uint8, (64, 64), 3, ['imdecode_backend=pillow']),
}
VOC = Path(__file__).parents[2] / 'configs' / 'faster_rcnn_slak_t_voc07.py'
OBJECT = (
    '<annotation><object><name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>'
    '</object></annotation>'
)


@pytest.fixture
def received(monkeypatch):
    """What a model's preprocessor gets; tools stop there. Weights do not matter."""
    seen = []

    def forward(self, data, training=False):
        seen.append(data['inputs'][0])
        raise ConfigOverrideError('seen')

    for package, name in (('mmseg', 'SegDataPreProcessor'), ('mmdet', 'DetDataPreprocessor')):
        if importlib.util.find_spec(package):
            monkeypatch.setattr(getattr(importlib.import_module(f'{package}.models'), name), 'forward', forward)
    monkeypatch.setattr('slak_mm.checkpoints.read_checkpoint', lambda source: {})
    monkeypatch.setattr('slak_mm.engine.hooks.load_whole_model', lambda *args: None)
    return seen


@pytest.mark.parametrize('loader', LOADERS)
@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
def test_reads_what_the_test_tool_reads(call_tool, received, request, tmp_path, scope, loader):
    dtype, shape, orientation, options = LOADERS[loader]
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if scope == 'mmseg':
        config, tiny = request.getfixturevalue('config_path'), request.getfixturevalue('tiny')
        image = tmp_path / 'images/validation/a.jpg'
        label = tmp_path / 'annotations/validation/a.png'
        label.parent.mkdir(parents=True)
        Image.fromarray(np.ones((64, 64), np.uint8)).save(label)
    else:
        pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")
        config, tiny = VOC, request.getfixturevalue('tiny_detector')(VOC.stem)
        image = tmp_path / 'VOC2007/JPEGImages/a.jpg'
        for name, text in (('Annotations/a.xml', OBJECT), ('ImageSets/Main/test.txt', 'a')):
            path = tmp_path / 'VOC2007' / name
            path.parent.mkdir(parents=True)
            path.write_text(text)
    image.parent.mkdir(parents=True)
    # What a file is called does not matter to decoders.
    Image.fromarray(pixels).save(image, format='PNG', exif=exif)
    tiny = [*tiny, *(f'test_dataloader.dataset.pipeline.0.{option}' for option in options)]
    extra = ['--data-root', tmp_path, '--num-workers', '0', '--work-dir', tmp_path / 'w', '--cfg-options', *tiny]
    calls = [['test', 'none', *extra], ['infer', 'none', image, '--device', 'cpu', '--cfg-options', *tiny]]
    for tool, *arguments in calls + [['test', 'none', '--tta', *extra]] * (scope == 'mmseg'):
        result = call_tool(tool, config, *arguments)
        assert result.err.endswith('error: seen\n'), result.text
    by_test, by_infer, *by_tta = received
    assert torch.equal(by_test, by_infer)
    assert by_test.shape[0] == {'16 bits': 1, 'alpha': 4, 'gray': 1}.get(loader, 3)
    for first in by_tta:  # of another scale
        assert first.shape[0] == by_test.shape[0]
        assert float(first.float().mean()) == pytest.approx(float(by_test.float().mean()), rel=0.05)


def test_an_address_is_read_by_the_backend_of_the_config(run, tmp_path, monkeypatch):
    class Attic(LocalBackend):
        def get(self, filepath):
            return super().get(tmp_path / filepath.removeprefix('attic://'))

    monkeypatch.setitem(backends, 'attic', Attic)
    monkeypatch.setitem(prefix_to_backends, 'attic', Attic)
    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(tmp_path / 'gray.png')
    assert run('attic://gray.png', opacity='0').code == 0
    assert (np.asarray(Image.open(tmp_path / 'out' / 'gray.png'))[:50, :60] == 90).all()


@pytest.mark.parametrize(
    'image,picture',
    [
        (np.array([[1, 200]], np.uint8), [[[1] * 3, [200] * 3]]),
        (np.array([[[1, 2, 3, 4]]], np.uint8), [[[3, 2, 1]]]),
        (np.array([[0, 32768, 65535]], np.uint16), [[[0] * 3, [128] * 3, [255] * 3]]),
        (np.array([[1.0, 200.0]], np.float32), [[[1] * 3, [200] * 3]]),
    ],
)
def test_pictures_have_8_bit_colors(image, picture):
    assert displayable(image).tolist() == picture


def movie(path, count, size=(64, 80)):
    with writing_video(path, 12.5, size) as write:
        for _ in range(count):
            write(np.full((*size, 3), 90, np.uint8))
    return path


def coco(path):
    """Results and the data set that was written beside them."""
    annotations = pytest.importorskip('pycocotools.coco').COCO(str(path.with_name(f'{path.stem}_dataset.json')))
    return annotations.loadRes(str(path))


def test_video_in_and_out(run, tmp_path):
    from mmseg.datasets import ADE20KDataset

    result = run(movie(tmp_path / 'clip.mp4', 9), json=tmp_path / 'out.json')
    assert result.code == 0 and 'clip.mp4: 9 frames' in result.out, result.text
    assert '100%' in result.err
    video = Video(str(tmp_path / 'out' / 'clip.mp4'))
    assert (video.fps, video.size, len(video)) == (12.5, (64, 80), 9)
    sky = ADE20KDataset.METAINFO['palette'][2]
    for frame in video:
        assert np.abs(frame[..., ::-1] - (90 + np.array(sky)) / 2).mean() < 5
    results = coco(tmp_path / 'out.json')
    images = results.loadImgs(results.getImgIds())
    assert {image['video'] for image in images} == {str(tmp_path / 'clip.mp4')}
    assert [image['frame_id'] for image in images] == list(range(9))
    assert len(results.anns) == 9
    for annotation in results.anns.values():
        assert results.loadCats(annotation['category_id'])[0]['name'] == 'sky'
        assert results.annToMask(annotation).all() and annotation['segmentation']['size'] == [64, 80]


def test_damaged_video_is_named(run, tmp_path):
    (tmp_path / 'in').mkdir()
    damaged = movie(tmp_path / 'in' / 'a.mp4', 9)
    damaged.write_bytes(damaged.read_bytes()[:500])
    movie(tmp_path / 'in' / 'b.mp4', 2)
    result = run(tmp_path / 'in')
    assert result.code == 1 and re.search('error: 1 of 2 files could not be read: .*a.mp4$', result.err.strip())
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['b.mp4']


def test_an_interrupt_leaves_what_is_done(start_tool, arguments, tmp_path):
    process = start_tool('infer', *arguments(movie(tmp_path / 'clip.mp4', 3000), json=tmp_path / 'out.json'))
    begin = time.monotonic()
    while not list((tmp_path / 'out').glob('.*.mp4')):
        assert process.poll() is None and time.monotonic() - begin < 120
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in output, output
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['clip.mp4']
    count = len(list(Video(str(tmp_path / 'out' / 'clip.mp4'))))
    assert 0 < count < 3000 and count <= len(coco(tmp_path / 'out.json').getImgIds()) <= count + 1


def test_windows_of_a_large_image(run, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (200, 150, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / 'large.png')
    result = run(tmp_path / 'large.png', window='64', stride='40x48', json=tmp_path / 'out.json')
    assert result.code == 0 and 'sky 100.0%' in result.out, result.text
    [annotation] = coco(tmp_path / 'out.json').anns.values()
    assert annotation['area'] == 200 * 150


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(stride='40'), 'there is none'),
        (dict(window='40', stride='41'), 'parts of an image are left out'),
        (dict(ann_file='a.json'), 'there is none'),
        (dict(json='out.json', ann_file='nowhere.json'), '"nowhere.json" is no annotation file'),
    ],
)
def test_options_that_do_not_fit(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (60, 60)).save('a.png')
    result = run('a.png', **options)
    assert result.code == 1 and message in result.err and not (tmp_path / 'out').exists()


def test_sources_are_not_overwritten(call_tool, arguments, tmp_path):
    (tmp_path / 'out').mkdir()
    path = movie(tmp_path / 'out' / 'clip.mp4', 2)
    before = path.read_bytes()
    result = call_tool('infer', *arguments(path), code=1)
    assert 'would be overwritten' in result.err and path.read_bytes() == before
