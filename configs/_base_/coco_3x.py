# Instance segmentation on COCO 2017, 3x (36 epochs): data, optimizer and schedule that all detectors of this folder
# share. The official recipe of ConvNeXt, which SLaK and ShiftWise took over.
_base_ = __import__('slak_mm.bases', fromlist=['_']).framework_configs(
    'mmdet', 'datasets/coco_instance.py', 'schedules/schedule_1x.py', 'default_runtime.py'
)

custom_imports = dict(imports=['slak_mm'], allow_failed_imports=False)

# Either a resize alone, or a resize, a crop and a second resize.
scales = [(short, 1333) for short in range(480, 801, 32)]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)],
            [
                dict(type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
                dict(type='RandomChoiceResize', scales=scales, keep_ratio=True),
            ],
        ],
    ),
    dict(type='PackDetInputs'),
]
del scales
# The batch of 16 is 8 processes with 2 images each.
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
auto_scale_lr = dict(enable=False, base_batch_size=16)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LargeKernelLayerDecayConstructor',
    paramwise_cfg=dict(decay_rate=0.7, decay_type='layer_wise', num_layers=6),
)

# The zeros of the sparse ImageNet weights stay zero, as in the official runs. --from-scratch, which
# has no such weights, draws masks of its own; --sparse changes or removes the hook.
sparse = dict(type='SparsityHook', mode='static', distribution='from_weights')
custom_hooks = [dict(sparse, from_scratch=dict(distribution='snip', sparsity=0.4))]
del sparse

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=36)

# One checkpoint has a gigabyte.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
