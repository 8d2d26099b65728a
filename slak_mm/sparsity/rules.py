"""Which weights go and which come.

Every function takes and gives boolean masks, True for an active entry, of one layer. Scores may
be of any shape, as long as the mask has the same: a weight each, or a filter each.

With ``exact=True`` the numbers of removed and added entries are equations and ties are decided by
position, the first in row-major order first. ``exact=False`` follows the code of Liu et al. (ICLR 2023), in
which ties with masked entries make fewer go, and random growth adds the right number on average.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .errors import SparsityError


def magnitude_prune(magnitude: Tensor, mask: Tensor, rate: float, exact: bool = True) -> Tensor:
    """Remove the active entries of smallest magnitude.

    Args:
        magnitude: Absolute weights, or sums of them; any floating-point type, (…).
        mask: Active entries, of the same shape.
        rate: Share of the active entries to remove, in [0, 1]; the number is rounded up.
        exact: Rank the active entries alone, so that exactly so many go. If False, rank all entries with the masked
            ones as zeros: an active weight of exactly zero may be taken for a masked one.

    Returns:
        The mask without the removed entries.

    Raises:
        SparsityError: The shapes differ.
    """
    _same_shape(magnitude, mask, 'magnitude')
    active = int(mask.count_nonzero())
    count = min(active, math.ceil(rate * active))  # as in the official code
    if count == 0:
        return mask.clone()
    if exact:
        return mask & ~smallest(magnitude, count, mask)
    magnitude = torch.where(mask, magnitude, torch.zeros_like(magnitude))
    return mask & ~smallest(magnitude, mask.numel() - active + count)


def random_grow(mask: Tensor, count: int, generator: torch.Generator, exact: bool = True) -> Tensor:
    """Add inactive entries at random (SET).

    Args:
        mask: Active entries, (…).
        count: Entries to add; if there are fewer inactive ones, all of them.
        generator: A generator on the CPU, so that all devices draw alike.
        exact: Add exactly so many. If False, each inactive entry comes with the probability
            ``count / number of inactive entries``.

    Returns:
        The mask with the added entries.
    """
    inactive = mask.numel() - int(mask.count_nonzero())
    if count <= 0 or inactive == 0:
        return mask.clone()
    if exact:
        return mask | random_positions(~mask, count, generator)
    drawn = torch.rand(mask.shape, generator=generator) < count / inactive
    return mask | drawn.to(mask.device)


def random_positions(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw so many of the candidates, each as likely as any other; boolean, same shape."""
    flat = candidates.reshape(-1)
    if flat.device.type == 'cpu':
        places = torch.from_numpy(np.flatnonzero(flat.numpy()))  # twice as fast as nonzero()
    else:
        places = flat.nonzero()[:, 0]
    # Narrow numbers are drawn several times as fast.
    dtype = torch.int32 if len(places) < 2**31 else torch.int64
    order = torch.randperm(len(places), generator=generator, dtype=dtype)[: max(0, count)]
    chosen = torch.zeros_like(flat)
    chosen[places[order.to(places.device, torch.int64)]] = True
    return chosen.view(candidates.shape)


def gradient_grow(gradient: Tensor, mask: Tensor, count: int, exact: bool = True) -> Tensor:
    """Add the inactive entries with the largest gradients (RigL).

    Args:
        gradient: Gradients of all entries, or absolute values of them, (…).
        mask: Active entries, of the same shape.
        count: Entries to add; if there are fewer inactive ones, all of them.
        exact: Rank the inactive entries alone, so that exactly so many come. If False, active
            ones take part with the score 0: where gradients are exactly zero, fewer come.

    Returns:
        The mask with the added entries.

    Raises:
        SparsityError: The shapes differ.
    """
    _same_shape(gradient, mask, 'gradient')
    score = -gradient.abs()
    if exact:
        return mask | smallest(score, count, ~mask)
    return mask | smallest(torch.where(mask, torch.zeros_like(score), score), count)


def smallest(score: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Mark the entries with the smallest scores; of equal ones those that come first.

    Args:
        score: Any shape. NaN ranks as the largest finite value.
        count: How many; at most as many as there are candidates.
        among: Candidates, boolean, of the same shape. Default: all.

    Returns:
        Boolean, of the same shape.
    """
    if score.dtype in (torch.float16, torch.bfloat16):
        score = score.float()
    largest = torch.finfo(score.dtype).max
    flat = torch.nan_to_num(score.detach().reshape(-1), largest, largest, -largest)
    candidates = flat.numel()
    if among is not None:
        # Adds 0 to candidates and infinity to the others; masked_fill_ takes seven times as long.
        flat = flat.add_(among.reshape(-1).to(flat.dtype).reciprocal_().sub_(1))
        candidates = int(among.count_nonzero())
    count = min(count, candidates)
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if flat.device.type == 'cpu':
        # More than ten times as fast as torch.kthvalue.
        values = flat.numpy()
        threshold = float(np.partition(values, count - 1)[count - 1])
    else:
        threshold = float(torch.topk(flat, count, largest=False, sorted=False).values.max())
    chosen = flat < threshold
    missing = count - int(chosen.count_nonzero())
    chosen[(flat == threshold).nonzero()[:missing, 0]] = True
    return chosen.view(score.shape)


def _same_shape(score: Tensor, mask: Tensor, what: str) -> None:
    if score.shape != mask.shape:
        raise SparsityError(
            f'{what} has the shape {tuple(score.shape)} and the mask {tuple(mask.shape)}; one '
            'entry of the mask needs one score'
        )
