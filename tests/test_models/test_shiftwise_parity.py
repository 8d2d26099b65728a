"""ShiftWise against the official code's results, and against its operator on activations."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    SHIFTWISE_GOLDENS,
    Goldens,
    block_input,
    check_features,
    check_logits,
    input_for,
    load_part,
    official_weights,
    training_step,
)
from shiftwise_reference import activation_space, draw_tables, shift_and_add

from slak_mm import load_pretrained, switch_to_deploy
from slak_mm.checkpoints import convert_state_dict, to_official
from slak_mm.models import ShiftWise
from slak_mm.models.shiftwise import ShiftWiseBlock, ShiftWiseConv
from slak_mm.models.slak import SLaKBlock
from slak_mm.ops import cross_dwconv2d
from slak_mm.ops.shift_tables import assemble_kernels, ghost_channels, num_filters, shift_tables

GOLDENS = Goldens(SHIFTWISE_GOLDENS)
ARRAYS = np.load(SHIFTWISE_GOLDENS)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
TABLES = ('shifts', 'picks', 'rep', 'ghost')


def digest(table: torch.Tensor) -> str:
    return hashlib.sha256(table.numpy().astype('<i4').tobytes()).hexdigest()[:16]


# Tables


@pytest.mark.parametrize('num_reps', [2, 4])
def test_tables_of_all_layer_sizes(num_reps):
    """Bit-equal to the official ones, for every kernel and width of the official networks."""
    rows = [row.split() for row in ARRAYS['tables'] if int(row.split()[3]) == num_reps]
    for kernel, small, channels, reps, want_shifts, want_picks in rows:
        shifts, picks = shift_tables(int(channels), int(kernel), int(small), int(reps))
        assert shifts.dtype == picks.dtype == torch.int32
        assert (digest(shifts), digest(picks)) == (want_shifts, want_picks)
    assert len(rows) > 100


def test_ghosts_of_all_layer_sizes():
    for row in ARRAYS['ghosts']:
        version, channels, ratio, num_ghosts, want_ghost, want_rep = row.split()
        layer = dict(depths=(1,), dims=(int(channels),))
        with torch.device('meta'):
            model = ShiftWise(
                layer, int(version), kernel_sizes=(3,), ghost_ratio=float(ratio), num_reps=1, out_indices=0
            )
        assert len(model.stages[0][0].large_kernel.ghost) == int(num_ghosts)
        rep, ghost = ghost_channels(int(channels), int(num_ghosts))
        assert (digest(ghost), digest(rep)) == (want_ghost, want_rep)


@pytest.mark.parametrize('kernel, small', [(51, 3), (49, 3), (13, 5), (8, 3), (3, 3)])
def test_tables_entry_by_entry(kernel, small):
    for got, want in zip(shift_tables(7, kernel, small, 3), draw_tables(7, kernel, small, 3)):
        assert torch.equal(got, want)


# The operator, from two sides


@pytest.mark.parametrize('case', GOLDENS.cases('addshift_'))
def test_slow_path_is_the_official_operator(case):
    """The golden results pin down tests/shiftwise_reference.py, on which the rest leans."""
    sizes, image = case.removeprefix('addshift_').split('__')
    kernel, small, c, reps = (int(part[1:]) for part in sizes.split('_'))
    h, w = map(int, image.split('x'))
    n = 2 if (h, w) == (9, 11) else 1
    e = small - 1 - small // 2
    x = input_for((n, c * num_filters(kernel, small), h + 2 * e, w + 2 * e), 7).double()
    x.requires_grad_()
    outs = shift_and_add(x, *shift_tables(c, kernel, small, reps), small)
    torch.cat(outs).backward(input_for((3 * n, c, h, w), 8).double())
    for name, got in zip(('out_h', 'out_v', 'out_i', 'grad_in'), (*outs, x.grad), strict=True):
        GOLDENS.assert_close(case, name, got, 1e-6)


def assert_same_from_both_sides(c, kernel, small, reps, n, h, w, tables=None, seed=0):
    shifts, picks = tables or shift_tables(c, kernel, small, reps)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=g, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(len(shifts), 1, small, small, generator=g, dtype=torch.float64, requires_grad=True)
    want = activation_space(x, filters, shifts, picks)
    tall, wide, square = assemble_kernels(filters, shifts, picks, kernel)
    y_tall, y_wide, y_small = cross_dwconv2d(x, tall, wide, square, center=kernel // 2)
    got = (y_wide, y_tall, y_small)
    outward = [torch.randn(n, c, h, w, generator=g, dtype=torch.float64) for _ in want]
    want += torch.autograd.grad(want, (x, filters), outward)
    got += torch.autograd.grad(got, (x, filters), outward)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize('size', [(20, 17), (9, 11), (1, 1), (1, 40), (60, 2)], ids=str)
@pytest.mark.parametrize(
    'kernel, small', [(51, 3), (49, 3), (47, 3), (13, 3), (51, 5), (49, 5), (47, 5), (13, 5), (7, 7), (10, 3), (5, 1)]
)
def test_kernels_equal_shifted_activations(kernel, small, size):
    """Outputs and gradients, on maps larger and much smaller than the shifts."""
    assert_same_from_both_sides(4, kernel, small, 3, 2, *size)


@pytest.mark.parametrize('kernel, small', [(51, 3), (13, 5)])
def test_fused_slow_path_equals_the_plain_one(kernel, small):
    """The competitor in tools/benchmark.py computes what it should."""
    g = torch.Generator().manual_seed(0)
    shifts, picks = shift_tables(4, kernel, small, 3)
    x = torch.randn(2, 4, 30, 17, generator=g, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(len(shifts), 1, small, small, generator=g, dtype=torch.float64, requires_grad=True)
    results = []
    for fused in (False, True):
        outs = activation_space(x, filters, shifts, picks, fused)
        grads = torch.autograd.grad(outs, (x, filters), [(i + 1) * o for i, o in enumerate(outs)])
        results.append((*outs, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * float(b.detach().abs().max()))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(0, 24), st.sampled_from([1, 3, 5, 7]), st.integers(1, 4)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**20),
)
def test_kernels_equal_shifted_activations_anywhere(sizes, shape, seed):
    c, extra, small, reps = sizes
    assert_same_from_both_sides(c, small + extra, small, reps, *shape, seed=seed)


def test_other_tables_are_followed():
    """Any places within the kernel, several filters in one place included."""
    g = torch.Generator().manual_seed(5)
    c, kernel, small, reps, nk = 3, 11, 3, 2, 4
    place = torch.randint(0, nk, (c * nk, 2 * reps), generator=g)
    shifts = (kernel // 2 - (small - 1) - small * place).int()
    picks = (nk * torch.arange(c).view(-1, 1) + torch.randint(0, nk, (c, reps), generator=g)).int()
    assert_same_from_both_sides(c, kernel, small, reps, 2, 9, 8, tables=(shifts, picks))


# Kernels, blocks and networks


def build_operator(version: int, **options) -> ShiftWiseConv:
    sizes = dict(kernel_size=13, small_kernel=3, num_paths=2, num_reps=4)
    return ShiftWiseConv(16, {1: 3, 2: 4}[version], **sizes, branch_norm=True, norm_cfg=dict(type='BN'), **options)


@pytest.mark.parametrize('version', [1, 2])
def test_equivalent_kernels(version):
    case = f'equivalent_conv_v{version}_c16_K13_k3'
    operator = build_operator(version)
    load_part(operator, 'shiftwise', 'eq/', 'stages.0.0.large_kernel.')
    operator.double().eval()
    for name, kernel in zip('vhi', operator.kernels(), strict=True):
        GOLDENS.assert_close(case, f'kernel_{name}', kernel, 1e-6)
    x = input_for((2, 16, 11, 7), 9).double()
    with torch.no_grad():
        GOLDENS.assert_close(case, 'out', operator(x), 1e-6)
        operator.switch_to_deploy()
        GOLDENS.assert_close(case, 'out', operator(x), 1e-6)


@pytest.mark.parametrize('with_cp', [False, True], ids=['stored', 'recomputed'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('version', [1, 2])
def test_block_in_training(version, dtype, with_cp):
    """Output, every gradient and all running statistics."""
    case = f'block_train_shiftwise_v{version}_c16_K13_k3'
    operator = build_operator(version)
    block: torch.nn.Module
    if version == 1:
        block = SLaKBlock(16, operator, 0.0, 1.0, with_cp)
    else:
        block = ShiftWiseBlock(16, operator, dict(type='BN'), 0.0, 1.0, with_cp)
    ours = load_part(block, 'shiftwise', 'block/')
    checked = set()
    for name, got in training_step(GOLDENS, case, block, ours, dtype):
        kind, _, key = name.partition(':')
        # Statistics are kept with the precision of float32. A bias before another batch norm has
        # no effect, so that its gradient is all rounding error.
        without_effect = version == 2 and (key == 'act.1.beta' or 'large_kernel.bn' in key and key.endswith('.bias'))
        small = kind == 'buf' or without_effect
        GOLDENS.assert_close(case, name, got, TOLERANCE[dtype], least_scale=1.0 if small else 0)
        checked.add(ours.get(key, name))
    stored = {k for k in block.state_dict() if k.rsplit('.')[-1] not in TABLES}
    assert stored <= checked

    load_part(block, 'shiftwise', 'block/')
    block.eval()
    x = block_input(dtype)
    with torch.no_grad():
        GOLDENS.assert_close(case, 'out_eval', block(x), TOLERANCE[dtype])
        (operator if version == 1 else block).switch_to_deploy()
        GOLDENS.assert_close(case, 'out_eval', block(x), TOLERANCE[dtype])


def build(variant: str) -> ShiftWise:
    _, version, arch = variant.split('_')
    model = ShiftWise(arch, version=int(version[1]))
    load_pretrained(model, official_weights(model, 'shiftwise'))
    return model.eval()


@pytest.mark.parametrize(
    'variant', sorted({case.removeprefix('feat_').split('__')[0] for case in GOLDENS.cases('feat_')})
)
def test_features(variant):
    """In float64 and float32, before and after deployment."""
    model = build(variant)
    cases = GOLDENS.cases(f'feat_{variant}')
    assert len(cases) == 2

    def check(dtype):
        for case in cases:
            check_features(GOLDENS, case, model.to(dtype), dtype, TOLERANCE[dtype])

    check(torch.float32)
    check(torch.float64)
    switch_to_deploy(model)
    check(torch.float64)
    check(torch.float32)


@pytest.mark.parametrize('case', GOLDENS.cases('logits_'))
def test_logits(case):
    check_logits(GOLDENS, case, build(case.removeprefix('logits_').split('__')[0]))


# Names


MANIFESTS = sorted(name.removeprefix('manifest/') for name in ARRAYS.files if name.startswith('manifest/'))


@pytest.mark.parametrize('variant', MANIFESTS)
def test_names_convert_both_ways(variant):
    """Every name and shape of the official networks: classifier, downstream and merged."""
    name, _, kind = variant.partition('__')
    _, version, arch = name.split('_')
    with torch.device('meta'):
        model = ShiftWise(arch, version=int(version[1]), out_norm=kind == 'seg')
    tables = {k: v for k, v in model.state_dict().items() if k.rsplit('.')[-1] in TABLES}
    state = {k: v for k, v in model.state_dict().items() if k not in tables}
    official = to_official(state, 'LoRA' if kind == 'merged' else 'LoRAs', family='shiftwise')
    shapes = {k: list(v.shape) for k, v in official.items()}
    if kind != 'seg':
        channels = model.dims[-1]
        shapes |= {'norm.weight': [channels], 'norm.bias': [channels]}
        shapes |= {'head.weight': [1000, channels], 'head.bias': [1000]}
    lines = '\n'.join(sorted(f'{k} {s}' for k, s in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == str(ARRAYS[f'manifest/{variant}'])

    back, notes = convert_state_dict(official)
    assert not notes.unrecognized and notes.format == 'shiftwise'
    remarks = model.complete_state_dict(back)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert len(remarks) == (2 if kind == 'merged' else 1)
