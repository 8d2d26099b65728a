"""Zeros of weights by layer and by kernel tap, in figures and as a picture."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

# A kernel from this extent on has a heat map of its taps.
_LARGE = 7
_STAGE = re.compile(r'^(?:.*\.)?stages?\.?(\d+)\.')
# Okabe and Ito's colors, which color-blind readers can tell apart.
_COLOURS = {
    'large kernel': '#0072B2',
    'small depthwise kernel': '#56B4E9',
    'other convolution': '#009E73',
    'linear': '#E69F00',
}


@dataclass(frozen=True)
class LayerSparsity:
    """Number of exact zeros among all elements of one weight."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    total: int

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0..1."""
        return self.zeros / self.total if self.total else 0.0

    @property
    def kind(self) -> str:
        """What sort of layer the shape is of."""
        if len(self.shape) == 2:
            return 'linear'
        if len(self.shape) == 4 and self.shape[1] == 1:
            return 'large kernel' if max(self.shape[2:]) >= _LARGE else 'small depthwise kernel'
        return 'other convolution'


def layer_sparsity(state_dict: Mapping[str, Tensor]) -> list[LayerSparsity]:
    """Count the zeros of every floating-point tensor with entries and two or more dimensions, in their order."""
    return [
        LayerSparsity(name, tuple(value.shape), value.numel() - int(_countable(value).count_nonzero()), value.numel())
        for name, value in state_dict.items()
        if value.dim() >= 2 and value.numel() and value.is_floating_point()
    ]


def _countable(value: Tensor) -> Tensor:
    """Eight-bit numbers as others, since torch does not count zeros among them."""
    return value.float() if value.element_size() == 1 else value


def tap_densities(state_dict: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Share of non-zero weights at each tap of the large depthwise kernels, by stage.

    Kernels of one stage are laid over each other at their centers, so that a tall and a wide one give a cross.
    Depthwise kernels (C, 1, kh, kw) whose longer side is at least 7 count, with the smaller ones of their stage.

    Returns:
        'stage 0', ... -> shares (H, W), 0..1; NaN where no kernel reaches.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, value in state_dict.items():
        if value.dim() == 4 and value.shape[1] == 1 and value.is_floating_point():
            match = _STAGE.match(name)
            groups.setdefault(f'stage {match[1]}' if match else 'all layers', []).append(value)
    maps = {}
    for stage, kernels in groups.items():
        height = max(kernel.shape[2] for kernel in kernels)
        width = max(kernel.shape[3] for kernel in kernels)
        if max(height, width) < _LARGE:
            continue
        alive, there = np.zeros((height, width)), np.zeros((height, width))
        for kernel in kernels:
            top, left = (height - kernel.shape[2]) // 2, (width - kernel.shape[3]) // 2
            place = np.s_[top : top + kernel.shape[2], left : left + kernel.shape[3]]
            alive[place] += (kernel != 0).sum(dim=(0, 1)).numpy()
            there[place] += kernel.shape[0]
        maps[stage] = np.where(there > 0, alive / np.maximum(there, 1), np.nan)
    return maps


def draw_sparsity(state_dict: Mapping[str, Tensor], title: str = '') -> np.ndarray:
    """Draw the share of non-zero weights: a bar for each layer, a heat map for each stage.

    Args:
        state_dict: Tensors by name, on the CPU.
        title: Written above. Defaults to nothing.

    Returns:
        RGB image (H, W, 3), uint8.

    Raises:
        ValueError: There are no weights with two or more dimensions.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = layer_sparsity(state_dict)
    if not layers:
        raise ValueError('There are no weights with two or more dimensions to draw.')
    maps = tap_densities(state_dict)
    columns = min(4, math.ceil(len(layers) / 12))
    rows = math.ceil(len(layers) / columns)
    heights = [0.2 * rows + 0.6] + ([3.6] if maps else [])
    figure = Figure(figsize=(max(4.6 * columns, 3.4 * len(maps)), sum(heights) + 0.9), dpi=100, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    parts = np.ravel(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False))

    for column, axis in enumerate(parts[0].subplots(1, columns, squeeze=False)[0]):
        part = layers[column * rows : (column + 1) * rows]
        density = [1 - layer.sparsity for layer in part]
        axis.barh(range(len(part)), density, color=[_COLOURS[layer.kind] for layer in part], height=0.75)
        for place, value in enumerate(density):
            axis.text(min(value, 1) + 0.01, place, f'{value:.1%}', va='center', fontsize=7)
        axis.set_yticks(range(len(part)), [_short(layer.name) for layer in part], fontsize=7)
        axis.set_ylim(rows - 0.4, -0.6)
        axis.set_xlim(0, 1.18)
        axis.set_xticks([0, 0.5, 1], ['0', '50%', '100%'], fontsize=8)
        axis.grid(axis='x', alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
    there = [kind for kind in _COLOURS if any(layer.kind == kind for layer in layers)]
    total, zeros = sum(x.total for x in layers), sum(x.zeros for x in layers)
    figure.suptitle(
        f'{title}{": " if title else ""}non-zero weights, {1 - zeros / total:.2%} of {total / 1e6:.3g} M', fontsize=12
    )
    parts[0].legend(
        [Patch(color=_COLOURS[kind]) for kind in there],
        there,
        frameon=False,
        loc='outside upper center',
        ncols=len(there),
        fontsize=9,
    )

    if maps:
        axes = parts[1].subplots(1, len(maps), squeeze=False)[0]
        image = None
        for axis, (stage, shares) in zip(axes, maps.items()):
            bottom, right = (side / 2 for side in shares.shape)  # offsets from the center
            image = axis.imshow(
                shares, vmin=0, vmax=1, cmap='viridis', interpolation='nearest', extent=(-right, right, bottom, -bottom)
            )
            axis.set_title(f'{stage}: taps of {shares.shape[0]}x{shares.shape[1]}', fontsize=10)
            axis.tick_params(labelsize=7)
        bar = parts[1].colorbar(image, ax=axes, shrink=0.8)
        bar.set_label('share of channels with a non-zero weight', fontsize=8)
        bar.ax.tick_params(labelsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _short(name: str) -> str:
    """A name without what says nothing about the layer, cut to 34 letters from the left."""
    name = name.removesuffix('.weight')
    return name if len(name) <= 34 else f'…{name[-33:]}'
