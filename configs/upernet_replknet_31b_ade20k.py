# UperNet + RepLKNet-31B, ADE20K: the official recipe for weights of ImageNet-1K. What it calls a 160k schedule is 40k
# iterations with eight times the usual batch. Without a decay of the rate over depth; norms have no weight decay.
_base_ = './_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='RepLKNet',
        arch='31B',
        drop_path_rate=0.5,
        with_cp=True,
        norm_cfg=_base_.norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint='replknet_31b_in1k'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
    test_cfg=dict(_delete_=True, mode='whole'),
)

# The batch of 128 is 64 processes with 2 images each.
train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(base_batch_size=128)

optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    constructor='DefaultOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0),
)
# As in the base: the poly schedule begins after the warm-up.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=400),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=400, end=40000),
]
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))

# Its ImageNet weights are dense.
custom_hooks = []
