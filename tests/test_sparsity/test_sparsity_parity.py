"""Sparse training against results of the official code: densities, rules, short trainings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import input_for, weight_for
from torch import nn

from slak_mm.checkpoints import to_official
from slak_mm.models import ShiftWise, SLaK
from slak_mm.sparsity import (
    SparseTraining,
    cosine_prune_rate,
    erk_densities,
    gradient_grow,
    magnitude_prune,
    path_groups,
    random_grow,
    snip_densities,
    snip_gradients,
    snip_scores,
)

ARRAYS = np.load(Path(__file__).parents[1] / 'data' / 'sparse_goldens.npz')
REPORT = json.loads(ARRAYS['report'].tobytes())
SALT = 'sparse/'
PLAN = dict(
    arch=dict(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24)),
    kernel_sizes=(13, 11, 9, 7),
    norm_cfg=dict(type='BN'),
    out_norm=False,
    out_indices=3,
)


class Classifier(nn.Module):
    """The official classification network around our backbone, its weights by the formula."""

    def __init__(self, kind):
        super().__init__()
        if kind == 'slak':
            self.backbone = SLaK(**PLAN)
        else:
            self.backbone = ShiftWise(**PLAN, version=int(kind[-1]), small_kernel=3)
        self.norm = nn.LayerNorm(self.backbone.dims[-1], eps=1e-6)
        self.head = nn.Linear(self.backbone.dims[-1], 10)
        self.official = {}
        own = self.backbone.state_dict()
        tables = {k: v for k, v in own.items() if k.endswith(('shifts', 'picks', 'rep', 'ghost'))}
        for ours, value in own.items():
            if ours not in tables:
                (theirs,) = to_official({ours: value}, family=self.backbone.family.name)
                self.official[f'backbone.{ours}'] = theirs
        self.official |= {k: k for k in self.state_dict() if not k.startswith('backbone.')}
        with torch.no_grad():
            for name, value in self.state_dict().items():
                if name in self.official:
                    value.copy_(weight_for(self.official[name], value.shape, SALT))
        self.double().train()

    def forward(self, x):
        return self.head(self.norm(self.backbone(x)[0].mean((2, 3))))

    def by_official_name(self):
        return {self.official[name]: p for name, p in self.named_parameters()}

    def ours(self, theirs):
        return next(ours for ours, name in self.official.items() if name == theirs)


def loss_of_batch(model, shape=(8, 3, 64, 64), seed=21):
    labels = np.random.RandomState(seed + 1).randint(0, 10, shape[0])
    return F.cross_entropy(model(input_for(shape, seed).double()), torch.from_numpy(labels))


@pytest.fixture(scope='module')
def snip():
    """Weights and gradients of the SNIP batch by official names, of each network."""
    found = {}
    for kind in ('slak', 'shiftwise_v1', 'shiftwise_v2'):
        model = Classifier(kind)
        parameters = dict(model.named_parameters())
        gradients = snip_gradients(model, parameters, loss_of_batch)
        found[kind] = (model.by_official_name(), {model.official[name]: g for name, g in gradients.items()})
    return found


# Densities


@pytest.mark.parametrize('case', REPORT['cosine'], ids=lambda c: f'T{c["T_max"]}+{c["init_step"]}')
def test_cosine_prune_rate(case):
    """Also past the end of the schedule, where the official rate rises again."""
    for i, want in enumerate(case['values']):
        got = cosine_prune_rate(case['init_step'] + i, case['T_max'], case['prune_rate'], case['eta_min'])
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize('case', REPORT['erk'], ids=lambda c: f'{c["model"]}-{c["sparsity"]}-{c["only_L"]}')
def test_erk_densities(case, snip):
    weights = snip[case['model']][0]
    got = erk_densities({name: tuple(weights[name].shape) for name in case['density']}, case['sparsity'])
    assert got == pytest.approx(case['density'], rel=1e-12)
    # Layers that the official code left dense: their masks were drawn with that density.
    assert {name for name, d in got.items() if d == 1} <= set(case['layers_kept_dense'])


@pytest.mark.parametrize(
    'case', REPORT['snip'], ids=lambda c: f'{c["model"]}-{c["kind"]}-{c["keep_ratio"]}-{c["only_L"]}'
)
def test_snip_densities(case, snip):
    weights, gradients = snip[case['model']]
    sparsity = 1 - case['keep_ratio']
    if case['kind'] == 'fine':
        scores = snip_scores({name: weights[name] for name in case['names']}, gradients)
        got = snip_densities(scores, sparsity)
    else:
        filters = {
            name: [name.replace('LoRAs.0', f'LoRAs.{p}') for p in (0, 1)] for name in case['names'] if 'LoRAs' in name
        }
        chosen = [n for paths in filters.values() for n in paths]
        got = snip_densities(snip_scores({name: weights[name] for name in chosen}, gradients, filters), sparsity)
        others = {name: weights[name] for name in case['names'] if name not in filters}
        if others:
            got |= snip_densities(snip_scores(others, gradients), sparsity)
    want = dict(zip(case['names'], case['sparsity']))
    assert {name: 1 - d for name, d in got.items()} == pytest.approx(want, abs=1e-12)


# Rules on single layers


@pytest.mark.parametrize('exact', [True, False], ids=['exact', 'official'])
@pytest.mark.parametrize('i', range(4))
def test_rules(i, exact):
    weight, mask, gradient, pruned, by_gradient = (
        torch.from_numpy(ARRAYS[f'prim{i}_{name}']) for name in ('weight', 'mask', 'grad', 'pruned', 'grown_gradient')
    )
    rate, removed = float(ARRAYS[f'prim{i}_prune_rate']), int(ARRAYS[f'prim{i}_removed'])
    mask, pruned, by_gradient = mask.bool(), pruned.bool(), by_gradient.bool()
    got = magnitude_prune(weight.abs(), mask, rate, exact)
    assert torch.equal(got, pruned)
    assert int(mask.sum()) - int(got.sum()) == removed
    assert torch.equal(gradient_grow(gradient, pruned, removed, exact), by_gradient)


@pytest.mark.parametrize('i', range(3))
def test_filters_of_paths_that_share_a_mask(i):
    weights = torch.from_numpy(ARRAYS[f'coarse{i}_weights'])
    mask = torch.from_numpy(ARRAYS[f'coarse{i}_mask']).bool()
    rate = float(ARRAYS[f'coarse{i}_prune_rate'])
    taps = weights.abs().sum((2, 3, 4))
    for name, score in (('shared', taps.sum(0)), ('path0_alone', taps[0])):
        want = torch.from_numpy(ARRAYS[f'coarse{i}_pruned_{name}']).bool()
        assert torch.equal(magnitude_prune(score.view(mask.shape), mask, rate), want)


# Trainings


def zero_initially(model, case):
    """The zeros that the golden training starts from, in the order of the official parameters."""
    random = np.random.RandomState(case['mask_seed'])
    for name, p in model.by_official_name().items():
        if p.ndim in (2, 4) and 'head' not in name and 'downsample' not in name:
            p.data *= torch.from_numpy(random.rand(*p.shape) < 0.7)


def schedule(case):
    kept = {'T_max': 'total_steps', 'update_frequency': 'update_interval', 'prune_rate': 'prune_rate'}
    return dict(stop_fraction=1.0, **{ours: case[theirs] for theirs, ours in kept.items()})


TRAININGS = dict(slak_fine='slak', slak_onlyL='slak', sw2_onlyL='shiftwise_v2')


@pytest.mark.parametrize('sampling', ['exact', 'bernoulli'])
@pytest.mark.parametrize('name, kind', [(f'traj_{name}_gradient', kind) for name, kind in TRAININGS.items()])
def test_training(name, kind, sampling):
    """SGD with momentum and growth by gradients: losses, rates, counts and final masks."""
    case = REPORT[name]
    model = Classifier(kind)
    zero_initially(model, case)
    parameters = model.by_official_name()
    masked = {n: parameters[n] for n in case['mask_names']}
    sparse = SparseTraining(masked, mode='rigl', sampling=sampling, **schedule(case))
    sparse.initialize()
    assert {n: int(m.sum()) for n, m in sparse.masks.items()} == case['init_nonzero']
    optimizer = torch.optim.SGD(parameters.values(), case['lr'], case['momentum'])
    sparse.attach(optimizer)
    for i, log in enumerate(case['log']):
        seed = case['batch_seed0'] + case['batch_seed_step'] * i
        before = sparse.masks if log['removed'] is None else {n: m.clone() for n, m in sparse.masks.items()}
        optimizer.zero_grad()
        loss = loss_of_batch(model, tuple(case['batch_shape']), seed)
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(log['loss'], rel=1e-7)
        assert sparse.schedule.rate(sparse.steps) == pytest.approx(log['prune_rate'], rel=1e-12)
        assert sparse.statistics().active == log['nonzero']
        if log['removed'] is not None:
            for n, mask in before.items():
                pruned = magnitude_prune(torch.zeros(mask.shape), mask, sparse.schedule.rate(sparse.steps))
                assert int(mask.sum()) - int(pruned.sum()) == log['removed'][n]
    for n, mask in sparse.masks.items():
        want = np.unpackbits(ARRAYS[f'{name}|mask|{n}'], count=mask.numel()).astype(bool)
        assert np.array_equal(mask.numpy().reshape(-1), want), n


def test_paths_share_masks_at_aligned_updates():
    """Updates 3 and 6 are aligned, as in the golden run; its counts are random, ours are not."""
    run = REPORT['rep_coarse_run']
    model = Classifier('shiftwise_v2')
    parameters = {model.ours(name): dict(model.named_parameters())[model.ours(name)] for name in run['mask_order']}
    options = dict(distribution='snip', sparsity=run['sparsity'], per_filter=True, sparse_gap=run['sparse_gap'])
    sparse = SparseTraining(parameters, mode='set', **options, **schedule(run))
    sparse.initialize(snip_gradients(model, parameters, loss_of_batch))
    groups = path_groups(parameters).values()
    shapes = {model.official[n]: list(layer.mask_shape) for layer in sparse._layers for n in layer.parameters}
    assert shapes == run['mask_shapes']
    counts = {name: int(mask.sum()) for name, mask in sparse.masks.items()}
    optimizer = torch.optim.SGD(parameters.values(), 0.05, 0.9)
    sparse.attach(optimizer)
    g = torch.Generator().manual_seed(0)
    for log in run['log']:
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
        optimizer.step()
        shared = all(torch.equal(sparse.masks[a], sparse.masks[b]) for a, b in groups)
        assert shared == log['paths_share_mask'], log['step']
        assert {name: int(mask.sum()) for name, mask in sparse.masks.items()} == counts


def test_official_random_growth_has_the_right_mean():
    mask = torch.zeros(400, 500, dtype=torch.bool)
    mask[:100] = True
    g = torch.Generator().manual_seed(0)
    grown = random_grow(mask, 30000, g, exact=False)
    assert bool((grown & mask).sum() == mask.sum())
    # The standard deviation of the number is sqrt(30000 * 0.8) = 155.
    assert abs(int(grown.sum()) - 50000 - 30000) < 5 * 155
    assert int(random_grow(mask, 30000, g).sum()) == 80000
