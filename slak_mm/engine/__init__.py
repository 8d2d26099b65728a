"""What mmengine finds registered: hooks, a loop, layer decay, reproducible sampling."""

from .checkpoint_hook import AtomicCheckpointHook
from .epoch_loop import ResumableEpochLoop
from .hooks import StrictCheckpointHook
from .layer_decay import LargeKernelLayerDecayConstructor
from .reproducible import IterationSeedHook, KeyedDefaultSampler, KeyedInfiniteSampler, SeedBySample
from .sparsity_hook import SparsityHook

__all__ = [
    'AtomicCheckpointHook',
    'IterationSeedHook',
    'KeyedDefaultSampler',
    'KeyedInfiniteSampler',
    'LargeKernelLayerDecayConstructor',
    'ResumableEpochLoop',
    'SeedBySample',
    'SparsityHook',
    'StrictCheckpointHook',
]
