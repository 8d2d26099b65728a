"""What plugs into mmengine, and what the command line does with configs."""

from .hooks import StrictCheckpointHook
from .layer_decay import LargeKernelLayerDecayConstructor
from .overrides import ConfigOverrideError
from .reproducible import IterationSeedHook, KeyedDefaultSampler, KeyedInfiniteSampler, SeedBySample
from .sparsity_hook import SparsityHook

__all__ = [
    'ConfigOverrideError',
    'IterationSeedHook',
    'KeyedDefaultSampler',
    'KeyedInfiniteSampler',
    'LargeKernelLayerDecayConstructor',
    'SeedBySample',
    'SparsityHook',
    'StrictCheckpointHook',
]
