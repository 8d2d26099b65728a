import itertools
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset, DefaultSampler, InfiniteSampler, RepeatDataset
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from slak_mm.engine import reproducible
from slak_mm.engine.reproducible import (
    IterationSeedHook,
    KeyedDefaultSampler,
    KeyedIndex,
    KeyedInfiniteSampler,
    SeedBySample,
    make_reproducible,
)

DATA = range(7)


def draw():
    return torch.rand(1).item(), np.random.rand(), random.random()


def in_process(monkeypatch, kind, rank, world_size):
    """The first twelve indices that a sampler gives one of several processes."""
    monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda: (rank, world_size))
    return list(itertools.islice(iter(kind(DATA, seed=5)), 12))


@pytest.mark.parametrize('rank,world_size', [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(
    'keyed,plain', [(KeyedInfiniteSampler, InfiniteSampler), (KeyedDefaultSampler, DefaultSampler)]
)
def test_same_order_as_mmengine(monkeypatch, keyed, plain, rank, world_size):
    assert in_process(monkeypatch, keyed, rank, world_size) == in_process(monkeypatch, plain, rank, world_size)


def test_place_is_that_of_the_whole_run(monkeypatch):
    alone = in_process(monkeypatch, KeyedInfiniteSampler, 0, 1)
    assert [index.key for index in alone] == [(5, place) for place in range(12)]
    pair = [in_process(monkeypatch, KeyedInfiniteSampler, rank, 2) for rank in (0, 1)]
    together = [index for indices in zip(*pair) for index in indices][:12]
    assert [(int(index), index.key) for index in together] == [(int(index), index.key) for index in alone]


def test_epochs_have_different_places():
    sampler = KeyedDefaultSampler(DATA, seed=5)
    first = [index.key for index in sampler]
    sampler.set_epoch(1)
    second = [index.key for index in sampler]
    assert first + second == [(5, place) for place in range(14)]


def test_index_is_an_integer_that_survives_the_way_to_a_worker():
    index = pickle.loads(pickle.dumps(KeyedIndex.of(3, (11, 42))))
    assert index == 3 and [10, 11, 12, 13][index] == 13 and index.key == (11, 42)


@pytest.mark.parametrize(
    'wrapper', [lambda inner: ConcatDataset([inner(), inner()]), lambda inner: RepeatDataset(inner(), 2)]
)
def test_index_keeps_its_key_within_wrapping_datasets(wrapper):
    class Inner(BaseDataset):
        def load_data_list(self):
            return [dict(number=number) for number in range(3)]

    dataset = wrapper(Inner)
    assert len(dataset) == 6
    for place in range(6):
        results = dataset[KeyedIndex.of(place, (11, 40 + place))]
        assert results['number'] == place % 3
        assert results['sample_idx'] == place % 3 and results['sample_idx'].key == (11, 40 + place)
    assert not hasattr(dataset[4]['sample_idx'], 'key')


def test_transform_makes_randomness_a_function_of_the_place():
    seed = SeedBySample()
    results = dict(sample_idx=KeyedIndex.of(3, (11, 42)), img='x')
    assert seed(results) is results
    first = draw()
    seed(dict(sample_idx=KeyedIndex.of(3, (11, 43))))
    assert draw() != first
    seed(dict(sample_idx=KeyedIndex.of(0, (11, 42))))
    assert draw() == first
    state = torch.get_rng_state()
    seed(dict(sample_idx=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_hook_depends_on_seed_rank_and_iteration():
    seen = set()
    for seed, rank, iteration in itertools.product((0, 1), (0, 1), (0, 1)):
        runner = SimpleNamespace(seed=seed, rank=rank, iter=iteration)
        IterationSeedHook().before_train_iter(runner, 0)
        first = draw()
        IterationSeedHook().before_train_iter(runner, 0)
        assert draw() == first
        seen.add(first)
    assert len(seen) == 8


def test_make_reproducible_changes_what_it_should(config_path):
    cfg = Config.fromfile(config_path)
    make_reproducible(cfg)
    make_reproducible(cfg)
    assert cfg.train_dataloader.sampler.to_dict() == dict(type='KeyedInfiniteSampler', shuffle=True)
    kinds = [transform.type for transform in cfg.train_dataloader.dataset.pipeline]
    assert kinds.count('SeedBySample') == 1 and kinds[0] == 'SeedBySample'
    assert [hook.type for hook in cfg.custom_hooks] == ['SparsityHook', 'IterationSeedHook']
    assert cfg.test_dataloader.sampler.type == 'DefaultSampler'


@pytest.mark.parametrize('workers', [1, 3])
def test_batches_do_not_depend_on_the_workers(config_path, demo_data, workers):
    def batches(num_workers):
        cfg = Config.fromfile(config_path)
        reproducible.make_reproducible(cfg)
        loader = cfg.train_dataloader
        loader.update(num_workers=num_workers, persistent_workers=num_workers > 0, batch_size=2)
        loader.dataset.data_root = demo_data
        loader.dataset.pipeline[3].scale = (96, 64)
        loader.dataset.pipeline[4].crop_size = (48, 48)
        init_default_scope('mmseg')
        np.random.seed(num_workers)
        dataloader = Runner.build_dataloader(loader, seed=9)
        return [batch['inputs'] for batch in itertools.islice(iter(dataloader), 6)]

    for ours, theirs in zip(batches(0), batches(workers)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
