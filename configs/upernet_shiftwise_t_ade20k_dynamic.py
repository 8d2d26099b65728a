# UperNet + ShiftWise-T, ADE20K, 160k, with dynamic sparsity: the masks begin at the zeros of the
# ImageNet weights and change while fine-tuning, where the official run keeps them (RigL: every 100
# steps the smallest weights go, and as many with the largest gradients start from zero).
_base_ = './upernet_shiftwise_t_ade20k.py'

custom_hooks = [
    dict(
        type='SparsityHook',
        mode='rigl',
        distribution='from_weights',
        update_interval=100,
        prune_rate=0.3,
        stop_fraction=0.75,
        from_scratch=dict(preset='shiftwise', distribution='snip', sparsity=0.3),
    )
]
