# Cascade Mask R-CNN + ConvNeXt-T, COCO, 3x: the official recipe, and the baseline to swap against.
# It is the same class in its ConvNeXt mode (one 7x7 kernel with a bias, no branch norms).
_base_ = './_base_/cascade_mask_rcnn_coco.py'

model = dict(
    backbone=dict(
        kernel_sizes=(7, 7, 7, 7),
        small_kernel=None,
        width_factor=1.0,
        decomposed=False,
        branch_norm=False,
        conv_bias=True,
        init_cfg=dict(type='Pretrained', checkpoint='convnext_t_in1k_300e'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

# Its ImageNet weights are dense.
custom_hooks = []
