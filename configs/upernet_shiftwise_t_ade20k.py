# UperNet + ShiftWise-T (version 2), ADE20K, 160k: the official fine-tuning recipe.
_base_ = './_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(type='ShiftWise', version=2, init_cfg=dict(type='Pretrained', checkpoint='shiftwise_t_in1k_300e')),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)

# A decay of 1 is none: all layers have the same rate.
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0, decay_type='layer_wise', num_layers=9))

# As in the base; from scratch, whole filters are masked, as in the official ImageNet training.
sparse = dict(type='SparsityHook', mode='static', distribution='from_weights')
custom_hooks = [dict(sparse, from_scratch=dict(preset='shiftwise', distribution='snip', sparsity=0.3))]
del sparse
