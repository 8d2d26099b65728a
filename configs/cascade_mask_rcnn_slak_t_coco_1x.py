# Cascade Mask R-CNN + SLaK-T pretrained for 120 epochs, COCO, 1x: the official short recipe.
_base_ = './cascade_mask_rcnn_slak_t_coco.py'

model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='slak_t_k51_in1k_120e')))

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(max_epochs=12)
