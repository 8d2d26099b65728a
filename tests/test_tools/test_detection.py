"""The detection configs through ``tools/train.py``, ``test.py`` and ``infer.py``, made tiny."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, officially_named, parsed
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from slak_mm import cli

pytest.importorskip('mmdet')
pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")

ROOT = Path(__file__).resolve().parents[2]
# With a tiny backbone the other sizes and schedules are no different.
VOC = ('slak_t_voc07', 'slak_t_voc0712', 'shiftwise_t_voc07', 'convnext_t_voc07')
COCO = ('slak_t_coco', 'shiftwise_t_coco', 'convnext_t_coco')
NAMES = [*(f'faster_rcnn_{name}' for name in VOC), *(f'cascade_mask_rcnn_{name}' for name in COCO)]
REAL = ROOT.parent / 'shared' / 'data'
# Untrained, a model is sure of nothing: keep all boxes.
ALL_BOXES = 'model.test_cfg.rcnn.score_thr=0.'


@pytest.fixture
def arguments(demo_voc, demo_coco, tmp_path):
    """Config and arguments of a run on small generated images, by the config's name."""

    def make(name, work_dir='work'):
        data = ['--data-root', demo_voc if 'voc' in name else demo_coco, '--img-scale 96x64 --num-workers 0']
        return [ROOT / 'configs' / f'{name}.py', *data, '--work-dir', tmp_path / work_dir]

    return make


TRAIN = '--from-scratch --batch-size 2 --seed 3 --max-iters'


def metrics(text, stage):
    """Metrics by their names, of the last line in which a stage reports some."""
    line = re.findall(rf'(?:Iter|Epoch)\({stage}\).*(?:mAP).*', text)[-1]
    return {name: float(value) for name, value in re.findall(r'((?:coco|pascal_voc)/\w+): (-?[\d.]+)', line)}


@pytest.mark.parametrize('name', NAMES)
def test_trains_and_tests(call_tool, arguments, tiny_detector, tmp_path, name):
    options = [*tiny_detector(name), ALL_BOXES]
    often = ['train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2']
    result = call_tool('train', *arguments(name), f'{TRAIN} 2', '--cfg-options', *options, *often, code=0)
    assert 'Iter(train) [2/2]' in result.text and 'FROM SCRATCH' in result.text
    # The heads of the cascade and the backbone, in one line.
    places = 1 if 'faster' in name else 4
    assert result.text.count(f'SyncBN is replaced by BN in {places} places') == 1
    trained = metrics(result.text, 'val')
    judged = 'pascal_voc/mAP pascal_voc/AP50' if 'voc' in name else 'coco/bbox_mAP coco/segm_mAP coco/segm_mAP_50'
    assert set(trained) >= set(judged.split())
    assert 0 <= min(value for key, value in trained.items() if key.endswith('mAP')) < 0.5

    weights, out = tmp_path / 'work' / 'iter_2.pth', ['--out', tmp_path / 'out.pkl', '--cfg-options']
    result = call_tool('test', *arguments(name, 'test'), weights, *out, *options, code=0)
    assert metrics(result.text, 'test') == trained
    predictions = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert len(predictions) == 2
    for prediction in predictions:
        assert tuple(prediction['ori_shape']) == (96, 96)
        assert max(prediction['img_shape']) == 64
        assert ('masks' in prediction['pred_instances']) == ('cascade' in name)


@pytest.mark.parametrize('name', ['faster_rcnn_slak_t_voc07', 'cascade_mask_rcnn_slak_t_coco'])
def test_learns_and_draws(call_tool, arguments, tiny_detector, tmp_path, demo_voc, demo_coco, name):
    options = [*tiny_detector(name), 'model.backbone.drop_path_rate=0.', ALL_BOXES]
    often = ['train_cfg.val_interval=30', 'default_hooks.checkpoint.interval=30', 'optim_wrapper.optimizer.lr=0.002']
    result = call_tool('train', *arguments(name), f'{TRAIN} 30', '--cfg-options', *options, *often, code=0)
    losses = [float(loss) for loss in re.findall(r'Iter\(train\).* loss: ([\d.]+)', result.text)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    checkpoint = tmp_path / 'work' / 'iter_30.pth'

    shown = ['--show-dir', tmp_path / 'shown', '--cfg-options', *options]
    result = call_tool('test', *arguments(name, 'test'), checkpoint, *shown, code=0)
    expected = metrics(result.text, 'test')
    # mmdet puts the annotation and the detections side by side.
    pictures = sorted((tmp_path / 'shown').rglob('*.jpg')) or sorted((tmp_path / 'shown').rglob('*.png'))
    assert len(pictures) == 2
    assert {Image.open(path).size for path in pictures} == {(192, 96)}

    folder = Path(demo_voc, 'VOC2007/JPEGImages') if 'voc' in name else Path(demo_coco, 'val2017')
    images = sorted(folder.glob('*.jpg'))[-2:]
    scales = [f'{place}.1.scale=(96,64)' for place in ('test_pipeline', 'test_dataloader.dataset.pipeline')]
    drawn = ['--out-dir', tmp_path / 'drawn', '--device cpu --score-thr 0', '--cfg-options', *options, *scales]
    call_tool('infer', ROOT / 'configs' / f'{name}.py', checkpoint, *images, *drawn, code=0)
    for image in images:
        drawn = np.asarray(Image.open(tmp_path / 'drawn' / f'{image.stem}.png').convert('RGB'))
        before = np.asarray(Image.open(image))
        assert drawn.shape == before.shape and (drawn != before).any()

    # The same weights as the official code in mmdet 2.x saved them.
    official = dict(meta=dict(CLASSES=('a', 'b')), state_dict=officially_named(load(checkpoint)['state_dict']))
    torch.save(official, tmp_path / 'official.pth')
    again = [*arguments(name, 'test'), tmp_path / 'official.pth', '--cfg-options', *options]
    result = call_tool('test', *again, code=0)
    assert metrics(result.text, 'test') == expected


def test_json_is_what_the_metric_of_coco_writes(call_tool, arguments, tiny_detector, demo_coco, tmp_path):
    name = 'cascade_mask_rcnn_slak_t_coco'
    options = [*tiny_detector(name), ALL_BOXES]
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.merge_from_dict(parsed(options))
    cli.adapt_to_device(cfg, has_gpu=lambda: False)
    torch.manual_seed(0)
    torch.save(dict(state_dict=cli.build_model(cfg, cfg.model).state_dict()), tmp_path / 'random.pth')
    written = ['--cfg-options', *options, f'test_evaluator.outfile_prefix={tmp_path}/metric']
    call_tool('test', *arguments(name), tmp_path / 'random.pth', *written, code=0)
    expected = json.loads((tmp_path / 'metric.segm.json').read_text())
    boxes = [result['bbox'] for result in json.loads((tmp_path / 'metric.bbox.json').read_text())]

    config, files = arguments(name)[0], ['--json', tmp_path / 'out.json', '--out-dir', tmp_path / 'drawn']
    ids = ['--ann-file', Path(demo_coco, 'annotations/instances_val2017.json'), '--device cpu --img-scale 96x64']
    images = Path(demo_coco, 'val2017')
    call_tool('infer', config, tmp_path / 'random.pth', images, *files, *ids, '--cfg-options', *options, code=0)
    ours = json.loads((tmp_path / 'out.json').read_text())
    assert len(ours) == len(expected) == 40
    assert [result.pop('bbox') for result in ours] == boxes
    for result in expected:
        result.pop('bbox', None)
    assert ours == expected


def test_resumed_is_the_same_run(call_tool, arguments, tiny_detector, tmp_path):
    """Two data sets in one, batches by aspect ratio, and another number of data workers."""
    name = 'faster_rcnn_slak_t_voc0712'
    options = ['--cfg-options', *tiny_detector(name), 'train_cfg.val_interval=4', 'default_hooks.checkpoint.interval=2']
    call_tool('train', *arguments(name), f'{TRAIN} 4', *options, code=0)
    resumed = [*arguments(name, 'resumed'), '--num-workers 1', '--resume', tmp_path / 'work' / 'iter_2.pth']
    call_tool('train', *resumed, f'{TRAIN} 4', *options, code=0)
    ours, theirs = (load(tmp_path / folder / 'iter_4.pth') for folder in ('work', 'resumed'))
    assert ours['meta']['iter'] == theirs['meta']['iter'] == 4
    for key, value in ours['state_dict'].items():
        assert torch.equal(value, theirs['state_dict'][key]), key


@pytest.mark.parametrize(
    'name,root', [('faster_rcnn_slak_t_voc07', 'VOCdevkit'), ('cascade_mask_rcnn_slak_t_coco', 'coco')]
)
def test_real_images(call_tool, tiny_detector, tmp_path, name, root):
    if not (REAL / root).is_dir():
        pytest.skip(f'{REAL / root} is not there')
    common = ['--data-root', REAL / root, '--img-scale 64 --num-workers 0', '--work-dir', tmp_path / 'w']
    options = ['--cfg-options', *tiny_detector(name), ALL_BOXES, 'test_dataloader.dataset.indices=8']
    config, seldom = ROOT / 'configs' / f'{name}.py', ['train_cfg.val_interval=3', 'train_cfg.val_begin=3']
    call_tool('train', config, *common, f'{TRAIN} 2', *options, *seldom, code=0)
    assert 'mAP' in call_tool('test', config, tmp_path / 'w' / 'iter_2.pth', *common, *options, code=0).text


def test_without_our_tools(demo_coco, tiny_detector, tmp_path):
    """mmengine's own runner puts BN in the place of SyncBN in a single process."""
    name = 'cascade_mask_rcnn_slak_t_coco'
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.merge_from_dict(parsed(tiny_detector(name)))
    assert str(cfg.model).count('SyncBN') == 4
    cfg.work_dir, cfg.experiment_name = str(tmp_path), tmp_path.name
    cfg.model.backbone.init_cfg = None
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.data_root = demo_coco
    for transforms in cfg.train_dataloader.dataset.pipeline[3].transforms:
        for transform in transforms:
            if 'scales' in transform:
                transform.scales = [(64, 96)]
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
    cfg.param_scheduler = cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint.by_epoch = False
    cfg.custom_hooks = []
    runner = Runner.from_cfg(cfg)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in runner.model.modules())
    runner.train()
    assert runner.iter == 1


def test_sizes_are_for_the_other_kind_of_config(call_tool, arguments, config_path):
    assert '--img-scale' in call_tool('train', *arguments('faster_rcnn_slak_t_voc07'), '--crop-size 64', code=1).err
    assert '--crop-size' in call_tool('train', config_path, '--img-scale 64', code=1).err
    assert '667x400' in call_tool('train', config_path, '--img-scale 1x2x3', code=2).err


@pytest.mark.parametrize('metric', ['[bbox,segm]', 'bbox'])
def test_augmentation_is_for_boxes_alone(call_tool, arguments, tiny_detector, tmp_path, metric):
    """mmdetection merges boxes over views and no masks."""
    name = 'cascade_mask_rcnn_slak_t_coco'
    plain, *rest = arguments(name)
    config = tmp_path / 'tta.py'
    config.write_text(
        f"""_base_ = {str(plain)!r}
tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=(1333, 800), keep_ratio=True)],
        [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
        [dict(type='PackDetInputs', meta_keys=keys)],
    ]),
]
"""
    )
    cfg = cli.load_config(str(config))
    options = [*tiny_detector(name), ALL_BOXES]
    cfg.merge_from_dict(parsed(options))
    cli.adapt_to_device(cfg, has_gpu=lambda: False)
    weights = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=cli.build_model(cfg, cfg.model).state_dict()), weights)
    options = ['--tta', '--cfg-options', *options, f'test_evaluator.metric={metric}']
    result = call_tool('test', config, *rest, weights, *options, code=int(metric != 'bbox'))
    if metric == 'bbox':
        assert 'bbox_mAP' in result.text and 'segm_mAP' not in result.text
    else:
        assert 'boxes only' in result.err and 'test_evaluator.metric=bbox' in result.err
