# UperNet + UniRepLKNet-B, ADE20K, 640x640, 160k, from ImageNet-22K weights: the official recipe. The official config
# defines the crops of 640 pixels for training and, by an oversight, trains on those of 512; here they are used.
_base_ = './_base_/upernet_unireplknet_ade20k.py'

crop_size = (640, 640)
scale = (2560, 640)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_b_in22k_to_in1k_384'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9, decay_type='layer_wise', num_layers=12))

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = scale
train_pipeline[3].crop_size = crop_size
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(int(2560 * ratio), int(640 * ratio)), keep_ratio=True) for ratio in (0.75, 1.0, 1.25)
]
