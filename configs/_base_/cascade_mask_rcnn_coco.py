# Cascade Mask R-CNN with FPN on COCO 2017, 3x (36 epochs): everything that the configs of this
# folder share. The official recipe of ConvNeXt, which SLaK and ShiftWise took over.
_base_ = [
    *__import__('slak_mm.bases', fromlist=['_']).framework_configs('mmdet', 'models/cascade-mask-rcnn_r50_fpn.py'),
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
    ),
    roi_head=dict(
        # The three stages differ in how finely they code boxes.
        bbox_head=[
            dict(
                type='ConvFCBBoxHead',
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=target_stds),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=dict(type='SyncBN', requires_grad=True),
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
            )
            for target_stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ]
    ),
)
