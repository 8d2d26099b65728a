"""How tensors lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Memory format of the results for an input (N, C, H, W): that of the input.

    Channels-last for an input that is contiguous so, else contiguous. Where a shape makes both
    true it does not matter, and channels-last is said.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def eights(n: int) -> int:
    """Round up to a multiple of 8: 16 bytes in half precision."""
    return -(-n // 8) * 8


def power_of_two(n: int, least: int) -> int:
    """The least power of two that is below neither ``n`` nor ``least``, a power of two itself."""
    return max(least, 1 << (n - 1).bit_length())


def in_memory(t: Tensor) -> Tensor:
    """The tensor itself where its memory holds its values, else a copy.

    A view with a lazy negation (``torch._neg_view``, the imaginary part of a conjugate) and a
    tensor of zeros without memory, as autograd makes them, are copied.
    """
    if t._is_zerotensor():
        return t.clone()
    return t.resolve_neg() if t.is_neg() else t
