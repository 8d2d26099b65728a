"""What mmengine finds registered: hooks, a loop, layer decay, reproducible sampling, checks of samples."""

from .checkpoint_hook import AtomicCheckpointHook
from .epoch_loop import ResumableEpochLoop
from .hooks import StrictCheckpointHook
from .inferencers import register_models
from .layer_decay import LargeKernelLayerDecayConstructor
from .loader import register_schemes
from .reproducible import IterationSeedHook, KeyedDefaultSampler, KeyedInfiniteSampler, SeedBySample
from .samples import DataError, FiniteLossHook, check_samples
from .sparsity_hook import SparsityHook

__all__ = [
    'AtomicCheckpointHook',
    'DataError',
    'FiniteLossHook',
    'IterationSeedHook',
    'KeyedDefaultSampler',
    'KeyedInfiniteSampler',
    'LargeKernelLayerDecayConstructor',
    'ResumableEpochLoop',
    'SeedBySample',
    'SparsityHook',
    'StrictCheckpointHook',
    'check_samples',
]

register_schemes()
register_models()
