# UperNet + SLaK-S, ADE20K, 160k: the official fine-tuning recipe.
_base_ = './_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.3, init_cfg=dict(type='Pretrained', checkpoint='slak_s_in1k_300e')),
    decode_head=dict(in_channels=[124, 249, 499, 998]),
    auxiliary_head=dict(in_channels=499),
)

# The third stage has 27 blocks. Only the layer-wise rule needs 12 layer ids for them; the
# official config gives 12 to the stage-wise rule as well, which lowers the rates of all stages.
optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
