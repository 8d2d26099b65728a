"""Agreement of processes about masks. Without an initialized process group nothing happens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .masks import pack_mask, unpack_mask


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _reachable(device: torch.device) -> torch.device:
    """The device itself, or the GPU where the backend cannot send from the CPU."""
    if device.type == 'cpu' and dist.get_backend() == 'nccl':
        return torch.device('cuda', torch.cuda.current_device())
    return device


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in place: the same shapes, in the same order in each."""
    ranks = _num_ranks()
    if ranks == 1:
        return
    for tensor in tensors:
        sent = tensor.to(_reachable(tensor.device))
        dist.all_reduce(sent)
        tensor.copy_(sent.div_(ranks))


def broadcast_masks(masks: Sequence[Tensor]) -> None:
    """Overwrite masks, the same shapes in the same order in each process, by those of rank 0; one message."""
    if _num_ranks() == 1 or not masks:
        return
    packed = [pack_mask(mask) for mask in masks]
    message = torch.cat(packed)
    sent = message.to(_reachable(message.device))
    dist.broadcast(sent, src=0)
    for mask, part in zip(masks, sent.cpu().split([len(p) for p in packed])):
        mask.copy_(unpack_mask(part, mask.shape))


def same_on_all_ranks(digest: str) -> bool:
    """Whether every process has the same hash, in hexadecimal digits; true also without other processes."""
    if _num_ranks() == 1:
        return True
    # 60 bits, and their negation: the largest of both tell the largest and the smallest.
    value = int(digest[:15], 16)
    extremes = torch.tensor([value, -value], dtype=torch.int64)
    sent = extremes.to(_reachable(extremes.device))
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    largest, smallest = sent.tolist()
    return largest == -smallest
