"""Our backbones in configs that mmdetection and mmsegmentation ship, by a few ``--cfg-options``.

Each config is read as it is installed, gets the options, predicts on one or two images and makes
one training step with its own optimizer. The backbones have one block per stage, the heads have
their own size; the weights are random.
"""

import re

import pytest
import torch
from conftest import parsed
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData

from slak_mm import cli
from slak_mm.bases import framework_configs
from slak_mm.cli.model import check_channels

CHANNELS = [8, 16, 24, 32]
BACKBONES = dict(
    SLaK=['type=SLaK', 'width_factor=1.0', 'kernel_sizes=(13,11,9,7)', 'small_kernel=3'],
    ShiftWise=['type=ShiftWise', 'kernel_sizes=(13,11,9,7)'],
    UniRepLKNet=['type=UniRepLKNet', 'kernel_sizes=(3,13,13,13)', 'layer_scale_init_value=1.0'],
    RepLKNet=['type=RepLKNet', 'kernel_sizes=(13,11,9,7)', 'small_kernel=3'],
)
# In place of `arch=tiny` and its widths.
SMALL = ['model.backbone.arch.depths=[1,1,1,1]', f'model.backbone.arch.dims={CHANNELS}']

NECK = ['model.neck.in_channels=[8,16,24,32]']
HEAD = ['model.pretrained=None', 'model.decode_head.in_channels=[8,16,24,32]']
LAST = ['model.pretrained=None', 'model.decode_head.in_channels=32', 'model.auxiliary_head.in_channels=24']
FASTER = 'mmdet/faster_rcnn/faster-rcnn_r50_fpn_1x_coco'
DEEPLAB = 'mmseg/deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512'
CONFIGS = {
    'mmdet/retinanet/retinanet_r50_fpn_1x_coco': NECK,
    'mmdet/atss/atss_r50_fpn_1x_coco': NECK,
    'mmdet/fcos/fcos_r50-caffe_fpn_gn-head_1x_coco': NECK,
    FASTER: NECK,
    'mmdet/mask_rcnn/mask-rcnn_r50_fpn_1x_coco': NECK,
    # Its neck takes the last stage alone.
    'mmdet/detr/detr_r50_8xb2-150e_coco': ['model.neck.in_channels=[32]', 'model.backbone.out_indices=(3,)'],
    'mmdet/mask2former/mask2former_r50_8xb2-lsj-50e_coco': ['model.panoptic_head.in_channels=[8,16,24,32]'],
    DEEPLAB: [*LAST, 'model.decode_head.c1_in_channels=8'],
    'mmseg/pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512': LAST,
    'mmseg/sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512': ['model.pretrained=None', *NECK],
    'mmseg/upernet/upernet_r50_4xb4-160k_ade20k-512x512': [*HEAD, 'model.auxiliary_head.in_channels=24'],
    'mmseg/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512': HEAD,
}


def load(name, backbone, without=None, *more):
    """An installed config with its backbone exchanged, as ``--cfg-options`` would."""
    package, _, path = name.partition('/')
    cfg = Config.fromfile(framework_configs(package, f'../{path}.py')[0])
    options = ['model.backbone._delete_=True', *(f'model.backbone.{o}' for o in BACKBONES[backbone]), *SMALL]
    options += [option for option in CONFIGS[name] if without is None or without not in option] + list(more)
    cfg.merge_from_dict(parsed(options))
    cli.adapt_to_device(cfg, has_gpu=lambda: False)
    return cfg


def detection_batch(size, with_mask):
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(1, [(3, size, size)], num_items=[2], num_classes=10, with_mask=with_mask)


def segmentation_batch(size):
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    images = list(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator))
    shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), (size, size))
    samples = [SegDataSample(metainfo=dict(shapes, padding_size=[0] * 4)) for _ in images]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, size, size), generator=generator))
    return dict(inputs=images, data_samples=samples)


@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('name', CONFIGS)
def test_stock_config(name, backbone):
    package = name.partition('/')[0]
    pytest.importorskip(package)
    size = 64
    cfg = load(name, backbone)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(package):
        if package == 'mmseg':
            # Batches are cropped to one size; windows and crops of 512 pixels do not fit these.
            cfg.model.data_preprocessor.update(size=(size, size))
            batch = segmentation_batch(size)
        else:
            masks = 'mask' in name
            cfg.model.data_preprocessor.pop('batch_augments', None)
            batch = detection_batch(size, masks)
        model = MODELS.build(cfg.model)
        model.backbone.init_weights()
        assert type(model.backbone).__name__ == backbone
        state = {module: module.training for module in model.modules()}
        check_channels(model, cfg)
        assert state == {module: module.training for module in model.modules()}
        model.eval()
        results = model.test_step(batch)
        assert len(results) == len(batch['inputs'])
        for result in results:
            if package == 'mmseg':
                assert result.pred_sem_seg.data.shape == (1, size, size)
            else:
                assert torch.isfinite(result.pred_instances.scores).all()
        model.train()
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
        block = model.backbone.stages[0][0]
        paths = dict(SLaK='pwconv1', ShiftWise='ffn.fc1', UniRepLKNet='ffn.fc1', RepLKNet='pw1.conv')
        weight = block.get_submodule(paths[backbone]).weight
        before = weight.detach().clone()
        logs = model.train_step(batch, optimizer)
    losses = {key: float(value) for key, value in logs.items() if 'loss' in key}
    assert losses and all(torch.isfinite(torch.tensor(list(losses.values()))))
    assert not torch.equal(weight, before)


MISFITS = [
    *((name, None, '', '') for name in CONFIGS),
    # An option that is left out, others that are added, and what is said.
    ('mmseg/upernet/upernet_r50_4xb4-160k_ade20k-512x512', 'auxiliary', '', r'auxiliary_head.* 1024 .*=24\.'),
    ('mmseg/pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512', '', 'model.decode_head.in_index=4', 'in_index'),
    (DEEPLAB, 'c1_', '', r'decode_head.c1_bottleneck.conv has weights for 256 channels and gets 8'),
    (FASTER, '', 'model.backbone.out_indices=(2,3)', r'\[8, 16, 24, 32\] .* \[24, 32\]\. .*neck.in_channels=\[24,32\]'),
    (FASTER, '', 'model.neck.out_channels=16', 'rpn_head.in_channels=16'),
    ('mmdet/mask_rcnn/mask-rcnn_r50_fpn_1x_coco', '', 'model.roi_head.mask_head.in_channels=16', 'mask_head.convs.0'),
]


@pytest.mark.parametrize('name, without, more, message', MISFITS)
def test_channels_that_do_not_fit_are_named(name, without, more, message):
    """A config whose heads are still set for another backbone."""
    package = name.partition('/')[0]
    pytest.importorskip(package)
    cfg = load(name, 'SLaK', 'in_channels' if without is None else without or None, *filter(None, [more]))
    with DefaultScope.overwrite_default_scope(package):
        model = MODELS.build(cfg.model)
        with pytest.raises(cli.ConfigOverrideError, match=f'does not fit the backbone SLaK.*{message}') as error:
            check_channels(model, cfg)
    if without is None:  # the first of several options
        advice = re.search(r'set (model\.\S+in_channels=\S+)\.$', str(error.value))
        assert advice[1] in CONFIGS[name]
