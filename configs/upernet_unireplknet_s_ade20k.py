# UperNet + UniRepLKNet-S, ADE20K, 160k: the official recipe. The one with ImageNet-22K weights differs in
# --cfg-options model.backbone.init_cfg.checkpoint=unireplknet_s_in22k_to_in1k_384
_base_ = './_base_/upernet_unireplknet_ade20k.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.3,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_s_in1k_224'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9, decay_type='layer_wise', num_layers=12))
