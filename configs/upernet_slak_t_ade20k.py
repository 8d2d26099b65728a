# UperNet + SLaK-T, ADE20K, 160k: the official fine-tuning recipe.
_base_ = './_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='slak_t_in1k_300e')),
    decode_head=dict(in_channels=[124, 249, 499, 998]),
    auxiliary_head=dict(in_channels=499),
)
