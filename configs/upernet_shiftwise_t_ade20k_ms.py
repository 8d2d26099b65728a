# Multi-scale and flip test of upernet_shiftwise_t_ade20k.py; for testing only.
_base_ = './upernet_shiftwise_t_ade20k.py'

model = dict(_delete_=True, type='SegTTAModel', module=_base_.model)
test_dataloader = dict(dataset=dict(pipeline=_base_.tta_pipeline))
