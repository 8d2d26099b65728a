# UperNet + SLaK-B, ADE20K, 160k: the official fine-tuning recipe.
_base_ = './_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(arch='base', init_cfg=dict(type='Pretrained', checkpoint='slak_b_in1k_300e')),
    decode_head=dict(in_channels=[166, 332, 665, 1331]),
    auxiliary_head=dict(in_channels=665),
)

# 12 as in the official config; see upernet_slak_s_ade20k.py.
optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
