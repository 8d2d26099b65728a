"""Randomness as a function of the seed and of the place in the run.

mmengine saves no state of the random number generators, and what a resumed run draws depends on
the number of data workers and on how the data loader was moved forward. Instead of storing
states, the parts in this file give each training sample and each iteration its own seed:

* :class:`KeyedInfiniteSampler` and :class:`KeyedDefaultSampler` give the same order of samples as
  mmengine's samplers, as integers that know their place in that order,
* :class:`SeedBySample`, first in the pipeline, seeds the augmentations from that place,
* :class:`IterationSeedHook` seeds what the model draws (drop path, dropout) from the iteration.

A run that was interrupted and resumed then sees the same images with the same augmentations and
the same dropped paths as an uninterrupted one, with any number of data workers.
"""

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, HOOKS, TRANSFORMS

from slak_mm._config import add_hook, datasets_of, type_name


def seed_everything(*key: int) -> None:
    """Seed torch, numpy and python from non-negative integers, for example seed, rank and iteration."""
    words = np.random.SeedSequence(key).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


class KeyedIndex(int):
    """Index of a sample whose ``key`` is the seed of its run and its place in the run's order.

    Wrapping data sets compute the index within the data set that they wrap: mmengine's ``ConcatDataset`` by a
    difference, its ``RepeatDataset`` by a remainder. Both keep the key.
    """

    key: tuple[int, int] | None = None

    def __sub__(self, other: int) -> 'KeyedIndex':
        return type(self).of(int(self) - other, self.key)

    def __mod__(self, other: int) -> 'KeyedIndex':
        return type(self).of(int(self) % other, self.key)

    @classmethod
    def of(cls, index: int, key: tuple[int, int] | None) -> 'KeyedIndex':
        """Make one."""
        keyed = cls(index)
        keyed.key = key
        return keyed


@DATA_SAMPLERS.register_module()
class KeyedInfiniteSampler(InfiniteSampler):
    """mmengine's ``InfiniteSampler``, with its arguments and :class:`KeyedIndex` as indices."""

    def _indices_of_rank(self) -> Iterator[int]:
        for count, index in enumerate(super()._indices_of_rank()):
            yield KeyedIndex.of(index, (self.seed, count * self.world_size + self.rank))


@DATA_SAMPLERS.register_module()
class KeyedDefaultSampler(DefaultSampler):
    """mmengine's ``DefaultSampler``, with its arguments and :class:`KeyedIndex` as indices."""

    def __iter__(self) -> Iterator[int]:
        before = self.epoch * self.num_samples * self.world_size
        for count, index in enumerate(super().__iter__()):
            yield KeyedIndex.of(index, (self.seed, before + count * self.world_size + self.rank))


@TRANSFORMS.register_module()
class SeedBySample:
    """First transform of a pipeline: seeds the generators from the sample's place in the run.

    It needs a data set that hands the sampler's index on as ``results['sample_idx']``, as mmengine's ``BaseDataset``
    does, alone or within ``ConcatDataset`` or ``RepeatDataset``; with a plain index it does nothing.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Seed torch, numpy and python; the results pass unchanged."""
        key = getattr(results.get('sample_idx'), 'key', None)
        if key is not None:
            seed_everything(*key)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}()'


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds torch, numpy and python before each training iteration.

    The seed is made of the run's seed, the process's rank and the iteration, so that what the
    model draws does not depend on what was drawn before, and differs between processes.
    """

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the generators; ``batch_idx`` is not used, the runner counts iterations."""
        # The 1 keeps these keys apart from those of the samples.
        seed_everything(runner.seed, runner.rank, runner.iter, 1)


def make_reproducible(cfg: Config) -> None:
    """Let a config train with the parts of this module.

    Args:
        cfg: Changed in place: samplers of mmengine become their keyed versions, training pipelines begin with
            :class:`SeedBySample`, and :class:`IterationSeedHook` is added. Other samplers are left as they are, with
            a warning, and so are wrapping data sets that look the index up in a table (``ClassBalancedDataset``):
            their augmentations then depend on the workers as usual.
    """
    loader = cfg.get('train_dataloader')
    if not loader:
        return
    sampler = loader.get('sampler')
    keyed = {'InfiniteSampler': 'KeyedInfiniteSampler', 'DefaultSampler': 'KeyedDefaultSampler'}
    if type_name(sampler) in keyed:
        sampler['type'] = keyed[type_name(sampler)]
    elif type_name(sampler) not in keyed.values():
        print_log(
            f'The sampler {type_name(sampler)} does not say the place of a sample in the run: '
            'a resumed run draws other augmentations than an uninterrupted one.',
            logger='current',
            level=logging.WARNING,
        )
    for _, dataset in datasets_of(cfg, ('train_dataloader',)):
        pipeline = dataset.get('pipeline')
        if pipeline and type_name(pipeline[0]) != 'SeedBySample':
            dataset['pipeline'] = [ConfigDict(type='SeedBySample'), *pipeline]
    add_hook(cfg, 'IterationSeedHook')
