"""Sparse training in mmengine's runner, on a small model."""

import copy
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from sparse_toy import NAMES, Images, Probe, ScaledWrapper, Toy, make_runner, process
from torch import multiprocessing, nn

from slak_mm.checkpoints import CheckpointMismatch, read_checkpoint
from slak_mm.engine import SparsityHook
from slak_mm.engine.sparsity_hook import finalize_checkpoint
from slak_mm.sparsity import SparsityError

CPU_SCALER = pytest.mark.skipif(
    not hasattr(torch.amp, 'GradScaler'), reason='torch has no loss scaler for the CPU (from 2.3)'
)
FUSED = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 4),
    reason='torch has no fused optimizers for the CPU (from 2.4)',
)
FUSED_OPTIMIZERS = [pytest.param(f'{kind}-fused', marks=FUSED) for kind in ('SGD', 'AdamW')]
STRICT = dict(type='StrictCheckpointHook')
# Active weights of the layers at a sparsity of 0.4: 0.6 of 216, 720 and 120.
ACTIVE = dict(zip(NAMES, (130, 432, 72)))


def sparse_hook(mode='static', **changes):
    options = dict(
        mode=mode, distribution='uniform', sparsity=0.4, update_interval=2, prune_rate=0.3, stop_fraction=0.8
    )
    return SparsityHook(**dict(options, **changes))


def same_bits(ours, theirs):
    """Equality that tells negative zeros from positive ones."""
    as_bits = {4: torch.int32, 8: torch.int64, 1: torch.uint8}
    return ours.shape == theirs.shape and torch.equal(
        ours.detach().contiguous().view(as_bits[ours.element_size()]),
        theirs.detach().contiguous().view(as_bits[theirs.element_size()]),
    )


def tensors_of(runner, hook, ema=None):
    """Everything that a step may change, as copies."""
    found = {f'model.{key}': value for key, value in runner.model.state_dict().items()}
    optimizer = runner.optim_wrapper.optimizer
    for number, parameter in enumerate(runner.model.parameters()):
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f'optimizer.{number}.{key}'] = torch.as_tensor(value)
    found.update({f'mask.{key}': value for key, value in hook.masks.items()})
    found['steps'] = torch.tensor(hook.training.steps)
    if ema is not None:
        found.update({f'ema.{key}': value for key, value in ema.ema_model.state_dict().items()})
    return {key: value.detach().clone() for key, value in found.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert same_bits(value, theirs[key]), key


def assert_sparse(runner, hook):
    """Pruned weights and what the optimizer keeps of them are positive zeros."""
    optimizer = runner.optim_wrapper.optimizer
    for name, mask in hook.masks.items():
        parameter = runner.model.get_parameter(name)
        states = map(torch.as_tensor, optimizer.state.get(parameter, {}).values())
        for tensor in (parameter, *(value for value in states if value.shape == parameter.shape)):
            pruned = tensor.detach()[~mask]
            assert same_bits(pruned, torch.zeros_like(pruned)), name


# Exactness


@pytest.mark.parametrize('mode', ['static', 'set', 'rigl'])
@pytest.mark.parametrize('accumulation', [1, 4])
@pytest.mark.parametrize('precision', ['fp32', pytest.param('amp', marks=CPU_SCALER)])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW', *FUSED_OPTIMIZERS])
def test_number_of_non_zeros_is_exact(tmp_path, optimizer, precision, accumulation, mode):
    iterations = 9 * accumulation
    # The second and the fifth update overflow, the latter in its last micro-batch.
    overflows = (accumulation + 1, 5 * accumulation) if precision == 'amp' else ()
    hook = sparse_hook(mode)
    counts = []

    def look(runner):
        assert_sparse(runner, hook)
        counts.append(hook.training.steps)
        assert {name: int(mask.sum()) for name, mask in hook.masks.items()} == ACTIVE

    extra = dict(wrapper=ScaledWrapper, inf_at=overflows) if overflows else {}
    if accumulation == 4:
        extra['clip_grad'] = dict(max_norm=0.5)
    extra['accumulative_counts'] = accumulation
    runner = make_runner(tmp_path, [hook, Probe(look)], iterations, optimizer, **extra)
    runner.train()
    # What the weights are, and not only the masks: none of the active ones is zero.
    for name, active in ACTIVE.items():
        assert int(runner.model.get_parameter(name).count_nonzero()) == active
    # An overflow in the middle of an accumulation skips the step at its end.
    ends = [-(-at // accumulation) * accumulation for at in overflows]
    real = [iteration // accumulation - sum(end <= iteration for end in ends) for iteration in range(1, iterations + 1)]
    assert counts == real
    # Every second step, within 0.8 of the nine steps.
    assert hook.training.updates == (0 if mode == 'static' else min(real[-1], 7) // 2)


@CPU_SCALER
@pytest.mark.parametrize('optimizer', ['AdamW', *FUSED_OPTIMIZERS])
def test_a_step_that_overflows_changes_nothing(tmp_path, optimizer):
    # The fourth step would have changed the masks; they change in the fifth instead.
    hook = sparse_hook('rigl')
    states = []
    probe = Probe(lambda runner: states.append(tensors_of(runner, hook)))
    make_runner(tmp_path, [hook, probe], 6, optimizer, wrapper=ScaledWrapper, inf_at=(4,)).train()
    assert_same(states[2], states[3])
    assert not torch.equal(states[3]['mask.' + NAMES[1]], states[4]['mask.' + NAMES[1]])


def test_grown_weights_start_from_nothing(tmp_path):
    hook = sparse_hook('set', prune_rate=0.5)
    masks, states = [], []

    def look(runner):
        masks.append({name: mask.clone() for name, mask in hook.masks.items()})
        states.append(tensors_of(runner, hook))

    make_runner(tmp_path, [hook, Probe(look)], 5).train()
    grown = 0
    for name, number in zip(NAMES, (0, 2, 4)):
        new = masks[1][name] & ~masks[0][name]
        grown += int(new.sum())
        for key in (f'model.{name}', *(f'optimizer.{number}.{moment}' for moment in ('exp_avg', 'exp_avg_sq'))):
            assert same_bits(states[1][key][new], torch.zeros(int(new.sum()))), key
            assert states[2][key][new].all(), key
    assert grown > 50


class MaskedGradients(OptimWrapper):
    """Sparse training another way: the gradients of pruned weights are zero."""

    masks: dict = {}

    def step(self, **kwargs):
        for parameter, mask in self.masks.items():
            parameter.grad.mul_(mask)
        super().step(**kwargs)


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_static_is_training_of_the_subnetwork(tmp_path, optimizer):
    hook = sparse_hook()
    ours = make_runner(tmp_path / 'ours', [hook], 6, optimizer)
    ours.train()
    theirs = make_runner(tmp_path / 'theirs', [], 6, optimizer, wrapper=MaskedGradients)

    def mask_once(runner):
        MaskedGradients.masks = {runner.model.get_parameter(name): mask for name, mask in hook.masks.items()}
        for parameter, mask in MaskedGradients.masks.items():
            parameter.data.mul_(mask)

    starter = Probe(lambda runner: None)
    starter.before_train = mask_once
    theirs.register_hook(starter)
    theirs.train()
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[key]), key


def test_rigl_grows_where_the_gradients_are_largest(tmp_path):
    """Gradients of four micro-batches against those of the joint batch, clipped by norm."""
    hook = sparse_hook('rigl', update_interval=1, stop_fraction=0.3)
    gradients, before = {}, {}

    class Recorder(Hook):
        def before_train(self, runner):
            batch = Images()
            model = copy.deepcopy(runner.model)
            model(batch.images[:16], batch.labels[:16], mode='loss')['loss'].backward()
            gradients.update({name: model.get_parameter(name).grad for name in NAMES})
            before.update({name: mask.clone() for name, mask in hook.masks.items()})

    after = {}

    def look(runner):
        if runner.iter == 3:
            after.update({name: mask.clone() for name, mask in hook.masks.items()})

    hooks = [hook, Recorder(), Probe(look)]
    make_runner(tmp_path, hooks, 16, accumulative_counts=4, clip_grad=dict(max_norm=1e-3)).train()
    for name in NAMES:
        new = after[name] & ~before[name]
        # Nothing that stayed away had a larger gradient than what came.
        away = ~after[name] & ~before[name]
        size = gradients[name].abs()
        assert int(new.sum()) > 0 and size[new].min() >= size[away].max() * (1 - 1e-5)


# Resuming


@pytest.mark.parametrize(
    'mode,average',
    [
        ('static', dict(momentum=0.2)),
        ('set', dict(momentum=0.2, update_buffers=True)),
        ('rigl', dict(momentum=0.2, interval=3)),
        ('momentum', dict(ema_type='MomentumAnnealingEMA', gamma=4)),
    ],
)
def test_resumed_at_any_step_is_the_same_run(tmp_path, mode, average):
    def run(folder, resume=None):
        # A run from the start draws, one that goes on does not.
        masks = dict(distribution='from_weights', sparsity=None) if resume else dict(distribution='snip')
        hook = sparse_hook(mode, momentum_window=2, stop_fraction=1.0, **masks)
        ema = EMAHook(**average)
        options = dict(checkpoint_interval=1, val_interval=3, resume=bool(resume), load_from=resume)
        runner = make_runner(folder, [ema, hook], 8, **options)
        runner.train()
        return dict(
            tensors_of(runner, hook, ema),
            explored=torch.tensor(hook.training.statistics().exploration),
            scalar=torch.tensor(runner.message_hub.get_scalar('train/sparsity/exploration').current()),
        )

    whole = run(tmp_path / 'whole')
    for stop in range(1, 8):
        assert_same(whole, run(tmp_path / f'from{stop}', str(tmp_path / 'whole' / f'iter_{stop}.pth')))


def test_state_is_read_by_the_safe_reader(tmp_path):
    make_runner(tmp_path, [sparse_hook('rigl')], 4).train()
    state = read_checkpoint(tmp_path / 'iter_4.pth')['sparsity']
    # Eight entries a byte.
    assert sum(entry['bits'].numel() for entry in state['masks'].values()) == 27 + 90 + 15


@pytest.mark.parametrize(
    'first,second,message',
    [
        (None, sparse_hook(), 'trained densely: .*Resume it without one'),
        (sparse_hook(), None, 'trained with sparsity.*load_from'),
        (sparse_hook(), sparse_hook('set'), "mode 'static', this one 'set'.*config that it had"),
        (sparse_hook(include='backbone.[02]'), sparse_hook(), r'do not fit.*backbone\.4\.weight'),
        (sparse_hook(), 'bigger', 'do not fit.*shape'),
    ],
)
def test_what_cannot_be_resumed(tmp_path, first, second, message):
    make_runner(tmp_path / 'first', [copy.deepcopy(first)] if first else [], 2).train()
    model = Toy()
    if second == 'bigger':
        second = sparse_hook()
        model.backbone[0] = nn.Conv2d(3, 8, 5, padding=1)
    # Without StrictCheckpointHook's comparison of the weights, which would come first.
    hooks = [dict(STRICT, strict=False), *([copy.deepcopy(second)] if second else [])]
    last = str(tmp_path / 'first' / 'iter_2.pth')
    runner = make_runner(tmp_path / 'second', hooks, 4, model=model, resume=True, load_from=last)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=message) as error:
        runner.train()
    assert '\n\n' not in str(error.value)
    assert_same(before, dict(model.state_dict()))


def test_starting_from_weights_takes_their_zeros(tmp_path):
    make_runner(tmp_path / 'first', [sparse_hook('rigl')], 4).train()
    second = SparsityHook(sparsity=0.4)
    runner = make_runner(tmp_path / 'second', [second], 1, load_from=str(tmp_path / 'first' / 'iter_4.pth'))
    runner.train()
    weights = torch.load(tmp_path / 'first' / 'iter_4.pth', weights_only=False)['state_dict']
    for name in NAMES:
        assert torch.equal(second.masks[name], weights[name] != 0)
    assert_sparse(runner, second)


# Averages


AVERAGES = [
    dict(momentum=0.3),
    dict(momentum=0.3, update_buffers=True),
    dict(momentum=0.3, interval=3),
    dict(momentum=0.3, begin_iter=4),
    dict(ema_type='MomentumAnnealingEMA', gamma=3),
    dict(ema_type='StochasticWeightAverage'),
]


@pytest.mark.parametrize('average', AVERAGES)
def test_averages_stay_sparse_in_any_order_of_hooks(tmp_path, average):
    ends = []
    orders = ('NORMAL', 'NORMAL'), ('NORMAL', 'NORMAL'), ('VERY_HIGH', 'LOWEST'), ('LOWEST', 'VERY_HIGH')
    for number, (priority, own) in enumerate(orders):
        sparse = dict(type=SparsityHook, **sparse_hook('set').options, priority=own)
        hooks = [sparse, dict(type='EMAHook', priority=priority, **average)]
        looked = []

        def look(runner, looked=looked):
            ema = next(h for h in runner.hooks if isinstance(h, EMAHook))
            sparse = next(h for h in runner.hooks if isinstance(h, SparsityHook))
            looked.append((ema, sparse))
            for name, mask in sparse.masks.items():
                assert not ema.ema_model.module.get_parameter(name)[~mask].any()

        folder = tmp_path / str(number)
        runner = make_runner(folder, hooks[::-1] if number == 1 else hooks, 8, checkpoint_interval=2, val_interval=2)
        # Hooks of the same priority keep their order: last of all.
        runner._hooks.append(Probe(look))
        runner.train()
        ema, sparse = looked[-1]
        ends.append(tensors_of(runner, sparse, ema))
        # What was saved and what was validated.
        for step in (2, 4, 6, 8):
            saved = torch.load(folder / f'iter_{step}.pth', weights_only=False)
            average_of = {name: saved['ema_state_dict'][f'module.{name}'] for name in NAMES}
            runner.model.seen += [saved['state_dict'], average_of]
        assert len(runner.model.seen) == 8 + 2 * 4
        for seen in runner.model.seen:
            assert all(int(seen[name].count_nonzero()) <= active for name, active in ACTIVE.items())
    # Hooks after the checkpoint's save one update later; what is computed is the same.
    for end in ends[1:]:
        assert_same(ends[0], end)


def test_average_against_a_simulation(tmp_path):
    """Entry by entry: the plain average, from the first value that a weight has."""
    hook = sparse_hook('set', prune_rate=0.5)
    history = []
    ema = EMAHook(momentum=0.25)

    def look(runner):
        weights = {name: runner.model.get_parameter(name).detach().double() for name in NAMES}
        history.append({name: (weights[name].clone(), mask.clone()) for name, mask in hook.masks.items()})

    make_runner(tmp_path, [hook, ema, Probe(look)], 8).train()
    for name in NAMES:
        average, old = history[0][name]
        average = average.clone()
        born = torch.zeros_like(old)
        for step in history[1:]:
            weight, mask = step[name]
            # A weight comes with zero and has its first value a step later.
            average = torch.where(born, weight, 0.75 * average + 0.25 * weight)
            average[~mask] = 0
            born, old = mask & ~old, mask
        ours = ema.ema_model.module.get_parameter(name).double()
        torch.testing.assert_close(ours, average, rtol=1e-5, atol=1e-7)


# SNIP


def test_snip_leaves_no_trace(tmp_path):
    """Order of the data, random numbers, running statistics, gradients: as without it."""
    runs = {}
    for distribution in ('snip', 'uniform'):
        model = Toy(norm=True, dropout=0.5)
        seen = []

        def before(runner, model=model, seen=seen):
            states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
            buffers = {key: value.clone() for key, value in model.named_buffers()}
            seen.append((*states, buffers, [parameter.grad is None for parameter in model.parameters()]))

        first, last = Probe(lambda runner: None), Probe(lambda runner: None)
        first.before_train = last.before_train = before
        hook = sparse_hook(distribution=distribution)
        runner = make_runner(tmp_path / distribution, [hook], 3, model=model)
        runner._hooks.insert(0, first)
        runner._hooks.append(last)
        runner.train()
        # Of the batch that SNIP took, the data set itself knows; the sampler does not.
        taken = runner.train_dataloader.dataset.taken
        runs[distribution] = taken[-12:], seen
    one, two = runs['snip'][1]
    assert torch.equal(one[0], two[0]) and (one[1] == two[1]).all() and one[2] == two[2]
    assert all(torch.equal(value, two[3][key]) for key, value in one[3].items())
    assert all(one[4]) and all(two[4])
    assert runs['snip'][0] == runs['uniform'][0] == list(range(12))


class Mixing(Images):
    """Remembers in a transform what it saw, as cached mosaics do; on its own or around another data set."""

    def __init__(self, dataset=None):
        super().__init__()
        self.dataset, self.pipeline = dataset, [Transform()]

    def __getitem__(self, index):
        return self.pipeline[0](self.dataset[index] if self.dataset else super().__getitem__(index))


class Transform:
    def __init__(self):
        self.cache = []

    def __call__(self, results):
        self.cache.append(int(results['labels']))
        return results


def test_snip_batch_leaves_caches_of_transforms_alone():
    dataset = Mixing(Mixing())
    loader = torch.utils.data.DataLoader(dataset, batch_size=5)
    hook = sparse_hook()
    batch = hook._draw_batch(SimpleNamespace(train_dataloader=loader, rank=0))
    assert batch['inputs'].shape == (5, 3, 6, 6)
    assert not dataset.pipeline[0].cache and not dataset.dataset.pipeline[0].cache
    # Another process takes other samples; without an index there is nothing to draw.
    other = hook._draw_batch(SimpleNamespace(train_dataloader=loader, rank=1))
    assert not torch.equal(batch['inputs'], other['inputs'])

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(SparsityError, match="Stream does not have; .*'erk'"):
        hook._draw_batch(SimpleNamespace(train_dataloader=torch.utils.data.DataLoader(Stream()), rank=0))


def test_snip_densities_against_plain_autograd(tmp_path):
    hook = sparse_hook(distribution='snip')
    # Dropout would leave most branches without gradients.
    runner = make_runner(tmp_path, [hook], 1, model=Toy(dropout=0.9))
    model = copy.deepcopy(runner.model).eval()
    runner.train()
    taken = runner.train_dataloader.dataset.taken[:4]
    data = Images()
    model(data.images[taken], data.labels[taken], mode='loss')['loss'].backward()
    scores = {name: (model.get_parameter(name) * model.get_parameter(name).grad).abs() for name in NAMES}
    merged = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True)[0]
    threshold = merged[int(len(merged) * 0.6) - 1]
    for name, score in scores.items():
        kept = 1 - float((score <= threshold).float().mean())
        assert int(hook.masks[name].sum()) == round(kept * score.numel())


# Log, end, refusals


def test_log_and_tables(tmp_path):
    hook = sparse_hook('set')
    make_runner(tmp_path, [hook], 6, log_level='INFO').train()
    (path,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines() if '"loss"' in line]
    density = sum(ACTIVE.values()) / (216 + 720 + 120)
    assert [line['sparsity/density'] for line in lines] == [pytest.approx(density)] * 6
    churn = [line['sparsity/churn'] for line in lines]
    assert churn[0] == 0 and all(churn[1:])
    explored = [line['sparsity/exploration'] for line in lines]
    assert explored[0] == pytest.approx(density) and explored[-1] > explored[0]
    text = next(tmp_path.glob('*/*.log')).read_text()
    assert text.count('Sparse training begins') == text.count('Sparse training ended') == 1
    rows = [line.split() for line in text.splitlines() if line.startswith(f'{NAMES[1]}  ')]
    assert rows[0] == [NAMES[1], '10x8x3x3', '432', '720', '0.6000', '0.6000']
    assert rows[1][:5] == rows[0][:5] and float(rows[1][5]) > 0.6


def test_finalized_checkpoint_has_real_zeros(tmp_path):
    make_runner(tmp_path, [sparse_hook('rigl'), EMAHook()], 4).train()
    checkpoint = torch.load(tmp_path / 'iter_4.pth', weights_only=False)
    final = finalize_checkpoint(checkpoint)
    assert set(final) == {'state_dict', 'meta'}
    for name, active in ACTIVE.items():
        assert int(final['state_dict'][name].count_nonzero()) <= active
    checkpoint['state_dict'][NAMES[0]].fill_(1.0)
    with pytest.raises(SparsityError, match=f'86 pruned weights of {NAMES[0]} are not zero'):
        finalize_checkpoint(checkpoint)


def test_the_optimizer_is_let_go(tmp_path):
    hook = sparse_hook()
    runner = make_runner(tmp_path, [hook], 2)
    runner.train()
    optimizer = runner.optim_wrapper.optimizer
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    'arguments,message',
    [
        (dict(preset='slak_x'), 'no preset .*slak_t'),
        (dict(no_such=1), "no argument 'no_such'"),
        (dict(from_scratch=dict(sparsty=0.4)), "from_scratch of .* no argument 'sparsty'; it takes .*sparsity"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(SparsityError, match=message):
        SparsityHook(**arguments)


@pytest.mark.parametrize(
    'hooks,message',
    [
        ([SparsityHook(mode='no')], "unknown mode 'no'"),
        ([SparsityHook()], 'dense network.*train without sparsity'),
        ([sparse_hook(include='nothing')], "include='nothing'"),
        ([sparse_hook(), sparse_hook()], '2 SparsityHooks'),
    ],
)
def test_wrong_beginnings(tmp_path, hooks, message):
    runner = make_runner(tmp_path, copy.deepcopy(hooks), 2)
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    with pytest.raises(SparsityError, match=message):
        runner.train()
    assert_same(before, dict(runner.model.state_dict()))


@pytest.mark.parametrize('mode', ['static', 'set'])
def test_a_frozen_backbone(tmp_path, capfd, mode):
    """Masks that would not change are not needed; those that should change cannot."""
    model = Toy()
    model.backbone.requires_grad_(False)
    runner = make_runner(tmp_path, [STRICT, sparse_hook(mode)], 2, model=model)
    if mode == 'set':
        with pytest.raises(SparsityError, match='all frozen'):
            runner.train()
        return
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    runner.train()
    assert 'nothing to do: no weight of Toy is selected: the 3 candidates are all frozen' in capfd.readouterr().out
    assert_same(before, dict(model.backbone.state_dict()))
    last = str(tmp_path / 'iter_2.pth')
    make_runner(tmp_path, [STRICT, sparse_hook()], 3, model=model, resume=True, load_from=last).train()
    assert (tmp_path / 'iter_3.pth').is_file()


@pytest.mark.parametrize(
    'change,message',
    [
        (dict(strategy=type('FSDPStrategy', (), {})()), 'FSDPStrategy.*DistributedDataParallel'),
        (dict(strategy=type('DeepSpeedStrategy', (), {})()), 'DeepSpeedStrategy'),
        (dict(model=type('Fsdp', (nn.Module,), {})()), 'Fsdp'),
        (dict(optim_wrapper=SimpleNamespace(optimizer=None)), 'one optimizer'),
    ],
)
def test_sharded_training_is_refused(monkeypatch, change, message):
    from slak_mm.engine import sparsity_hook

    monkeypatch.setattr(sparsity_hook, 'is_model_wrapper', lambda model: 'Fsdp' in repr(model))
    model = Toy()
    wrapper = SimpleNamespace(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    runner = SimpleNamespace(**dict(dict(model=model, hooks=[], optim_wrapper=wrapper), **change))
    with pytest.raises(SparsityError, match=message):
        sparsity_hook._refuse_unsupported(runner)


def test_registered_with_its_defaults():
    hook = HOOKS.build(dict(type='SparsityHook', preset='slak_s', prune_rate=0.2))
    published = dict(mode='set', distribution='snip', sparsity=0.4, stop_fraction=1.0, dense_above=0.99)
    assert hook.options == dict(published, update_interval=100, prune_rate=0.2)


# Distributed


def test_two_processes_go_on_inside_an_accumulation(tmp_path):
    multiprocessing.spawn(process, (str(tmp_path), 'two-parts'), nprocs=2)
    whole, *others = (torch.load(tmp_path / f'{name}{rank}.pth') for name in ('whole', 'resumed') for rank in range(2))
    for other in others:
        assert_same(dict(whole), dict(other))


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    multiprocessing.spawn(process, (str(tmp_path), 'uniform:static', 'snip:rigl'), nprocs=2)
    for distribution, mode in (('uniform', 'static'), ('snip', 'rigl')):
        one, two = (torch.load(tmp_path / f'{distribution}{rank}.pth', weights_only=False) for rank in range(2))
        assert one['hash'] == two['hash'] and one['updates'] == two['updates']
        assert_same(one['masks'], two['masks'])
        assert_same(dict(one['state']), dict(two['state']))
        # Each saw its half of the data.
        assert not set(one['taken'][-16:]) & set(two['taken'][-16:])

        hook = SparsityHook(mode=mode, distribution=distribution, sparsity=0.4, update_interval=2)
        alone = make_runner(tmp_path / 'alone', [hook], batch_size=4)
        alone.train()
        # SNIP's scores are those of the joint batch, up to rounding near the threshold.
        for name in NAMES:
            assert abs(int(one['masks'][name].sum()) - int(hook.masks[name].sum())) <= 1
        if mode == 'static':
            assert_same(one['masks'], hook.masks)
            for key, value in alone.model.state_dict().items():
                torch.testing.assert_close(one['state'][key], value, rtol=1e-4, atol=1e-6)
