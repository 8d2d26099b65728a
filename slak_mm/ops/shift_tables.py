"""Index tables for shifted sums of small convolutions, and the large kernels that equal these.

Li et al., CVPR 2025 (https://arxiv.org/abs/2401.12736), convolve each channel with nk = ceil(K / s) small s x s filters
and add up the results, each shifted by a table. A convolution whose result is shifted is a convolution with the shifted
kernel, also at the borders (the official code pads by s - 1 before it shifts). So the sum over activations is written
here as a sum over filters, of which there are some thousand times fewer.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The official code seeds the global generators of torch and numpy with it in every constructor.
_SEED = 123


def num_filters(kernel_size: int, small_kernel: int) -> int:
    """Number nk of small filters that make up one large kernel, nk * s taps long."""
    return -(-kernel_size // small_kernel)


def shift_tables(channels: int, kernel_size: int, small_kernel: int, num_reps: int) -> tuple[Tensor, Tensor]:
    """Draw the tables of one layer, from a generator of their own.

    Args:
        channels: Number c of channels that are convolved.
        kernel_size: K.
        small_kernel: s.
        num_reps: Number G of random orders of the filters, whose results are summed.

    Returns:
        int32 tables on the CPU, bit-equal to those of the official code: ``shifts`` of shape (c * nk, 2 * G) (its
        ``pad_hv``), the shift in pixels of each filter's result along the width in the first G columns and along the
        height in the others; and ``picks`` of shape (c, G) (its ``idx_identit``), the filters which are used unshifted.
    """
    shifts, picks = _draw(channels, kernel_size, small_kernel, num_reps)
    return shifts.clone(), picks.clone()


@lru_cache(maxsize=64)
def _draw(channels: int, kernel_size: int, small_kernel: int, num_reps: int) -> tuple[Tensor, Tensor]:
    nk = num_filters(kernel_size, small_kernel)
    # The device is named because a default device may be set around the construction.
    generator = torch.Generator('cpu').manual_seed(_SEED)
    orders = torch.stack(
        [torch.randperm(nk, generator=generator, device='cpu') for _ in range(2 * num_reps * channels)]
    ).view(2 * num_reps, channels, nk)
    chosen = torch.stack(
        [torch.randint(0, nk, (channels,), generator=generator, device='cpu') for _ in range(num_reps)], dim=1
    )
    # Place i holds filter orders[..., i]; a filter's place is found by inverting the order.
    places = orders.argsort(dim=-1)
    shifts = kernel_size // 2 - (small_kernel - 1) - small_kernel * places
    shifts = shifts.permute(1, 2, 0).reshape(channels * nk, 2 * num_reps)
    picks = nk * torch.arange(channels, device='cpu').view(-1, 1) + chosen
    return shifts.int().contiguous(), picks.int().contiguous()


def ghost_channels(channels: int, num_ghosts: int) -> tuple[Tensor, Tensor]:
    """Choose the channels that pass a layer unchanged, as the official code does.

    Args:
        channels: C.
        num_ghosts: Number of such channels.

    Returns:
        int64 indices on the CPU, ascending: the convolved channels, and the others (ghosts).
    """
    drawn = np.random.RandomState(_SEED).choice(channels, num_ghosts, replace=False)
    ghosts = np.sort(drawn).astype(np.int64)
    others = np.setdiff1d(np.arange(channels, dtype=np.int64), ghosts)
    return (
        torch.tensor(others.tolist(), dtype=torch.int64, device='cpu'),
        torch.tensor(ghosts.tolist(), dtype=torch.int64, device='cpu'),
    )


def shift_table_error(shifts: Tensor, picks: Tensor, kernel_size: int, small_kernel: int) -> str | None:
    """Say why tables cannot belong to a layer with these kernels, or None if they can."""
    nk = num_filters(kernel_size, small_kernel)
    taps = kernel_size // 2 - (small_kernel - 1) - shifts.long()
    if bool(((taps % small_kernel != 0) | (taps < 0) | (taps >= nk * small_kernel)).any()):
        return (
            f'it has shifts which are no multiple of {small_kernel} from the first place of '
            f'a kernel of {kernel_size}, or lie outside it'
        )
    first = nk * torch.arange(len(picks), device=picks.device).view(-1, 1)
    if bool(((picks < first) | (picks >= first + nk)).any()):
        return f'it picks filters of another channel than its own {nk}'
    return None


def assemble_kernels(filters: Tensor, shifts: Tensor, picks: Tensor, kernel_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assemble the large kernels from small filters; differentiable in the filters.

    How often filter p of a channel stands at place i is a small matrix per channel, so that the
    assembly is one batched matrix product, forward and backward, and has the same bits in every
    run. It always follows the tables it is given; nothing derived from them is kept.

    Args:
        filters: Shape (c * nk, 1, s, s).
        shifts: Table of shape (c * nk, 2 * G), see :func:`shift_tables`.
        picks: Table of shape (c, G).
        kernel_size: K.

    Returns:
        The tall kernel (c, nk * s, s), the wide one (c, s, nk * s), both to be used with
        ``center=K // 2``, and the small one (c, s, s).
    """
    channels, s = len(picks), filters.shape[-1]
    nk = len(filters) // channels
    num_reps = picks.shape[1]
    device = filters.device
    # Rows of a channel's matrix: the places of the wide kernel, of the tall one, and the pick.
    num_rows = 2 * nk + 1
    place = (kernel_size // 2 - (s - 1) - shifts.view(channels, nk, 2, num_reps).long()) // s
    row = place + nk * torch.arange(2, device=device).view(2, 1)
    channel = torch.arange(channels, device=device)
    row = row + num_rows * channel.view(-1, 1, 1, 1)
    entries = row * nk + torch.arange(nk, device=device).view(nk, 1, 1)
    picked = (num_rows * channel + 2 * nk).view(-1, 1) * nk + picks.long() % nk
    entries = torch.cat([entries.reshape(-1), picked.reshape(-1)])
    counts = filters.new_zeros(channels * num_rows * nk)
    counts.scatter_add_(0, entries, filters.new_ones(1).expand(len(entries)))

    kernels = torch.bmm(counts.view(channels, num_rows, nk), filters.view(channels, nk, s * s))
    kernels = kernels.view(channels, num_rows, s, s)
    wide = kernels[:, :nk].permute(0, 2, 1, 3).reshape(channels, s, nk * s)
    tall = kernels[:, nk : 2 * nk].reshape(channels, nk * s, s)
    return tall, wide, kernels[:, 2 * nk]


def shifted_sums(
    filtered: Tensor, shifts: Tensor, picks: Tensor, kernel_size: int, small_kernel: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the results of the small filters, shifted: what convolution with assembled kernels gives.

    For filters which have to be applied one by one, at a multiple of its time and memory.

    Args:
        filtered: What the filters, with a padding of s - 1, make of a map: (N, c * nk, H + s - 1, W + s - 1).
        shifts: Table of shape (c * nk, 2 * G), see :func:`shift_tables`.
        picks: Table of shape (c, G).
        kernel_size: K.
        small_kernel: s.

    Returns:
        The results of the tall, the wide and the small kernel, each (N, c, H, W).
    """
    channels, num_reps = picks.shape
    margin = small_kernel // 2
    n, num_maps, h, w = filtered.shape
    center = filtered[:, :, margin : h - margin, margin : w - margin]
    h, w = center.shape[2:]
    sums: list[Tensor] = []
    for dim, column in ((2, num_reps), (3, 0)):
        size, reach = center.shape[dim], kernel_size + small_kernel  # further than any shift
        maps = filtered.narrow(5 - dim, margin, center.shape[5 - dim])
        maps = F.pad(maps, (reach, reach) if dim == 3 else (0, 0, reach, reach))
        total = maps.new_zeros(n, channels, h, w)
        for shift in shifts[:, column : column + num_reps].long().unbind(1):
            index = reach + torch.arange(size, device=shift.device) - shift.view(-1, 1)
            index = index.view(1, num_maps, *((size, 1) if dim == 2 else (1, size))).expand(n, num_maps, h, w)
            total = total + maps.gather(dim, index).view(n, channels, -1, h, w).sum(2)
        sums.append(total)
    small = center[:, picks.long().view(-1)].view(n, channels, num_reps, h, w).sum(2)
    tall, wide = sums
    return tall, wide, small
