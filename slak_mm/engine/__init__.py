"""What mmengine finds registered: hooks, layer decay, reproducible sampling, checks of samples."""

from .hooks import StrictCheckpointHook
from .layer_decay import LargeKernelLayerDecayConstructor
from .reproducible import IterationSeedHook, KeyedDefaultSampler, KeyedInfiniteSampler, SeedBySample
from .samples import DataError, FiniteLossHook, check_samples
from .sparsity_hook import SparsityHook

__all__ = [
    'DataError',
    'FiniteLossHook',
    'IterationSeedHook',
    'KeyedDefaultSampler',
    'KeyedInfiniteSampler',
    'LargeKernelLayerDecayConstructor',
    'SeedBySample',
    'SparsityHook',
    'StrictCheckpointHook',
    'check_samples',
]
