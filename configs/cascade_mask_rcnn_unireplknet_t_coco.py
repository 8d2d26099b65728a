# Cascade Mask R-CNN + UniRepLKNet-T, COCO, 3x: the official recipe. It numbers 12 layers where the depth of 18 needs
# 9, which makes the early stages slower; kept, as it was trained so.
_base_ = './_base_/cascade_mask_rcnn_coco.py'

model = dict(
    backbone=dict(
        type='UniRepLKNet',
        drop_path_rate=0.3,
        layer_scale_init_value=1e-6,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_t_in1k_224'),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)

optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.8, num_layers=12))

# The ImageNet weights are dense.
custom_hooks = []
