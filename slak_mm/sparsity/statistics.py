"""How sparse a network is, and how much of it has been tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from slak_mm._tables import table

__all__ = ['LayerStatistics', 'Statistics', 'format_table']


@dataclass(frozen=True)
class LayerStatistics:
    """Numbers of entries of one parameter.

    ``active`` ones are kept by the mask, all where there is none; ``explored`` ones were ever active; ``replaced`` ones
    became active in the latest update.
    """

    name: str
    shape: tuple[int, ...]
    active: int
    total: int
    explored: int
    replaced: int

    @property
    def density(self) -> float:
        """Share of active entries."""
        return self.active / self.total

    @property
    def exploration(self) -> float:
        """Share of the entries that were ever active."""
        return self.explored / self.total


@dataclass(frozen=True)
class Statistics:
    """All selected parameters together, after so many optimizer steps and updates of the masks."""

    step: int
    updates: int
    layers: Sequence[LayerStatistics] = field(repr=False)

    @property
    def active(self) -> int:
        """Active entries."""
        return sum(layer.active for layer in self.layers)

    @property
    def total(self) -> int:
        """Entries."""
        return sum(layer.total for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of active entries."""
        return self.active / self.total

    @property
    def churn(self) -> float:
        """Share of the active entries that the latest update brought in; 0 before the first."""
        return sum(layer.replaced for layer in self.layers) / max(1, self.active)

    @property
    def exploration(self) -> float:
        """Share of the entries that were ever active."""
        return sum(layer.explored for layer in self.layers) / self.total

    def scalars(self, prefix: str = 'sparsity/') -> dict[str, float]:
        """``density``, ``churn`` and ``exploration`` for a log."""
        return {prefix + name: getattr(self, name) for name in ('density', 'churn', 'exploration')}


def format_table(statistics: Statistics) -> str:
    """Name, shape, active and all entries, density and exploration of each parameter and of their sum, as text."""
    rows = [('parameter', 'shape', 'active', 'all', 'density', 'explored')]
    named: list[tuple[str, str, LayerStatistics | Statistics]] = [
        (layer.name, 'x'.join(map(str, layer.shape)), layer) for layer in statistics.layers
    ]
    named.append(('sum', '', statistics))
    for name, shape, part in named:
        shares = f'{part.density:.4f}', f'{part.exploration:.4f}'
        rows.append((name, shape, f'{part.active:,}', f'{part.total:,}', *shares))
    return table(rows, markdown=False)
