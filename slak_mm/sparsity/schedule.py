"""When masks change and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import SparsityError

#: What the rate falls to, in the published trainings.
FINAL_PRUNE_RATE = 0.005

#: Arguments of :class:`~slak_mm.sparsity.SparseTraining` for published trainings, and under
#: ``selection`` the preset of :func:`~slak_mm.sparsity.select_parameters`; each family of backbones
#: adds its own. Their numbers of non-zero weights are exact; ``sampling='bernoulli'`` draws them as
#: the official code does.
PRESETS: dict[str, Mapping[str, Any]] = {}


def cosine_prune_rate(step: int, total_steps: int, initial: float, final: float = FINAL_PRUNE_RATE) -> float:
    """Share of a layer's weights to replace, falling along half a cosine.

    ``final + (initial - final) (1 + cos(pi step / total_steps)) / 2``, which rises again after
    ``total_steps`` as the official scheduler does. ``step`` counts the optimizer steps taken so far,
    the one before this update included.
    """
    return final + (initial - final) * (1 + math.cos(math.pi * step / total_steps)) / 2


@dataclass(frozen=True)
class UpdateSchedule:
    """Steps at which masks change, and the prune rate at each.

    Attributes:
        total_steps: Optimizer steps of the whole training.
        update_interval: Optimizer steps between two updates. Default: 100.
        prune_rate: Share of a layer's weights to replace at step 0, in (0, 1). Default: 0.3.
        stop_fraction: No update happens after this share of the training, in [0, 1]. Default: 0.75.
        final_prune_rate: Rate that the last step would have. Default: 0.005.

    Raises:
        SparsityError: A value is out of its range.
    """

    total_steps: int
    update_interval: int = 100
    prune_rate: float = 0.3
    stop_fraction: float = 0.75
    final_prune_rate: float = FINAL_PRUNE_RATE

    def __post_init__(self) -> None:
        for name in ('total_steps', 'update_interval'):
            if int(getattr(self, name)) < 1:
                raise SparsityError(f'{name} must be a positive number of optimizer steps, got {getattr(self, name)}')
        if not 0 < self.prune_rate < 1:
            raise SparsityError(f'prune_rate must lie in (0, 1), got {self.prune_rate}')
        if not 0 <= self.final_prune_rate <= 1:
            raise SparsityError(f'final_prune_rate must lie in [0, 1], got {self.final_prune_rate}')
        if not 0 <= self.stop_fraction <= 1:
            raise SparsityError(f'stop_fraction must lie in [0, 1], got {self.stop_fraction}')

    def is_due(self, step: int) -> bool:
        """Whether masks change after the optimizer step of this number, counted from 1."""
        return step % self.update_interval == 0 and 0 < step <= self.last_step

    @property
    def last_step(self) -> int:
        """No mask changes after this optimizer step."""
        # The tolerance keeps 0.7 of 10 steps at 7.
        return math.floor(self.stop_fraction * self.total_steps + 1e-9)

    def steps_to_update(self, step: int) -> int | None:
        """Optimizer steps from one to the next update, 0 at an update; None after the last."""
        following = max(1, -(-step // self.update_interval)) * self.update_interval
        return following - step if following <= self.last_step else None

    def rate(self, step: int) -> float:
        """Prune rate of an update after this optimizer step."""
        return cosine_prune_rate(step, self.total_steps, self.prune_rate, self.final_prune_rate)
