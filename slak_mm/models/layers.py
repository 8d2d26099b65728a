"""Layers which the backbones share."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from slak_mm._config import type_name
from slak_mm.ops import branch_norm, pointwise_mlp, row_mlp
from slak_mm.ops._context import is_counted
from slak_mm.ops._fused import attempt, why_not
from slak_mm.ops.branch_norm import BranchNorms
from slak_mm.ops.pointwise import global_response_norm, scaled_sum


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether an operator may read a module's tensors instead of calling the module.

    It may if the module is exactly of one of the classes, and nobody looks at its inputs, results or gradients. An
    adapter, a quantized or parametrized layer, or one with hooks is called. This is the only place that decides it.
    """
    every = nn.modules.module
    return (
        type(module) in classes
        and 'forward' not in module.__dict__
        and not (
            module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
        )
        # PyTorch's FLOP counter has hooks for all modules, which look at nothing but the names.
        and (
            is_counted()
            or not (
                every._global_forward_pre_hooks
                or every._global_forward_hooks
                or every._global_backward_pre_hooks
                or every._global_backward_hooks
            )
        )
    )


@torch.no_grad()
def is_foldable(module: nn.Module, cls: type[nn.Module], shape: Sequence[int]) -> bool:
    """Whether a module computes what its class computes with its tensors, in eval mode.

    Pruning and weight norm set the weight in a hook, which has run when this function returns.

    Args:
        module: The module.
        cls: The class whose tensors are to be read.
        shape: A shape of inputs.
    """
    if is_plain(module, cls, nn.BatchNorm2d, nn.SyncBatchNorm):
        return True
    if not isinstance(module, cls):
        return False
    like = next(itertools.chain(module.parameters(), module.buffers()))
    x = torch.linspace(-1, 1, math.prod(shape), dtype=like.dtype, device=like.device).view(*shape)
    training = module.training
    module.eval()
    is_same = torch.equal(module(x), cls.forward(module, x))
    module.train(training)
    return is_same


def is_depthwise(conv: nn.Conv2d, padding: tuple[int, ...], dilation: tuple[int, ...] = (1, 1)) -> bool:
    """Whether a convolution is depthwise with stride 1, this many zeros around the map and this dilation."""
    return (
        conv.groups == conv.in_channels
        and conv.stride == (1, 1)
        and conv.dilation == dilation
        and conv.padding == padding
        and conv.padding_mode == 'zeros'
    )


def sum_maps(maps: Sequence[Tensor]) -> Tensor:
    """Add up maps, of which there is one at least."""
    return sum(maps[1:], start=maps[0])


def passes(drop_path: nn.Module) -> bool:
    """Whether a layer for stochastic depth returns its input and need not be called."""
    return is_plain(drop_path, nn.Identity) or (not drop_path.training and is_plain(drop_path, DropPath))


@dataclass
class Branches:
    """Maps (N, C, H, W) that are to be added up, each behind its norm.

    Attributes:
        maps: One or more.
        norms: As many batch norms, or none.
    """

    maps: Sequence[Tensor]
    norms: Sequence[nn.Module] = ()

    def sum(self) -> Tensor:
        """The sum, (N, C, H, W)."""
        return sum_maps([norm(y) for norm, y in zip(self.norms, self.maps)] if self.norms else self.maps)

    def tensors_of_norms(self) -> BranchNorms | str | None:
        """What the fused passes read of the norms, None if there are none, or why they must be called."""
        if not self.norms:
            return None
        if not all(is_plain(bn, nn.BatchNorm2d, nn.SyncBatchNorm) for bn in self.norms):
            return 'a norm is no plain batch norm'
        bns: Any = self.norms
        tensors = [(bn.weight, bn.bias, bn.running_mean, bn.running_var) for bn in bns]
        counters = [bn.num_batches_tracked for bn in bns if bn.training and bn.num_batches_tracked is not None]
        kinds = {(bn.training, bn.momentum, bn.eps, type(bn), getattr(bn, 'process_group', None)) for bn in bns}
        if len(kinds) > 1 or any(t is None for some in tensors for t in some) or len(counters) % len(bns):
            return 'the norms are of several kinds, or lack tensors'
        ((training, momentum, eps, kind, group),) = kinds
        is_shared = training and kind is nn.SyncBatchNorm and dist.is_available() and dist.is_initialized()
        group = (group or dist.group.WORLD) if is_shared else None
        if group is not None and dist.get_world_size(group) == 1:
            group = None
        return BranchNorms(*map(tuple, zip(*tensors)), tuple(counters), momentum, eps, training, group)  # type: ignore


def perceptron(
    x: Tensor | Branches,
    linear1: Any,
    act: Any,
    linear2: Any,
    *,
    gate: Tensor | None = None,
    norm: Any = None,
    grn: Any = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    drop_path: nn.Module | None = None,
) -> Tensor:
    """Compute ``residual + drop_path(scale * linear2(grn(act(linear1(norm(gate * x))))))`` for each pixel.

    Plain modules are computed by fused passes where :mod:`slak_mm.ops.row_mlp` can run, else by
    :func:`slak_mm.ops.pointwise_mlp`; other modules are called, with whole maps of shape (N, H, W, channels). ``x`` is
    (N, C, H, W) or branches of this shape, ``gate`` (N, C, 1, 1), ``scale`` (E,), and ``residual`` (N, E, H, W) as the
    result; what is None is left out.
    """
    if drop_path is not None and residual is not None:
        y = (
            _by_fused_passes(x, linear1, act, linear2, norm, scale, residual, drop_path)
            if gate is grn is None
            else None
        )
        if y is not None:
            return y
        if not passes(drop_path):
            y = perceptron(x, linear1, act, linear2, gate=gate, norm=norm, grn=grn, scale=scale)
            return residual + drop_path(y)
    x = x.sum() if isinstance(x, Branches) else x
    if (
        is_plain(linear1, nn.Linear)
        and is_plain(linear2, nn.Linear)
        and is_plain(act, nn.GELU)
        and act.approximate == 'none'
        and (norm is None or is_plain(norm, nn.LayerNorm))
        and (grn is None or is_plain(grn, GRN))
    ):
        return pointwise_mlp(
            x,
            linear1.weight,
            linear1.bias,
            linear2.weight,
            linear2.bias,
            gate=gate,
            norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
            grn=None if grn is None else grn.tensors(),
            scale=scale,
            residual=residual,
        )
    y = (x if gate is None else x * gate).permute(0, 2, 3, 1)
    y = act(linear1(y if norm is None else norm(y)))
    y = linear2(y if grn is None else grn(y)).permute(0, 3, 1, 2)
    return scaled_sum(y, None if scale is None else scale.view(-1, 1, 1), residual)


def _by_fused_passes(
    x: Tensor | Branches,
    linear1: Any,
    act: Any,
    linear2: Any,
    norm: Any,
    scale: Tensor | None,
    residual: Tensor,
    drop_path: Any,
) -> Tensor | None:
    """:func:`perceptron` by the passes of :mod:`slak_mm.ops.row_mlp`, or None where they cannot run."""
    x = x if isinstance(x, Branches) else Branches([x])
    # The least expensive question first: it rules out CPUs.
    if why_not(residual, scale):
        return None
    drops = not passes(drop_path)
    if (
        not (is_plain(linear1, nn.Linear) and is_plain(linear2, nn.Linear) and is_plain(act, nn.GELU))
        or act.approximate != 'none'
        or not is_plain(norm, nn.LayerNorm)
        or (drops and not is_plain(drop_path, DropPath))
    ):
        return None
    norms = x.tensors_of_norms()
    layer_norm = (norm.weight, norm.bias, norm.eps)
    weights = (linear1.weight, linear1.bias, linear2.weight, linear2.bias)
    if (
        isinstance(norms, str)
        or any(t is None for t in (*layer_norm, *weights))
        or len({t.dtype for t in weights}) > 1
        or branch_norm.why_not_fused(x.maps, norms, layer_norm)
        or why_not(*weights)
    ):
        return None
    keep = 1.0 - drop_path.drop_prob if drops else 1.0
    maps = x.maps

    def run() -> Tensor:
        rows = branch_norm.branch_norm_rows(maps, norms, layer_norm)
        return row_mlp.row_mlp(rows, *weights, scale, keep, residual)

    return attempt(run, residual)


class GRN(nn.Module):
    """Global response normalization of (N, H, W, C) maps, see :func:`global_response_norm`."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, C) to the same shape."""
        return global_response_norm(x, *self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """``gamma`` and ``beta``, (C,)."""
        return self.gamma.view(-1), None if self.beta is None else self.beta.view(-1)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of an (N, C, H, W) tensor.

    The biased variance and ``eps`` inside the square root are those of ``nn.LayerNorm``. The
    result has the memory format of the input; channels-last needs no copy.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W) over C; the memory layout is kept."""
        fused = branch_norm.layer_norm_map(x, (self.weight, self.bias, self.eps))
        if fused is not None:
            return fused
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
    """One depthwise convolution and the batch norm behind it.

    Plain modules are not called: the operator of the block computes their convolution together
    with the block's other branches. ``kernel_size`` is (height, width), both odd.
    """

    def __init__(
        self, channels: int, kernel_size: tuple[int, int], bias: bool, norm_cfg: dict | None, dilation: int = 1
    ) -> None:
        super().__init__()
        self.dilation = dilation
        padding = (dilation * (kernel_size[0] // 2), dilation * (kernel_size[1] // 2))
        self.conv = nn.Conv2d(
            channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, bias=bias
        )
        self.bn: _BatchNorm | None = None if norm_cfg is None else build_branch_norm(norm_cfg, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        y = self.conv(x)
        return y if self.bn is None else self.bn(y)

    @property
    def kernel(self) -> Tensor:
        """The kernel in the operator's shape, (C, height, width), a dilated one filled up with zeros."""
        kernel, step = self.conv.weight.squeeze(1), self.dilation
        if step == 1:
            return kernel
        height, width = (step * (size - 1) + 1 for size in kernel.shape[1:])
        spread = F.pad(kernel[:, :, None, :, None], (0, step - 1, 0, 0, 0, step - 1))
        return spread.flatten(3).flatten(1, 2)[:, :height, :width]

    def with_bias(self, y: Tensor) -> Tensor:
        """Add the bias to the convolution's result, (N, C, H, W)."""
        return y if self.conv.bias is None else y + self.conv.bias.view(-1, 1, 1)

    def finish(self, y: Tensor) -> Tensor:
        """Add the bias to the convolution's result, (N, C, H, W), and normalize."""
        y = self.with_bias(y)
        return y if self.bn is None else self.bn(y)

    def is_read(self) -> bool:
        """Whether the operator may take the place of :meth:`forward`, but for the norm."""
        return is_plain(self, DepthwiseBranch) and is_plain(self.conv, nn.Conv2d) and self._has_same_size()

    def is_foldable(self) -> bool:
        """Whether :meth:`folded` gives what the branch computes in eval mode."""
        conv = self.conv
        if not isinstance(conv, nn.Conv2d) or not self._has_same_size():
            return False
        shape = (1, conv.in_channels, *conv.kernel_size)
        return (
            is_foldable(self, DepthwiseBranch, shape)
            and is_foldable(conv, nn.Conv2d, shape)
            and (self.bn is None or is_foldable(self.bn, _BatchNorm, shape))
        )

    def _has_same_size(self) -> bool:
        padding = tuple(self.dilation * (size // 2) for size in self.conv.kernel_size)
        return is_depthwise(self.conv, padding, (self.dilation, self.dilation))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Copies of kernel (C, height, width) and bias (C,) with the norm in eval mode folded in."""
        kernel = self.kernel.clone()
        bias = torch.zeros_like(kernel[:, 0, 0])
        if self.conv.bias is not None:
            bias = bias + self.conv.bias
        if self.bn is not None:
            scale, shift = batch_norm_affine(self.bn)
            kernel, bias = kernel * scale.view(-1, 1, 1), bias * scale + shift
        return kernel, bias


class RecomputableBlock(nn.Module):
    """A block that can drop its intermediate results and recompute them in the backward pass.

    A subclass implements :meth:`_forward`. The running statistics of batch norms change once per step all the same.
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
