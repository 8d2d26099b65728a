"""Ground truth of the cross convolution: one ``F.conv2d`` per kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def unavailable_reason(x: Tensor, kernels: Sequence[Tensor]) -> str | None:
    """Say why this backend cannot run; it runs everywhere."""
    return None


def run(x: Tensor, kernels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Convolve ``x`` depthwise with every kernel.

    Args:
        x: Input of shape (N, C, H, W).
        kernels: Kernels of shape (C, kh, kw), kh and kw odd.

    Returns:
        One tensor of shape (N, C, H, W) per kernel.
    """
    return tuple(
        F.conv2d(x, k.unsqueeze(1), padding=(k.shape[1] // 2, k.shape[2] // 2), groups=x.shape[1])
        for k in kernels
    )
