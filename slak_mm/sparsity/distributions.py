"""How many weights of each layer are kept, and which at first.

Densities are shares of a layer's entries that are kept, ``1 - sparsity``. A mask drawn from a
density d has exactly ``round(d * entries)`` active entries, unless the official sampling is named.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DenseWeights, SparsityError
from .rules import random_positions, smallest

#: Ways to choose the active entries of a layer once their number is known.
SAMPLINGS = ('exact', 'bernoulli', 'magnitude', 'saliency')

# A pruned network has many zeros; one that was never pruned has none, but for rare accidents.
_LEAST_SPARSITY = 0.01


def uniform_densities(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """The same density by the name of every layer, for a share of zeros in [0, 1).

    Raises:
        SparsityError: The sparsity is out of its range.
    """
    return dict.fromkeys(shapes, _density(sparsity))


def erk_densities(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Erdős-Rényi-Kernel densities: small layers are denser (Evci et al., ICML 2020).

    The density of a layer is proportional to ``sum(shape) / prod(shape)``. The densest layers become entirely dense
    where that would exceed 1, and the others make up for them, so that the total is that of a uniform distribution.

    Args:
        shapes: Shapes of the layers' weights by name.
        sparsity: Share of zeros in all layers together, in [0, 1).

    Returns:
        Density by name, 1.0 for layers that stay dense.

    Raises:
        SparsityError: The sparsity is out of its range.
    """
    density = _density(sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        rest = [name for name in shapes if name not in dense]
        budget = sum(sizes[name] * density for name in rest) - sum(sizes[name] * (1 - density) for name in dense)
        scale = budget / sum(raw[name] * sizes[name] for name in rest)
        top = max(raw[name] for name in rest)
        if top * scale <= 1:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= {name for name in rest if raw[name] == top}
    return dict.fromkeys(shapes, 1.0)


def snip_scores(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], filters: Mapping[str, list[str]] | None = None
) -> dict[str, Tensor]:
    """How much the loss would change if a weight were gone: ``|w * dL/dw|``.

    Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019.

    Args:
        weights: By name.
        gradients: Of the loss, by the same names.
        filters: Names of the paths that one layer consists of, by layer. Such a layer has a score for each filter and
            path, the mean over the filter's taps, of shape (filters, paths). Default: none.

    Returns:
        Scores by name, and by layer for those of ``filters``.
    """
    layer_of = {name: layer for layer, names in (filters or {}).items() for name in names}
    scores: dict[str, Tensor] = {}
    for name, weight in weights.items():
        score = (weight.detach() * gradients[name]).abs()
        layer = layer_of.get(name)
        if layer is None:
            scores[name] = score
        else:
            path = score.flatten(1).mean(1, keepdim=True)
            scores[layer] = torch.cat([scores[layer], path], 1) if layer in scores else path
    return scores


def snip_densities(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Share of each layer's scores above a threshold that all layers have in common.

    The threshold is the n-th largest of the N scores, ``n = int(N * (1 - sparsity))``; scores
    above it count, as in the code of Liu et al. (ICLR 2023).

    Args:
        scores: By layer, of any shape; see :func:`snip_scores`.
        sparsity: Share of scores to drop, in [0, 1).

    Returns:
        Density by layer.

    Raises:
        SparsityError: The sparsity is out of its range, or a score is not finite.
    """
    density = _density(sparsity)
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    if not bool(torch.isfinite(flat).all()):
        raise SparsityError('the SNIP scores are not all finite: the loss or its gradients overflowed')
    rank = max(1, int(flat.numel() * density))
    # Of those that rank as the n smallest after negation, the last.
    chosen = smallest(-flat, rank)
    threshold = flat[chosen].min()
    # From the number of dropped scores, as the official code has it.
    return {name: 1 - int((score <= threshold).count_nonzero()) / score.numel() for name, score in scores.items()}


def snip_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], compute_loss: Callable[[nn.Module], Tensor]
) -> dict[str, Tensor]:
    """Gradients for SNIP, without a trace in the model.

    They are computed on a copy in train mode, so that running statistics, gradients and hooks of
    the model stay as they are; the global random number generators are put back as well.

    Args:
        model: The network, not wrapped for distribution.
        parameters: Those of its parameters to differentiate by, by their names in it.
        compute_loss: Runs the copy that it is given on a batch and returns the loss, a scalar.

    Returns:
        Gradients by name. They are those of this process; see :func:`slak_mm.sparsity.average_`.

    Raises:
        SparsityError: A name is not one of the model, or the loss is not finite.
    """
    devices = sorted({parameter.get_device() for parameter in parameters.values()} - {-1})
    with torch.random.fork_rng(devices), torch.enable_grad():
        replica = copy.deepcopy(model).train()
        own = dict(replica.named_parameters())
        missing = [name for name in parameters if name not in own]
        if missing:
            raise SparsityError(
                f'{type(model).__name__} has no parameter {missing[0]}; names must be those of the model that SNIP runs'
            )
        loss = compute_loss(replica)
        if not bool(torch.isfinite(loss)):
            raise SparsityError(f'the loss of the SNIP batch is {float(loss)}')
        found = torch.autograd.grad(loss, [own[name] for name in parameters], allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient.detach()
        for (name, parameter), gradient in zip(parameters.items(), found)
    }


def draw_mask(
    shape: tuple[int, ...],
    density: float,
    generator: torch.Generator,
    sampling: str = 'exact',
    score: Tensor | None = None,
) -> Tensor:
    """Draw the first mask of a layer.

    Args:
        shape: Of the mask.
        density: Share of entries to keep.
        generator: A generator on the CPU.
        sampling: ``'exact'``: ``round(density * entries)`` entries, all choices equally likely.
            ``'bernoulli'``: each entry with the probability ``density``, as the official code.
            Any other name: as many as for ``'exact'``, those with the largest ``score``.
        score: Of ``shape``, for the latter. Default: None.

    Returns:
        Boolean, on the CPU or the device of ``score``.
    """
    if sampling == 'bernoulli':
        return torch.rand(shape, generator=generator) < density
    count = round(density * math.prod(shape))
    if score is not None and sampling != 'exact':
        return smallest(-score, count)
    return random_positions(torch.ones(shape, dtype=torch.bool), count, generator)


def require_zeros(masks: Mapping[str, Tensor], promised: float | None = None) -> None:
    """Refuse the masks of a dense network.

    Args:
        masks: True for weights that are not exactly zero.
        promised: Sparsity that the weights should have; half of it must be found. Default: None,
            for which 1 % of zeros suffices.

    Raises:
        DenseWeights: There are too few zeros.
    """
    entries = sum(mask.numel() for mask in masks.values())
    zeros = entries - sum(int(mask.count_nonzero()) for mask in masks.values())
    if zeros < entries * max(_LEAST_SPARSITY, (promised or 0) / 2):
        expected = 'many' if promised is None else f'about {promised:.0%}'
        raise DenseWeights(
            f'{zeros:,} of {entries:,} weights ({zeros / max(1, entries):.2%}) are exactly zero '
            f'where {expected} should be: these are weights of a dense network. Load a sparse '
            "checkpoint, or choose the distribution 'uniform', 'erk' or 'snip' and a sparsity, "
            'or train without sparsity.'
        )


def _density(sparsity: Any) -> float:
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise SparsityError(f'sparsity must lie in [0, 1), got {sparsity!r}')
    return 1 - sparsity
