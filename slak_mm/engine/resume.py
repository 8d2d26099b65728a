"""What a run needs to go on, and what of it does not fit."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor
from torch.optim import Optimizer

from slak_mm.checkpoints import CheckpointMismatch, unwrap_model

from .epoch_loop import ResumableEpochLoop
from .sparsity_hook import SPARSITY_KEY, SparsityHook, SparsityMismatch

#: Entry of a checkpoint with the gradients of an unfinished accumulation, by process and parameter.
GRADIENTS_KEY = 'gradients'
#: Entry of a checkpoint's ``meta`` with :func:`describe_run`.
RUN_KEY = 'run'

_DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# What torch fills in for a state of an earlier version.
_NEWER_OPTIONS = {'foreach', 'maximize', 'capturable', 'differentiable', 'fused', 'decoupled_weight_decay'}
# State of optimizers that has the shape of its parameter.
_MOMENTS = ('exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'momentum_buffer', 'square_avg')


def wrappers_of(optim_wrapper: Any) -> dict[str, OptimWrapper]:
    """Optimizer wrappers by name; a single one has the name ''."""
    if isinstance(optim_wrapper, OptimWrapper):
        return {'': optim_wrapper}
    return dict(optim_wrapper.items()) if hasattr(optim_wrapper, 'items') else {}


def describe_run(runner: Any) -> dict[str, Any]:
    """What an exact continuation has in common with the run that saved a checkpoint."""
    wrappers = wrappers_of(runner.optim_wrapper).values()
    return dict(
        optimizer=', '.join(type(wrapper.optimizer).__name__ for wrapper in wrappers),
        accumulative_counts=_accumulation(runner),
        batch_size=getattr(runner.train_dataloader, 'batch_size', None),
        processes=get_world_size(),
    )


def _accumulation(runner: Any) -> int:
    return max((wrapper._accumulative_counts for wrapper in wrappers_of(runner.optim_wrapper).values()), default=1)


def check_state(checkpoint: Mapping[str, Any], source: str) -> None:
    """Refuse a checkpoint that is not of a training run, or whose parts are of other types.

    Raises:
        CheckpointMismatch: Names the file (``source``) and the part.
    """
    missing = [part for part in ('state_dict', 'optimizer', 'message_hub', 'meta') if part not in checkpoint]
    if missing:
        raise CheckpointMismatch(
            f'{source} has weights but no state of a training run ({", ".join(missing)}), so there is nothing to '
            f'resume; to start a new run from its weights, name it as load_from.'
        )
    with _part(source, 'meta'):
        for key, count in (('epoch', checkpoint['meta'].get('epoch', 0)), ('iter', checkpoint['meta']['iter'])):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f'{key} is {count!r}, not a number of finished ones')
        if not isinstance(checkpoint['meta'].get(RUN_KEY, {}), Mapping):
            raise TypeError(f'{RUN_KEY} is no dictionary')
    for part in ('state_dict', 'optimizer', 'message_hub'):
        with _part(source, part):
            checkpoint[part].items()


def check_resumed(runner: Any, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that a runner could not go on from, and log what will be other than in the run before.

    Args:
        runner: About to resume, with its model and optimizer built.
        checkpoint: Content of the file; not changed.

    Raises:
        CheckpointMismatch: Names the file and the part. Nothing of the model was changed then.
    """
    source = getattr(runner, '_load_from', None) or 'The checkpoint'
    check_state(checkpoint, source)
    with _part(source, 'meta'):
        checkpoint['meta']['epoch']  # noqa: B018  # the runner reads it
    with _part(source, 'message_hub'):
        for key in ('log_scalars', 'runtime_info', 'resumed_keys'):
            checkpoint['message_hub'][key].items()
        kept = checkpoint['message_hub']['runtime_info'].get('keep_ckpt_ids', [])
        if not all(isinstance(step, int) for step in kept):
            raise TypeError('keep_ckpt_ids are not all numbers')
    if SPARSITY_KEY in checkpoint and not any(isinstance(hook, SparsityHook) for hook in runner.hooks):
        raise SparsityMismatch(
            'The run to resume trained with sparsity, and this one would not (its config has no SparsityHook). To '
            f'train on densely from its weights, start a new run with {source} as load_from.'
        )
    changes = _changed_facts(runner, checkpoint['meta'].get(RUN_KEY, {}), source)
    for part, check in (
        ('optimizer', _check_optimizer),
        ('param_schedulers', _check_schedulers),
        ('ema_state_dict', _check_averages),
        (GRADIENTS_KEY, _check_place),
    ):
        with _part(source, part):
            changes += check(runner, checkpoint)
    if changes:
        print_log(
            f'{source} is resumed with other settings than it was saved with, so this is not the same run any more: '
            f'{"; ".join(changes)}.',
            logger='current',
            level=logging.WARNING,
        )


@contextmanager
def _part(source: str, part: str) -> Iterator[None]:
    """Name the file and the part in what goes wrong with it."""
    try:
        yield
    except CheckpointMismatch:
        raise
    except _DAMAGE as error:
        text = f'there is no {error}' if isinstance(error, KeyError) else ' '.join(str(error).split())[:300]
        raise CheckpointMismatch(
            f'{source} cannot be resumed, because the contents of its part "{part}" do not fit this run or are '
            f'damaged: {text}. Resume with the config that it had, or from another checkpoint; or start a new run '
            'with it as load_from.'
        ) from error


def _changed_facts(runner: Any, before: Mapping[str, Any], source: str) -> list[str]:
    now = describe_run(runner)
    changed = {key: value for key, value in now.items() if before.get(key, value) != value}
    if 'optimizer' in changed:
        raise CheckpointMismatch(
            f'{source} cannot be resumed: it has the state of {before["optimizer"]}, and this run trains with '
            f'{now["optimizer"]}. Resume with the optimizer that it had, or start a new run with it as load_from.'
        )
    return [f'{key} was {before[key]!r}, is {value!r}' for key, value in changed.items()]


def _check_optimizer(runner: Any, checkpoint: Mapping[str, Any]) -> list[str]:
    """Load it as the runner will, which compares groups and sizes."""
    state, wrappers = checkpoint['optimizer'], wrappers_of(runner.optim_wrapper)
    before = {name: [dict(group) for group in wrapper.param_groups] for name, wrapper in wrappers.items()}
    # Loading takes entries out.
    runner.optim_wrapper.load_state_dict({k: dict(v) if isinstance(v, Mapping) else v for k, v in state.items()})
    changes = set()
    for name, wrapper in wrappers.items():
        _check_shapes(wrapper.optimizer)
        for old, group in zip(before[name], wrapper.param_groups):
            missing = set(wrapper.optimizer.defaults) - set(group) - _NEWER_OPTIONS
            if missing:
                raise ValueError(f'it is of another optimizer, without {", ".join(sorted(missing))}')
            for key, default in wrapper.optimizer.defaults.items():
                if isinstance(default, float) and not isinstance(group[key], (int, float, Tensor)):
                    raise TypeError(f'{key} is {group[key]!r}')
            for key in set(old) - {'params', 'lr', *_NEWER_OPTIONS}:
                if key in group and group[key] != old[key]:
                    changes.add(f'{key} stays {group[key]!r} in place of {old[key]!r}')
        saved = state[name] if name else state
        if 'loss_scaler' in saved and not hasattr(wrapper, 'loss_scaler'):
            changes.add('the loss scale is not restored, because this run has no mixed precision')
        if 'loss_scaler' not in saved and hasattr(wrapper, 'loss_scaler'):
            changes.add('the loss scale starts anew, because the run before had no mixed precision')
    return sorted(changes)


def _check_shapes(optimizer: Optimizer) -> None:
    for parameter in (parameter for group in optimizer.param_groups for parameter in group['params']):
        for key in set(_MOMENTS) & set(optimizer.state.get(parameter, {})):
            value = optimizer.state[parameter][key]
            if value is not None and value.shape != parameter.shape:
                raise ValueError(f'{key} has the shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}')


def _check_schedulers(runner: Any, checkpoint: Mapping[str, Any]) -> list[str]:
    state, ours = checkpoint.get('param_schedulers'), _by_optimizer(runner.param_schedulers)
    if not any(ours.values()):
        return ['the schedules of the run before are not restored, because this one has none'] if state else []
    theirs = _by_optimizer(state)
    changes = []
    for name, schedulers in ours.items():
        saved = theirs[name] if state is not None else []
        if len(saved) != len(schedulers):
            raise ValueError(f'it has {len(saved)} schedules, this run has {len(schedulers)}')
        for scheduler, values in zip(schedulers, saved):
            kind = type(scheduler).__name__
            fresh = scheduler.state_dict()
            other = set(fresh) - set(values)
            if other:
                raise ValueError(f'it is not of {kind}, which has {", ".join(sorted(other))}')
            if not isinstance(values['last_step'], int) or values['last_step'] < 0:
                raise ValueError(f'last_step is {values["last_step"]!r}')
            changes += [
                f'{key} of {kind} stays {values[key]!r} in place of {value!r}'
                for key, value in fresh.items()
                if not key.startswith('_') and key not in ('last_step', 'base_values') and values[key] != value
            ]
    return changes


def _by_optimizer(schedulers: Any) -> Mapping[str, list]:
    return schedulers if isinstance(schedulers, Mapping) else {'': schedulers or []}


def _check_averages(runner: Any, checkpoint: Mapping[str, Any]) -> list[str]:
    averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    state = checkpoint.get('ema_state_dict')
    if state is None:
        return ['the averaged weights start anew, the run before had none'] if averages else []
    if not averages:
        return ['averaged weights are not restored, because this run has no EMAHook: it goes on from the averages']
    for name, value in averages[0].ema_model.state_dict().items():
        if state[name].shape != value.shape:
            raise ValueError(f'{name} has the shape {tuple(state[name].shape)}, here {tuple(value.shape)}')
    return []


def _check_place(runner: Any, checkpoint: Mapping[str, Any]) -> list[str]:
    """Refuse a place in an accumulation or an epoch that the file does not have the state for."""
    iteration, epoch, loop = checkpoint['meta']['iter'], checkpoint['meta']['epoch'], runner.train_loop
    if RUN_KEY not in checkpoint['meta'] and iteration < runner.max_iters:
        if iteration % _accumulation(runner):
            raise ValueError(
                f'iteration {iteration} is inside an accumulation over {_accumulation(runner)}, whose gradients were '
                'not saved (AtomicCheckpointHook saves them)'
            )
        inside = iteration % epoch if epoch else iteration
    else:
        inside = checkpoint['meta'].get(RUN_KEY, {}).get('in_epoch') and not isinstance(loop, ResumableEpochLoop)
    if inside and isinstance(loop, EpochBasedTrainLoop):
        raise ValueError(
            f'iteration {iteration} is inside an epoch; only ResumableEpochLoop goes on there, from a file of '
            'AtomicCheckpointHook'
        )
    gradients = checkpoint.get(GRADIENTS_KEY)
    if gradients is None:
        return []
    if len(gradients) != get_world_size():
        raise ValueError(
            f'it was saved inside an accumulation of {len(gradients)} processes, this run has {get_world_size()}'
        )
    parameters = dict(unwrap_model(runner.model).named_parameters())
    for own in gradients:
        for name, gradient in own.items():
            if not isinstance(gradient, Tensor) or gradient.shape != parameters[name].shape:
                raise ValueError(f'the gradient of {name} does not fit')
    return []
