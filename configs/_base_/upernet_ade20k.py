# UperNet on ADE20K, 512x512, 160k iterations: everything that the configs of this folder share. The framework's own
# bases are found by import name, because `mmseg::...` does not resolve with the onedl builds (see slak_mm/bases.py).
_base_ = __import__('slak_mm.bases', fromlist=['_']).framework_configs(
    'mmseg', 'models/upernet_swin.py', 'datasets/ade20k.py', 'default_runtime.py', 'schedules/schedule_160k.py'
)

custom_imports = dict(imports=['slak_mm'], allow_failed_imports=False)

crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        _delete_=True,
        type='SLaK',
        arch='tiny',
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        norm_cfg=_base_.norm_cfg,
    ),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)),
)

# The batch of 16 as the official runs had it: 4 processes with 4 images each.
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(enable=False, base_batch_size=16)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LargeKernelLayerDecayConstructor',
    paramwise_cfg=dict(decay_rate=0.9, decay_type='stage_wise', num_layers=6),
)

# The zeros of the sparse ImageNet weights stay zero, as in the official runs. --from-scratch, which
# has no such weights, draws masks of its own; --sparse changes or removes the hook.
sparse = dict(type='SparsityHook', mode='static', distribution='from_weights')
custom_hooks = [dict(sparse, from_scratch=dict(distribution='snip', sparsity=0.4))]
del sparse

# The official recipe (mmseg 0.x) multiplies the warm-up onto a poly schedule that counts from 0;
# here, as in the framework's own ConvNeXt configs, the poly schedule begins after the warm-up.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]

# Multi-scale and flip, for `tools/test.py --tta`. The framework's default scales the image as it
# comes; the published protocol scales the one of the single-scale test.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True)
                for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
