# UperNet + UniRepLKNet on ADE20K, 512x512, 160k: what the official recipe has other than ConvNeXt's.
_base_ = './upernet_ade20k.py'

model = dict(
    backbone=dict(type='UniRepLKNet', layer_scale_init_value=1e-6),
    # Squeeze-excite and GRN average over the map: windows would give other results than the image.
    test_cfg=dict(_delete_=True, mode='whole'),
)

# The ImageNet weights are dense.
custom_hooks = []

test_pipeline = _base_.test_pipeline
test_pipeline.insert(2, dict(type='ResizeToMultiple', size_divisor=32))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms.insert(2, [dict(type='ResizeToMultiple', size_divisor=32)])
