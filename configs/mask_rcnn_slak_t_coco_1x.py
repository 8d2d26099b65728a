# Mask R-CNN + SLaK-T, COCO, 1x. Not published by the authors: the base says where the recipe is from.
_base_ = './_base_/mask_rcnn_coco_1x.py'

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='slak_t_in1k_300e')),
    neck=dict(in_channels=[124, 249, 499, 998]),
)
