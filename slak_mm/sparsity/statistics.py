"""How sparse a network is, and how much of it has been tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """Lay out one line for each parameter and one for the sum.

    Args:
        statistics: What to show.

    Returns:
        Lines of equal columns: name, shape, active and all entries, density and exploration.
    """
    rows = [('parameter', 'shape', 'active', 'all', 'density', 'explored')]
    for layer in statistics.layers:
        rows.append(
            (
                layer.name,
                'x'.join(map(str, layer.shape)),
                f'{layer.active:,}',
                f'{layer.total:,}',
                f'{layer.density:.4f}',
                f'{layer.explored / layer.total:.4f}',
            )
        )
    rows.append(
        (
            'sum',
            '',
            f'{statistics.active:,}',
            f'{statistics.total:,}',
            f'{statistics.density:.4f}',
            f'{statistics.exploration:.4f}',
        )
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
