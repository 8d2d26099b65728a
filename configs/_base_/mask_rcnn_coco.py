# Mask R-CNN with FPN on COCO 2017, 3x (36 epochs), with which newer networks are compared. Neither SLaK nor ShiftWise
# published one: data, optimizer, layer decay and schedule are those of ConvNeXt-T's official Mask R-CNN config (in
# float32, and --amp trains as it does), the heads mmdet's own, as there.
_base_ = [
    *__import__('slak_mm.bases', fromlist=['_']).framework_configs('mmdet', 'models/mask-rcnn_r50_fpn.py'),
    './coco_3x.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='SLaK',
        arch='tiny',
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
    )
)

optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.95))
