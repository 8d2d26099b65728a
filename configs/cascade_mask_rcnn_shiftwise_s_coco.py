# Cascade Mask R-CNN + ShiftWise-S (version 2), COCO, 3x: the recipe of ShiftWise-T, as none for S
# and no ImageNet weights of S were published; the drop path is ConvNeXt-S's. Give yours by
# --cfg-options model.backbone.init_cfg.checkpoint=FILE model.backbone.init_cfg.type=Pretrained
_base_ = './_base_/cascade_mask_rcnn_coco.py'

model = dict(
    backbone=dict(type='ShiftWise', arch='small', version=2, drop_path_rate=0.6),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.8, num_layers=12))

# As in the base; from scratch, whole filters are masked, as in the official ImageNet training.
sparse = dict(type='SparsityHook', mode='static', distribution='from_weights')
custom_hooks = [dict(sparse, from_scratch=dict(preset='shiftwise', distribution='snip', sparsity=0.3))]
del sparse
