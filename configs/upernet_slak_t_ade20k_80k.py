# UperNet + SLaK-T pretrained for 120 epochs, ADE20K, 80k: the official short recipe, which has
# no layer decay, no weight decay on norms, and a batch of 32 (4 processes with 8 images each).
_base_ = './upernet_slak_t_ade20k.py'

model = dict(backbone=dict(drop_path_rate=0.1, init_cfg=dict(type='Pretrained', checkpoint='slak_t_k51_in1k_120e')))

train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(enable=False, base_batch_size=32)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=800),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=800, end=80000),
]

train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))

# The official short run, unlike the long one, fine-tunes all weights of the sparse network, the
# zeros too; --sparse static keeps them.
custom_hooks = []
