# UperNet + ShiftWise-S (version 2), ADE20K, 160k: the recipe of ShiftWise-T, as none for S and no
# ImageNet weights of S were published. Give yours by
# --cfg-options model.backbone.init_cfg.checkpoint=FILE model.backbone.init_cfg.type=Pretrained
_base_ = './_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(type='ShiftWise', arch='small', version=2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

# A decay of 1 is none. The layer numbers of a third stage with 27 blocks need 12.
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0, decay_type='layer_wise', num_layers=12))

# As in the base; from scratch, whole filters are masked, as in the official ImageNet training.
sparse = dict(type='SparsityHook', mode='static', distribution='from_weights')
custom_hooks = [dict(sparse, from_scratch=dict(preset='shiftwise', distribution='snip', sparsity=0.3))]
del sparse
