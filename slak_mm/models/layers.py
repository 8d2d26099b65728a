"""Layers which the backbones share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from slak_mm._config import type_name
from slak_mm.ops._context import is_autocast_enabled, is_observed

PIXELS_AT_ONCE = 1024
"""Pixels whose hidden layer fits into a CPU's cache; fewer make matrix products slower."""

SQUARES_AT_ONCE = 1 << 16
"""Squares that are added up while they are in the second-level cache of one core."""


def runs_eagerly_on_cpu(x: Tensor) -> bool:
    """Whether a channels-last map on the CPU is computed on now, without autograd.

    Then what is best for the caches may take the place of plain operators. Not so where a graph
    is recorded or a mode looks on, or under autocast.
    """
    return (
        x.device.type == 'cpu'
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not is_observed(x)
        and not is_autocast_enabled('cpu')
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum over the rows of (P, C) of the squares, (C,), in float32 at least; without autograd."""
    # A few rows at a time: their squares do not leave the cache.
    scratch = x.new_empty(max(1, min(len(x), SQUARES_AT_ONCE // x.shape[1])), x.shape[1])
    total = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    for part in x.split(len(scratch)):
        total += torch.mul(part, part, out=scratch[: len(part)]).sum(0, dtype=total.dtype)
    return total


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of an (N, C, H, W) tensor.

    The biased variance and ``eps`` inside the square root are those of ``nn.LayerNorm``. The
    result has the memory format of the input; channels-last needs no copy.

    Args:
        num_channels: C.
        eps: Added to the variance. Default: 1e-6.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W) over C; the memory layout is kept."""
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        y = y.permute(0, 3, 1, 2)
        return y if is_channels_last else y.contiguous()


def patch_downsampling(before: int, channels: int, is_stem: bool) -> nn.Sequential:
    """Downsampling by convolutions whose stride is their size, as in ConvNeXt.

    Args:
        before: Channels of the input.
        channels: Channels of the output.
        is_stem: A 4x4 convolution and a LayerNorm, in place of a LayerNorm and a 2x2 convolution.

    Returns:
        The layers; sizes are rounded down.
    """
    if is_stem:
        return nn.Sequential(nn.Conv2d(before, channels, kernel_size=4, stride=4), LayerNorm2d(channels))
    return nn.Sequential(LayerNorm2d(before), nn.Conv2d(before, channels, kernel_size=2, stride=2))


def build_branch_norm(norm_cfg: dict, num_channels: int) -> _BatchNorm:
    """Build the norm layer of a convolution branch.

    ``SyncBN`` becomes ``BN`` on a machine without a CUDA device, where statistics cannot be
    synchronized; the state dict has the same keys, so checkpoints move freely between the two.

    Args:
        norm_cfg: Norm config as in mmcv, e.g. ``dict(type='SyncBN')``.
        num_channels: C.

    Returns:
        The layer.

    Raises:
        ValueError: The layer is no batch norm, and could not be folded for deployment.
    """
    if type_name(norm_cfg) == 'SyncBN' and not torch.cuda.is_available():
        norm_cfg = {**norm_cfg, 'type': 'BN'}
        _log_replaced_sync_bn()
    layer = build_norm_layer(norm_cfg, num_channels)[1]
    if not isinstance(layer, _BatchNorm):
        raise ValueError(
            f'norm_cfg type {type_name(norm_cfg)!r} is no batch norm: the branches of a '
            'large kernel need one to be merged (BN or SyncBN)'
        )
    return layer


@cache  # once is enough
def _log_replaced_sync_bn() -> None:
    print_log(
        'No CUDA device: backbones use BN in place of SyncBN (same parameters, statistics of each process alone).',
        logger='current',
    )


def batch_norm_affine(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What a batch norm is in eval mode: scale and shift of each channel, both (C,)."""
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None and var is not None
    scale = bn.weight / torch.sqrt(var + bn.eps)
    return scale, bn.bias - mean * scale


class DepthwiseBranch(nn.Module):
    """Weights of one depthwise kernel and of the batch norm behind it.

    The convolution itself is computed by the operator of the block, together with the block's
    other branches.

    Args:
        channels: C.
        kernel_size: (height, width), both odd.
        bias: Whether the convolution has a bias.
        norm_cfg: Config of the batch norm, or None for no norm.
    """

    def __init__(self, channels: int, kernel_size: tuple[int, int], bias: bool, norm_cfg: dict | None) -> None:
        super().__init__()
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=padding, groups=channels, bias=bias)
        self.bn: _BatchNorm | None = None if norm_cfg is None else build_branch_norm(norm_cfg, channels)

    @property
    def kernel(self) -> Tensor:
        """The kernel in the operator's shape, (C, height, width)."""
        return self.conv.weight.squeeze(1)

    def finish(self, y: Tensor) -> Tensor:
        """Add the bias and normalize the convolution's result, (N, C, H, W)."""
        if self.conv.bias is not None:
            y = y + self.conv.bias.view(-1, 1, 1)
        return y if self.bn is None else self.bn(y)

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, height, width) and bias (C,) with the norm in eval mode folded in."""
        kernel = self.kernel.detach().clone()
        bias = torch.zeros_like(kernel[:, 0, 0])
        if self.conv.bias is not None:
            bias += self.conv.bias
        if self.bn is not None:
            scale, shift = batch_norm_affine(self.bn)
            kernel *= scale.view(-1, 1, 1)
            bias = bias * scale + shift
        return kernel, bias


class RecomputableBlock(nn.Module):
    """A block that can drop its intermediate results and recompute them in the backward pass.

    A subclass implements :meth:`_forward`.

    Args:
        with_cp: Recompute, to save memory. The running statistics of batch norms are updated
            once per step all the same.
    """

    def __init__(self, with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        if not (self.with_cp and torch.is_grad_enabled()):
            return self._forward(x)
        return checkpoint(
            self._forward, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_running_statistics(self))
        )

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor:
        """The block itself."""


@contextmanager
def _frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Normalize with batch statistics without adding them to the running ones.

    The running statistics stay in use, with the weight 0 for the batch: autograd saves them, and
    the recomputation has to save what the first pass saved.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum = 0.0
        m.num_batches_tracked = None
    try:
        yield
    finally:
        for m, momentum, num_batches_tracked in kept:
            m.momentum = momentum
            m.num_batches_tracked = num_batches_tracked
