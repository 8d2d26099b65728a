# Cascade Mask R-CNN + SLaK-S, COCO, 3x. The authors published no config of this size; drop path and
# layer decay are ConvNeXt-S's, as those of the official SLaK-T are ConvNeXt-T's.
_base_ = './cascade_mask_rcnn_slak_t_coco.py'

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.6, init_cfg=dict(type='Pretrained', checkpoint='slak_s_in1k_300e'))
)

# 27 blocks in the third stage need 12 layers.
optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
