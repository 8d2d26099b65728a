# Cascade Mask R-CNN + ShiftWise-T (version 2), COCO, 3x: the official recipe. It numbers 12 layers
# where the depth of 18 needs 9, which makes the early stages slower; kept, as it was trained so.
_base_ = './_base_/cascade_mask_rcnn_coco.py'

model = dict(
    backbone=dict(type='ShiftWise', version=2, init_cfg=dict(type='Pretrained', checkpoint='shiftwise_t_in1k_300e')),
    neck=dict(in_channels=[80, 160, 320, 640]),
)

optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.8, num_layers=12))

# As in the base; from scratch, whole filters are masked, as in the official ImageNet training.
sparse = dict(type='SparsityHook', mode='static', distribution='from_weights')
custom_hooks = [dict(sparse, from_scratch=dict(preset='shiftwise', distribution='snip', sparsity=0.3))]
del sparse
