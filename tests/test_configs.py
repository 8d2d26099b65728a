"""Every config: readable, complete, and about a model that exists."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from slak_mm.bases import framework_configs
from slak_mm.checkpoints import ZOO
from slak_mm.cli import adapt_to_device, datasets_of, model_of, named_weights, remove_weights

FOLDER = Path(__file__).resolve().parent.parent / 'configs'
CONFIGS = sorted(path.name for path in FOLDER.glob('*.py'))
# Recipes of their own.
REPLKNET = [name for name in CONFIGS if '_replknet_' in name]
SEGMENTATION = [name for name in CONFIGS if name.startswith('upernet') and name not in REPLKNET]
VOC = [name for name in CONFIGS if name.startswith('faster_rcnn')]
COCO = [name for name in CONFIGS if name.startswith('cascade_mask_rcnn') and name not in REPLKNET]

# Widths of SLaK's architectures times 1.3, rounded down; the others as published.
CHANNELS = dict(
    slak_t=[124, 249, 499, 998],
    slak_s=[124, 249, 499, 998],
    slak_b=[166, 332, 665, 1331],
    convnext_t=[96, 192, 384, 768],
    shiftwise_t=[80, 160, 320, 640],
    shiftwise_s=[96, 192, 384, 768],
    unireplknet_t=[80, 160, 320, 640],
    unireplknet_s=[96, 192, 384, 768],
    unireplknet_b=[128, 256, 512, 1024],
)
# No ImageNet weights were published for them.
WITHOUT_WEIGHTS = ('upernet_shiftwise_s_ade20k.py', 'cascade_mask_rcnn_shiftwise_s_coco.py')


def read(name):
    return Config.fromfile(str(FOLDER / name))


def test_the_expected_configs_are_there():
    assert {f'upernet_{model}_ade20k.py' for model in CHANNELS} | {'upernet_slak_t_ade20k_80k.py'} <= set(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_survives_a_dump(name, tmp_path):
    cfg = read(name)
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


@pytest.mark.parametrize('name', CONFIGS)
def test_weights_are_in_the_zoo(name):
    cfg = read(name)
    weights = named_weights(cfg)
    assert len(weights) == (0 if name in WITHOUT_WEIGHTS else 1)
    if not weights:
        return
    info = ZOO[weights[0][1]]
    backbone = model_of(cfg).backbone
    for key, value in info.backbone.items():
        default = dict(kernel_sizes=(51, 49, 47, 13), small_kernel=5, width_factor=1.3)
        if backbone.type == 'ShiftWise':
            default.update(small_kernel=3, ghost_ratio=0.23, num_paths=2, num_reps=4)
        ours = backbone.get(key, default.get(key))
        assert (tuple(ours) if isinstance(ours, list) else ours) == value, key


@pytest.mark.parametrize('name', SEGMENTATION)
def test_recipe_of_the_official_runs(name):
    cfg = read(name)
    model = model_of(cfg)
    variant = next(key for key in CHANNELS if key in name)
    assert list(model.decode_head.in_channels) == CHANNELS[variant]
    assert model.auxiliary_head.in_channels == CHANNELS[variant][2]
    assert model.auxiliary_head.in_index == 2
    assert (model.decode_head.channels, model.decode_head.num_classes) == (512, 150)
    assert tuple(model.decode_head.pool_scales) == (1, 2, 3, 6)
    is_unireplknet = variant.startswith('unireplknet')
    windows = dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    assert model.test_cfg.to_dict() == (dict(mode='whole') if is_unireplknet else windows)
    short = '80k' in name
    published = dict(slak_s=0.3, unireplknet_t=0.2, unireplknet_s=0.3, unireplknet_b=0.3)
    assert model.backbone.drop_path_rate == (0.1 if short else published.get(variant, 0.4))
    assert model.backbone.layer_scale_init_value == (1e-6 if is_unireplknet else 1.0)
    assert model.backbone.get('with_cp', False) == (variant in ('unireplknet_s', 'unireplknet_b'))
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.weight_decay) == ('AdamW', 0.05)
    assert tuple(optimizer.betas) == (0.9, 0.999)
    assert optimizer.lr == (2e-4 if short else 1e-4)
    assert cfg.train_cfg.max_iters == (80000 if short else 160000)
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.type, warm_up.end) == ('LinearLR', 800 if short else 1500)
    assert (poly.type, poly.power, poly.eta_min) == ('PolyLR', 1.0, 0.0)
    assert (poly.begin, poly.end) == (warm_up.end, cfg.train_cfg.max_iters)
    if short:
        assert 'constructor' not in cfg.optim_wrapper
        assert cfg.optim_wrapper.paramwise_cfg.norm_decay_mult == 0
    elif variant.startswith('shiftwise'):
        assert cfg.optim_wrapper.constructor == 'LargeKernelLayerDecayConstructor'
        assert cfg.optim_wrapper.paramwise_cfg.to_dict() == dict(
            decay_rate=1.0, decay_type='layer_wise', num_layers=9 if variant == 'shiftwise_t' else 12
        )
    elif is_unireplknet:
        tiny = variant == 'unireplknet_t'
        assert cfg.optim_wrapper.constructor == 'LargeKernelLayerDecayConstructor'
        assert cfg.optim_wrapper.paramwise_cfg.to_dict() == dict(
            decay_rate=1.0 if tiny else 0.9, decay_type='layer_wise', num_layers=9 if tiny else 12
        )
    else:
        assert cfg.optim_wrapper.constructor == 'LargeKernelLayerDecayConstructor'
        num_layers = 12 if variant in ('slak_s', 'slak_b') else 6
        expected = dict(decay_rate=0.9, decay_type='stage_wise', num_layers=num_layers)
        assert cfg.optim_wrapper.paramwise_cfg.to_dict() == expected
    # 4 processes with 4 images each; the short run 4 with 8.
    assert cfg.auto_scale_lr.base_batch_size == 4 * cfg.train_dataloader.batch_size
    assert cfg.train_dataloader.batch_size == (8 if short else 4)


@pytest.mark.parametrize('name', [name for name in SEGMENTATION if 'unireplknet' in name])
def test_images_of_unireplknet(name):
    """Crops and scales of 640 pixels for B; whole images with sides that are multiples of 32."""
    cfg = read(name)
    side = 640 if 'unireplknet_b' in name else 512
    _, _, resize, crop, *_ = cfg.train_dataloader.dataset.pipeline
    assert (tuple(resize.scale), tuple(resize.ratio_range)) == ((4 * side, side), (0.5, 2.0))
    assert tuple(crop.crop_size) == tuple(cfg.model.data_preprocessor.size) == (side, side)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        steps = loader.dataset.pipeline
        kinds = 'LoadImageFromFile Resize ResizeToMultiple LoadAnnotations PackSegInputs'
        assert [step.type for step in steps] == kinds.split()
        assert (tuple(steps[1].scale), steps[1].keep_ratio, steps[2].size_divisor) == ((4 * side, side), True, 32)
    assert [step.type for step in cfg.tta_pipeline[1].transforms[2]] == ['ResizeToMultiple']


@pytest.mark.parametrize('name', SEGMENTATION)
def test_multi_scale_is_the_published_protocol(name):
    resizes, flips = read(name).tta_pipeline[1].transforms[:2]
    side, ratios = 512, (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    if 'unireplknet_b' in name:
        side, ratios = 640, (0.75, 1.0, 1.25)
    scales = [(int(4 * side * ratio), int(side * ratio)) for ratio in ratios]
    assert [tuple(resize.scale) for resize in resizes] == scales
    assert all(resize.keep_ratio for resize in resizes)
    assert [flip.prob for flip in flips] == [0, 1]


@pytest.mark.parametrize(
    'name', [f'upernet_{model}_ade20k.py' for model in ('slak_t', 'convnext_t', 'shiftwise_t', 'unireplknet_t')]
)
def test_model_is_built_and_its_parts_fit(name):
    cfg = read(name)
    remove_weights(cfg)
    adapt_to_device(cfg, has_gpu=lambda: False)
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        features = model.extract_feat(torch.zeros(1, 3, 64, 64))
        logits = model.decode_head(features)
    assert [feature.shape[1] for feature in features] == list(model.decode_head.in_channels)
    assert [feature.shape[-1] for feature in features] == [16, 8, 4, 2]
    assert logits.shape == (1, 150, 16, 16)


def test_the_expected_detection_configs_are_there():
    assert set(VOC) == {f'faster_rcnn_{model}_voc07.py' for model in ('slak_t', 'shiftwise_t', 'convnext_t')} | {
        'faster_rcnn_slak_t_voc0712.py'
    }
    assert set(COCO) == {f'cascade_mask_rcnn_{model}_coco.py' for model in CHANNELS if model != 'unireplknet_b'} | {
        f'cascade_mask_rcnn_slak_{size}_coco_1x.py' for size in 'tsb'
    }


def check_detector(cfg, name):
    """What both kinds of detectors have in common."""
    variant = next(key for key in CHANNELS if key in name)
    assert list(cfg.model.neck.in_channels) == CHANNELS[variant]
    assert (cfg.model.neck.out_channels, cfg.model.neck.num_outs) == (256, 5)
    assert cfg.model.backbone.layer_scale_init_value == (1e-6 if 'unireplknet' in name else 1.0)
    assert cfg.model.backbone.get('with_cp', False) == ('unireplknet' in name)
    assert cfg.model.backbone.norm_cfg.type == 'SyncBN'
    assert 'frozen_stages' not in cfg.model.backbone
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.weight_decay) == ('AdamW', 0.05)
    assert tuple(optimizer.betas) == (0.9, 0.999)
    assert cfg.optim_wrapper.constructor == 'LargeKernelLayerDecayConstructor'
    # 8 processes with 2 images each.
    assert (cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size) == (2, 16)
    epochs = 12 if '1x' in name else 36
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ('EpochBasedTrainLoop', epochs)
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.type, warm_up.by_epoch, warm_up.end, warm_up.start_factor) == ('LinearLR', False, 500, 0.001)
    assert (steps.type, steps.by_epoch, steps.end, steps.gamma) == ('MultiStepLR', True, epochs, 0.1)
    assert steps.milestones == ([8, 11] if '1x' in name else [27, 33])
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert hooks == ([] if 'convnext' in name or 'unireplknet' in name else ['SparsityHook'])
    for loader in ('val_dataloader', 'test_dataloader'):
        resize = cfg[loader].dataset.pipeline[1]
        assert (resize.type, tuple(resize.scale), resize.keep_ratio) == ('Resize', (1333, 800), True)
    return variant


MULTI_SCALE = [(short, 1333) for short in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]


@pytest.mark.parametrize('name', VOC)
def test_recipe_of_voc(name):
    cfg = read(name)
    check_detector(cfg, name)
    assert cfg.model.type == 'FasterRCNN' and cfg.model.roi_head.bbox_head.num_classes == 20
    assert cfg.optim_wrapper.optimizer.lr == 1e-4
    assert cfg.optim_wrapper.paramwise_cfg.decay_rate == 1
    assert cfg.model.backbone.drop_path_rate == 0.4
    train = [dataset for _, dataset in datasets_of(cfg, ('train_dataloader',))]
    assert [dataset.ann_file for dataset in train] == [
        f'VOC{year}/ImageSets/Main/trainval.txt' for year in ((2007, 2012) if '0712' in name else (2007,))
    ]
    assert 'RepeatDataset' not in str(cfg.train_dataloader)
    for dataset in train:
        assert (dataset.type, dataset.data_root) == ('VOCDataset', 'data/VOCdevkit/')
        assert dataset.ann_file.startswith(dataset.data_prefix.sub_data_root)
        resize = dataset.pipeline[2]
        assert (resize.type, resize.keep_ratio) == ('RandomChoiceResize', True)
        assert resize.scales == MULTI_SCALE
    for loader in ('val_dataloader', 'test_dataloader'):
        assert cfg[loader].dataset.ann_file == 'VOC2007/ImageSets/Main/test.txt'
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert (evaluator.type, evaluator.metric, evaluator.eval_mode) == ('VOCMetric', 'mAP', '11points')


@pytest.mark.parametrize('name', COCO)
def test_recipe_of_coco(name):
    cfg = read(name)
    variant = check_detector(cfg, name)
    assert cfg.model.type == 'CascadeRCNN'
    heads = cfg.model.roi_head.bbox_head
    deviations = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    assert [head.bbox_coder.target_stds for head in heads] == deviations
    for head in heads:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs, head.num_classes) == ('ConvFCBBoxHead', 4, 1, 80)
        assert (head.conv_out_channels, head.fc_out_channels) == (256, 1024)
        assert (head.norm_cfg.type, head.reg_class_agnostic, head.reg_decoded_bbox) == ('SyncBN', False, True)
        assert head.loss_bbox.to_dict() == dict(type='GIoULoss', loss_weight=10.0)
    # The published drop path, layer decay and layer count of ShiftWise-T, SLaK-T, ConvNeXt-T/S/B, UniRepLKNet-T/S.
    drop_path, decay, layers = dict(
        shiftwise_t=(0.4, 0.8, 12),
        shiftwise_s=(0.6, 0.8, 12),
        slak_t=(0.4, 0.7, 6),
        slak_s=(0.6, 0.7, 12),
        slak_b=(0.7, 0.8, 12),
        convnext_t=(0.4, 0.7, 6),
        unireplknet_t=(0.3, 0.8, 12),
        unireplknet_s=(0.5, 0.8, 12),
    )[variant]
    assert cfg.model.backbone.drop_path_rate == drop_path
    assert cfg.optim_wrapper.optimizer.lr == (1e-4 if variant.startswith(('shiftwise', 'unireplknet')) else 2e-4)
    expected = dict(decay_rate=decay, decay_type='layer_wise', num_layers=layers)
    assert cfg.optim_wrapper.paramwise_cfg.to_dict() == expected
    pipeline = cfg.train_dataloader.dataset.pipeline
    expected = 'LoadImageFromFile LoadAnnotations RandomFlip RandomChoice PackDetInputs'
    assert [transform.type for transform in pipeline] == expected.split()
    assert pipeline[1].with_mask
    (alone,), (first, crop, second) = pipeline[3].transforms
    assert alone.scales == second.scales == MULTI_SCALE
    assert first.scales == [(400, 1333), (500, 1333), (600, 1333)]
    assert (crop.crop_type, tuple(crop.crop_size), crop.allow_negative_crop) == ('absolute_range', (384, 600), True)
    assert cfg.test_evaluator.metric == ['bbox', 'segm']


@pytest.mark.parametrize('name', REPLKNET)
def test_recipe_of_replknet(name):
    """Drop path, rate, steps and batch of the official configs for RepLKNet-31B from ImageNet-1K."""
    cfg, is_upernet = read(name), name.startswith('upernet')
    model = model_of(cfg)
    assert (model.backbone.type, model.backbone.arch, model.backbone.with_cp) == ('RepLKNet', '31B', True)
    assert model.backbone.drop_path_rate == (0.5 if is_upernet else 0.6)
    assert list((model.decode_head if is_upernet else model.neck).in_channels) == [128, 256, 512, 1024]
    assert 'layer_scale_init_value' not in model.backbone and not cfg.custom_hooks
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 2e-4 if is_upernet else 4e-4, 0.05)
    assert cfg.optim_wrapper.constructor == 'DefaultOptimWrapperConstructor'
    assert cfg.optim_wrapper.paramwise_cfg.to_dict() == dict(norm_decay_mult=0.0)
    warm_up, rest = cfg.param_scheduler
    if is_upernet:
        assert model.test_cfg.to_dict() == dict(mode='whole') and model.auxiliary_head.in_channels == 512
        assert (warm_up.start_factor, warm_up.end, rest.begin, rest.end) == (1e-6, 400, 400, 40000)
        assert (cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size) == (40000, 2)
        assert cfg.auto_scale_lr.base_batch_size == 64 * 2
    else:
        assert (warm_up.end, rest.milestones, cfg.train_cfg.max_epochs) == (500, [27, 33], 36)
        assert cfg.train_dataloader.batch_size == 1


@pytest.mark.parametrize('name', VOC + COCO + [name for name in REPLKNET if name.startswith('cascade')])
def test_detector_is_built_and_its_parts_fit(name):
    pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")
    cfg = read(name)
    remove_weights(cfg)
    adapt_to_device(cfg, has_gpu=lambda: False)
    assert 'SyncBN' not in str(cfg.model)
    init_default_scope('mmdet')
    with torch.device('meta'), torch.no_grad():
        model = MODELS.build(cfg.model).eval()
        features = model.backbone(torch.zeros(1, 3, 64, 96))
        pyramid = model.neck(features)
    assert [feature.shape[1] for feature in features] == list(cfg.model.neck.in_channels)
    assert [tuple(level.shape[2:]) for level in pyramid] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    rates = [group['lr'] for group in wrapper.optimizer.param_groups]
    assert max(rates) == cfg.optim_wrapper.optimizer.lr
    decay = cfg.optim_wrapper.paramwise_cfg
    assert min(rates) == pytest.approx(max(rates) * decay.get('decay_rate', 1) ** (decay.get('num_layers', 0) + 1))


def test_missing_framework_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'mmseg' else find_spec(name, *a))
    with pytest.raises(ImportError, match='"mmseg", which is not installed'):
        read('upernet_slak_t_ade20k.py')


def test_framework_configs_names_what_it_lacks():
    (path,) = framework_configs('mmseg', 'datasets/ade20k.py')
    assert Path(path).is_file()
    with pytest.raises(FileNotFoundError, match='no base config "datasets/nowhere.py"'):
        framework_configs('mmseg', 'datasets/nowhere.py')
