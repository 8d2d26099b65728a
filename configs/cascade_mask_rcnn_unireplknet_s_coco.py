# Cascade Mask R-CNN + UniRepLKNet-S, COCO, 3x: the official recipe from ImageNet-1K weights. From ImageNet-22K weights
# (unireplknet_s_in22k_to_in1k_384) the authors average the weights as well, with a momentum of 1e-4.
_base_ = './cascade_mask_rcnn_unireplknet_t_coco.py'

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.5, init_cfg=dict(checkpoint='unireplknet_s_in1k_224')),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
