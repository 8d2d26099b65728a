"""Curves of training runs, from the scalars that mmengine writes into their work directories."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigOverrideError

__all__ = ['Curves', 'choose_keys', 'draw_curves', 'read_scalars', 'smoothed']

#: Name of a scalar -> steps and values, both of shape (N,), in order of the steps.
Curves = dict[str, tuple[np.ndarray, np.ndarray]]

#: What is drawn unasked, in this order; validation metrics follow.
DEFAULT_KEYS = ('loss', 'sparsity/density', 'sparsity/exploration', 'sparsity/churn', 'lr')
# Of the bookkeeping of mmengine's log, not of the run.
_NOT_SCALARS = frozenset({'step', 'iter', 'epoch', 'time', 'data_time', 'memory'})
# In every line that the training loop writes, and in none of validation.
_OF_TRAINING = frozenset({'lr', 'loss', 'iter'})
# Distinguishable for color-blind readers as well (Okabe and Ito).
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
# Together with the color, so that curves which lie on each other can be told apart.
_STYLES = ('-', '--', '-.', ':')


def read_scalars(work_dir: str | Path) -> Curves:
    """Read the scalars of a run, over all of its interruptions, from its work directory or a ``scalars.json``.

    mmengine's local visualization backend writes one ``<time>/vis_data/scalars.json`` with a JSON object per line for
    each start of a run. What a resumed run wrote replaces what the earlier ones wrote from its first step on. A line
    that was cut off when a run was killed is skipped, bookkeeping such as ``time`` and ``memory`` left out. Where a run
    counts epochs, validation results stand at the last training step before them.

    Raises:
        ConfigOverrideError: There is no such file in the directory, or the files have no numbers.
    """
    path = Path(work_dir)
    files = [path] if path.is_file() else sorted(path.glob('**/scalars.json'))
    if not files:
        raise ConfigOverrideError(
            f'{path} has no scalars.json; give the work directory of a training run (with the '
            'LocalVisBackend, which mmengine uses by default).'
        )
    found: dict[str, dict[float, float]] = {}
    for file in files:
        entries = list(_entries(file))
        first = min((step for step, _ in entries), default=math.inf)
        for values in found.values():
            for step in [step for step in values if step >= first]:
                del values[step]
        for step, scalars in entries:
            for key, value in scalars.items():
                found.setdefault(key, {})[step] = value
    numbers = {key: sorted(values.items()) for key, values in found.items() if values}
    curves = {key: (np.array([s for s, _ in n]), np.array([v for _, v in n])) for key, n in numbers.items()}
    if not curves:
        raise ConfigOverrideError(f'The scalars.json files below {path} have no numbers in them.')
    return curves


def _entries(file: Path) -> list[tuple[float, dict[str, float]]]:
    """Step and scalars of each line of a file."""
    entries = []
    trained = 0.0
    by_epoch = False
    for line in file.read_text(errors='replace').splitlines():
        try:
            content = json.loads(line)
            step = float(content['step'])
        except (ValueError, KeyError, TypeError):
            continue
        if _OF_TRAINING & content.keys():
            trained, by_epoch = step, 'epoch' in content
        elif by_epoch:
            step = trained
        numbers = {k: float(v) for k, v in content.items() if k not in _NOT_SCALARS and isinstance(v, (int, float))}
        entries.append((step, numbers))
    return entries


def choose_keys(runs: Mapping[str, Curves], wanted: Sequence[str] | None = None) -> list[str]:
    """Names of the scalars to draw, each once; a wanted one that ends in ``*`` stands for all that begin so.

    Defaults to those of :data:`DEFAULT_KEYS` that are not zero throughout in some run, and all metrics of validation.

    Raises:
        ConfigOverrideError: No run has a wanted name.
    """
    there = {key: None for curves in runs.values() for key in curves}
    if wanted:
        chosen: dict[str, None] = {}
        for name in wanted:
            matches = [key for key in there if key == name or (name.endswith('*') and key.startswith(name[:-1]))]
            if not matches:
                raise ConfigOverrideError(f'No run has a scalar "{name}"; there are {", ".join(sorted(there))}.')
            chosen.update(dict.fromkeys(matches))
        return list(chosen)
    # Validation happens seldom, and its names are those that training does not write.
    drawn = [run for run in runs.values() if 'loss' in run]
    training = {key for run in drawn for key in run if len(run[key][0]) == len(run['loss'][0])}
    moving = {key for curves in runs.values() for key, (_, values) in curves.items() if values.any()}
    keys = [key for key in DEFAULT_KEYS if key in moving]
    others = re.compile('sparsity/|base_lr|.*loss')
    return keys + [key for key in there if key not in {*keys, *training} and not others.match(key)]


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centered running mean of (N,) values; at both ends over the part of the window that is there.

    Even windows are made odd.
    """
    half = max(0, window // 2)
    totals = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (totals[last] - totals[first]) / (last - first)


def draw_curves(runs: Mapping[str, Curves], keys: Sequence[str] | None = None, title: str | None = None) -> np.ndarray:
    """Draw the curves of runs, by their names for the legend, as one RGB picture (H, W, 3), a panel for each scalar.

    Losses are drawn as they are, pale, and as a running mean over a twentieth of the run. For the keys see
    :func:`choose_keys`.

    Raises:
        ConfigOverrideError: No run has any of the wanted scalars.
    """
    # The object interface: no window system, and no figures that pyplot would keep.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = choose_keys(runs, keys)
    if not names:
        raise ConfigOverrideError('There is nothing to draw: no run has a loss, a metric or a density.')
    columns = min(len(names), 3 if len(names) > 4 else 2)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * rows + 0.7), dpi=110, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    legend: dict[str, Any] = {}
    for axis, key in zip(axes, names):
        for number, (name, curves) in enumerate(runs.items()):
            if key not in curves:
                continue
            steps, values = curves[key]
            look = dict(
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=_STYLES[number % len(_STYLES)],
                linewidth=1.6,
                marker='o' if len(steps) < 12 else None,
                markersize=4,
                # Masks change at once, and stay as they are in between.
                drawstyle='steps-post' if key.startswith('sparsity/') else 'default',
            )
            window = len(steps) // 20 if 'loss' in key else 0
            if window > 1:
                axis.plot(steps, values, color=look['color'], alpha=0.25, linewidth=0.8)
                values = smoothed(values, window)
            (line,) = axis.plot(steps, values, **look)
            legend.setdefault(name, line)
        axis.set_title(key, fontsize=11)
        axis.set_xlabel('iteration', fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=9)
        axis.spines[['top', 'right']].set_visible(False)
        # An offset such as "+5.9e-1" hides how little a flat curve moves.
        if axis.get_yscale() == 'linear':
            axis.ticklabel_format(axis='y', useOffset=False)
        low, high = axis.get_ylim()
        if high - low < 1e-3 * max(abs(low), abs(high)):
            middle = (low + high) / 2
            axis.set_ylim(middle - 0.05 * abs(middle), middle + 0.05 * abs(middle))
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    look = dict(loc='outside upper center', ncols=min(len(legend), 4), frameon=False, fontsize=10)
    figure.legend(legend.values(), legend.keys(), **look)
    if title:
        figure.suptitle(title, fontsize=12)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
