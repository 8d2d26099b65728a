"""Sparse training beside any training loop."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import average_, broadcast_masks, same_on_all_ranks
from .distributions import (
    SAMPLINGS,
    draw_mask,
    erk_densities,
    require_zeros,
    snip_densities,
    snip_scores,
    uniform_densities,
)
from .errors import SparsityError
from .layers import Layer
from .masks import masks_hash, pack_mask, unpack_mask, zero_pruned_
from .schedule import FINAL_PRUNE_RATE, UpdateSchedule
from .select import path_groups
from .statistics import Statistics

MODES = ('static', 'set', 'rigl', 'momentum')
DISTRIBUTIONS = ('from_weights', 'uniform', 'erk', 'snip')
_VERSION = 1
# Of the running mean of gradients by which the mode 'momentum' grows.
_BETA = 0.9

# Those that matter after the first masks were made.
_ONGOING_SETTINGS = (
    *('mode', 'sampling', 'sparse_gap', 'momentum_window', 'total_steps'),
    *('update_interval', 'prune_rate', 'stop_fraction', 'final_prune_rate'),
)

_ONE_OPTIMIZER = (
    'sparse training follows one optimizer, because the schedule of the masks counts its steps: make a SparseTraining '
    'for the parameters of each optimizer, or remove the handle of the earlier attach() first'
)

_logger = logging.getLogger(__name__)


class SparseTraining:
    """Keeps weights sparse while any optimizer trains them.

    Typical use::

        sparse = SparseTraining(select_parameters(model), mode='rigl', distribution='erk',
                                sparsity=0.4, total_steps=10000)
        sparse.initialize()                  # draws masks and zeroes weights
        handle = sparse.attach(optimizer)    # calls step() after every real optimizer step
        ...
        torch.save(dict(model=model.state_dict(), sparsity=sparse.state_dict()), path)

    After every optimizer step the weights that are pruned, and all of the optimizer's state that
    belongs to them, are positive zero bit for bit. Weights that an update brings in start from
    zero with zero state. Masks change only where the step could train the weights: those of
    tensors that are not in the optimizer, have a learning rate of 0, do not require gradients or
    have none stay as they are, and the log names them once. A weight that an update removes and
    brings back at once, which the rules of Liu et al. and of RigL allow, keeps its value: it never
    was inactive.

    Args:
        parameters: Weights by name, as :func:`~slak_mm.sparsity.select_parameters` returns them.
        mode: ``'static'``: masks never change. Otherwise the smallest weights are replaced at
            times: ``'set'`` by random ones, ``'rigl'`` by those with the largest gradients,
            ``'momentum'`` by those with the largest running mean of gradients over the last
            ``momentum_window`` steps. Default: ``'static'``.
        distribution: Where the first masks come from: ``'from_weights'`` (what is not zero),
            ``'uniform'``, ``'erk'``, or ``'snip'``, which needs gradients. Default:
            ``'from_weights'``.
        sparsity: Share of zeros, in (0, 1). Needed by all distributions but ``'from_weights'``,
            for which it is a promise that is checked. Default: None.
        total_steps: Optimizer steps of the whole training; needed unless the mode is static.
            Default: None.
        update_interval: Optimizer steps between two updates of the masks. Default: 100.
        prune_rate: Share of a layer's weights to replace, falling along a cosine to
            ``final_prune_rate`` at the end of the training. Default: 0.3.
        stop_fraction: Masks stay after this share of the training. Default: 0.75.
        final_prune_rate: See above. Default: 0.005, as in the official code.
        sampling: ``'exact'``: a layer of density d has ``round(d * entries)`` active entries, at
            random places, and every update conserves their number. ``'bernoulli'``: the numbers
            are random, as in the official code, which also takes active zeros for pruned ones.
            ``'magnitude'``, ``'saliency'``: exact numbers, at first where weights, or SNIP scores,
            are largest. Default: ``'exact'``.
        per_filter: One entry of the mask for each filter in place of each weight, for the filters
            that large kernels are made up of (names like ``large_kernel.filters.0.weight``), the
            same for all paths at the start and after aligned updates. Other parameters are masked
            weight by weight. Default: False.
        sparse_gap: Every so many updates is aligned: filters are ranked by the sum over the
            paths, which get one mask. In other updates each path is on its own. Default: 1.
        dense_above: A layer that starts with at least this density gets no mask and stays dense.
            Default: 1.0; the official code has 0.99.
        momentum_window: See ``mode``. Default: 10.
        seed: Of the generator for all random choices. Default: 0.

    Raises:
        SparsityError: An argument is unknown, missing or out of its range.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        mode: str = 'static',
        distribution: str = 'from_weights',
        sparsity: float | None = None,
        total_steps: int | None = None,
        update_interval: int = 100,
        prune_rate: float = 0.3,
        stop_fraction: float = 0.75,
        final_prune_rate: float = FINAL_PRUNE_RATE,
        sampling: str = 'exact',
        per_filter: bool = False,
        sparse_gap: int = 1,
        dense_above: float = 1.0,
        momentum_window: int = 10,
        seed: int = 0,
    ) -> None:
        for name, value, choices in (
            ('mode', mode, MODES),
            ('distribution', distribution, DISTRIBUTIONS),
            ('sampling', sampling, SAMPLINGS),
        ):
            if value not in choices:
                raise SparsityError(f'unknown {name} {value!r}: choose from {", ".join(choices)}')
        if sparsity is None and distribution != 'from_weights':
            raise SparsityError(f'the distribution {distribution!r} needs a sparsity, the share of zeros')
        if sparsity is not None and not 0 < sparsity < 1:
            raise SparsityError(f'sparsity must lie in (0, 1), got {sparsity}')
        if sampling == 'saliency' and distribution != 'snip':
            raise SparsityError("the sampling 'saliency' needs the distribution 'snip'")
        if mode != 'static' and total_steps is None:
            raise SparsityError(f'the mode {mode!r} needs total_steps, the optimizer steps of the training')
        for name, number in (('sparse_gap', sparse_gap), ('momentum_window', momentum_window)):
            if number < 1:
                raise SparsityError(f'{name} must be a positive number, got {number}')
        if not 0 < dense_above <= 1:
            raise SparsityError(f'dense_above must lie in (0, 1], got {dense_above}')
        if not parameters:
            raise SparsityError('there are no parameters to make sparse')
        self.parameters = dict(parameters)
        self.mode = mode
        self.distribution = distribution
        self.sparsity = sparsity
        self.sampling = sampling
        self.sparse_gap = sparse_gap
        self.dense_above = dense_above
        self.momentum_window = momentum_window
        self.schedule = (
            None
            if total_steps is None
            else UpdateSchedule(total_steps, update_interval, prune_rate, stop_fraction, final_prune_rate)
        )
        self.steps = 0
        self.updates = 0
        self.last_update = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._layers = _make_layers(self.parameters, per_filter)
        self._is_initialized = False
        self._gathered: dict[str, Tensor] = {}
        self._statistics: Statistics | None = None
        self._handles: list[Any] = []
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._left_alone: set[str] = set()

    # Masks and where they start

    @property
    def is_initialized(self) -> bool:
        """Whether there are masks, drawn or loaded."""
        return self._is_initialized

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks by parameter name, boolean, of the parameters' shapes; dense layers have none.

        They are those in use: look, and do not write.
        """
        return dict(item for layer in self._layers for item in layer.full_masks())

    @property
    def dense_parameters(self) -> list[str]:
        """Names of selected parameters that have no mask."""
        return [name for layer in self._layers if layer.is_dense for name in layer.parameters]

    def initialize(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Make the first masks and set pruned weights to zero.

        With several processes all must call this; they get the masks of rank 0.

        Args:
            gradients: For the distribution ``'snip'``, by parameter name; see
                :func:`~slak_mm.sparsity.snip_gradients`. They are averaged over the processes.

        Raises:
            SparsityError: The gradients are missing.
            DenseWeights: The distribution is ``'from_weights'``, and the weights are dense.
        """
        scores = self._scores(gradients) if self.distribution == 'snip' else {}
        if self.distribution == 'from_weights':
            drawn = self._masks_of_weights()
        else:
            drawn = self._draw(self._densities(scores), scores)
        broadcast_masks([mask for masks in drawn.values() for mask in masks])
        for layer in self._layers:
            masks = drawn[layer.name]
            active = sum(int(mask.count_nonzero()) for mask in masks)
            if active >= self.dense_above * sum(mask.numel() for mask in masks):
                layer.masks = []
            else:
                layer.set_masks(masks, None if self.mode == 'static' else masks)
        self.steps = self.updates = self.last_update = 0
        self._is_initialized = True
        self._statistics = None
        self.enforce(self.parameters)

    def _scores(self, gradients: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        missing = [name for name in self.parameters if name not in (gradients or {})]
        if gradients is None or missing:
            raise SparsityError(
                "the distribution 'snip' needs the gradients of a batch for every selected "
                f'parameter{f"; {missing[0]} has none" if gradients else ""}'
            )
        averaged = {name: gradients[name].detach().clone() for name in self.parameters}
        average_(averaged.values())
        return snip_scores(
            self.parameters,
            averaged,
            {layer.name: list(layer.parameters) for layer in self._layers if layer.per_filter},
        )

    def _densities(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        assert self.sparsity is not None
        if self.distribution == 'snip':
            densities: dict[str, float] = {}
            # Filters and single weights have thresholds of their own, as in the official code.
            for per_filter in (True, False):
                chosen = {layer.name: scores[layer.name] for layer in self._layers if layer.per_filter == per_filter}
                if chosen:
                    densities |= snip_densities(chosen, self.sparsity)
            return densities
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        by_name = (uniform_densities if self.distribution == 'uniform' else erk_densities)(shapes, self.sparsity)
        # All paths of an operator have the same shape.
        return {layer.name: by_name[next(iter(layer.parameters))] for layer in self._layers}

    def _draw(self, densities: Mapping[str, float], scores: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        drawn = {}
        for layer in self._layers:
            score = None
            if self.sampling == 'magnitude':
                score = torch.stack(layer.scores(list(layer.parameters.values()))).sum(0)
            elif self.sampling == 'saliency':
                score = scores[layer.name]
                if layer.per_filter:
                    score = score.sum(1).view(layer.mask_shape)
            mask = draw_mask(layer.mask_shape, densities[layer.name], self._generator, self.sampling, score)
            drawn[layer.name] = [mask] * len(layer.parameters)
        return drawn

    def _masks_of_weights(self) -> dict[str, list[Tensor]]:
        # A zero among the taps of a filter does not remove the filter.
        found = {
            layer.name: [score != 0 for score in layer.scores(list(layer.parameters.values()))]
            for layer in self._layers
        }
        siblings = {name: names for names in path_groups(self.parameters).values() for name in names}
        for layer in self._layers:
            # A path that is zero beside others that are not adds nothing, and should not start.
            related = {name for own in layer.parameters for name in siblings.get(own, [own])}
            if not any(bool(self.parameters[name].any()) for name in related):
                _logger.warning('%s is zero throughout: it was initialized so and stays dense', layer.name)
                found[layer.name] = [torch.ones_like(mask) for mask in found[layer.name]]
        require_zeros(
            {f'{name}.{i}': mask for name, masks in found.items() for i, mask in enumerate(masks)}, self.sparsity
        )
        return found

    # Training

    def attach(self, optimizer: Optimizer) -> Any:
        """Have :meth:`gather_gradients` and :meth:`step` called around the optimizer's steps.

        Hooks that are registered with the optimizer afterwards find the weights sparse.

        Args:
            optimizer: Of the parameters, all of them or some.

        Returns:
            A handle whose ``remove()`` undoes this.

        Raises:
            SparsityError: This is attached already: steps would count twice.
        """
        if self._handles:
            raise SparsityError(_ONE_OPTIMIZER)
        self._follow(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(lambda opt, *_: self.gather_gradients(opt)),
            optimizer.register_step_post_hook(lambda opt, *_: _nothing(self.step(opt))),
        ]
        return _Handle(self._detach)

    def _follow(self, optimizer: Optimizer) -> None:
        """Refuse a second optimizer while the first is in use."""
        followed = None if self._optimizer is None else self._optimizer()
        if followed is not None and followed is not optimizer:
            raise SparsityError(_ONE_OPTIMIZER)
        self._optimizer = weakref.ref(optimizer)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None

    def needs_gradient(self) -> bool:
        """Whether the coming optimizer step has to keep dense gradients for growth."""
        if self.schedule is None or self.mode not in ('rigl', 'momentum'):
            return False
        wait = self.schedule.steps_to_update(self.steps + 1)
        return wait is not None and wait < (1 if self.mode == 'rigl' else self.momentum_window)

    @torch.no_grad()
    def gather_gradients(self, optimizer: Optimizer | None = None) -> None:
        """Copy the gradients, if the coming step needs them; else do nothing.

        Call it before each optimizer step, when all micro-batches have been accumulated. An optimizer may change the
        gradients that it is given, so :meth:`step` prefers the copies; they are dropped with the update.

        Args:
            optimizer: Whose step comes. With a fused optimizer the gradients are still scaled by
                ``torch.amp.GradScaler``, which tells the optimizer the scale. Default: None.
        """
        if not self.needs_gradient() or _is_skipped(optimizer):
            return
        scale = getattr(optimizer, 'grad_scale', None)
        for layer in self._layers:
            if layer.is_dense:
                continue
            for name, parameter in layer.parameters.items():
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.detach()
                if scale is not None:
                    gradient = gradient / scale.to(gradient.device)
                if self.mode == 'momentum' and name in self._gathered:
                    self._gathered[name].lerp_(gradient, 1 - _BETA)
                else:
                    self._gathered[name] = gradient.clone()

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> bool:
        """Keep what is pruned at zero after an optimizer step, and change masks when due.

        Call it after every optimizer step, before the gradients are set to zero. A step that a
        fused optimizer left out because gradients overflowed does not count.

        Args:
            optimizer: The one that stepped. Each tensor of its state that has a parameter's shape is masked like the
                parameter; others, such as step counters and factored moments, are left alone.

        Returns:
            Whether masks changed.

        Raises:
            SparsityError: There are no masks yet, no gradients at an update, or this is another
                optimizer than the one before: each would count its steps.
        """
        if not self._is_initialized:
            raise SparsityError('call initialize() or load_state_dict() before step()')
        self._follow(optimizer)
        if _is_skipped(optimizer):
            return False
        self.steps += 1
        is_due = self.mode != 'static' and self.schedule is not None and self.schedule.is_due(self.steps)
        sparse = [layer for layer in self._layers if not layer.is_dense]
        for layer in sparse:
            layer.follow_device()
        changing = self._trained(sparse, optimizer) if is_due else []
        staying = self._update(changing) if changing else {}
        if is_due:
            self._gathered = {}
        for layer in sparse:
            for parameter, mask in zip(layer.parameters.values(), staying.get(layer.name, layer.masks)):
                zero_pruned_(_with_state(parameter, optimizer), mask)
        return bool(changing)

    def _trained(self, layers: list[Layer], optimizer: Optimizer) -> list[Layer]:
        """Layers whose weights this step could train, in all processes alike; names the others once."""
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        if all(p.grad is None for p in parameters):
            raise SparsityError(
                'masks are to change, but no parameter has a gradient: call step() before the gradients are set to zero'
            )
        trained = {
            id(p)
            for group in optimizer.param_groups
            if group.get('lr') is None or float(group['lr']) > 0
            for p in group['params']
            if p.requires_grad and p.grad is not None
        }
        is_trained = torch.tensor(
            [all(id(p) in trained for p in layer.parameters.values()) for layer in layers]
        ).float()
        average_([is_trained])  # a branch may be used in one process only
        left = [n for layer, here in zip(layers, is_trained) if not here for n in layer.parameters]
        if not self._left_alone.issuperset(left):
            _logger.warning(
                'the masks of %d tensors stay as they are, because the optimizer does not train them now (not in it, '
                'learning rate 0, frozen, or without gradient): %s',
                len(left),
                ', '.join(left),
            )
            self._left_alone.update(left)
        return [layer for layer, here in zip(layers, is_trained) if here]

    def _update(self, layers: list[Layer]) -> dict[str, list[Tensor]]:
        """Change the masks of layers; returns what was and stays active, by the layer's name."""
        assert self.schedule is not None
        growth = self._growth(layers) if self.mode in ('rigl', 'momentum') else None
        is_aligned = self.steps // self.schedule.update_interval % self.sparse_gap == 0
        proposals = []
        for layer in layers:
            proposals.append(
                layer.proposal(
                    self.schedule.rate(self.steps),
                    None if growth is None else [growth[name] for name in layer.parameters],
                    self._generator,
                    self.sampling != 'bernoulli',
                    is_aligned and layer.per_filter,
                )
            )
        broadcast_masks([mask for masks in proposals for mask in masks])
        self.updates += 1
        self.last_update = self.steps
        self._statistics = None
        for layer in self._layers:
            layer.replaced = [0] * len(layer.masks)
        return {layer.name: layer.replace(masks) for layer, masks in zip(layers, proposals)}

    def _growth(self, layers: list[Layer]) -> dict[str, Tensor]:
        """Gradients, or running means of them, by name, averaged over processes."""
        growth = {}
        for layer in layers:
            for name, parameter in layer.parameters.items():
                gradient = self._gathered.get(name, parameter.grad)
                # None where another process used the weight in this step, and this one did not.
                growth[name] = torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()
        average_(growth.values())
        return growth

    # Weights elsewhere

    @torch.no_grad()
    def enforce(self, tensors: Mapping[str, Tensor], prefix: str = '') -> list[str]:
        """Set the pruned entries of named tensors to zero in place.

        Args:
            tensors: The model's parameters, a state dict, or an average of weights.
            prefix: What the names in ``tensors`` have before the parameters' names, such as ``'module.'``.

        Returns:
            Names of the tensors that have a mask.

        Raises:
            SparsityError: A tensor has another shape than its parameter.
        """
        found = []
        for name, mask in self.masks.items():
            tensor = tensors.get(prefix + name)
            if tensor is None:
                continue
            if tensor.shape != mask.shape:
                raise SparsityError(f'{prefix}{name} has the shape {tuple(tensor.shape)}, its mask {tuple(mask.shape)}')
            zero_pruned_([tensor], mask)
            found.append(prefix + name)
        return found

    @torch.no_grad()
    def enforce_average(self, averages: Mapping[str, Tensor], prefix: str = '', force: bool = False) -> None:
        """Keep a moving average of the weights sparse while masks change.

        Call it after :meth:`step` and before the average takes in the new weights. Entries that are pruned become zero;
        entries that came with the latest update, and are still zero in the average, take the weight as it is, as in the
        official code: averaging up from zero would take thousands of steps. It costs nothing unless masks changed in
        this step or the one before.

        Args:
            averages: Averaged tensors by name.
            prefix: As in :meth:`enforce`.
            force: Do both in any case, as after loading.

        Raises:
            SparsityError: A tensor has another shape than its parameter.
        """
        age = self.steps - self.last_update
        if force or (age == 1 and self.updates > 0):
            for name, mask in self.masks.items():
                average, weight = averages.get(prefix + name), self.parameters[name]
                if average is not None and average.shape == weight.shape:
                    mask = mask.to(average.device)
                    is_new = (average == 0).logical_and_(mask)
                    average.copy_(torch.where(is_new, weight.detach().to(average.device, average.dtype), average))
        if force or age == 0:
            self.enforce(averages, prefix)

    def finalize(self) -> Statistics:
        """End the training: zero the pruned weights once more and detach from optimizers.

        Returns:
            The final statistics.
        """
        self.enforce(self.parameters)
        self._detach()
        return self.statistics()

    # To look at and to keep

    def statistics(self) -> Statistics:
        """Active entries, those that were ever active, and those of the latest update."""
        if self._statistics is None or self._statistics.step != self.steps:
            layers = None if self._statistics is None else self._statistics.layers
            if layers is None:
                order = {name: i for i, name in enumerate(self.parameters)}
                layers = sorted(
                    (entry for layer in self._layers for entry in layer.statistics()),
                    key=lambda entry: order[entry.name],
                )
            self._statistics = Statistics(self.steps, self.updates, layers)
        return self._statistics

    def hash(self) -> str:
        """A hash of all masks; see :func:`~slak_mm.sparsity.masks_hash`."""
        return masks_hash({name: mask for layer in self._layers for name, mask in zip(layer.parameters, layer.masks)})

    def check_agreement(self) -> None:
        """Raise unless all processes have the same masks. Costs a message of 16 bytes.

        Raises:
            RuntimeError: They differ.
        """
        if not same_on_all_ranks(self.hash()):
            raise RuntimeError('the masks of the processes differ: a process stepped or loaded differently')

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs: tensors, numbers and strings only.

        Returns:
            Masks and the record of exploration with eight entries a byte, steps, updates, the
            settings, the state of the generator, and gradients gathered for a coming update.
        """
        sparse = [layer for layer in self._layers if not layer.is_dense]
        return dict(
            version=_VERSION,
            step=self.steps,
            updates=self.updates,
            last_update=self.last_update,
            settings=self._settings(),
            generator=self._generator.get_state(),
            dense=self.dense_parameters,
            masks={
                name: dict(shape=list(mask.shape), bits=pack_mask(mask))
                for layer in sparse
                for name, mask in zip(layer.parameters, layer.masks)
            },
            explored={
                name: pack_mask(mask) for layer in sparse for name, mask in zip(layer.parameters, layer.explored)
            },
            replaced={name: number for layer in sparse for name, number in zip(layer.parameters, layer.replaced)},
            gathered={name: tensor.clone() for name, tensor in self._gathered.items()},
        )

    def _settings(self) -> dict[str, Any]:
        schedule = self.schedule
        return dict(
            mode=self.mode,
            distribution=self.distribution,
            sparsity=self.sparsity,
            sampling=self.sampling,
            sparse_gap=self.sparse_gap,
            **({'momentum_window': self.momentum_window} if self.mode == 'momentum' else {}),
            **({} if schedule is None else vars(schedule)),
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned.

        The weights are left as they are; load those that were saved with it. Settings are those
        of this object: where the saved ones differ, the log says so.

        Args:
            state: The state.

        Raises:
            SparsityError: It is of other parameters or shapes, or damaged. Nothing was changed then.
        """
        try:
            self._load(state)
        except SparsityError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise SparsityError(f'the sparsity state is damaged ({type(error).__name__}: {error})') from error

    def _load(self, state: Mapping[str, Any]) -> None:
        """Read everything, then take it over."""
        if state.get('version') != _VERSION:
            raise SparsityError(
                f'the sparsity state has the version {state.get("version")!r}, this code reads {_VERSION}'
            )
        saved, dense = state['masks'], set(state['dense'])
        unknown = sorted((set(saved) | dense) - set(self.parameters))
        missing = [name for name in self.parameters if name not in saved and name not in dense]
        if unknown or missing:
            raise SparsityError(
                'the sparsity state is of other parameters: '
                + (
                    f'{missing[0]} and {len(missing) - 1} more have no mask in it'
                    if missing
                    else f'{unknown[0]} and {len(unknown) - 1} more are not selected here'
                )
                + '; select the same parameters as the interrupted training'
            )
        loaded: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for layer in self._layers:
            if all(name in saved for name in layer.parameters):
                loaded[layer.name] = self._unpack(layer, state)
            elif any(name in saved for name in layer.parameters):
                raise SparsityError(f'the sparsity state has masks for some paths of {layer.name}')
        differences = [
            f'{key} {value!r} (saved: {state["settings"][key]!r})'
            for key, value in self._settings().items()
            if key in _ONGOING_SETTINGS and state['settings'].get(key, value) != value
        ]
        counts = {key: int(state[key]) for key in ('step', 'updates', 'last_update')}
        if min(counts.values()) < 0:
            raise SparsityError(f'the sparsity state counts {min(counts.values())} steps')
        replaced = {
            layer.name: [int(state['replaced'].get(name, 0)) for name in layer.parameters] for layer in self._layers
        }
        generator = torch.Generator()
        generator.set_state(state['generator'].cpu())
        gathered = {}
        for name, tensor in state['gathered'].items():
            if tensor.shape != self.parameters[name].shape:
                raise SparsityError(f'the gathered gradient of {name} has the shape {tuple(tensor.shape)}')
            gathered[name] = tensor.to(self.parameters[name].device, copy=True)
        if differences:
            _logger.warning('sparse training goes on with other settings: %s', ', '.join(differences))
        for layer in self._layers:
            masks, explored = loaded.get(layer.name, ([], []))
            layer.set_masks(masks, None if self.mode == 'static' else explored)
            layer.replaced = replaced[layer.name]
        self.steps, self.updates, self.last_update = counts['step'], counts['updates'], counts['last_update']
        self._generator, self._gathered = generator, gathered
        self._is_initialized = True
        self._statistics = None

    def _unpack(self, layer: Layer, state: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of a layer, and those of what was ever active."""
        masks, explored = [], []
        for name in layer.parameters:
            shape = tuple(state['masks'][name]['shape'])
            if shape != layer.mask_shape:
                raise SparsityError(
                    f'the mask of {name} has the shape {shape} in the sparsity state, here '
                    f'{layer.mask_shape}; the network or per_filter is another'
                )
            masks.append(unpack_mask(state['masks'][name]['bits'], shape))
            # A static training kept no record: what is active was ever active.
            explored.append(unpack_mask(state['explored'].get(name, state['masks'][name]['bits']), shape))
        return masks, explored


class _Handle:
    """What ``remove()`` undoes, as the handles of torch's hooks."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self.remove = undo


def _nothing(_: object) -> None:
    """What torch expects of a hook."""


def _make_layers(parameters: Mapping[str, nn.Parameter], per_filter: bool) -> list[Layer]:
    """A layer for each parameter, or for all paths of an operator if masks are per filter."""
    groups = path_groups(parameters) if per_filter else {}
    if per_filter and not groups:
        raise SparsityError('per_filter=True, but no selected parameter is a filter (….large_kernel.filters.0.weight)')
    in_group = {name for names in groups.values() for name in names}
    layers = [
        Layer(name, {path: parameters[path] for path in names}, per_filter=True) for name, names in groups.items()
    ]
    layers += [Layer(name, {name: parameter}) for name, parameter in parameters.items() if name not in in_group]
    return layers


def _with_state(parameter: nn.Parameter, optimizer: Optimizer) -> Iterable[Tensor]:
    """A parameter and what the optimizer keeps of the same shape."""
    yield parameter
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            yield value


def _is_skipped(optimizer: Optimizer | None) -> bool:
    """Whether a fused optimizer leaves this step out because gradients overflowed.

    ``GradScaler`` does not call other optimizers then; those that find out on the device are
    called, with the finding in ``found_inf``.
    """
    found_inf = getattr(optimizer, 'found_inf', None)
    return found_inf is not None and bool(found_inf.item())
