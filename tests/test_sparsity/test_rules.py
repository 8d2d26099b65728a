"""Prune, grow and select on masks of random shapes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slak_mm.models import ShiftWise, SLaK
from slak_mm.sparsity import (
    PRESETS,
    SparsityError,
    UpdateSchedule,
    draw_mask,
    erk_densities,
    gradient_grow,
    magnitude_prune,
    masks_hash,
    pack_mask,
    path_groups,
    random_grow,
    select_parameters,
    uniform_densities,
    unpack_mask,
    zero_pruned_,
)
from slak_mm.sparsity.rules import smallest

SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 12), st.just(1), st.integers(1, 9), st.integers(1, 9)),
)
SEEDS = st.integers(0, 2**31)


def random_mask(shape, density, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@given(SHAPES, st.floats(0, 1), st.floats(0, 1), SEEDS, st.integers(1, 6), st.booleans())
@settings(deadline=None, max_examples=150)
def test_prune_and_grow_conserve_the_count(shape, density, rate, seed, levels, by_gradient):
    """With few distinct values, so that ties are the rule."""
    g = torch.Generator().manual_seed(seed)
    mask = random_mask(shape, density, seed)
    weight = torch.randint(0, levels, shape, generator=g).float() * mask
    active = int(mask.sum())
    pruned = magnitude_prune(weight.abs(), mask, rate)
    removed = min(active, math.ceil(rate * active))
    assert int(pruned.sum()) == active - removed
    assert not bool((pruned & ~mask).any())
    gone = weight[mask & ~pruned]
    if removed and bool(pruned.any()):
        assert gone.abs().max() <= weight[pruned].abs().min()
    gradient = torch.randint(0, levels, shape, generator=g).float()
    grown = gradient_grow(gradient, pruned, removed) if by_gradient else random_grow(pruned, removed, g)
    assert int(grown.sum()) == active
    assert not bool((pruned & ~grown).any())
    if by_gradient and removed and not bool(grown.all()):
        assert gradient[grown & ~pruned].min() >= gradient[~grown].max()


@given(SHAPES, SEEDS, st.integers(0, 2000), st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_smallest_is_a_stable_sort(shape, seed, count, levels):
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(-levels, levels, shape, generator=g).double()
    among = random_mask(shape, 0.6, seed + 1)
    order = np.argsort(np.where(among, score, np.inf).reshape(-1), kind='stable')
    want = np.zeros(score.numel(), bool)
    want[order[: min(count, int(among.sum()))]] = True
    assert np.array_equal(smallest(score, count, among).numpy().reshape(-1), want)


def test_scores_that_are_no_numbers():
    """A count is exact whatever the scores are."""
    score = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0])
    assert smallest(score, 2).tolist() == [False, False, True, False, True]
    mask = torch.ones(5, dtype=torch.bool)
    assert magnitude_prune(score.abs(), mask, 0.4).tolist() == [True, True, True, False, False]
    assert int(gradient_grow(score, ~mask, 3).sum()) == 3
    with pytest.raises(SparsityError, match='one score'):
        magnitude_prune(torch.zeros(4), mask, 0.5)


def test_half_precision_weights():
    weight = torch.tensor([3.0, 1.0, 2.0, 4.0])
    for dtype in (torch.float16, torch.bfloat16):
        assert smallest(weight.to(dtype), 2).tolist() == [False, True, True, False]


@given(SHAPES, st.floats(0, 1), SEEDS)
@settings(deadline=None, max_examples=60)
def test_drawn_masks_have_exact_counts(shape, density, seed):
    g = torch.Generator().manual_seed(seed)
    count = round(density * math.prod(shape))
    score = torch.rand(shape, generator=g)
    assert int(draw_mask(shape, density, g).sum()) == count
    chosen = draw_mask(shape, density, g, 'magnitude', score)
    assert int(chosen.sum()) == count
    if 0 < count < score.numel():
        assert score[chosen].min() >= score[~chosen].max()


@given(st.lists(SHAPES, min_size=1, max_size=8), st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=100)
def test_erk_keeps_the_total(shapes, sparsity):
    shapes = {str(i): shape for i, shape in enumerate(shapes)}
    densities = erk_densities(shapes, sparsity)
    total = sum(map(math.prod, shapes.values()))
    kept = sum(d * math.prod(shapes[name]) for name, d in densities.items())
    assert kept == pytest.approx((1 - sparsity) * total, rel=1e-9)
    assert all(0 < d <= 1 + 1e-12 for d in densities.values())
    assert set(uniform_densities(shapes, sparsity).values()) == {1 - sparsity}


@given(SHAPES, st.floats(0, 1), SEEDS)
@settings(deadline=None, max_examples=60)
def test_packing(shape, density, seed):
    mask = random_mask(shape, density, seed)
    packed = pack_mask(mask)
    assert packed.numel() == math.ceil(mask.numel() / 8)
    assert torch.equal(unpack_mask(packed, shape), mask)
    other = mask.clone()
    other.view(-1)[-1] ^= True
    assert masks_hash({'a': mask, 'b': other}) == masks_hash({'b': other, 'a': mask})
    assert masks_hash({'a': mask}) != masks_hash({'a': other})
    with pytest.raises(SparsityError, match='cannot hold'):
        unpack_mask(packed, (*shape, 9))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed', 'part'])
def test_zeroing_is_bit_exact(dtype, layout):
    """Over more entries than one chunk; NaN, infinity and minus zero become plus zero."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(96, 4, 31, 31, generator=g).to(dtype)
    mask = random_mask(t.shape, 0.6, 1)
    t.masked_fill_(~mask & random_mask(t.shape, 0.5, 2), math.nan)
    t.masked_fill_(~mask & random_mask(t.shape, 0.2, 3), -math.inf)
    if layout == 'channels_last':
        t = t.contiguous(memory_format=torch.channels_last)
        mask = mask.contiguous(memory_format=torch.channels_last)
    elif layout == 'transposed':
        t, mask = t.transpose(0, 3).contiguous().transpose(0, 3), mask
    elif layout == 'part':
        whole = torch.ones(97, 4, 31, 31, dtype=dtype)
        whole[:-1] = t
        t = whole[:-1]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    want = torch.where(mask, t.view(bits), 0)
    zero_pruned_([t, other := -t.abs()], mask)
    assert torch.equal(t.view(bits), want)
    assert torch.equal(other.view(bits)[~mask], torch.zeros_like(want[~mask]))
    if layout == 'part':
        assert bool((whole[-1] == 1).all())


def test_schedule():
    schedule = UpdateSchedule(100, 10, 0.3, 0.7)
    assert [step for step in range(120) if schedule.is_due(step)] == [10, 20, 30, 40, 50, 60, 70]
    assert [schedule.steps_to_update(step) for step in (1, 10, 11, 70, 71)] == [9, 0, 9, 0, None]
    for wrong in (
        dict(total_steps=0),
        dict(update_interval=0),
        dict(prune_rate=1.0),
        dict(stop_fraction=1.1),
        dict(final_prune_rate=-1),
    ):
        with pytest.raises(SparsityError, match=next(iter(wrong))):
            UpdateSchedule(**{'total_steps': 10, **wrong})


# Selection

ARCH = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))


def shapes_of(model, **options):
    return {name: tuple(p.shape) for name, p in select_parameters(model, **options).items()}


def test_selections():
    slak = SLaK(ARCH)
    chosen = shapes_of(slak)
    # SLaK masks every parameter with 2 or 4 dimensions; this network has no other such ones.
    assert set(chosen) == {n for n, p in slak.named_parameters() if p.ndim in (2, 4)}
    kernels = shapes_of(slak, preset='large_kernel')
    assert len(kernels) == 8 and all('.tall.' in n or '.wide.' in n for n in kernels)
    assert set(shapes_of(slak, include='Linear')) == {n for n in chosen if 'pwconv' in n}
    rest = shapes_of(slak, exclude=[r'\.pwconv\d\.', r'^downsample'])
    assert set(rest) == {n for n in chosen if 'large_kernel' in n}


def test_grn_is_never_selected():
    """The official code masks GRN's 4-D parameters, which start at zero, and so freezes them."""
    model = ShiftWise(ARCH, kernel_sizes=(7, 7, 7, 7))
    chosen = set(shapes_of(model))
    left = {n for n, p in model.named_parameters() if p.ndim in (2, 4)} - chosen
    assert left == {f'stages.{i}.0.ffn.grn.{name}' for i in range(4) for name in ('gamma', 'beta')}
    filters = shapes_of(model, preset='shiftwise_filters')
    assert path_groups(filters) == {
        f'stages.{i}.0.large_kernel.filters': [f'stages.{i}.0.large_kernel.filters.{p}.weight' for p in (0, 1)]
        for i in range(4)
    }


def test_backbone_of_a_model():
    model = nn.ModuleDict(dict(backbone=SLaK(ARCH), head=nn.Linear(32, 4)))
    assert set(shapes_of(model)) - set(shapes_of(model, preset='backbone')) == {'head.weight'}
    model['backbone'].requires_grad_(False)
    assert set(shapes_of(model)) == {'head.weight'}
    with pytest.raises(SparsityError, match='no weight of ModuleDict is selected'):
        select_parameters(model, 'backbone')


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(preset='most'), "unknown selection 'most'"),
        (dict(include='('), 'regular expression'),
        (dict(include='nothing'), "include='nothing'"),
    ],
)
def test_selection_errors(options, message):
    with pytest.raises(SparsityError, match=message):
        select_parameters(SLaK(ARCH), **options)
    with pytest.raises(SparsityError, match='no trainable weight'):
        select_parameters(nn.LayerNorm(3))


def test_many_paths_are_ordered_by_number():
    names = [f'x.large_kernel.filters.{p}.weight' for p in (10, 9, 0, 1)]
    assert path_groups(names)['x.large_kernel.filters'] == [names[2], names[3], names[1], names[0]]


def test_presets_are_the_published_settings():
    assert [
        (PRESETS[n]['update_interval'], PRESETS[n]['prune_rate'], PRESETS[n]['sparsity'])
        for n in ('slak_t', 'slak_s', 'slak_b', 'shiftwise')
    ] == [(2000, 0.5, 0.4), (100, 0.3, 0.4), (100, 0.3, 0.4), (100, 0.3, 0.3)]
    assert PRESETS['shiftwise']['sparse_gap'] == 131
