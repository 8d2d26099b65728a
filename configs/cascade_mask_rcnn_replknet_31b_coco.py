# Cascade Mask R-CNN + RepLKNet-31B, COCO, 3x: the official recipe for weights of ImageNet-1K. It has one image per
# process and does not say how many processes; the batch that the rate belongs to is taken to be that of the base, 16.
# Without a decay of the rate over depth; norms have no weight decay.
_base_ = './_base_/cascade_mask_rcnn_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='RepLKNet',
        arch='31B',
        drop_path_rate=0.6,
        with_cp=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        init_cfg=dict(type='Pretrained', checkpoint='replknet_31b_in1k'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

train_dataloader = dict(batch_size=1)

optim_wrapper = dict(
    optimizer=dict(lr=4e-4),
    constructor='DefaultOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0),
)

# Its ImageNet weights are dense.
custom_hooks = []
