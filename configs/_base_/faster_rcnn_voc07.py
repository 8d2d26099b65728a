# Faster R-CNN with FPN on VOC 2007: everything that the configs of this folder share. The recipe
# is that of the SLaK paper: AdamW, rate 1e-4, weight decay 0.05, batch 16, 36 epochs, shorter side
# 480 to 800 and longer side at most 1333 pixels. What it leaves open is said where it is decided.
_base_ = __import__('slak_mm.bases', fromlist=['_']).framework_configs(
    'mmdet', 'models/faster-rcnn_r50_fpn.py', 'datasets/voc0712.py', 'schedules/schedule_1x.py', 'default_runtime.py'
)

custom_imports = dict(imports=['slak_mm'], allow_failed_imports=False)

# Open in the paper: the drop path rate. 0.4 and a layer scale of 1 are those of both official
# fine-tuning recipes (COCO, ADE20K) for weights of 300 epochs.
model = dict(
    backbone=dict(
        _delete_=True,
        type='SLaK',
        arch='tiny',
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
    ),
    roi_head=dict(bbox_head=dict(num_classes=20)),
)

# Open in the paper: the steps between 480 and 800, which are those of the official COCO recipe, and
# the test scale, which is the largest of training, as there.
scales = [(short, 1333) for short in range(480, 801, 32)]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomChoiceResize', scales=scales, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
del scales
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    # After Resize: the metric compares with the boxes of the image as it is.
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

# The framework's base repeats 2007 and 2012 three times in an epoch; here an epoch is an epoch. It
# also ignores boxes below 32 pixels in training, which mmdet 2.x, of the paper's time, did not.
# The batch of 16 is 8 processes with 2 images each.
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        _delete_=True,
        type='VOCDataset',
        data_root='data/VOCdevkit/',
        ann_file='VOC2007/ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
auto_scale_lr = dict(enable=False, base_batch_size=16)

# The paper does not mention a decay of the rate over depth, so there is none (1.0); as in all
# official runs, norms and biases have no weight decay.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LargeKernelLayerDecayConstructor',
    paramwise_cfg=dict(decay_rate=1.0),
)

# The zeros of the sparse ImageNet weights stay zero, as in the official runs. --from-scratch, which
# has no such weights, draws masks of its own; --sparse changes or removes the hook.
sparse = dict(type='SparsityHook', mode='static', distribution='from_weights')
custom_hooks = [dict(sparse, from_scratch=dict(distribution='snip', sparsity=0.4))]
del sparse

# Open in the paper: warm-up and decay steps. Those of the official COCO recipe of 36 epochs.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=36)

# One checkpoint has half a gigabyte.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
