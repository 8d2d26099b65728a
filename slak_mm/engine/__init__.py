"""What mmengine finds registered: hooks, layer decay, reproducible sampling."""

from .hooks import StrictCheckpointHook
from .layer_decay import LargeKernelLayerDecayConstructor
from .reproducible import IterationSeedHook, KeyedDefaultSampler, KeyedInfiniteSampler, SeedBySample
from .sparsity_hook import SparsityHook

__all__ = [
    'IterationSeedHook',
    'KeyedDefaultSampler',
    'KeyedInfiniteSampler',
    'LargeKernelLayerDecayConstructor',
    'SeedBySample',
    'SparsityHook',
    'StrictCheckpointHook',
]
