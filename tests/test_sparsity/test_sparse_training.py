"""SparseTraining with real optimizers: exact zeros and counts, and the same bits after a stop."""

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from slak_mm.models import ShiftWise
from slak_mm.sparsity import (
    PRESETS,
    DenseWeights,
    SparseTraining,
    SparsityError,
    erk_densities,
    format_table,
    masks_from_state,
    masks_hash,
    path_groups,
    select_parameters,
    snip_gradients,
)


def lamb(parameters, **options):
    return pytest.importorskip('timm.optim').Lamb(parameters, **options)


OPTIMIZERS = {
    'sgd': lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    'sgd-nesterov-foreach': lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    'adamw': lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    'adamw-foreach': lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    'adamw-fused': lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    'lamb': lambda p: lamb(p, lr=0.01),
}
FUSED_ON_CPU = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 4)


def make_optimizer(kind, parameters):
    if kind.endswith('fused') and not FUSED_ON_CPU:
        pytest.skip('this torch has no fused optimizers for the CPU')
    return OPTIMIZERS[kind](parameters)


class Net(nn.Module):
    """A convolution, a depthwise one, and two linear layers."""

    def __init__(self, seed=0):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)

    def forward(self, x):
        return self.head(F.gelu(self.fc(self.norm(self.depthwise(self.stem(x))).mean((2, 3)))))


def loss_of_batch(model, step, dtype=torch.float32):
    g = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(4, 3, 8, 8, generator=g).to(dtype)
    return F.cross_entropy(model(x), torch.randint(0, 4, (4,), generator=g))


def step_(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of_batch(model, batch).backward()
    optimizer.step()


OPTIONS = dict(distribution='erk', sparsity=0.5, total_steps=24, update_interval=3, stop_fraction=0.75)


def sparsify(model, **options):
    sparse = SparseTraining(select_parameters(model), **{**OPTIONS, **options})
    is_snip = sparse.distribution == 'snip'
    sparse.initialize(snip_gradients(model, sparse.parameters, lambda m: loss_of_batch(m, -1)) if is_snip else None)
    return sparse


def training(optimizer, **options):
    model = Net()
    optimizer = make_optimizer(optimizer, model.parameters())
    sparse = sparsify(model, **options)
    sparse.attach(optimizer)
    return model, optimizer, sparse


def counts(sparse):
    return {name: int(mask.sum()) for name, mask in sparse.masks.items()}


def bits(tensor):
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def with_state(optimizer, parameter):
    state = optimizer.state[parameter].values()
    return [parameter, *(t for t in state if torch.is_tensor(t) and t.shape == parameter.shape)]


def assert_dead_entries_are_zero(sparse, optimizer):
    for name, mask in sparse.masks.items():
        tensors = with_state(optimizer, sparse.parameters[name])
        assert len(tensors) > 1, "the optimizer keeps no state of the parameter's shape"
        for tensor in tensors:
            assert not bits(tensor)[~mask].any(), name


# Exactness


@pytest.mark.parametrize('accumulation', [1, 4])
@pytest.mark.parametrize('mode', ['static', 'set', 'rigl', 'momentum'])
@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_counts_and_zeros_are_exact(kind, mode, accumulation):
    model, optimizer, sparse = training(kind, mode=mode)
    want = counts(sparse)
    densities = erk_densities({name: tuple(p.shape) for name, p in sparse.parameters.items()}, 0.5)
    assert want == {name: round(densities[name] * sparse.parameters[name].numel()) for name in want}
    for step in range(1, 25):
        before = copy.deepcopy(sparse.masks)
        optimizer.zero_grad()
        for micro in range(accumulation):
            (loss_of_batch(model, accumulation * step + micro) / accumulation).backward()
            assert sparse.steps == step - 1
        optimizer.step()
        assert counts(sparse) == want
        assert_dead_entries_are_zero(sparse, optimizer)
        changed = any(not torch.equal(before[n], m) for n, m in sparse.masks.items())
        assert changed == (mode != 'static' and step % 3 == 0 and step <= 18)
        for name, mask in sparse.masks.items():
            for tensor in with_state(optimizer, sparse.parameters[name]):
                assert not bits(tensor)[mask & ~before[name]].any(), 'grown entries start at zero'
        assert bool(sparse._gathered) == (mode == 'momentum' and step % 3 != 0 and step <= 18)
    assert sparse.updates == (0 if mode == 'static' else 6)


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='GradScaler is for CUDA only')
@pytest.mark.parametrize('mode', ['static', 'set', 'rigl', 'momentum'])
@pytest.mark.parametrize('kind', ['sgd', 'adamw', 'adamw-fused'])
def test_skipped_steps_do_not_count(kind, mode):
    """Steps 2 and 3 overflow. What is left is the training without these two batches."""
    results = []
    for skipped in ((), (2, 3)):
        model, optimizer, sparse = training(kind, mode=mode)
        want = counts(sparse)
        # All scales are powers of two, which round nothing.
        scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
        batches = [b for b in range(12) if b not in (2, 3)] if not skipped else range(12)
        for batch in batches:
            optimizer.zero_grad()
            model.norm.momentum = 0.0 if batch in (2, 3) else 0.1
            loss = loss_of_batch(model, batch)
            scaler.scale(loss * (math.inf if batch in skipped else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert counts(sparse) == want
            if sparse.steps:
                assert_dead_entries_are_zero(sparse, optimizer)
        assert sparse.steps == 10
        results.append((model.state_dict(), sparse.hash()))
    (first, first_hash), (second, second_hash) = results
    assert first_hash == second_hash
    assert all(torch.equal(first[name], second[name]) for name in first if 'num_batches' not in name)


@pytest.mark.skipif(not FUSED_ON_CPU, reason='this torch has no fused optimizers for the CPU')
def test_gathered_gradients_are_unscaled():
    """A fused optimizer gets scaled gradients; running means mix steps of different scales."""
    gathered = []
    for scale in (1.0, 64.0):
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        sparse = sparsify(model, mode='momentum', update_interval=20, total_steps=100, momentum_window=20)
        sparse.attach(optimizer)
        scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        for batch in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of_batch(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
        gathered.append(sparse._gathered)
    assert len(gathered[0]) == len(sparse.masks)
    for name, tensor in gathered[0].items():
        torch.testing.assert_close(gathered[1][name], tensor, rtol=1e-5, atol=1e-9)


@given(
    st.one_of(
        st.tuples(st.integers(1, 30), st.integers(1, 30)),
        st.tuples(st.integers(1, 9), st.just(1), st.integers(1, 7), st.integers(1, 7)),
    ),
    st.sampled_from(['sgd', 'adamw', 'lamb']),
    st.sampled_from(['static', 'set', 'rigl']),
    st.floats(0.05, 0.95),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_random_shapes(shape, kind, mode, sparsity, seed):
    g = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=g))
    optimizer = make_optimizer(kind, [p])
    options = dict(mode=mode, distribution='uniform', sparsity=sparsity)
    options |= dict(total_steps=6, update_interval=2, stop_fraction=1.0)
    sparse = SparseTraining({'p': p}, **options, seed=seed)
    sparse.initialize()
    count = round((1 - sparsity) * p.numel())
    sparse.attach(optimizer)
    for _ in range(6):
        p.grad = torch.randn(shape, generator=g)
        optimizer.step()
        if sparse.dense_parameters:
            assert count == p.numel()
        else:
            assert counts(sparse) == {'p': count}
            assert_dead_entries_are_zero(sparse, optimizer)
    other = SparseTraining({'p': p}, **options)
    other.load_state_dict(sparse.state_dict())
    assert other.hash() == sparse.hash() and other.statistics() == sparse.statistics()


def test_factored_moments_are_left_alone():
    if not hasattr(torch.optim, 'Adafactor'):
        pytest.skip('this torch has no Adafactor')
    model = Net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    sparse = sparsify(model, mode='rigl')
    sparse.attach(optimizer)
    for step in range(6):
        step_(model, optimizer, step)
        for name, mask in sparse.masks.items():
            assert not bits(sparse.parameters[name])[~mask].any()
            assert all(bool(v.all()) for k, v in optimizer.state[sparse.parameters[name]].items() if k.endswith('_var'))


@pytest.mark.parametrize('accumulation', [1, 4])
@pytest.mark.parametrize('kind', ['sgd', 'sgd-nesterov-foreach', 'adamw', 'adamw-fused'])
def test_static_masks_train_the_masked_subnetwork(kind, accumulation):
    """The other implementation has no masks: its parameters are the active weights alone."""
    model = Net().double()
    sparse = sparsify(model)
    reference = copy.deepcopy(model)
    masks = copy.deepcopy(sparse.masks)
    active = {
        name: nn.Parameter(p.detach()[masks[name]] if name in masks else p.detach().clone())
        for name, p in reference.named_parameters()
    }

    def whole():
        return {
            name: torch.zeros(masks[name].shape, dtype=p.dtype).masked_scatter(masks[name], p) if name in masks else p
            for name, p in active.items()
        }

    optimizer = make_optimizer(kind, model.parameters())
    other = make_optimizer(kind, active.values())
    sparse.attach(optimizer)
    for step in range(10):
        optimizer.zero_grad()
        other.zero_grad()
        for micro in range(accumulation):
            batch = accumulation * step + micro
            loss = loss_of_batch(model, batch, torch.float64)
            (loss / accumulation).backward()
            want = loss_of_batch(lambda x: functional_call(reference, whole(), x), batch, torch.float64)
            (want / accumulation).backward()
            assert loss.item() == pytest.approx(want.item(), rel=1e-10)
        optimizer.step()
        other.step()
    for name, p in whole().items():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-9, atol=1e-12, check_stride=False)


# Growth


@pytest.mark.parametrize('kind', ['adamw', 'sgd-nesterov-foreach'])
def test_rigl_grows_the_largest_accumulated_gradients(kind):
    """Also with an optimizer that writes into the gradients it is given."""
    model, optimizer, sparse = training(kind, mode='rigl')
    for step in range(1, 7):
        before = copy.deepcopy(sparse.masks)
        optimizer.zero_grad()
        for micro in range(3):
            loss_of_batch(model, 3 * step + micro).backward()
        gradients = {name: p.grad.abs().clone() for name, p in sparse.parameters.items()}
        assert sparse.needs_gradient() == (step % 3 == 0)
        optimizer.step()
        if step % 3 == 0:
            for name, mask in sparse.masks.items():
                grown = mask & ~before[name]
                least = gradients[name][grown].min()
                assert least >= gradients[name][~mask & ~before[name]].max()


def test_momentum_grows_by_the_mean_of_the_window():
    model, optimizer, sparse = training('sgd', mode='momentum', update_interval=5, momentum_window=3)
    before = copy.deepcopy(sparse.masks)
    mean = {}
    for step in range(1, 6):
        optimizer.zero_grad()
        loss_of_batch(model, step).backward()
        for name, p in sparse.parameters.items():
            if step >= 3:
                mean[name] = p.grad.clone() if name not in mean else 0.9 * mean[name] + 0.1 * p.grad
        optimizer.step()
    for name, mask in sparse.masks.items():
        grown = mask & ~before[name]
        assert grown.any()
        score = mean[name].abs()
        assert score[grown].min() >= score[~mask & ~before[name]].max() * (1 - 1e-5)


def test_update_without_gradients_is_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = sparsify(model, mode='rigl', update_interval=1)
    step_(model, optimizer, 0)
    optimizer.zero_grad()
    with pytest.raises(SparsityError, match='before the gradients are set to zero'):
        sparse.step(optimizer)


# What the optimizer trains


def groups(model, **of_fc):
    rest = [p for name, p in model.named_parameters() if not name.startswith('fc.')]
    return [dict(params=rest), dict(params=list(model.fc.parameters()), **of_fc)]


def freeze(model):
    model.fc.requires_grad_(False)


def leave_out(model):
    model.fc.forward = lambda x: x.repeat(1, 2)


@pytest.mark.parametrize('mode', ['set', 'rigl', 'momentum'])
@pytest.mark.parametrize(
    'untrained',
    [
        lambda model: torch.optim.AdamW(groups(model, lr=0.0)),
        lambda model: torch.optim.AdamW(groups(model, lr=torch.tensor(0.0))),
        lambda model: torch.optim.AdamW(groups(model)[:1]),
        lambda model: freeze(model) or torch.optim.AdamW(groups(model)),
        lambda model: leave_out(model) or torch.optim.AdamW(groups(model)),
    ],
    ids=['lr 0', 'lr tensor 0', 'not in it', 'frozen later', 'unused'],
)
def test_masks_stay_where_nothing_trains(caplog, untrained, mode):
    model = Net()
    sparse = sparsify(model, mode=mode, distribution='uniform')
    optimizer = untrained(model)
    before = copy.deepcopy(sparse.masks)
    weight = model.fc.weight.detach().clone()
    train(model, sparse, optimizer, 6)
    assert torch.equal(sparse.masks['fc.weight'], before['fc.weight']) and torch.equal(model.fc.weight, weight)
    assert not torch.equal(sparse.masks['head.weight'], before['head.weight'])
    assert sparse.updates == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith(': fc.weight')


def train(model, sparse, optimizer, steps):
    sparse.attach(optimizer)
    for step in range(steps):
        step_(model, optimizer, step)


def test_masks_change_once_the_warm_up_begins():
    """The first update falls on a step of learning rate 0; zeros are enforced all the same."""
    model = Net()
    sparse = sparsify(model, mode='set', update_interval=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    masks = sparse.masks['fc.weight'].clone()
    with torch.no_grad():
        model.fc.weight.fill_(1.0)
    train(model, sparse, optimizer, 1)
    assert torch.equal(model.fc.weight != 0, masks) and torch.equal(sparse.masks['fc.weight'], masks)
    assert (sparse.steps, sparse.updates) == (1, 0)
    optimizer.param_groups[0]['lr'] = 0.01
    step_(model, optimizer, 1)
    assert sparse.updates == 1 and not torch.equal(sparse.masks['fc.weight'], masks)


def test_a_second_optimizer_would_count_twice():
    model = Net()
    sparse = sparsify(model, mode='set')
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.fc, model.head))
    handle = sparse.attach(first)
    loss_of_batch(model, 0).backward()
    for refused in (lambda: sparse.attach(second), lambda: sparse.attach(first), lambda: sparse.step(second)):
        with pytest.raises(SparsityError, match='one optimizer.*a SparseTraining for the parameters of each'):
            refused()
    first.step()
    handle.remove()
    sparse.attach(second)
    second.step()
    first.step()
    assert sparse.steps == 2


# First masks


@pytest.mark.parametrize('sampling', ['exact', 'magnitude', 'saliency', 'bernoulli'])
@pytest.mark.parametrize('distribution', ['uniform', 'erk', 'snip'])
def test_first_masks(distribution, sampling):
    if sampling == 'saliency' and distribution != 'snip':
        with pytest.raises(SparsityError, match="needs the distribution 'snip'"):
            sparsify(Net(), distribution=distribution, sampling=sampling)
        return
    model = Net()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    sparse = sparsify(model, distribution=distribution, sampling=sampling)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(sparse.masks) | set(sparse.dense_parameters) == set(sparse.parameters)
    for name, mask in sparse.masks.items():
        assert torch.equal(model.get_parameter(name), weights[name] * mask)
        if sampling == 'magnitude':
            size = weights[name].abs()
            assert size[mask].min() >= size[~mask].max()
    if distribution == 'uniform' and sampling != 'bernoulli':
        assert counts(sparse) == {name: round(0.5 * p.numel()) for name, p in sparse.parameters.items()}
    again = sparsify(Net(), distribution=distribution, sampling=sampling)
    assert again.hash() == sparse.hash()
    other = sparsify(Net(), distribution=distribution, sampling=sampling, seed=1)
    assert (other.hash() == sparse.hash()) == (sampling in ('magnitude', 'saliency'))


def test_snip_leaves_the_model_alone():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    gradients = snip_gradients(
        model, dict(model.named_parameters()), lambda m: loss_of_batch(m, 0) + torch.rand(()) * 0
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    loss_of_batch(model, 0).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)
    with pytest.raises(SparsityError, match='gradients of a batch'):
        SparseTraining({'p': model.fc.weight}, distribution='snip', sparsity=0.5).initialize()
    with pytest.raises(SparsityError, match='loss of the SNIP batch is inf'):
        snip_gradients(model, {}, lambda m: loss_of_batch(m, 0) * math.inf)


def test_masks_from_sparse_weights():
    model = Net()
    zeros = {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) < 0.4
        for i, (name, p) in enumerate(select_parameters(model).items())
    }
    with torch.no_grad():
        for name, dead in zeros.items():
            model.get_parameter(name)[dead] = -0.0
        model.head.weight.zero_()
    sparse = SparseTraining(select_parameters(model))
    sparse.initialize()
    assert sparse.dense_parameters == ['head.weight'], 'initialized to zero, not pruned'
    assert set(sparse.masks) == set(zeros) - {'head.weight'}
    for name, mask in sparse.masks.items():
        assert torch.equal(mask, ~zeros[name])


def test_dense_weights_are_refused():
    model = Net()
    weights = copy.deepcopy(model.state_dict())
    sparse = SparseTraining(select_parameters(model))
    with pytest.raises(DenseWeights, match=r'0 of 608 weights \(0.00%\).*dense network'):
        sparse.initialize()
    with torch.no_grad():
        model.fc.weight[:8] = 0
    with pytest.raises(DenseWeights, match='where about 40% should be'):
        SparseTraining(select_parameters(model), sparsity=0.4).initialize()
    assert torch.equal(model.stem.weight, weights['stem.weight'])


def test_dense_layers():
    model = Net()
    sparse = sparsify(model, distribution='uniform', sparsity=0.04, dense_above=0.95)
    assert set(sparse.dense_parameters) == set(sparse.parameters) and not sparse.masks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse.attach(optimizer)
    step_(model, optimizer, 0)
    assert sparse.statistics().density == 1


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(mode='dynamic'), "unknown mode 'dynamic'"),
        (dict(sparsity=None), 'needs a sparsity'),
        (dict(sparsity=40), r'sparsity must lie in \(0, 1\)'),
        (dict(mode='set', total_steps=None), 'needs total_steps'),
        (dict(per_filter=True), 'no selected parameter is a filter'),
        (dict(sparse_gap=0), 'sparse_gap must be'),
        (dict(dense_above=0), 'dense_above must'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(SparsityError, match=message):
        sparsify(Net(), **options)


# ShiftWise

TINY = dict(arch=dict(depths=(1, 1), dims=(8, 16)), kernel_sizes=(9, 7), norm_cfg=dict(type='BN'), out_indices=(1,))


@pytest.mark.parametrize('mode', ['set', 'rigl'])
def test_filters_are_pruned_whole(mode):
    model = ShiftWise(**TINY)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    options = dict(PRESETS['shiftwise'], mode=mode, distribution='uniform', update_interval=2, sparse_gap=2)
    parameters = select_parameters(model, options.pop('selection'))
    sparse = SparseTraining(parameters, total_steps=20, **options)
    sparse.initialize()
    groups = path_groups(parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparse.attach(optimizer)
    for step in range(1, 9):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 32, 32, generator=g)
        model(x)[0].square().mean().backward()
        optimizer.step()
        assert_dead_entries_are_zero(sparse, optimizer)
        for paths in groups.values():
            masks = [sparse.masks[name] for name in paths]
            for mask in masks:
                assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))
                assert int(mask[:, 0, 0, 0].sum()) == round(0.7 * len(mask))
            if step in (1, 4, 5, 8):
                assert torch.equal(*masks)
            # All paths have the same gradients: growth by gradients picks alike among the
            # filters that both miss, but pruning looks at each path's own weights.
            elif step in (2, 3, 6, 7):
                assert not torch.equal(*masks)
    state = masks_from_state(sparse.state_dict())
    assert all(state[name].shape == (len(p), 1, 1, 1) for name, p in parameters.items())


def test_a_filled_up_path_stays_empty():
    """A merged checkpoint fills one path of two; the other one must not start to train."""
    model = ShiftWise(**TINY)
    parameters = select_parameters(model, 'shiftwise_filters')
    with torch.no_grad():
        for name, p in parameters.items():
            if '.filters.1.' in name:
                p.zero_()
            else:
                p[::3] = 0
    for per_filter in (False, True):
        sparse = SparseTraining(parameters, per_filter=per_filter)
        sparse.initialize()
        for name, mask in sparse.masks.items():
            assert bool(mask.any()) == ('.filters.0.' in name)
            assert not bool(mask[::3].any())


# State


def run(mode, until, state=None, sampling='exact'):
    """Train to a step, from the start or a state; returns state, weights included."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = dict(mode=mode, sampling=sampling, update_interval=4, momentum_window=3)
    if state is None:
        sparse = sparsify(model, **options)
    else:
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        sparse = SparseTraining(select_parameters(model), **{**OPTIONS, **options}, seed=99)
        sparse.load_state_dict(state['sparsity'])
    sparse.attach(optimizer)
    for step in range(sparse.steps, until):
        step_(model, optimizer, step)
    file = io.BytesIO()
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), sparsity=sparse.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True), sparse


@pytest.mark.parametrize(
    'mode, sampling',
    [('static', 'exact'), ('set', 'exact'), ('set', 'bernoulli'), ('rigl', 'exact'), ('momentum', 'exact')],
)
def test_resumed_is_uninterrupted(mode, sampling):
    want, whole = run(mode, 20, sampling=sampling)
    for stop in (0, 1, 3, 4, 5, 11, 12):
        got, resumed = run(mode, 20, run(mode, stop, sampling=sampling)[0], sampling)
        assert resumed.hash() == whole.hash()
        assert resumed.statistics() == whole.statistics()
        for name, tensor in want['model'].items():
            assert torch.equal(tensor, got['model'][name]), (stop, name)
        for a, b in zip(*(s['optimizer']['state'].values() for s in (want, got))):
            assert all(torch.equal(a[key], b[key]) for key in a)
        assert torch.equal(got['sparsity']['generator'], want['sparsity']['generator'])


def test_state_is_small():
    """Two bits an entry, for the mask and the record of exploration, and some kilobytes."""
    p = nn.Parameter(torch.randn(1000, 1000))
    sparse = SparseTraining({'p': p}, mode='set', distribution='uniform', sparsity=0.5, total_steps=10)
    sparse.initialize()
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    assert len(file.getvalue()) < 2 * 125_000 + 20_000


def test_states_that_do_not_fit(caplog):
    state = run('set', 3)[0]['sparsity']
    model = Net()

    def load(changes=None, parameters=None, **options):
        options = {**OPTIONS, 'mode': 'set', 'update_interval': 4, **options}
        sparse = SparseTraining(parameters or select_parameters(model), **options)
        sparse.load_state_dict({**state, **(changes or {})})
        return sparse

    with pytest.raises(SparsityError, match='version 7'):
        load(dict(version=7))
    with pytest.raises(SparsityError, match='are not selected here'):
        load(parameters=select_parameters(model, exclude='head'))
    masks = {k: v for k, v in state['masks'].items() if k != 'fc.weight'}
    with pytest.raises(SparsityError, match='fc.weight and 0 more have no mask'):
        load(dict(masks=masks))
    wrong = dict(state['masks']['fc.weight'], shape=[16, 9])
    with pytest.raises(SparsityError, match=r'shape \(16, 9\) in the sparsity state'):
        load(dict(masks={**state['masks'], 'fc.weight': wrong}))
    for key in state:
        for damaged in (None, 'x', -1):
            with pytest.raises(SparsityError):
                load({key: damaged})
    with pytest.raises(SparsityError, match='gathered gradient'):
        load(dict(gathered={'fc.weight': torch.ones(2)}))
    load()
    assert not caplog.records
    assert load(update_interval=5).steps == 3
    assert 'update_interval 5 (saved: 4)' in caplog.text
    with pytest.raises(SparsityError, match='initialize'):
        SparseTraining(select_parameters(model)).step(torch.optim.SGD(model.parameters(), 0.1))


# Averages, statistics, the end


def test_moving_average_follows_the_masks():
    """Against the rule of the official code, written entry by entry."""
    decay = 0.9
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparse = sparsify(model, mode='set', update_interval=4)
    ema = {f'module.{name}': p.detach().clone() for name, p in model.named_parameters()}
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    sparse.attach(optimizer)
    optimizer.register_step_post_hook(lambda *_: sparse.enforce_average(ema, prefix='module.'))
    for step in range(24):
        step_(model, optimizer, step)
        for name, p in model.named_parameters():
            ema[f'module.{name}'].lerp_(p.detach(), 1 - decay)
            old, mask = want[name], sparse.masks.get(name)
            new = decay * old + (1 - decay) * p.detach()
            if mask is not None:
                new = torch.where(mask & (old == 0), p.detach(), new) * mask
            want[name] = new
            torch.testing.assert_close(ema[f'module.{name}'], want[name], rtol=1e-4, atol=1e-6)
            if mask is not None:
                assert not bits(ema[f'module.{name}'])[~mask].any()
                assert torch.equal(ema[f'module.{name}'] == 0, p.detach() == 0)


def test_average_is_put_right_by_force():
    model = Net()
    sparse = sparsify(model)
    ema = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    name = next(iter(sparse.masks))
    ema[name][:] = 0
    sparse.enforce_average(ema, force=True)
    assert torch.equal(ema[name], model.get_parameter(name))
    assert sparse.enforce(ema) == list(sparse.masks)
    with pytest.raises(SparsityError, match='has the shape'):
        sparse.enforce({name: torch.ones(2)})


def test_statistics():
    model, optimizer, sparse = training('sgd', mode='set')
    ever = copy.deepcopy(sparse.masks)
    first = sparse.statistics()
    total = sum(p.numel() for p in sparse.parameters.values())
    dense = sum(sparse.parameters[name].numel() for name in sparse.dense_parameters)
    assert (first.total, first.churn) == (total, 0)
    assert first.exploration == first.density == (dense + sum(counts(sparse).values())) / total
    for step in range(9):
        before = copy.deepcopy(sparse.masks)
        step_(model, optimizer, step)
        for name, mask in sparse.masks.items():
            ever[name] |= mask
        if (step + 1) % 3 == 0:
            fresh = sum(int((mask & ~before[n]).sum()) for n, mask in sparse.masks.items())
    last = sparse.statistics()
    assert last.density == first.density
    assert last.exploration == (dense + sum(int(m.sum()) for m in ever.values())) / total
    assert last.churn == fresh / last.active > 0
    assert set(last.scalars()) == {'sparsity/density', 'sparsity/churn', 'sparsity/exploration'}
    table = format_table(last).splitlines()
    assert len(table) == 2 + len(sparse.parameters)
    assert len({len(line) for line in table}) == 1 and table[-1].startswith('sum')
    assert [line.split()[0] for line in table[1:-1]] == list(sparse.parameters)


def test_finalize():
    model, optimizer, sparse = training('sgd')
    with torch.no_grad():
        model.fc.weight.fill_(1.0)
    final = sparse.finalize()
    assert torch.equal(model.fc.weight != 0, sparse.masks['fc.weight'])
    assert final.active == sum(int((p != 0).sum()) for p in sparse.parameters.values())
    step_(model, optimizer, 0)
    assert sparse.steps == 0, 'the hooks are gone'


def test_masks_do_not_depend_on_the_order_of_names():
    masks = {str(i): torch.rand(5, 7) < 0.5 for i in range(3)}
    assert len({masks_hash({k: masks[k] for k in order}) for order in itertools.permutations(masks)}) == 1
