# Cascade Mask R-CNN + SLaK-B, COCO, 3x. The authors published no config of this size; drop path and
# layer decay are ConvNeXt-B's, as those of the official SLaK-T are ConvNeXt-T's.
_base_ = './_base_/cascade_mask_rcnn_coco.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.7, init_cfg=dict(type='Pretrained', checkpoint='slak_b_in1k_300e')),
    neck=dict(in_channels=[166, 332, 665, 1331]),
)

optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8, num_layers=12))
