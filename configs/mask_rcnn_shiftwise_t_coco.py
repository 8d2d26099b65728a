# Mask R-CNN + ShiftWise-T (version 2), COCO, 3x. Not published by the authors: the base says where the recipe is
# from. Its depth of 18 makes 9 layers for the decay, by ConvNeXt's rule.
_base_ = './_base_/mask_rcnn_coco.py'

model = dict(
    backbone=dict(type='ShiftWise', version=2, init_cfg=dict(type='Pretrained', checkpoint='shiftwise_t_in1k_300e')),
    neck=dict(in_channels=[80, 160, 320, 640]),
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=9))

# As in the base; from scratch, whole filters are masked, as in the official ImageNet training.
sparse = dict(type='SparsityHook', mode='static', distribution='from_weights')
custom_hooks = [dict(sparse, from_scratch=dict(preset='shiftwise', distribution='snip', sparsity=0.3))]
del sparse
