"""Hooks of mmengine's runner."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from slak_mm.checkpoints import LoadReport, find_backbones, load_foreign, prepare_checkpoint, unwrap_model

from .resume import check_resumed


def load_whole_model(model: nn.Module, checkpoint: dict, source: str) -> LoadReport | None:
    """Load every weight of a model, heads included, or none.

    Args:
        model: A segmentor or detector, wrapped or not.
        checkpoint: Content of a checkpoint file; its weights may have official names. It is changed.
        source: Name of the file for messages.

    Returns:
        What was loaded; None for a model without a backbone of this package, for which nothing is converted.

    Raises:
        CheckpointMismatch: The checkpoint lacks something, has something else, or is only a backbone.
    """
    model = unwrap_model(model)
    if not find_backbones(model):
        load_foreign(model, checkpoint, source)
        return None
    report = prepare_checkpoint(model, checkpoint, source=source, require_heads=True)
    # Verified above; what may be missing are counters that old batch norms do not have.
    model.load_state_dict(checkpoint['state_dict'], strict=False)
    return report


@HOOKS.register_module()
class StrictCheckpointHook(Hook):
    """Lets the runner's own ``load_from`` and ``resume`` load as strictly as this package does.

    The runner itself loads non-strictly: keys that fit nothing are reported in the log, and the
    run goes on with random weights in their place. With this hook a checkpoint is converted to
    the model's names and verified before the runner copies it. To resume, every other part of the
    checkpoint must fit too: the states of the optimizer, the schedules, the averages and the masks.

    Args:
        strict: Whether a checkpoint must have every weight of the model and nothing else.
            Defaults to True; False is for fine-tuning with another head, from ``load_from``.
        require_heads: Whether to refuse a checkpoint of a backbone alone, as for resuming. Defaults to False.

    Raises:
        CheckpointMismatch: While loading, before a weight is overwritten.
    """

    # Before hooks that take the weights from the checkpoint, such as EMAHook.
    priority = 'VERY_HIGH'

    def __init__(self, strict: bool = True, require_heads: bool = False) -> None:
        self.strict = strict
        self.require_heads = require_heads

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Replace the checkpoint's ``state_dict`` by the converted and verified one."""
        if getattr(runner, '_resume', False):
            check_resumed(runner, checkpoint)
        model = unwrap_model(runner.model)
        if find_backbones(model):
            prepare_checkpoint(model, checkpoint, strict=self.strict, require_heads=self.require_heads)
        elif self.strict:
            load_foreign(model, checkpoint, 'The checkpoint', dry=True)
