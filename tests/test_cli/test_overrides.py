import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS

from slak_mm import cli
from slak_mm._config import LOADERS, walk
from slak_mm.bases import framework_configs
from slak_mm.cli import ConfigOverrideError


@pytest.fixture
def cfg(config_path):
    return Config.fromfile(config_path)


@pytest.fixture
def config_folder(config_path):
    return Path(config_path).parent


@pytest.fixture
def det_cfg():
    """Faster R-CNN on COCO in epochs, put together from mmdet's own bases."""
    pytest.importorskip('mmdet')
    merged = {}
    parts = 'models/faster-rcnn_r50_fpn.py datasets/coco_detection.py schedules/schedule_1x.py default_runtime.py'
    for path in framework_configs('mmdet', *parts.split()):
        merged.update(Config.fromfile(path).to_dict())
    return Config(merged)


def concat(cfg):
    """The config with its training set wrapped as people wrap it."""
    inner = cfg.train_dataloader.dataset
    both = dict(type='ConcatDataset', datasets=[inner, copy.deepcopy(inner)])
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=both)
    return cfg


def test_data_root_reaches_every_dataset(cfg, demo_data):
    cli.set_data_root(concat(cfg), demo_data)
    found = dict(cli.datasets_of(cfg))
    both = [f'train_dataloader.dataset.dataset.datasets[{index}]' for index in range(2)]
    assert sorted(found) == ['test_dataloader.dataset', *both, 'val_dataloader.dataset']
    assert {dataset.data_root for dataset in found.values()} == {demo_data}
    assert cfg.data_root == demo_data


def test_data_root_reaches_paths_written_out(det_cfg, demo_coco):
    cli.set_data_root(det_cfg, demo_coco)
    for evaluator in (det_cfg.val_evaluator, det_cfg.test_evaluator):
        assert Path(evaluator.ann_file) == Path(demo_coco, 'annotations/instances_val2017.json')
    assert det_cfg.train_dataloader.dataset.data_root == demo_coco
    assert det_cfg.train_dataloader.dataset.ann_file == 'annotations/instances_train2017.json'
    cli.check_data(det_cfg)


def test_data_root_below_the_old_one_is_put_in_once(cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = Path(cfg.data_root, 'small')
    new.mkdir(parents=True)
    cfg.test_dataloader = cfg.val_dataloader
    cli.set_data_root(cfg, str(new))
    assert {dataset.data_root for _, dataset in cli.datasets_of(cfg)} == {str(new)}


def test_data_root_errors_say_what_is_expected(cfg, tmp_path):
    with pytest.raises(ConfigOverrideError, match='"/nowhere" does not exist; .*images/training'):
        cli.set_data_root(cfg, '/nowhere')
    cfg.val_dataloader.dataset.data_root = 'elsewhere'
    with pytest.raises(ConfigOverrideError, match='several roots'):
        cli.set_data_root(cfg, str(tmp_path))
    for _, dataset in cli.datasets_of(cfg):
        dataset.pop('data_root')
    with pytest.raises(ConfigOverrideError, match='no effect'):
        cli.set_data_root(cfg, str(tmp_path))


def lacks(cfg, message, loaders=LOADERS):
    with pytest.raises(ConfigOverrideError, match=message):
        cli.check_data(cfg, loaders)


def test_check_data_names_the_first_thing_missing(cfg, tmp_path):
    lacks(cfg, r'"data/ade/ADEChallengeData2016" does not')
    root = tmp_path / 'ade'
    root.mkdir()
    cli.set_data_root(cfg, str(root))
    train = ('train_dataloader',)
    lacks(cfg, r'images/training" does not exist.*--data-root', train)
    (root / 'images/training').mkdir(parents=True)
    lacks(cfg, 'annotations/training" does not exist', train)
    (root / 'annotations/training').mkdir(parents=True)
    lacks(cfg, r'images/training" has no \*\.jpg images', train)
    for name in 'ab':
        (root / f'images/training/{name}.jpg').touch()
    (root / 'annotations/training/a.png').touch()
    lacks(cfg, '1 of 2 images .*annotations/training/b.png"', train)
    (root / 'annotations/training/b.png').touch()
    cli.check_data(cfg, train)
    lacks(cfg, 'images/validation')


def test_check_data_of_voc(config_folder, demo_voc, tmp_path):
    pytest.importorskip('mmdet')
    root = shutil.copytree(demo_voc, tmp_path / 'voc')
    cfg = Config.fromfile(config_folder / 'faster_rcnn_slak_t_voc0712.py')
    cli.set_data_root(cfg, str(root))
    cli.check_data(cfg)
    (root / 'VOC2007/JPEGImages/000008.jpg').unlink()
    # 000008 is a test image.
    cli.check_data(cfg, ('train_dataloader',))
    lacks(cfg, '1 of 2 images .*test.txt" lists are missing, the first is .*000008.jpg')
    for number in (2, 5):
        (root / f'VOC2012/Annotations/{number:06d}.xml').unlink()
    place = r'VOC2012/Annotations/000002.xml" \(train_dataloader.dataset.datasets\[1\]\)'
    lacks(cfg, f'2 of 6 images .*without annotation, the first is .*{place}')
    shutil.rmtree(root / 'VOC2012')
    lacks(cfg, 'VOC2012/" does not exist')
    (root / 'VOC2007/ImageSets/Main/trainval.txt').write_text('\n')
    lacks(cfg, 'trainval.txt" lists no images')


def test_check_data_of_coco(config_folder, demo_coco, tmp_path):
    root = shutil.copytree(demo_coco, tmp_path / 'coco')
    cfg = Config.fromfile(config_folder / 'cascade_mask_rcnn_slak_t_coco.py')
    cli.set_data_root(cfg, str(root))
    cli.check_data(cfg)
    listing = root / 'annotations/instances_val2017.json'
    content = listing.read_text()
    # Spaces and escapes as another writer of json puts them.
    other = content.replace('"file_name": "', '"file_name"  :\n "..\\/val2017\\/')
    listing.write_text(other + '\n')
    cli.check_data(cfg)
    (root / 'val2017/000000000002.jpg').unlink()
    lacks(cfg, '1 of 2 images .*val2017.json" lists are missing, the first is .*000000000002.jpg')
    listing.write_text(content[:-200])
    lacks(cfg, 'val2017.json" ends in the middle')
    listing.write_text('')
    lacks(cfg, 'val2017.json" is empty')
    shutil.rmtree(root / 'train2017')
    lacks(cfg, 'train2017/" does not exist')


def learning_rates(cfg, iters):
    """What mmengine's schedulers make of base rate 1, for each iteration."""
    wrapper = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    schedulers = [
        PARAM_SCHEDULERS.build(dict(scheduler, verbose=False), default_args=dict(optimizer=wrapper))
        for scheduler in copy.deepcopy(cfg.param_scheduler)
    ]
    rates = []
    for _ in range(iters):
        rates.append(wrapper.param_groups[0]['lr'])
        wrapper.optimizer._opt_called = True
        for scheduler in schedulers:
            scheduler.step()
    return rates


def test_max_iters_keeps_the_proportions(cfg):
    cli.set_max_iters(cfg, 1600)
    assert cfg.train_cfg.max_iters == 1600
    assert cfg.train_cfg.val_interval == 160
    assert cfg.default_hooks.checkpoint.interval == 160
    assert [(s.begin, s.end) for s in cfg.param_scheduler] == [(0, 15), (15, 1600)]
    rates = learning_rates(cfg, 1600)
    # Linear from 1e-6 to 1 over the warm-up, then linear to 0 (poly with power 1).
    assert rates[0] == pytest.approx(1e-6)
    assert rates[7] == pytest.approx(0.5, abs=1e-5)
    for iteration in (15, 400, 1000, 1599):
        assert rates[iteration] == pytest.approx(1 - (iteration - 15) / (1600 - 15 - 1), abs=1e-3)


@pytest.mark.parametrize('iters', [1, 2, 3, 4, 10, 107, 213])
def test_short_runs_do_learn(cfg, iters):
    """A warm-up scaled down to one step would keep the learning rate at a millionth."""
    cli.set_max_iters(cfg, iters)
    rates = learning_rates(cfg, iters)
    assert max(rates) > 0.9
    assert cfg.default_hooks.logger.interval <= max(1, iters // 10)
    assert cfg.train_cfg.val_interval >= 1 and cfg.default_hooks.checkpoint.interval >= 1


def test_max_iters_turns_epochs_into_iterations(det_cfg):
    assert det_cfg.train_cfg.max_epochs == 12
    cli.set_max_iters(det_cfg, 1200)
    assert det_cfg.train_cfg.to_dict() == dict(type='IterBasedTrainLoop', max_iters=1200, val_interval=100)
    warm_up, steps = det_cfg.param_scheduler
    # Epochs 8 and 11 of 12; the warm-up counts iterations already and is capped at a tenth.
    assert (steps.milestones, steps.end, steps.by_epoch) == ([800, 1100], 1200, False)
    assert (warm_up.begin, warm_up.end, warm_up.by_epoch) == (0, 120, False)
    assert det_cfg.log_processor.by_epoch is False
    assert det_cfg.default_hooks.checkpoint.to_dict() == dict(type='CheckpointHook', interval=100, by_epoch=False)
    assert det_cfg.default_hooks.logger.log_metric_by_epoch is False
    assert det_cfg.train_dataloader.sampler.type == 'InfiniteSampler'
    rates = learning_rates(det_cfg, 1200)
    # A schedule is set before the step it is for: the boundary itself may fall either way.
    assert rates[790] == pytest.approx(1) and rates[810] == pytest.approx(0.1)
    assert rates[1090] == pytest.approx(0.1) and rates[1110] == pytest.approx(0.01)


def test_max_iters_scales_every_kind_of_boundary(cfg):
    cfg.param_scheduler = [
        dict(type='CosineAnnealingLR', T_max=160000, begin=0, end=160000, by_epoch=False),
        dict(type='StepLR', step_size=40000, by_epoch=False, end=math.inf),
    ]
    cfg.train_cfg.dynamic_intervals = [(80000, 800)]
    cfg.train_cfg.val_begin = 1600
    cli.set_max_iters(cfg, 1600)
    cosine, step = cfg.param_scheduler
    assert (cosine.T_max, cosine.end) == (1600, 1600)
    assert (step.step_size, step.end) == (400, math.inf)
    assert cfg.train_cfg.dynamic_intervals == [(800, 8)]
    assert cfg.train_cfg.val_begin == 16


def test_max_iters_refuses_what_it_does_not_know(cfg):
    cfg.train_cfg.type = 'FlexibleLoop'
    with pytest.raises(ConfigOverrideError, match='FlexibleLoop'):
        cli.set_max_iters(cfg, 10)
    cfg.train_cfg = None
    with pytest.raises(ConfigOverrideError, match='does not train'):
        cli.set_max_iters(cfg, 10)


def test_batch_size_and_workers(cfg):
    cfg.val_dataloader.prefetch_factor = 4
    cli.set_batch_size(cfg, 7)
    cli.set_num_workers(cfg, 0)
    assert cfg.train_dataloader.batch_size == 7
    assert cfg.val_dataloader.batch_size == 1
    for name in LOADERS:
        assert cfg[name].num_workers == 0 and cfg[name].persistent_workers is False
        assert 'prefetch_factor' not in cfg[name]
    cli.set_num_workers(cfg, 3)
    assert {cfg[name].num_workers for name in LOADERS} == {3}


@pytest.mark.parametrize('wrapped', [False, True])
def test_crop_size_reaches_everything(cfg, wrapped):
    if wrapped:
        concat(cfg)
    cli.set_crop_size(cfg, (128, 192))
    for _, dataset in cli.datasets_of(cfg, ('train_dataloader',)):
        resize, crop = dataset.pipeline[2:4]
        assert (resize.type, crop.type) == ('RandomResize', 'RandomCrop')
        # The shorter side is a quarter: so are the scales.
        assert tuple(resize.scale) == (512, 128)
        assert tuple(crop.crop_size) == (128, 192)
    for name in ('val_dataloader', 'test_dataloader'):
        assert tuple(cfg[name].dataset.pipeline[1].scale) == (512, 128)
    ratios = (0.5, 0.75, 1, 1.25, 1.5, 1.75)
    tta = [(int(512 * ratio), int(128 * ratio)) for ratio in ratios]
    assert [tuple(resize.scale) for resize in cfg.tta_pipeline[1].transforms[0]] == tta
    assert tuple(cfg.model.data_preprocessor['size']) == (128, 192)
    assert tuple(cfg.data_preprocessor['size']) == (128, 192)
    assert cfg.model.test_cfg.crop_size == (128, 192)
    # The official stride is two thirds of the crop.
    assert cfg.model.test_cfg.stride == (round(341 / 4), round(341 * 192 / 512))


def test_crop_size_of_a_multi_scale_config(tta_config_path):
    cfg = Config.fromfile(tta_config_path)
    cli.set_crop_size(cfg, (256, 256))
    assert tuple(cfg.model.module.data_preprocessor['size']) == (256, 256)
    assert cfg.model.module.test_cfg.crop_size == (256, 256)
    resizes = cfg.test_dataloader.dataset.pipeline[1].transforms[0]
    assert tuple(resizes[2].scale) == (1024, 256)


def test_crop_size_is_refused_where_it_has_no_meaning(cfg, det_cfg):
    with pytest.raises(ConfigOverrideError, match='detection trains on whole images.*--img-scale'):
        cli.set_crop_size(det_cfg, (128, 128))
    before = copy.deepcopy(cfg.to_dict())
    del before['train_dataloader']['dataset']['pipeline'][3]
    cfg = Config(before)
    with pytest.raises(ConfigOverrideError, match='has no RandomCrop'):
        cli.set_crop_size(cfg, (128, 128))
    assert cfg.to_dict() == before


def transforms_of(cfg, loader, kind):
    nodes = [node for _, dataset in cli.datasets_of(cfg, (loader,)) for node in walk(dataset.pipeline)]
    return [node for node in nodes if node.get('type') == kind]


@pytest.mark.parametrize('size,long', [((0, 200), 333), ((400, 200), 400)])
def test_img_scale_reaches_everything(config_folder, size, long):
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(config_folder / 'cascade_mask_rcnn_slak_t_coco.py')
    cfg.model.data_preprocessor.batch_augments = [
        dict(type='BatchSyncRandomResize', random_size_range=(480, 800), size_divisor=32),
        dict(type='BatchFixedSizePad', size=(1024, 1024)),
    ]
    resizes = [dict(type='Resize', scale=scale, keep_ratio=True) for scale in ((1333, 800), (2000, 1200))]
    cfg.tta_pipeline = [dict(type='TestTimeAug', transforms=[resizes])]
    cli.set_img_scale(cfg, size)
    # A quarter of the shorter sides, which the configs write first.
    expected = [(round(short / 4), long) for short in range(480, 801, 32)]
    alone, first, second = transforms_of(cfg, 'train_dataloader', 'RandomChoiceResize')
    assert alone.scales == second.scales == expected
    assert first.scales == [(100, long), (125, long), (150, long)]
    (crop,) = transforms_of(cfg, 'train_dataloader', 'RandomCrop')
    assert tuple(crop.crop_size) == (96, 150)
    for loader in ('val_dataloader', 'test_dataloader'):
        assert [tuple(node.scale) for node in transforms_of(cfg, loader, 'Resize')] == [(long, 200)]
    assert [tuple(node.scale) for node in cfg.tta_pipeline[0].transforms[0]] == [
        (long, 200),
        (round(2000 * long / 1333), 300),
    ]
    assert cfg.test_pipeline[1].scale == (long, 200)
    resize, pad = cfg.model.data_preprocessor.batch_augments
    assert (resize.random_size_range, resize.size_divisor) == ((120, 200), 32)
    assert pad.size == (256, 256)


def test_img_scale_reaches_wrapped_datasets(config_folder):
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(config_folder / 'faster_rcnn_slak_t_voc0712.py')
    cli.set_img_scale(cfg, (0, 200))
    for node in transforms_of(cfg, 'train_dataloader', 'RandomChoiceResize'):
        assert node.scales == [(short // 4, 333) for short in range(480, 801, 32)]
    assert len(transforms_of(cfg, 'train_dataloader', 'RandomChoiceResize')) == 2


def test_img_scale_of_other_transforms(det_cfg):
    train = det_cfg.train_dataloader.dataset
    train.pipeline[2] = dict(type='Resize', scale=(800, 1333), keep_ratio=True)
    train.pipeline[3:3] = [
        dict(type='RandomCrop', crop_type='relative_range', crop_size=(0.3, 0.3)),
        dict(type='Mosaic', img_scale=(640, 640)),
        dict(type='Resize', scale_factor=0.5),
        dict(type='Pad', size=None),
    ]
    cli.set_img_scale(det_cfg, (667, 400))
    resize, crop, mosaic, factor, pad = train.pipeline[2:7]
    assert resize['scale'] == (400, 667)
    assert crop['crop_size'] == (0.3, 0.3) and mosaic['img_scale'] == (320, 320)
    assert factor['scale_factor'] == 0.5 and pad['size'] is None


def test_img_scale_is_refused_where_it_has_no_meaning(cfg, det_cfg):
    with pytest.raises(ConfigOverrideError, match='follows --crop-size'):
        cli.set_img_scale(cfg, (0, 128))
    det_cfg.test_dataloader.dataset.pipeline[1].scale = (1000, 600)
    with pytest.raises(ConfigOverrideError, match='resizes them to 2 different scales'):
        cli.set_img_scale(det_cfg, (0, 128))
    for loader in ('val_dataloader', 'test_dataloader'):
        det_cfg[loader].dataset.pipeline.pop(1)
    before = copy.deepcopy(det_cfg.to_dict())
    with pytest.raises(ConfigOverrideError, match='resizes them to no scale'):
        cli.set_img_scale(det_cfg, (0, 128))
    assert det_cfg.to_dict() == before


def test_remove_weights(cfg, det_cfg):
    cfg.load_from = 'somewhere.pth'
    cfg.model.decode_head.init_cfg = [dict(type='Normal', std=0.01), dict(type='Pretrained', checkpoint='head.pth')]
    cfg.model.pretrained = 'old_style.pth'
    assert sorted(source for _, source in cli.named_weights(cfg)) == ['head.pth', 'old_style.pth', 'slak_t_in1k_300e']
    removed = cli.remove_weights(cfg)
    assert ('load_from', 'somewhere.pth') in removed and len(removed) == 4
    assert cli.named_weights(cfg) == [] and cfg.load_from is None
    assert cfg.model.decode_head.init_cfg == [dict(type='Normal', std=0.01)]
    assert cli.remove_weights(det_cfg) == [('model.backbone.init_cfg', 'torchvision://resnet50')]


def test_without_a_gpu(cfg):
    del cfg.model.backbone['norm_cfg']
    cfg.launcher = 'pytorch'
    cli.adapt_to_device(cfg, has_gpu=lambda: False)
    assert 'SyncBN' not in str(cfg.model)
    assert cfg.model.backbone.norm_cfg.type == 'BN'
    assert cfg.env_cfg.dist_cfg.backend == 'gloo'
    assert cfg.model_wrapper_cfg.device_ids is None
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    with pytest.raises(ConfigOverrideError, match='needs a GPU'):
        cli.adapt_to_device(cfg, has_gpu=lambda: False)


def test_with_a_gpu_nothing_changes(cfg):
    before = copy.deepcopy(cfg.to_dict())
    cli.adapt_to_device(cfg, has_gpu=lambda: True)
    assert cfg.to_dict() == before
