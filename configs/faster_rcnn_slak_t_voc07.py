# Faster R-CNN + SLaK-T, VOC 2007 trainval, 36 epochs: the paper's recipe. The paper does not say
# how long the ImageNet training was; these are the published weights of 300 epochs.
_base_ = './_base_/faster_rcnn_voc07.py'

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='slak_t_in1k_300e')),
    neck=dict(in_channels=[124, 249, 499, 998]),
)
