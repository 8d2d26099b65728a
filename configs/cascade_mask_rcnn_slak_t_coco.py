# Cascade Mask R-CNN + SLaK-T, COCO, 3x: the official recipe. The official base file has the wrong
# channels for the FPN and a layer scale of 1e-6; the official runs override both, as here.
_base_ = './_base_/cascade_mask_rcnn_coco.py'

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='slak_t_in1k_300e')),
    neck=dict(in_channels=[124, 249, 499, 998]),
)
