"""Find the weights inside a checkpoint (:func:`unwrap`), and the model inside wrappers (:func:`unwrap_model`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from ._pickle_check import kind_of_tensor, unusable
from .errors import CheckpointMismatch, CheckpointUnreadable, shown

# Where frameworks keep the weights, in the order in which the official loaders look.
_WRAPPERS = ('state_dict', 'model', 'module')
# Where they keep the moving average of the weights.
_EMA_WRAPPERS = ('model_ema', 'state_dict_ema')
# Put in front of every name by DistributedDataParallel and torch.compile.
_OUTER_PREFIXES = ('module.', '_orig_mod.')

# Longer than any name of a module's tensor.
_LONGEST_NAME = 500


@dataclass
class Unwrapped:
    """The weights found in a checkpoint."""

    state_dict: dict[str, Tensor]  # without the prefixes that wrappers of a whole model put in front of names
    wrapper: str  # the entry they came from, '' if the checkpoint is the state dict itself
    is_ema: bool = False  # whether they are the moving average
    other_copy: str = ''  # what is said of a second copy that was not taken, '' if there is none


def unwrap(checkpoint: Mapping[str, Any], weights: str = 'model') -> Unwrapped:
    """Take the weights out of a checkpoint.

    Knows ``state_dict`` (OpenMMLab), ``model`` with or without ``model_ema`` (the official code),
    ``module`` (DeepSpeed), ``state_dict_ema`` (timm) and a bare state dict. Where mmengine's
    EMAHook has been at work, ``state_dict`` holds the average already.

    Args:
        checkpoint: The content of a checkpoint file.
        weights: 'model' for the weights that the official loaders take, 'ema' for their moving average, or the name
            of an entry of the checkpoint. Defaults to 'model'.

    Raises:
        CheckpointMismatch: There is no such copy of the weights.
        CheckpointUnreadable: There are no weights at all, or some that no network can have: without a
            proper name, sparse, quantized, nested or without data.
    """
    entries = [key for key in (*_WRAPPERS, *_EMA_WRAPPERS) if _holds_tensors(checkpoint.get(key))]
    by_hook = 'state_dict' in entries and _holds_tensors(checkpoint.get('ema_state_dict'))
    live = next((key for key in entries if key in _WRAPPERS), None)
    average = 'state_dict' if by_hook else next((key for key in entries if key in _EMA_WRAPPERS), None)

    if weights == 'model':
        wrapper = live or average
    elif weights == 'ema':
        wrapper = average
        if wrapper is None:
            raise CheckpointMismatch(
                'The checkpoint holds no moving average of the weights (no model_ema): load it without use_ema.'
            )
    elif _holds_tensors(checkpoint.get(weights)):
        wrapper = weights
    else:
        raise CheckpointMismatch(f'The checkpoint has no weights under {weights!r}; it has {_names(checkpoint)}.')

    if wrapper is None and not _holds_tensors(checkpoint):
        if any(isinstance(value, Tensor) for value in checkpoint.values()):
            raise _unnamed(next(key for key, value in checkpoint.items() if isinstance(value, Tensor)))
        raise CheckpointUnreadable(
            f'The checkpoint holds no weights: found {_names(checkpoint)}. Save model.state_dict(), alone or under '
            'state_dict.'
        )
    content = checkpoint if wrapper is None else checkpoint[wrapper]
    while wrapper is not None and not _has_direct_tensors(content):  # a wrapper in a wrapper
        content = next(content[key] for key in _WRAPPERS if _holds_tensors(content.get(key)))

    tensors: dict[str, Tensor] = OrderedDict(
        (key, value) for key, value in content.items() if isinstance(value, Tensor)
    )
    for key, value in tensors.items():
        if not isinstance(key, str) or len(key) > _LONGEST_NAME or not key.isprintable():
            raise _unnamed(key)
        if kind := kind_of_tensor(value):
            raise unusable(f'{key} is', kind)
    metadata = getattr(content, '_metadata', None)
    if metadata is not None:
        tensors._metadata = metadata  # type: ignore[attr-defined]
    if wrapper == 'ema_state_dict' and 'steps' in tensors:  # mmengine's counter of updates
        del tensors['steps']

    other = ''
    if by_hook and wrapper == 'state_dict':
        other = 'state_dict is the moving average; the live weights are under ema_state_dict'
    elif average is not None and wrapper not in (average, None):
        other = f'not used, under {average} (use_ema=True takes it)'
    is_ema = wrapper is not None and wrapper == average
    return Unwrapped(_strip_outer(tensors), wrapper or '', is_ema, other)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model that owns the weights, inside wrappers for distribution, augmentation and torch.compile."""
    while True:
        if is_model_wrapper(model) or isinstance(model, (BaseTTAModel, nn.DataParallel)):
            model = model.module  # type: ignore[assignment]
        elif isinstance(getattr(model, '_orig_mod', None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def join_head(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Put the backbone and the head of mmpretrain's classifiers on one level, and leave others as they are."""
    if {key.partition('.')[0] for key in state_dict} != {'backbone', 'head'}:
        return state_dict
    return {key.removeprefix('backbone.'): value for key, value in state_dict.items()}


def _names(entries: Mapping[Any, Any]) -> str:
    return ', '.join(shown(key) for key in list(entries)[:6]) or 'nothing'


def _unnamed(key: Any) -> CheckpointUnreadable:
    return CheckpointUnreadable(
        f'The checkpoint has a tensor under {shown(key)} ({type(key).__name__}), which is no name of a weight: save '
        'model.state_dict(), whose keys are names such as stages.0.0.gamma.'
    )


def _holds_tensors(value: Any, depth: int = 2) -> bool:
    # A pickled dict may contain itself, hence the limit.
    if not isinstance(value, Mapping) or not depth:
        return False
    return _has_direct_tensors(value) or any(_holds_tensors(value.get(key), depth - 1) for key in _WRAPPERS)


def _has_direct_tensors(value: Mapping[str, Any]) -> bool:
    return any(isinstance(item, Tensor) and isinstance(key, str) for key, item in value.items())


def _strip_outer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _OUTER_PREFIXES * 2:
        if tensors and all(key.startswith(prefix) for key in tensors):
            metadata = getattr(tensors, '_metadata', None)
            tensors = OrderedDict((key[len(prefix) :], value) for key, value in tensors.items())
            if metadata is not None:
                tensors._metadata = OrderedDict(  # type: ignore[attr-defined]
                    (key.removeprefix(prefix), value) for key, value in metadata.items()
                )
    return tensors
