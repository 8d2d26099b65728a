# UperNet + UniRepLKNet-T, ADE20K, 160k: the official recipe.
_base_ = './_base_/upernet_unireplknet_ade20k.py'

model = dict(
    backbone=dict(drop_path_rate=0.2, init_cfg=dict(type='Pretrained', checkpoint='unireplknet_t_in1k_224')),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)

# A decay of 1 is none: all layers have the same rate.
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0, decay_type='layer_wise', num_layers=9))
