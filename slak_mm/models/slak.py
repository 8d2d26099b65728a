"""SLaK backbones.

Liu et al., "More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity", ICLR
2023, https://arxiv.org/abs/2207.03620. Official code: https://github.com/VITA-Group/SLaK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn

from slak_mm.ops import cross_dwconv2d

from .base import LargeKernelBackbone
from .layers import DepthwiseBranch, RecomputableBlock, passes, patch_downsampling, perceptron, sum_maps


class LargeKernelConv(nn.Module):
    """Parallel depthwise convolutions, each with its batch norm, and their sum.

    In training form there are up to three of the following branches, in deployed form one
    ``bias`` and the branches ``tall`` and ``wide``, or ``square``, without norms.

    ========= ===== ===========================================================
    branch    size  exists
    ========= ===== ===========================================================
    tall      M x N if decomposed (``LoRA1`` or ``Decom1`` in the official code)
    wide      N x M if decomposed (``LoRA2`` or ``Decom2``)
    square    M x M if not decomposed (``lkb_origin``)
    small     N x N if ``small_kernel`` is given (``small_conv``)
    ========= ===== ===========================================================

    Args:
        channels: C.
        kernel_size: M, odd.
        small_kernel: N, odd and smaller than M, or None.
        decomposed: Two rectangular kernels in place of a square one.
        branch_norm: A batch norm behind each branch.
        conv_bias: A bias in each convolution.
        norm_cfg: Config of the batch norms.
        deploy: Build the deployed form.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None,
        decomposed: bool,
        branch_norm: bool,
        conv_bias: bool,
        norm_cfg: dict,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.deploy = deploy
        sizes: dict[str, tuple[int, int]] = {}
        if decomposed:
            assert small_kernel is not None
            sizes['tall'] = (kernel_size, small_kernel)
            sizes['wide'] = (small_kernel, kernel_size)
        else:
            sizes['square'] = (kernel_size, kernel_size)
        if small_kernel is not None and not deploy:
            sizes['small'] = (small_kernel, small_kernel)
        self.branch_names = tuple(sizes)
        for name, size in sizes.items():
            branch = DepthwiseBranch(
                channels, size, bias=conv_bias and not deploy, norm_cfg=norm_cfg if branch_norm and not deploy else None
            )
            self.add_module(name, branch)
        self.bias = nn.Parameter(torch.zeros(channels)) if deploy else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        branches: dict[str, Any] = {name: getattr(self, name) for name in self.branch_names}
        if not all(isinstance(branch, DepthwiseBranch) and branch.is_read() for branch in branches.values()):
            y = sum_maps([branch(x) for branch in branches.values()])
            return y if self.bias is None else y + self.bias.view(-1, 1, 1)
        kernels: dict[str, Tensor] = {name: branch.kernel for name, branch in branches.items()}
        k_v, k_h, k_s = kernels.get('tall', kernels.get('square')), kernels.get('wide'), kernels.get('small')
        assert k_v is not None
        if self.deploy:
            return cross_dwconv2d(x, k_v, k_h, bias=self.bias, reduce=True)
        results = [y for y in cross_dwconv2d(x, k_v, k_h, k_s) if y is not None]
        return sum_maps([branch.finish(y) for branch, y in zip(branches.values(), results)])

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fold the norms into kernels and one bias, and the small kernel into a larger one.

        Nothing is done if something else than a convolution and its norm is in a branch.
        """
        branches = [getattr(self, name) for name in self.branch_names]
        if self.deploy or not all(isinstance(branch, DepthwiseBranch) and branch.is_foldable() for branch in branches):
            return
        folded = {name: getattr(self, name).folded() for name in self.branch_names}
        bias = torch.stack([b for _, b in folded.values()]).sum(0)
        kernels = {name: kernel for name, (kernel, _) in folded.items()}
        small = kernels.pop('small', None)
        if small is not None:
            host = 'wide' if 'wide' in kernels else 'square'
            rows, columns = ((kernels[host].shape[i] - small.shape[i]) // 2 for i in (1, 2))
            kernels[host] += F.pad(small, (columns, columns, rows, rows))
            del self.small
        for name, kernel in kernels.items():
            branch = DepthwiseBranch(len(kernel), (kernel.shape[1], kernel.shape[2]), bias=False, norm_cfg=None)
            branch.conv.weight = nn.Parameter(kernel.unsqueeze(1))
            branch.train(self.training)
            setattr(self, name, branch)
        self.bias = nn.Parameter(bias)
        self.branch_names = tuple(kernels)
        self.deploy = True


class SLaKBlock(RecomputableBlock):
    """Large-kernel convolution, LayerNorm and a pointwise two-layer perceptron, residual.

    ``y = x + DropPath(gamma * W2 GELU(W1 LayerNorm(L(x))))`` with the expansion ratio 4.

    Args:
        channels: C.
        large_kernel: The operator L.
        drop_path: Probability of dropping the residual branch of a sample.
        layer_scale_init_value: Initial value of ``gamma``; there is none if it is 0 or less.
        with_cp: Recompute the block in the backward pass to save memory.
    """

    def __init__(
        self,
        channels: int,
        large_kernel: nn.Module,
        drop_path: float,
        layer_scale_init_value: float,
        with_cp: bool = False,
    ) -> None:
        super().__init__(with_cp)
        self.large_kernel = large_kernel
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(layer_scale_init_value * torch.ones(channels)) if layer_scale_init_value > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _forward(self, x: Tensor) -> Tensor:
        y = self.large_kernel(x)
        residual = x if passes(self.drop_path) else None
        y = perceptron(y, self.pwconv1, self.act, self.pwconv2, norm=self.norm, scale=self.gamma, residual=residual)
        return x + self.drop_path(y) if residual is None else y


@MODELS.register_module()
class SLaK(LargeKernelBackbone):
    """SLaK, and with other arguments RepLKNet-like and ConvNeXt backbones.

    The paper's networks are the defaults with ``arch`` 'tiny', 'small' or 'base'. The width of
    stage i is ``int(dims[i] * width_factor)``: 124, 249, 499, 998 for tiny and small, 166, 332,
    665, 1331 for base.

    ``kernel_sizes=(7, 7, 7, 7), small_kernel=None, decomposed=False, width_factor=1.0`` is the
    ConvNeXt mode of the official code; with ``branch_norm=False, conv_bias=True`` as well it is
    ConvNeXt (Liu et al., CVPR 2022) itself, whose checkpoints are accepted.

    The other arguments are those of :class:`~slak_mm.models.LargeKernelBackbone`.

    Args:
        kernel_sizes: M of each stage in pixels of its map, odd. Default: (51, 49, 47, 13).
        small_kernel: N, the short side of the rectangular kernels and the size of the small
            one, odd and smaller than every M; None for no small kernel, which needs
            ``decomposed=False``. Default: 5.
        width_factor: Multiplies ``dims``. Default: 1.3.
        decomposed: M x N and N x M kernels in place of an M x M one. Default: True.
        branch_norm: A batch norm behind each kernel. Default: True.
        conv_bias: A bias in each depthwise convolution. Default: False.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    checkpoint_family = 'slak'
    arch_settings = {
        'tiny': dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
        'small': dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
        'base': dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
        'large': dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        small_kernel: int | None = 5,
        width_factor: float = 1.3,
        decomposed: bool = True,
        branch_norm: bool = True,
        conv_bias: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1.0,
        out_indices: Sequence[int] | int = (0, 1, 2, 3),
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_cfg: dict | None = None,
        with_cp: bool = False,
        deploy: bool = False,
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.arch = arch
        self.depths, dims = self._parse_arch(arch)
        self.dims = self._widths(dims, width_factor)
        self.kernel_sizes = self._for_each_stage(kernel_sizes)
        _check_kernels(self.kernel_sizes, small_kernel, decomposed)
        self.small_kernel = small_kernel
        self.decomposed = decomposed
        self.branch_norm = branch_norm
        self.conv_bias = conv_bias
        self.deploy = deploy

        drop_paths = self._drop_paths(drop_path_rate, sum(self.depths))
        for i, (depth, channels) in enumerate(zip(self.depths, self.dims)):
            before = in_channels if i == 0 else self.dims[i - 1]
            self.downsample_layers.append(patch_downsampling(before, channels, is_stem=i == 0))
            blocks = [
                SLaKBlock(
                    channels,
                    LargeKernelConv(
                        channels,
                        self.kernel_sizes[i],
                        small_kernel,
                        decomposed,
                        branch_norm,
                        conv_bias,
                        norm_cfg or dict(type='SyncBN', requires_grad=True),
                        deploy,
                    ),
                    next(drop_paths),
                    layer_scale_init_value,
                    with_cp,
                )
                for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
        self._finish_init(self.dims, out_indices, out_norm, frozen_stages)


def _check_kernels(kernel_sizes: Sequence[int], small_kernel: int | None, decomposed: bool) -> None:
    sizes = (*kernel_sizes, *(() if small_kernel is None else (small_kernel,)))
    for size in sizes:
        if not isinstance(size, int) or size < 1 or size % 2 == 0:
            raise ValueError(
                'kernel_sizes and small_kernel must be odd positive integers (an even kernel '
                f'has no center and changes the size of the map), got {size!r}'
            )
    if small_kernel is None:
        if decomposed:
            raise ValueError(
                'decomposed=True needs small_kernel, the short side of the rectangular '
                'kernels; give it, or set decomposed=False'
            )
    elif small_kernel >= min(kernel_sizes):
        raise ValueError(
            f'small_kernel ({small_kernel}) must be smaller than every entry of kernel_sizes '
            f'{tuple(kernel_sizes)}; for a net without small kernels set small_kernel=None'
        )
