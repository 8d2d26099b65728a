"""The masks of one layer: of a weight, or of the filters of several paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .rules import gradient_grow, magnitude_prune, random_grow
from .statistics import LayerStatistics


@dataclass
class Layer:
    """Parameters that are pruned together, and a mask for each.

    Attributes:
        name: That of the parameter, or the common part of the paths' names.
        parameters: By name: one, or the parallel paths of an operator.
        per_filter: Whether a mask has one entry for each filter, (filters, 1, 1, 1), in place of one for each weight.
        masks: One for each parameter, in their order; none while the layer is dense.
        explored: Entries that were ever active, like ``masks``. Kept if masks change.
        replaced: Entries that the latest update made active, for each parameter.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    per_filter: bool = False
    masks: list[Tensor] = field(default_factory=list)
    explored: list[Tensor] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)

    @property
    def is_dense(self) -> bool:
        """Whether there are no masks."""
        return not self.masks

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Shape of each mask."""
        parameter = next(iter(self.parameters.values()))
        if self.per_filter:
            return (len(parameter), *(1,) * (parameter.ndim - 1))
        return tuple(parameter.shape)

    def set_masks(self, masks: Sequence[Tensor], explored: Sequence[Tensor] | None) -> None:
        """Take over masks; ``explored`` is None for masks that will not change."""
        self.masks, self.explored = (
            [self._placed(mask, parameter) for mask, parameter in zip(given or (), self.parameters.values())]
            for given in (masks, explored)
        )
        self.replaced = [0] * len(self.masks)

    def _placed(self, mask: Tensor, parameter: nn.Parameter) -> Tensor:
        """A copy on the parameter's device, in its memory layout where the shape is the same."""
        if mask.shape != parameter.shape:
            return mask.to(parameter.device, copy=True)
        return torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(mask)

    def follow_device(self) -> None:
        """Move the masks to where the parameters are now."""
        for i, parameter in enumerate(self.parameters.values()):
            if self.masks[i].device != parameter.device:
                self.masks[i] = self._placed(self.masks[i], parameter)
                if self.explored:
                    self.explored[i] = self._placed(self.explored[i], parameter)

    def scores(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Absolute values, summed over the taps of a filter where masks are per filter."""
        if not self.per_filter:
            return [tensor.detach().abs() for tensor in tensors]
        return [tensor.detach().abs().flatten(1).sum(1).view(self.mask_shape) for tensor in tensors]

    def proposal(
        self, rate: float, growth: Sequence[Tensor] | None, generator: torch.Generator, exact: bool, is_aligned: bool
    ) -> list[Tensor]:
        """The masks after an update: pruned by magnitude, grown by as many.

        Args:
            rate: Share of the active entries to remove.
            growth: Gradients or the like for each parameter; None to grow at random.
            generator: For random growth.
            exact: See :mod:`slak_mm.sparsity.rules`.
            is_aligned: All paths get the same mask, from the sums of their scores.

        Returns:
            New masks; those that there are stay as they are.
        """
        magnitudes = self.scores(list(self.parameters.values()))
        gains = None if growth is None else self.scores(growth)
        masks = self.masks
        if is_aligned and len(masks) > 1:
            masks = masks[:1]
            magnitudes = [torch.stack(magnitudes).sum(0)]
            gains = None if gains is None else [torch.stack(gains).sum(0)]
        updated = []
        for i, (mask, magnitude) in enumerate(zip(masks, magnitudes)):
            pruned = magnitude_prune(magnitude, mask, rate, exact)
            count = int(mask.count_nonzero()) - int(pruned.count_nonzero())
            updated.append(
                random_grow(pruned, count, generator, exact)
                if gains is None
                else gradient_grow(gains[i], pruned, count, exact)
            )
        return [updated[min(i, len(updated) - 1)].clone() for i in range(len(self.masks))]

    def replace(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Take over the masks of an update; returns what was and stays active."""
        kept = []
        for i, new in enumerate(masks):
            stays = self.masks[i] & new
            self.replaced[i] = int(new.count_nonzero()) - int(stays.count_nonzero())
            self.masks[i].copy_(new)
            self.explored[i].logical_or_(new)
            kept.append(stays)
        return kept

    def full_masks(self) -> Iterator[tuple[str, Tensor]]:
        """Masks of the parameters' shapes by name; views."""
        for (name, parameter), mask in zip(self.parameters.items(), self.masks):
            yield name, mask.expand(parameter.shape)

    def statistics(self) -> Iterator[LayerStatistics]:
        """One entry for each parameter."""
        for i, (name, parameter) in enumerate(self.parameters.items()):
            total = parameter.numel()
            active = explored = total
            replaced = 0
            if not self.is_dense:
                entries = total // self.masks[i].numel()
                active = int(self.masks[i].count_nonzero()) * entries
                explored = active
                replaced = self.replaced[i] * entries
                if self.explored:
                    explored = int(self.explored[i].count_nonzero()) * entries
            yield LayerStatistics(name, tuple(parameter.shape), active, total, explored, replaced)
