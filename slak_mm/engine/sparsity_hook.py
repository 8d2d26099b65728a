"""Sparse training in mmengine's runner."""

import copy
import inspect
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseAveragedModel, is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from slak_mm.checkpoints import CheckpointMismatch, find_backbones, unwrap, unwrap_model
from slak_mm.sparsity import (
    PRESETS,
    FrozenWeights,
    SparseTraining,
    SparsityError,
    format_table,
    masks_from_state,
    select_parameters,
    snip_gradients,
)

from .reproducible import seed_everything

#: Entry of a checkpoint with the state of :class:`SparsityHook`.
SPARSITY_KEY = 'sparsity'


class SparsityMismatch(CheckpointMismatch):
    """The run to resume and this one differ in their sparse training."""


@HOOKS.register_module()
class SparsityHook(Hook):
    """Train with weights that are zero, and let other weights take their place from time to time.

    The masks are applied by a hook of the optimizer itself, after each of its steps and at no other time: neither
    gradient accumulation nor a step that mixed precision skips because of an overflow counts, and weights, momenta
    and second moments of pruned entries are zero, bit for bit, whenever anything looks at them. The averaged models
    of ``EMAHook`` and the like are masked in the same moment in which the masks change, whatever the order of the
    hooks, and stay sparse because an average of zeros is zero. The average of a grown weight begins at the first
    value that it has, as in the official code.

    Gradients for growth (``mode='rigl'``) are those that the optimizer is given in the step that changes the masks:
    dense, accumulated over micro-batches, averaged over the processes, without the loss scale, and after clipping.
    Clipping by norm scales all of them alike and so changes no choice.

    State is kept in the checkpoint under ``sparsity``: a resumed run goes on with the same masks, in the same phase of
    the schedule. The saved weights have real zeros; :func:`finalize_checkpoint` gives them without the rest.

    In a distributed run the processes have the same masks: they draw alike, SNIP's gradients are averaged, rank 0's
    masks are broadcast at each change, and their hashes are compared at the start. Model wrappers other than
    ``DistributedDataParallel``, which cut up or move weights, are refused.

    Args:
        preset: Published training, a key of :data:`slak_mm.sparsity.PRESETS`. Arguments given beside it have
            precedence. Defaults to None.
        include: Regular expressions; a weight is selected if one is found in its name or is the type of its module.
            Defaults to the weights of the backbone.
        exclude: The same, to leave weights out.
        selection: Selection of :func:`~slak_mm.sparsity.select_parameters`: 'backbone', 'large_kernel', 'all' or that
            of a family of backbones. Defaults to that of the preset where it is narrower than the backbone, else to
            the backbone.
        from_scratch: Arguments that take the place of those here in a run from random weights, which have no zeros to
            take masks from. Whoever starts such a run puts them in; the hook itself does not use them.
        **options: Further arguments of :class:`~slak_mm.sparsity.SparseTraining`, with its defaults but for
            ``sparsity``, which is 0.4 where masks are drawn. With ``distribution='from_weights'`` it is the share of
            zeros that the weights should have, of which half must be found. ``distribution='snip'`` needs one batch
            of the training data, which training does not miss, and runs it without dropout and drop path.

    Attributes:
        training: What holds and changes the masks; None before training, and where all selected weights are frozen.

    Raises:
        SparsityError: An argument is unknown or out of its range.
    """

    priority = 'NORMAL'

    def __init__(
        self,
        *,
        preset: str | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        selection: str | None = None,
        seed: int = 0,
        from_scratch: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if preset is not None and preset not in PRESETS:
            raise SparsityError(f'SparsityHook has no preset {preset!r}; there are {", ".join(PRESETS)}.')
        known = {*inspect.signature(SparseTraining).parameters, 'selection', 'include', 'exclude', 'preset'}
        known -= {'parameters', 'total_steps'}
        for place, given_keys in (('', options), ('from_scratch of ', from_scratch or {})):
            unknown = sorted(set(given_keys) - known)
            if unknown:
                raise SparsityError(
                    f'{place}SparsityHook has no argument {unknown[0]!r}; it takes {", ".join(sorted(known))}.'
                )
        published = dict(PRESETS[preset]) if preset else {}
        chosen = published.pop('selection', None)
        self.options = dict(mode='static', distribution='from_weights') | published
        self.options.update({key: value for key, value in options.items() if value is not None})
        if self.options['distribution'] == 'from_weights':
            self.options['sparsity'] = options.get('sparsity')
        elif 'sparsity' not in self.options:
            self.options['sparsity'] = 0.4
        self.selection = selection or (chosen if chosen != 'all' else None)
        self.include, self.exclude = include, exclude
        self.seed = seed
        self.training: SparseTraining | None = None
        self._restored = False
        self._handles: list[Any] = []
        self._runner: Any = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of each sparse parameter -> boolean tensor of its shape, True where it is not pruned."""
        return self.training.masks if self.training is not None else {}

    # Start and end

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Take the masks of the run to resume, or refuse it before a weight is overwritten."""
        if not getattr(runner, '_resume', False):
            return
        training = self._build(runner)
        if training is None:
            return
        source = getattr(runner, '_load_from', None) or 'its checkpoint'
        state = checkpoint.get(SPARSITY_KEY)
        if state is None:
            raise SparsityMismatch(
                f'The run to resume trained densely: {source} has no state of a SparsityHook. '
                'Resume it without one, or start a new sparse run with the checkpoint as load_from.'
            )
        try:
            mode = state['settings']['mode']
            if mode != training.mode:
                raise SparsityError(f'it has the mode {mode!r}, this one {training.mode!r}.')
            training.load_state_dict(state)
        except (SparsityError, LookupError, TypeError) as error:
            raise SparsityMismatch(
                f'The masks of the run to resume, part "{SPARSITY_KEY}" of {source}, do not fit this one: {error} '
                'Resume it with the config that it had.'
            ) from error
        self.training, self._restored = training, True

    def before_train(self, runner: Any) -> None:
        """Make the masks, or go on with the restored ones, and hook up the optimizer."""
        self._release()
        if not self._restored:
            self.training = self._build(runner)
            self._initialize(runner)
        if self.training is None:
            return
        self._restored = False
        self.training.check_agreement()
        self._runner = runner
        optimizer = runner.optim_wrapper.optimizer
        self._handles = [self.training.attach(optimizer), optimizer.register_step_post_hook(self._after_step)]
        self._enforce(runner)
        self._log_scalars(runner)
        self._log_table('Sparse training begins')
        empty = [layer.name for layer in self.training.statistics().layers if not layer.active]
        if empty:
            print_log(
                f'{len(empty)} layers have no weight left and cannot learn, the first is '
                f'{empty[0]}: lower the sparsity, or choose another distribution.',
                logger='current',
                level=logging.WARNING,
            )

    def after_train(self, runner: Any) -> None:
        """Show what has become of the masks, and detach from the optimizer."""
        if self.training is not None:
            self._log_table('Sparse training ended')
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _build(self, runner: Any) -> SparseTraining | None:
        _refuse_unsupported(runner)
        model = unwrap_model(runner.model)
        try:
            selected = self._select(model)
        except FrozenWeights as error:
            # Masks that do not change hold zeros, and frozen weights keep theirs without.
            if self.options['mode'] != 'static':
                raise SparsityError(f'{error}: unfreeze some of them, or train without SparsityHook.') from error
            print_log(f'Sparse training has nothing to do: {error}.', logger='current', level=logging.WARNING)
            return None
        wrapper = runner.optim_wrapper
        counts = getattr(wrapper, '_accumulative_counts', 1)
        return SparseTraining(selected, seed=self.seed, total_steps=-(-runner.max_iters // counts), **self.options)

    def _select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        selection, include = self.selection, self.include
        if selection is None and include is None:
            if find_backbones(model):
                selection = 'backbone'
            elif hasattr(model, 'backbone'):
                include = r'^backbone\.'
        return select_parameters(model, selection, include, self.exclude)

    def _initialize(self, runner: Any) -> None:
        if self.training is None:
            return
        if self.options['distribution'] != 'snip':
            self.training.initialize()
            return
        batch = self._draw_batch(runner)

        def compute_loss(replica: nn.Module) -> Tensor:
            seed_everything(self.seed, runner.rank, 0)
            for module in replica.modules():
                # A branch that is dropped has no gradients, and SNIP would prune all of it.
                if isinstance(module, _DropoutNd) or 'droppath' in type(module).__name__.lower():
                    module.eval()
            collector = _LossCollector()
            replica.train_step(batch, optim_wrapper=collector)  # type: ignore[operator]
            return collector.loss

        with _untouched_randomness():
            gradients = snip_gradients(unwrap_model(runner.model), self.training.parameters, compute_loss)
        self.training.initialize(gradients)

    def _draw_batch(self, runner: Any) -> Any:
        """A training batch for SNIP, past the sampler and the workers of the loader.

        Drawing it from the loader would shift the order of the samples, and a second iterator over
        persistent workers would take them from the first.
        """
        loader = runner.train_dataloader
        dataset = _detached(loader.dataset)
        size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 2)
        try:
            number = len(dataset)
        except TypeError:
            raise SparsityError(
                f'SNIP draws a batch by index, which {type(dataset).__name__} does not have; '
                "choose the distribution 'erk' or 'uniform'."
            ) from None
        with _untouched_randomness():
            order = np.random.default_rng(self.seed).permutation(number)
            first = runner.rank * size
            seed_everything(self.seed, runner.rank, 1)
            samples = [dataset[int(order[(first + i) % number])] for i in range(size)]
            return loader.collate_fn(samples)

    # Optimizer steps

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Let the averaged models and the log follow a change of the masks."""
        assert self.training is not None
        # The weights that came in have their first values one step later.
        if self.training.updates and self.training.steps - self.training.last_update <= 1:
            for average in _averages(self._runner):
                self.training.enforce_average(dict(average.named_parameters()))
            self._log_scalars(self._runner)

    def _enforce(self, runner: Any) -> None:
        """Mask the model and its averages; without effect where they are masked."""
        if self.training is None:
            return
        for module in (unwrap_model(runner.model), *_averages(runner)):
            self.training.enforce(dict(module.named_parameters()))

    # Checkpoints and log

    def before_val_epoch(self, runner: Any) -> None:
        """Mask what is going to be validated, also where a hook has put averages into it."""
        if self._handles:
            self._enforce(runner)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Mask what is going to be saved, and add the state of the masks."""
        if self.training is not None:
            self._enforce(runner)
            checkpoint[SPARSITY_KEY] = self.training.state_dict()

    def _log_scalars(self, runner: Any) -> None:
        """Hand density, churn and exploration to the log and all visualization backends."""
        assert self.training is not None
        for name, value in self.training.statistics().scalars().items():
            # The log repeats the latest value until there is another.
            runner.message_hub.update_scalar(f'train/{name}', value)

    def _log_table(self, title: str) -> None:
        assert self.training is not None
        statistics = self.training.statistics()
        print_log(
            f'{title} ({self.options["mode"]}): {statistics.density:.2%} of '
            f'{statistics.total:,} weights in {len(statistics.layers)} layers are active, '
            f'{statistics.exploration:.2%} have ever been.\n{format_table(statistics)}',
            logger='current',
            level=logging.INFO,
        )


def _averages(runner: Any) -> list[nn.Module]:
    """What the hooks of a runner keep as averaged models, under whatever name."""
    return [
        value.module for hook in runner.hooks for value in vars(hook).values() if isinstance(value, BaseAveragedModel)
    ]


def _refuse_unsupported(runner: Any) -> None:
    """Raise SparsityError for what cuts up the weights or has several optimizers."""
    strategy = type(getattr(runner, 'strategy', None)).__name__
    wrapper = runner.model if is_model_wrapper(runner.model) else None
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    unsupported = None
    if strategy not in ('NoneType', 'SingleDeviceStrategy', 'DDPStrategy'):
        unsupported = strategy
    elif wrapper is not None and not isinstance(wrapper, DistributedDataParallel):
        unsupported = type(wrapper).__name__
    elif any(kind.__name__ == 'ZeroRedundancyOptimizer' for kind in type(optimizer).__mro__):
        unsupported = 'ZeroRedundancyOptimizer'
    if unsupported:
        raise SparsityError(
            f'Sparse training does not work with {unsupported}, which cuts up the weights or the '
            'state of the optimizer: train with DistributedDataParallel, or without SparsityHook.'
        )
    if not isinstance(optimizer, Optimizer):
        raise SparsityError(
            f'Sparse training needs one optimizer from torch.optim or derived from it, because the schedule of the '
            f'masks counts its steps; {type(runner.optim_wrapper).__name__} has {type(optimizer).__name__}.'
        )
    others = [hook for hook in runner.hooks if isinstance(hook, SparsityHook)]
    if len(others) > 1:
        raise SparsityError(
            f'This config has {len(others)} SparsityHooks, each of which would '
            'change masks on its own: merge them into one with include=[...].'
        )


class _LossCollector:
    """Takes the place of an optimizer wrapper in ``train_step`` and only keeps the loss."""

    loss: Tensor

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Without mixed precision."""
        yield

    def update_params(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Keep the loss; where a model updates several times, their sum."""
        self.loss = self.loss + loss if hasattr(self, 'loss') else loss


@contextmanager
def _untouched_randomness() -> Iterator[None]:
    """Put the global generators of python, numpy and torch back afterwards."""
    states = random.getstate(), np.random.get_state()
    # The one GPU of this process; the others belong to other processes.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _detached(dataset: Any) -> Any:
    """A data set with the same samples, whose transforms remember nothing for the original."""
    dataset = copy.copy(dataset)
    for name in ('pipeline', 'transforms', 'transform'):
        if hasattr(dataset, name):
            setattr(dataset, name, copy.deepcopy(getattr(dataset, name)))
    if hasattr(dataset, 'dataset'):
        dataset.dataset = _detached(dataset.dataset)
    if isinstance(getattr(dataset, 'datasets', None), (list, tuple)):
        dataset.datasets = [_detached(inner) for inner in dataset.datasets]
    return dataset


def saved_masks(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that a checkpoint has from a :class:`SparsityHook`.

    Returns:
        Parameter name -> boolean tensor of the parameter's shape, or of (filters, 1, 1, 1) where whole filters are
        pruned. Empty without a hook's state.
    """
    state = checkpoint.get(SPARSITY_KEY)
    return masks_from_state(state) if state else {}


def finalize_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a training checkpoint alone, with the pruned ones verified to be zero.

    Args:
        checkpoint: Content of a checkpoint file, with or without the state of a :class:`SparsityHook`.

    Returns:
        ``state_dict``, and ``meta`` where there was one.

    Raises:
        SparsityError: A weight that its mask prunes is not zero.
    """
    weights = unwrap(checkpoint).state_dict
    for name, mask in saved_masks(checkpoint).items():
        if name not in weights:
            raise SparsityError(f'The checkpoint has a mask for {name}, but no such weight.')
        pruned = weights[name].masked_select(~mask)
        if bool(pruned.any()):
            raise SparsityError(
                f'{int(pruned.count_nonzero())} pruned weights of {name} are not zero: the '
                'weights were changed after they were saved.'
            )
    result: dict[str, Any] = {'state_dict': weights}
    if isinstance(checkpoint.get('meta'), Mapping):
        result['meta'] = checkpoint['meta']
    return result
