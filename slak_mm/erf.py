"""Effective receptive field: how much each pixel of the image contributes to the central pixel of the last stage.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016; the
procedure and the area ratio are those of Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022, section 4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slak_mm.models import LargeKernelBackbone

__all__ = ['THRESHOLDS', 'MeanMap', 'area_ratios', 'contribution_map', 'contributions', 'draw_maps', 'last_map']

#: Shares of the contribution that published area ratios are given for.
THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
# What lies further below the maximum is as dark as zero in a picture.
_DECADES = 4


def last_map(model: nn.Module, image: Tensor) -> Tensor:
    """Compute the last feature map of a network, before the final norm where the network is a backbone of this package.

    Args:
        model: A backbone of this package, or any network whose result is a map, or a sequence or dict of maps with the
            last stage at its end.
        image: Images of shape (N, C, H, W).

    Returns:
        A map of shape (N, C', h, w).

    Raises:
        ValueError: The result has no height and width.
    """
    if isinstance(model, LargeKernelBackbone):
        found: list[Tensor] = []
        handle = model.stages[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            model(image)
        finally:
            handle.remove()
        return found[-1]
    result: Any = model(image)
    while not isinstance(result, Tensor):
        values = list(result.values()) if isinstance(result, Mapping) else list(result)
        result = values[-1]
    if result.dim() != 4:
        raise ValueError(
            f'{type(model).__name__} gives a result of shape {tuple(result.shape)} and no map (N, C, H, W): '
            'leave out its pooling and head'
        )
    return result


def contributions(model: nn.Module, image: Tensor, official: bool = False) -> np.ndarray:
    """Contribution of each pixel to the central pixel of the last stage, for each image of a batch.

    The score is the sum over channels of what is positive at the pixel (h // 2, w // 2) of the map; contributions are
    the positive parts of its gradient, summed over the channels of the image. The network runs in eval mode and is left
    as it was.

    The center of that pixel on the image depends on strides and padding of the network. The result is moved so that it
    lies in the middle of the array, at most half a pixel off; what leaves the array at one border is replaced by zeros
    at the other.

    Args:
        model: See :func:`last_map`.
        image: Normalized images of shape (N, C, H, W), on the network's device and in its precision.
        official: Leave the result where it is, as the published scripts do. Defaults to False.

    Returns:
        Array of shape (N, H, W), float64.
    """
    with _frozen(model), torch.enable_grad(), _strided_layers(model) as strided:
        image = image.detach().requires_grad_()
        features = last_map(model, image)
        index = features.shape[2] // 2, features.shape[3] // 2
        score = features[:, :, index[0], index[1]].relu().sum()
        (gradient,) = torch.autograd.grad(score, image)
    result = gradient.double().relu().sum(1).cpu().numpy()
    if official:
        return result
    for axis, cell in enumerate(index):
        size, cells = image.shape[2 + axis], features.shape[2 + axis]
        shift = int(_cell_center(strided, axis, size, cells, cell) - (size - 1) / 2)
        result = np.roll(result, -shift, 1 + axis)
        behind = np.moveaxis(result, 1 + axis, 0)[size - shift if shift > 0 else 0 : size if shift > 0 else -shift]
        behind[...] = 0
    return result


_Strided = list[tuple[torch.Size, torch.Size, Any]]


@contextlib.contextmanager
def _strided_layers(model: nn.Module) -> Iterator[_Strided]:
    """Sizes (height, width) before and behind each layer with a stride, and the layer, in the order of their calls."""
    found: _Strided = []

    def note(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if inputs:
            found.append((inputs[0].shape[-2:], output.shape[-2:], layer))

    def is_strided(layer: Any) -> bool:
        if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            return False
        return layer.stride not in (1, (1, 1))

    # Others stay without hooks, with which backbones of this package would not use their own operator.
    handles = [layer.register_forward_hook(note) for layer in model.modules() if is_strided(layer)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _cell_center(strided: _Strided, axis: int, size: int, cells: int, index: int) -> float:
    """Center on the image, in pixels, of a pixel of the last map, along one axis.

    Where the strided layers do not explain the map's size, pixels are taken for tiles of the image.
    """
    offset, stride, length = 0.0, 1, size
    while length > cells:
        steps = [
            (int(behind[axis]), layer) for before, behind, layer in strided if before[axis] == length > behind[axis]
        ]
        if not steps:
            break
        # Attention may look at a map that is reduced further, on the side.
        behind, layer = max(steps, key=lambda step: step[0])
        kernel, step, padding, dilation = (
            value[axis] if isinstance(value, tuple) else value
            for value in (layer.kernel_size, layer.stride, layer.padding, getattr(layer, 'dilation', 1))
        )
        reach = dilation * (kernel - 1) + 1
        # TensorFlow's kind of padding depends on the size, with the odd pixel behind.
        padding = padding if padding and padding != 'valid' else max((behind - 1) * step + reach - length, 0) // 2
        offset += stride * ((reach - 1) / 2 - padding)
        stride *= step
        length = behind
    if length != cells:
        return (index + 0.5) * size / cells - 0.5
    return offset + stride * index


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients of weights, which would take time and memory."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


class MeanMap:
    """Mean of the contributions of images that are added one by one.

    In the mean each image counts alike: its contributions are divided by their sum. An image without a positive
    contribution, or with one that is not finite, is left out.

    Args:
        official: Average the contributions as they are, and leave out those with a NaN. Defaults to False.
    """

    def __init__(self, official: bool = False) -> None:
        self.official = official
        self.total: np.ndarray | float = 0.0
        self.count = 0
        self.num_left_out = 0

    def add(self, one: np.ndarray) -> None:
        """Add the contributions (H, W) of one image.

        Raises:
            ValueError: It has another size than those before it.
        """
        if self.count and np.shape(self.total) != one.shape:
            raise ValueError(f'images must have one size, got {np.shape(self.total)} and {one.shape}')
        mass = one.sum()
        if np.isnan(mass) if self.official else not (np.isfinite(mass) and mass > 0):
            self.num_left_out += 1
            return
        self.total = self.total + (one if self.official else one / mass)
        self.count += 1

    def mean(self) -> np.ndarray:
        """The mean (H, W), float64.

        Raises:
            ValueError: No image was added, or all were left out.
        """
        if not self.count:
            raise ValueError(
                f'all {self.num_left_out} images were left out: the network gives NaN, or nothing positive'
                if self.num_left_out
                else 'there are no images to average over'
            )
        return np.asarray(self.total / self.count)


def contribution_map(model: nn.Module, images: Tensor | Iterable[Tensor], official: bool = False) -> np.ndarray:
    """Average the contribution of each pixel to the central pixel of the last stage over images.

    Args:
        model: See :func:`last_map`.
        images: Normalized images of one size, (C, H, W) each, or batches (N, C, H, W).
        official: Average the gradients as they are and where they are, as the published scripts do, in place of each
            image's share of its whole contribution, centered (see :func:`contributions`). Defaults to False.

    Returns:
        Map of shape (H, W), float64; it sums to 1 unless ``official``.

    Raises:
        ValueError: There are no images, of different sizes, or none gives a finite and positive contribution; or the
            network gives no map.
    """
    average = MeanMap(official)
    for image in images:
        for one in contributions(model, image if image.dim() == 4 else image[None], official):
            average.add(one)
    return average.mean()


def area_ratios(
    map: np.ndarray, thresholds: Sequence[float] = THRESHOLDS, official: bool = False
) -> list[tuple[int, float] | None]:
    """Find the smallest square around the middle that holds more than a share of all contributions.

    The middle of the map is where :func:`contribution_map` has put the pixel of the last stage. Squares are cut off at
    the border of maps that are not square. Ratios stay the same when the map is multiplied by a number.

    The rule of the first published script takes log10(x + 1) of the map first, centers the squares on the pixel
    (H // 2, W // 2), and tries sides from 3 to 2 (H // 2) - 1.

    Args:
        map: Contributions of shape (H, W), none negative.
        thresholds: Shares between 0 and 1. Default: 0.2, 0.3, 0.5, 0.99.
        official: Follow the published rule. Defaults to False.

    Returns:
        For each threshold the side in pixels and the square's share of the map's area; None where no square
        holds as much, which by default happens only to a map without contributions.

    Raises:
        ValueError: The map is not two-dimensional, or has negative or non-finite values.
    """
    scores = np.asarray(map, np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all() or (scores < 0).any():
        raise ValueError(f'a map has shape (H, W) and finite values from 0, got {scores.shape} with others among them')
    if official:
        scores = np.log10(scores + 1)
    # Twice the distances from the center, which may lie between two pixels: a square's side is one more.
    rows, columns = (
        np.abs(2 * np.arange(size) - double) for size, double in zip(scores.shape, _double_center(scores, official))
    )
    rings = np.maximum(rows[:, None], columns[None, :]).ravel()
    held = np.cumsum(np.bincount(rings, weights=scores.ravel()))
    areas = np.cumsum(np.bincount(rings))
    sides = 1 + np.arange(len(held))
    allowed = (sides >= 3) & (sides < 2 * (scores.shape[0] // 2)) if official else sides > 0
    found: list[tuple[int, float] | None] = []
    for threshold in thresholds:
        enough = np.flatnonzero(allowed & (held > threshold * held[-1]))
        found.append((int(sides[enough[0]]), float(areas[enough[0]] / scores.size)) if len(enough) else None)
    return found


def _double_center(scores: np.ndarray, official: bool) -> tuple[int, int]:
    """Twice the row and the column of the squares' center."""
    height, width = scores.shape
    return (2 * (height // 2), 2 * (width // 2)) if official else (height - 1, width - 1)


def draw_maps(maps: Mapping[str, np.ndarray], official: bool = False, title: str = '') -> np.ndarray:
    """Draw maps side by side: each on its own scale with the squares of :func:`area_ratios`, and all on one scale.

    Scales are logarithmic over four decades; officially they are linear in log10(x + 1). Large maps are averaged over
    blocks of pixels. What lies beyond the image, where a map was moved, is white.

    Args:
        maps: Contributions (H, W) by the name of the network, at least one.
        official: Draw what the published rule looks at, and its squares. Defaults to False.
        title: Written above what the squares are. Defaults to nothing.

    Returns:
        RGB image (H, W, 3), uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    def scale(maximum: float) -> Normalize:
        maximum = maximum or 1.0
        return Normalize(0, maximum) if official else LogNorm(maximum / 10**_DECADES, maximum, clip=True)

    shown = {name: _reduced(np.log10(1 + scores) if official else scores) for name, scores in maps.items()}
    maxima = {name: float(np.nanmax(scores)) for name, scores in shown.items()}
    rows = 1 if len(maps) == 1 else 2
    figure = Figure(figsize=(3 * len(maps) + 0.9, 3.2 * rows + 0.85), dpi=100, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(maps), squeeze=False)
    image = None
    for (name, scores), axis in zip(shown.items(), axes[0]):
        height, width = maps[name].shape
        look = dict(cmap='magma', interpolation='nearest', extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        image = axis.imshow(scores / (maxima[name] or 1), norm=scale(1), **look)
        row, column = (double / 2 for double in _double_center(maps[name], official))
        texts = []
        for square in area_ratios(maps[name], official=official):
            texts.append('–' if square is None else f'{square[1]:.1%}')
            side = square[0] if square else 0
            corner = column - side / 2, row - side / 2
            axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor='white', linewidth=0.9))
        axis.set_title(name, fontsize=11)
        axis.set_xlabel(f'area of squares: {", ".join(texts)}', fontsize=8)
    _color_bar(figure, image, axes[0], 'log10(x + 1), ' * official + 'fraction of own maximum')
    if rows > 1:
        for scores, axis in zip(shown.values(), axes[1]):
            image = axis.imshow(scores, norm=scale(max(maxima.values())), cmap='magma', interpolation='nearest')
        _color_bar(figure, image, axes[1], 'log10(x + 1), one scale' if official else 'share per pixel, one scale')
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    thresholds = ', '.join(f'{threshold:.0%}' for threshold in THRESHOLDS)
    figure.suptitle(f'{title}\nSquares hold {thresholds} of all contributions.'.strip(), fontsize=10)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _reduced(scores: np.ndarray) -> np.ndarray:
    """Means over square blocks, 128 to 255 of them along the longer side; NaN beyond the image."""
    is_seen = scores != 0
    scores = scores.copy()
    for axis in range(2):
        seen = np.flatnonzero(is_seen.any(1 - axis))
        if len(seen):
            # Without contributions on one side only.
            excess = int(scores.shape[axis] - 1 - seen[-1] - seen[0])
            beyond = slice(scores.shape[axis] - excess, None) if excess > 0 else slice(-excess)
            np.moveaxis(scores, axis, 0)[beyond] = np.nan
    block = max(1, max(scores.shape) // 128)
    height, width = (size // block for size in scores.shape)
    return scores[: height * block, : width * block].reshape(height, block, width, block).mean((1, 3))


def _color_bar(figure: Any, image: Any, axes: np.ndarray, label: str) -> None:
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
