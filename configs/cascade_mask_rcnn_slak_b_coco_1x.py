# Cascade Mask R-CNN + SLaK-B, COCO, 1x: the short schedule of SLaK-T. There are no 120-epoch
# weights of this size, so it starts from those of 300 epochs.
_base_ = './cascade_mask_rcnn_slak_b_coco.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(max_epochs=12)
