# Faster R-CNN + ShiftWise-T (version 2), VOC 2007 trainval: SLaK-T's recipe, as none for ShiftWise was published.
_base_ = './_base_/faster_rcnn_voc07.py'

model = dict(
    backbone=dict(type='ShiftWise', version=2, init_cfg=dict(type='Pretrained', checkpoint='shiftwise_t_in1k_300e')),
    neck=dict(in_channels=[80, 160, 320, 640]),
)

# As in the base; from scratch, whole filters are masked, as in the official ImageNet training.
sparse = dict(type='SparsityHook', mode='static', distribution='from_weights')
custom_hooks = [dict(sparse, from_scratch=dict(preset='shiftwise', distribution='snip', sparsity=0.3))]
del sparse
