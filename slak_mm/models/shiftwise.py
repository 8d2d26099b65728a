"""ShiftWise backbones.

Li et al., "ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect", CVPR 2025,
https://arxiv.org/abs/2401.12736. Official code: https://github.com/lidc54/shift-wiseConv.
Version 1 has the plan of SLaK, version 2 that of UniRepLKNet (Ding et al., "UniRepLKNet: A
Universal Perception Large-Kernel ConvNet", CVPR 2024).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slak_mm.checkpoints import (
    Cause,
    CheckpointError,
    CheckpointMismatch,
    Convention,
    Family,
    ModelInfo,
    Published,
    Sizes,
    Variant,
    differs,
    register_family,
)
from slak_mm.ops import cross_dwconv2d, gated_rows, grn_mlp
from slak_mm.ops._context import is_recorded
from slak_mm.ops._fused import attempt, why_not
from slak_mm.ops.assembly import centered_kernels
from slak_mm.ops.branch_norm import BranchNorms
from slak_mm.ops.shift_tables import (
    assemble_kernels,
    ghost_channels,
    num_filters,
    shift_table_error,
    shift_tables,
    shifted_sums,
)
from slak_mm.sparsity import PRESETS, SELECTIONS, path_groups

from .base import KernelCost, LargeKernelBackbone, LargeKernelLayer, num_masked
from .layers import (
    GRN,
    Branches,
    LayerNorm2d,
    RecomputableBlock,
    batch_norm_affine,
    build_branch_norm,
    is_depthwise,
    is_foldable,
    is_plain,
    passes,
    patch_downsampling,
    perceptron,
    sum_maps,
)
from .slak import SLaKBlock

_TABLES = ('shifts', 'picks', 'rep', 'ghost')


class ShiftWiseConv(LargeKernelLayer):
    """A depthwise convolution with large kernels that are made up of small filters.

    The filters of all paths are summed and assembled to a tall, a wide and a small kernel (see
    :func:`slak_mm.ops.shift_tables.assemble_kernels`). Each has its batch norm; their sum and the input are added up.
    Ghost channels pass unchanged and come last: output channel j is input channel ``rep[j]``, then the ghosts follow.

    The tables ``shifts``, ``picks``, ``rep`` and ``ghost`` are buffers in the state dict; what
    they say is what is computed.

    In deployed form there are ``tall``, ``wide`` and ``bias``, and ``ghost_scale`` and ``ghost_bias`` if a norm behind
    the layer was folded in (``folds_norm``). K is ``kernel_size``, s the odd ``small_kernel`` of at most K, G the
    ``num_reps`` random orders of the filters, and there are fewer ghosts than the C ``channels``.
    """

    shifts: Tensor
    picks: Tensor
    rep: Tensor
    ghost: Tensor

    def __init__(
        self,
        channels: int,
        num_ghosts: int,
        kernel_size: int,
        small_kernel: int,
        num_paths: int,
        num_reps: int,
        branch_norm: bool,
        norm_cfg: dict,
        deploy: bool = False,
        folds_norm: bool = False,
    ) -> None:
        super().__init__()
        self.deploy = deploy
        self.kernel_size = kernel_size
        self.small_kernel = small_kernel
        n = channels - num_ghosts
        nk = num_filters(kernel_size, small_kernel)
        device = torch.empty(0).device  # of the parameters, where a default device is set
        for name, table in zip(('rep', 'ghost'), ghost_channels(channels, num_ghosts)):
            self.register_buffer(name, table.to(device))
        self.ghost_scale: nn.Parameter | None = None
        self.ghost_bias: nn.Parameter | None = None
        if deploy:
            centered = 2 * max(kernel_size // 2, nk * small_kernel - 1 - kernel_size // 2) + 1
            self.tall = nn.Parameter(torch.zeros(n, centered, small_kernel))
            self.wide = nn.Parameter(torch.zeros(n, small_kernel, centered))
            self.bias = nn.Parameter(torch.zeros(n))
            if folds_norm:
                self.ghost_scale = nn.Parameter(torch.ones(num_ghosts))
                self.ghost_bias = nn.Parameter(torch.zeros(num_ghosts))
            return
        for name, table in zip(('shifts', 'picks'), shift_tables(n, kernel_size, small_kernel, num_reps)):
            self.register_buffer(name, table.to(device))
        self.filters = nn.ModuleList(
            nn.Conv2d(n, n * nk, small_kernel, padding=small_kernel - 1, groups=n, bias=False) for _ in range(num_paths)
        )
        self.bn_wide, self.bn_tall, self.bn_small = (
            build_branch_norm(norm_cfg, n) if branch_norm else None for _ in range(3)
        )

    def kernels(self, assemble: Callable[..., tuple[Tensor, Tensor, Tensor]] = assemble_kernels) -> Any:
        """The assembled kernels: tall (n, nk * s, s), wide (n, s, nk * s), small (n, s, s)."""
        weights: list[Tensor] = [path.weight for path in self.filters]  # type: ignore[misc]
        device = weights[0].device.type
        # Weights keep their precision; the meta device has no autocast.
        with nullcontext() if device == 'meta' else torch.autocast(device, enabled=False):
            filters = sum(weights[1:], start=weights[0])
            return assemble(filters, self.shifts, self.picks, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape, channels in the order (rep, ghost)."""
        ghosts = _select_channels(x, self.ghost)
        x = _select_channels(x, self.rep)
        if self.deploy:
            # To convolve the ghosts as well, with an identity kernel, would save these copies and
            # cost more than they do (at stage 1 of the tiny network 2.3 ms for 0.6 on one core).
            y = cross_dwconv2d(x, self.tall, self.wide, bias=self.bias, reduce=True)
            if self.ghost_scale is not None and self.ghost_bias is not None:
                ghosts = torch.addcmul(self.ghost_bias.view(-1, 1, 1), ghosts, self.ghost_scale.view(-1, 1, 1))
            return torch.cat([y, ghosts], dim=1)
        norms = (self.bn_tall, self.bn_wide, self.bn_small)
        reduce = self.bn_tall is None
        ys: Any
        if not all(is_plain(path, nn.Conv2d) and self._is_filter(path) for path in self.filters):
            filtered = [path(x) for path in self.filters]
            ys = shifted_sums(sum_maps(filtered), self.shifts, self.picks, self.kernel_size, self.small_kernel)
        elif reduce:
            ys = [cross_dwconv2d(x, *self.kernels(centered_kernels), reduce=True)]
        else:
            ys = cross_dwconv2d(x, *self.kernels(centered_kernels))
        y = sum_maps([y if norm is None else norm(y) for y, norm in zip(ys, norms)])
        return torch.cat([y + x, ghosts], dim=1)

    def parts(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """What is added up and put behind each other, for the passes of :mod:`slak_mm.ops.gated_rows`.

        Returns:
            The convolved maps of the first channels, in training form before their norms; the input in the order of the
            result, in deployed form with what was folded into the ghosts; and the input as the residual is to use it.
        """
        if self.deploy:
            extra, first = gated_rows.ordered_channels(x, self.rep, self.ghost, self.ghost_scale, self.ghost_bias)
            return [cross_dwconv2d(first, self.tall, self.wide, bias=self.bias, reduce=True)], extra, x
        extra, first, x = gated_rows.permute_channels(x, self.rep, self.ghost)
        kernels = self.kernels(centered_kernels)
        if self.bn_tall is None:
            return [cross_dwconv2d(first, *kernels, reduce=True)], extra, x
        return [y for y in cross_dwconv2d(first, *kernels) if y is not None], extra, x

    def norms(self) -> list[nn.Module]:
        """Those of the tall, wide and small kernel, if there are any."""
        return [bn for bn in (self.bn_tall, self.bn_wide, self.bn_small) if bn is not None]

    def is_read(self) -> bool:
        """Whether :meth:`parts` may take the place of :meth:`forward`."""
        if self.deploy or not is_plain(self, ShiftWiseConv):
            return is_plain(self, ShiftWiseConv)
        is_read = all(is_plain(path, nn.Conv2d) and self._is_filter(path) for path in self.filters)
        return is_read and len(self.norms()) in (0, 3)

    def _is_filter(self, path: nn.Module) -> bool:
        return isinstance(path, nn.Conv2d) and path.bias is None and is_depthwise(path, (self.small_kernel - 1,) * 2)

    def _is_foldable(self, norm: _BatchNorm | None) -> bool:
        n, num_ghosts, s = len(self.rep), len(self.ghost), self.small_kernel
        norms = [(bn, n) for bn in (self.bn_tall, self.bn_wide, self.bn_small)] + [(norm, n + num_ghosts)]
        return all(
            self._is_filter(path) and is_foldable(path, nn.Conv2d, (1, n, s, s)) for path in self.filters
        ) and all(bn is None or is_foldable(bn, _BatchNorm, (1, channels, 1, 1)) for bn, channels in norms)

    @torch.no_grad()
    def switch_to_deploy(self, norm: _BatchNorm | None = None) -> None:
        """Fold paths, norms and the identity into two kernels and one bias.

        Nothing is done if a path is something else than a convolution, or a norm than a batch norm.

        Args:
            norm: Batch norm behind the layer to be folded in as well. Default: None.
        """
        if self.deploy or not self._is_foldable(norm):
            return
        tall, wide, small = (kernel.clone() for kernel in self.kernels())
        bias = torch.zeros_like(tall[:, 0, 0])
        for kernel, bn in ((tall, self.bn_tall), (wide, self.bn_wide), (small, self.bn_small)):
            if bn is not None:
                scale, shift = batch_norm_affine(bn)
                kernel *= scale.view(-1, 1, 1)
                bias += shift
        center, s = self.kernel_size // 2, self.small_kernel
        small[:, s // 2, s // 2] += 1
        # Symmetric about the output pixel, as the operator would otherwise make them each time.
        behind = tall.shape[1] - 1 - center
        reach = max(center, behind)
        tall = F.pad(tall, (0, 0, reach - center, reach - behind))
        wide = F.pad(wide, (reach - center, reach - behind))
        wide[:, :, reach - s // 2 : reach + s // 2 + 1] += small
        if norm is not None:
            scale, shift = batch_norm_affine(norm)
            of_rep, of_ghosts = scale.split([len(tall), len(scale) - len(tall)])
            tall *= of_rep.view(-1, 1, 1)
            wide *= of_rep.view(-1, 1, 1)
            bias = bias * of_rep + shift[: len(tall)]
            self.ghost_scale = nn.Parameter(of_ghosts.clone())
            self.ghost_bias = nn.Parameter(shift[len(tall) :].clone())
        del self.filters, self.bn_wide, self.bn_tall, self.bn_small, self.shifts, self.picks
        self.tall, self.wide, self.bias = (nn.Parameter(t) for t in (tall, wide, bias))
        self.deploy = True

    def cost(self, masked: Mapping[str, int | Tensor]) -> KernelCost:
        """Count the multiply-adds for each pixel, with the assembled kernels and with the filters."""
        if self.deploy:
            return super().cost(masked)
        tall, _, small = self.kernels()
        channels, length, short = tall.shape
        # The operator makes the kernels symmetric by zero taps.
        reach = max(self.kernel_size // 2, length - 1 - self.kernel_size // 2)
        filters = [path.weight.numel() for path in self.filters]  # type: ignore[union-attr,operator]
        masks = [masked[name] for i in range(len(filters)) if (name := f'filters.{i}.weight') in masked]
        zeros = self.num_zero_taps([torch.as_tensor(mask) for mask in masks]) if len(masks) == len(filters) else 0
        return KernelCost(2 * channels * (2 * reach + 1) * short + small.numel(), zeros, sum(filters[1:]), filters[0])

    def num_zero_taps(self, filters: list[Tensor]) -> int:
        """Elements of the assembled kernels that no filter reaches which is not masked."""
        # Counted, not added: filters of opposite signs do not make a zero.
        kept = torch.stack([(path != 0).float() for path in filters]).sum(0)
        channels, num_reps = self.picks.shape
        tables = shift_tables(channels, self.kernel_size, self.small_kernel, num_reps)
        return sum(num_masked(kernel) for kernel in assemble_kernels(kept, *tables, self.kernel_size))


def _select_channels(x: Tensor, index: Tensor) -> Tensor:
    """Copy channels of (N, C, H, W), in the order of ``index`` and in the memory format of x."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.index_select(1, index)
    n, c, h, w = x.shape
    # As a matrix: index_select is several times slower on four dimensions, and leaves the format.
    pixels = x.permute(0, 2, 3, 1).reshape(-1, c).index_select(1, index)
    return pixels.view(n, h, w, len(index)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate that is computed from the means of all channels.

    Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018; the inner width is C // 4, C at least 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, kernel_size=1)
        self.up = nn.Conv2d(channels // 4, channels, kernel_size=1)

    def tensors(self) -> gated_rows.Gates | None:
        """Its tensors, or None where its layers must be called."""
        down, up = self.down, self.up
        plain = all(
            is_plain(conv, nn.Conv2d)
            and conv.kernel_size == conv.stride == (1, 1)
            and conv.padding == (0, 0)
            and conv.groups == 1
            and conv.bias is not None
            for conv in (down, up)
        )
        return gated_rows.Gates(down.weight.flatten(1), down.bias, up.weight.flatten(1), up.bias) if plain else None  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """What the channels of (N, C, H, W) are multiplied with, (N, C, 1, 1)."""
        inner = F.relu(self.down(x.mean((2, 3), keepdim=True)))
        return self.up(inner).sigmoid()


class FeedForward(nn.Module):
    """Linear layer C to 4C, GELU, :class:`GRN`, linear layer 4C to C, batch norm.

    In deployed form the second layer has a bias and stands for everything behind the
    multiplication with GRN's ``gamma``.
    """

    def __init__(self, channels: int, norm_cfg: dict, deploy: bool = False) -> None:
        super().__init__()
        self.deploy = deploy
        self.channels = channels
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.grn = GRN(4 * channels, bias=not deploy)
        self.fc2 = nn.Linear(4 * channels, channels, bias=deploy)
        self.norm = None if deploy else build_branch_norm(norm_cfg, channels)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None] | None:
        """Weights and biases of the first layer, GRN and the second layer, or None where they must be called."""
        act: Any = self.act
        layers = ((self.fc1, nn.Linear), (act, nn.GELU), (self.grn, GRN), (self.fc2, nn.Linear))
        if not all(is_plain(layer, kind) for layer, kind in layers) or act.approximate != 'none':
            return None
        return self.fc1.weight, self.fc1.bias, *self.grn.tensors(), self.fc2.weight, self.fc2.bias

    def forward(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W), times ``gate`` (N, C, 1, 1), to the same shape; add ``residual`` in deployed form."""
        y = perceptron(x, self.fc1, self.act, self.fc2, grn=self.grn, gate=gate, residual=residual)
        return y if self.norm is None else self.norm(y)

    @torch.no_grad()
    def switch_to_deploy(self, gamma: Tensor | None = None) -> None:
        """Fold GRN's ``beta``, the norm and the layer scale ``gamma`` into the second layer.

        Nothing is done if there are other layers in their places.
        """
        if self.norm is None or not (
            is_foldable(self.fc2, nn.Linear, (1, 4 * self.channels))
            and is_foldable(self.grn, GRN, (1, 1, 1, 4 * self.channels))
            and is_foldable(self.norm, _BatchNorm, (1, self.channels, 1, 1))
        ):
            return
        scale, shift = batch_norm_affine(self.norm)
        weight, bias = scale.view(-1, 1) * self.fc2.weight, shift
        grn_gamma, beta = self.grn.tensors()
        if beta is not None:
            bias = bias + scale * (self.fc2.weight @ beta)
        if gamma is not None:
            weight, bias = gamma.view(-1, 1) * weight, gamma * bias
        self.fc2 = nn.Linear(weight.shape[1], len(weight), device='meta').train(self.training)
        self.fc2.weight, self.fc2.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.grn = GRN(0, bias=False).train(self.training)
        self.grn.gamma = nn.Parameter(grn_gamma.view(1, 1, 1, -1).clone())
        self.norm = None
        self.deploy = True


class ShiftWiseBlock(RecomputableBlock):
    """Large-kernel convolution, batch norm, squeeze-excite and feed-forward layer, residual.

    ``y = x + DropPath(gamma * FFN(SE(BN(L(x)))))``, the block of version 2. There is no ``gamma`` if its
    initial value is 0 or less; in deployed form there are neither ``norm`` nor ``gamma``.
    """

    def __init__(
        self,
        channels: int,
        large_kernel: Any,
        norm_cfg: dict,
        drop_path: float,
        layer_scale_init_value: float,
        with_cp: bool = False,
        deploy: bool = False,
    ) -> None:
        super().__init__(with_cp)
        self.deploy = deploy
        self.large_kernel = large_kernel
        self.norm = None if deploy else build_branch_norm(norm_cfg, channels)
        self.se = SqueezeExcite(channels)
        self.ffn = FeedForward(channels, norm_cfg, deploy)
        self.gamma = (
            nn.Parameter(layer_scale_init_value * torch.ones(channels))
            if layer_scale_init_value > 0 and not deploy
            else None
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _forward(self, x: Tensor) -> Tensor:
        fused = self._by_fused_passes(x)
        if fused is not None:
            return fused
        y = self.large_kernel(x)
        y = y if self.norm is None else self.norm(y)
        if (
            self.deploy
            and passes(self.drop_path)
            and is_plain(self.se, SqueezeExcite)
            and is_plain(self.ffn, FeedForward)
        ):
            return self.ffn(y, self.se.gate(y), residual=x)
        y = self.ffn(self.se(y))
        y = y if self.gamma is None else self.gamma.view(-1, 1, 1) * y
        return x + self.drop_path(y)

    def _by_fused_passes(self, x: Tensor) -> Tensor | None:
        """:meth:`_forward` by ``slak_mm.ops.gated_rows`` and ``grn_mlp``, or None where they cannot run."""
        # The least expensive question first: it rules out CPUs.
        if why_not(x, self.gamma):
            return None
        layer, ffn, drop_path = self.large_kernel, self.ffn, self.drop_path
        drops = not passes(drop_path)
        gates = self.se.tensors() if is_plain(self.se, SqueezeExcite) else None
        weights = ffn.tensors() if is_plain(ffn, FeedForward) else None
        if gates is None or weights is None or (drops and not is_plain(drop_path, DropPath)):
            return None
        is_read = isinstance(layer, ShiftWiseConv) and layer.is_read()
        norms: Any = (layer.norms() if is_read and not self.deploy else [], [self.norm], [ffn.norm])
        of_branches, of_sum, of_last = (Branches((), bns).tensors_of_norms() for bns in norms)
        if isinstance(of_branches, str) or why_not(x, *gates):
            return None
        rows: Callable[..., Tensor]
        if self.deploy and not drops and not is_recorded(x, *self.parameters()):
            of_last = None
            rows = gated_rows.deployed_rows
        elif (
            isinstance(of_sum, BranchNorms)
            and isinstance(of_last, BranchNorms)
            and not gated_rows.why_not_norms(of_branches, of_sum, x)
        ):
            rows = partial(gated_rows.gated_rows, norms=of_branches, norm=of_sum)
        else:
            return None
        if grn_mlp.why_not_fused(*weights, of_last, self.gamma, x):
            return None
        keep: Any = 1.0 - drop_path.drop_prob if drops else 1.0  # type: ignore[operator]

        def run() -> Tensor:
            maps, extra, residual = layer.parts(x) if is_read else ([], layer(x), x)
            return grn_mlp.grn_mlp(rows(maps, extra, gates=gates), *weights, of_last, self.gamma, keep, residual)

        return attempt(run, x)

    def switch_to_deploy(self) -> None:
        """Fold the norms, the layer scale and the branches of the large kernel, as far as possible."""
        if self.norm is not None and not self.large_kernel.deploy:
            self.large_kernel.switch_to_deploy(self.norm)
            self.norm = None if self.large_kernel.deploy else self.norm
        # Where it is no parameter, pruning, for one, would compute it again.
        gamma, was_folded = self._parameters.get('gamma'), self.ffn.deploy
        self.ffn.switch_to_deploy(gamma)
        if gamma is not None and self.ffn.deploy and not was_folded:
            self.gamma = None
        self.deploy = self.norm is None and self.ffn.deploy and self.gamma is None


_ARCHS = {
    'tiny': dict(depths=(3, 3, 18, 3), dims=(80, 160, 320, 640)),
    'small': dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    'base': dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    'large': dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
}
_TINY_OF_VERSION_1 = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))


def _differs_where_known(name: str) -> Callable[[Any, Any], bool]:
    def condition(theirs: Any, ours: Any) -> bool:
        values = getattr(theirs, name), getattr(ours, name)
        return None not in values and values[0] != values[1]

    return condition


@dataclass(frozen=True, kw_only=True)
class ShiftWiseVariant(Variant):
    """Arguments of a :class:`ShiftWise` that its tensors tell.

    ``kernel_sizes`` are in taps, a multiple of ``small_kernel``, which is all that the tensors tell.

    Attributes:
        version: 1 or 2.
        num_paths: Filter paths, None where they are folded.
        num_reps: Random orders of the filters, where the tables are there.
        convolved: Channels of each stage that are convolved, which are those that are no ghosts.
    """

    version: int
    num_paths: int | None
    num_reps: int | None
    convolved: Sizes

    title = 'ShiftWise'
    kernel_unit = ' taps'
    archs = _ARCHS
    causes = (
        Cause(
            differs('version'),
            'the checkpoint is of version {theirs.version} of ShiftWise and the model of version '
            '{ours.version}; set version={theirs.version}',
            is_final=True,
        ),
        Cause(
            lambda theirs, ours: theirs.convolved != ours.convolved and theirs.dims == ours.dims,
            'another number of ghost channels: the checkpoint convolves {theirs.convolved} channels, the model '
            '{ours.convolved}; set ghost_ratio',
        ),
        *(
            Cause(
                _differs_where_known(name),
                f'the checkpoint was trained with {name}={{theirs.{name}}}, the model has {{ours.{name}}}; set {name}',
            )
            for name in ('num_paths', 'num_reps')
        ),
    )

    @classmethod
    def read(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The attributes of a backbone whose tensors have these shapes, by our names."""
        facts = super().read(shapes)
        stages: dict[int, dict[str, tuple[int, ...]]] = {}
        for key, shape in shapes.items():
            if match := re.match(r'stages\.(\d+)\.0\.large_kernel\.(.*)$', key):
                stages.setdefault(int(match[1]), {})[match[2]] = shape
        convolved, taps = [], []
        small = num_paths = num_reps = None
        for _, tensors in sorted(stages.items()):
            filters = [shape for name, shape in tensors.items() if name.startswith('filters.') and len(shape) == 4]
            if filters:
                small, num_paths = filters[0][-1], len(filters)
            elif 'tall' in tensors:
                small = tensors['tall'][-1]
            if 'picks' in tensors:
                num_reps = tensors['picks'][1]
            channels = next((tensors[name][0] for name in ('bn_wide.weight', 'picks', 'tall') if name in tensors), None)
            if channels:
                convolved.append(channels)
                if filters and small:
                    taps.append(filters[0][0] // channels * small)
        version = 2 if any(re.match(r'stages\.\d+\.\d+\.se\.', key) for key in shapes) else 1
        archs = _ARCHS if version == 2 else {**_ARCHS, 'tiny': _TINY_OF_VERSION_1}
        sizes = dict(kernel_sizes=Sizes(taps), small_kernel=small, convolved=Sizes(convolved))
        numbers = dict(version=version, num_paths=num_paths, num_reps=num_reps)
        return {**facts, **cls.name_architecture(facts, archs), **sizes, **numbers}

    def words(self) -> list[str]:
        """What the variant is, in parts of a sentence."""
        return [f'ShiftWise version {self.version}', *super().words()]

    def kernel_words(self) -> list[str]:
        """The large kernels in words."""
        words = []
        if self.kernel_sizes:
            words.append(f'kernels of {self.kernel_sizes} taps from filters of size {self.small_kernel}')
        if self.convolved:
            words.append(f'{self.convolved} of the channels convolved')
        if self.num_paths:
            words.append(f'{self.num_paths} filter paths' if self.num_paths > 1 else 'one filter path')
        return words


def fit_paths(state_dict: Mapping[str, Any], num_paths: int, prefix: str = '') -> tuple[dict[str, Any], str]:
    """Bring filter paths to another number, where that leaves the computed function as it is.

    Several paths are summed into one. A single path becomes the first of several, and the others
    are zero. Several paths are not distributed over another number of them.

    Args:
        state_dict: Tensors by our names, with any prefix.
        num_paths: The number wanted.
        prefix: Leave names alone that do not begin with it. Defaults to ''.

    Returns:
        The state dict, and a sentence on what was done, '' if nothing was.
    """
    fitted, remark = dict(state_dict), ''
    for layer, names in path_groups(key for key in state_dict if key.startswith(prefix)).items():
        paths = [fitted[name] for name in names]
        if len(names) == num_paths or 1 not in (len(names), num_paths) or len({path.shape for path in paths}) > 1:
            continue
        for name in names[1:]:
            del fitted[name]
        fitted[names[0]] = merged = sum(paths[1:], start=paths[0])
        fitted.update((f'{layer}.{p}.weight', torch.zeros_like(merged)) for p in range(1, num_paths))
        remark = (
            f'the {len(names)} filter paths of the checkpoint were summed into one'
            if len(names) > 1
            else f'the single filter path of the checkpoint became the first of {num_paths}; the others are zero'
        )
    return fitted, remark


def _official(state_dict: dict[str, Any], prefix: str, spelling: str) -> tuple[dict[str, Any], str]:
    """Leave out the index tables, which the official code generates, and sum the paths for `LoRA`.

    Raises:
        CheckpointError: A table is not the one that the official code would generate.
    """
    pattern = re.compile(re.escape(prefix) + rf'stages\.\d+\.\d+\.large_kernel\.({"|".join(_TABLES)})$')
    for key, shifts in state_dict.items():
        if not (pattern.match(key) and key.endswith('.shifts')):
            continue
        operator = key.removesuffix('shifts')
        names = ('picks', 'rep', 'ghost', 'filters.0.weight')
        if any(operator + name not in state_dict for name in names):
            continue
        picks, rep, ghost, filters = (state_dict[operator + name] for name in names)
        if not _are_official((shifts, picks, rep, ghost), filters):
            raise CheckpointError(
                f'The index tables {operator}* are not those which the official code generates, '
                'and its checkpoints cannot hold others.'
            )
    rest = {key: value for key, value in state_dict.items() if not pattern.match(key)}
    return (fit_paths(rest, 1, prefix)[0] if spelling == 'LoRA' else rest), spelling


def _are_official(tables: Sequence[Tensor], filters: Tensor) -> bool:
    """Whether these are the tables for a kernel size that the greatest shift allows."""
    shifts, picks, rep, ghost = tables
    small = filters.shape[-1]
    channels, num_reps = picks.shape
    half = int(shifts.max()) + small - 1
    return any(
        all(
            ours.shape == theirs.shape and bool((ours.cpu() == theirs).all())
            for ours, theirs in zip(tables, _tables(len(rep), len(ghost), kernel_size, small, num_reps))
        )
        for kernel_size in (2 * half, 2 * half + 1)
        if kernel_size >= small and num_filters(kernel_size, small) * channels == len(filters)
    )


def _tables(channels: int, num_ghosts: int, kernel_size: int, small: int, num_reps: int) -> tuple[Tensor, ...]:
    """The official tables, in the order of their names, of a layer that convolves so many channels."""
    return (*shift_tables(channels, kernel_size, small, num_reps), *ghost_channels(channels + num_ghosts, num_ghosts))


def _with_filters(cost: Any) -> tuple[int, int]:
    return cost.parameters - cost.path_parameters, cost.flops - cost.large_flops + cost.filter_flops


_BLOCK = 'stages.{i}.{j}.'
_LARGE = 'stages.{i}.{j}.large_kernel.'
_PAPER = 'ShiftWise, tables of ADE20K and COCO'
# The official code gives no accuracy of its segmentors and detectors.
_SUMMARIES = "two independent summaries of the ShiftWise paper (CVPR 2025), not the paper's own table"


def _shiftwise(arch: str) -> dict[str, Any]:
    sizes = dict(kernel_sizes=(51, 49, 47, 13), small_kernel=3)
    return dict(type='ShiftWise', arch=arch, version=2, **sizes, ghost_ratio=0.23, num_paths=2, num_reps=4)


def _downstream(name: str, task: str, arch: str, schedule: str, **figures: float) -> ModelInfo:
    return ModelInfo(f'{name}_{schedule}', None, task, _shiftwise(arch), _SUMMARIES, f'{name}.py', figures)


# `LoRA` is the official code's form after it has merged the filter paths. Names below `ffn` exist
# in version 2 only, `pwconv1` and `pwconv2` of ours in version 1 only.
FAMILY = register_family(
    Family(
        name='shiftwise',
        titles=('ShiftWise',),
        spellings=('LoRAs', 'LoRA'),
        table=(
            # ours, LoRAs, LoRA
            (_LARGE + 'filters.0.weight', _LARGE + 'LoRAs.0.weight', _LARGE + 'LoRA.weight'),
            (_LARGE + 'filters.{p}.weight', _LARGE + 'LoRAs.{p}.weight', '-'),
            (_LARGE + 'bn_wide.', _LARGE + 'bn_lora1.', _LARGE + 'bn_lora1.'),
            (_LARGE + 'bn_tall.', _LARGE + 'bn_lora2.', _LARGE + 'bn_lora2.'),
            *((_LARGE + table, '-', '-') for table in _TABLES),
            *((_LARGE + folded, '-', '-') for folded in ('tall', 'wide', 'bias', 'ghost_scale', 'ghost_bias')),
            (_BLOCK + 'ffn.fc1.', _BLOCK + 'pwconv1.1.', _BLOCK + 'pwconv1.1.'),
            (_BLOCK + 'ffn.grn.', _BLOCK + 'act.1.', _BLOCK + 'act.1.'),
            (_BLOCK + 'ffn.fc2.bias', '-', '-'),
            (_BLOCK + 'ffn.fc2.weight', _BLOCK + 'pwconv2.0.weight', _BLOCK + 'pwconv2.0.weight'),
            (_BLOCK + 'ffn.norm.', _BLOCK + 'pwconv2.2.', _BLOCK + 'pwconv2.2.'),
            *((_BLOCK + same, '=', '=') for same in ('norm.', 'se.', 'pwconv1.', 'pwconv2.', 'gamma')),
            *((same, '=', '=') for same in ('downsample_layers.{i}.{j}.', _LARGE + 'bn_small.')),
            *((same, '=', '=') for same in ('norm{i}.', 'norm.', 'head.')),
        ),
        formats=(
            ('shiftwise', r'stages\.\d+\.\d+\.large_kernel\.(LoRAs\.\d+|LoRA)\.weight$', ('LoRAs', 'LoRA')),
            ('ours-deployed', r'stages\.\d+\.\d+\.large_kernel\.tall$', ()),
            ('ours', r'stages\.\d+\.\d+\.large_kernel\.filters\.\d+\.weight$', ()),
        ),
        variant=ShiftWiseVariant,
        official=_official,
        imagenet=dict(layer_scale_init_value=1e-6),
        models=(
            ModelInfo(
                'shiftwise_t_in1k_300e',
                'https://drive.google.com/file/d/1U4DOZv5V9_7wJdqdicjp0tCmNIdRNJOc/view',
                'classification',
                _shiftwise('tiny'),
                'https://github.com/lidc54/shift-wiseConv (README)',
                figures=dict(top1_percent=83.39),
            ),
            *(
                _downstream(
                    f'upernet_shiftwise_{arch[0]}_ade20k',
                    'segmentation',
                    arch,
                    '160k',
                    miou_percent=miou,
                    miou_ms_percent=multi_scale,
                )
                for arch, miou, multi_scale in (('tiny', 49.22, 50.06), ('small', 49.79, 50.83))
            ),
            _downstream(
                'cascade_mask_rcnn_shiftwise_t_coco',
                'detection',
                'tiny',
                '3x',
                box_ap_percent=52.21,
                mask_ap_percent=45.19,
            ),
        ),
        published={
            'upernet_shiftwise_t_ade20k': Published(61.73, 948, 'filters', _PAPER),
            'upernet_shiftwise_s_ade20k': Published(87.5, 1039, 'filters', _PAPER),
            'cascade_mask_rcnn_shiftwise_t_coco': Published(86.89, 751, 'filters_det', _PAPER),
            'cascade_mask_rcnn_shiftwise_s_coco': Published(110.48, 839, 'filters_det', _PAPER),
        },
        conventions=dict(
            filters=Convention(
                'all weights, with the paths of each layer merged to one, and the small filters '
                'applied to the map as in the official code. The kernels assembled from them, with which is '
                'convolved here, have about twice as many multiply-adds',
                _with_filters,
            ),
            filters_det=Convention(
                'as for segmentation with ShiftWise (merged paths, small filters), and fewer '
                'parameters for a reason that is not published; the difference is that of the '
                'squeeze-excite layers (1.59 M in -T, 2.96 M in -S) to 0.1 %',
                _with_filters,
            ),
        ),
    )
)
SELECTIONS['shiftwise_filters'] = r'large_kernel\.filters\.\d+\.weight$'
PRESETS['shiftwise'] = dict(
    PRESETS['slak_s'], sparsity=0.3, selection='shiftwise_filters', per_filter=True, sparse_gap=131
)


@MODELS.register_module()
class ShiftWise(LargeKernelBackbone):
    """ShiftWise backbones, version 1 and 2.

    The published network is ``ShiftWise('tiny')``. Widths and depths of version 2 are those of UniRepLKNet: (80, 160,
    320, 640) with (3, 3, 18, 3) blocks for tiny, (96, ..., 768), (128, ..., 1024) and (192, ..., 1536) with (3, 3, 27,
    3) for small, base and large. Version 1 has SLaK's.

    The other arguments are those of :class:`~slak_mm.models.LargeKernelBackbone`.

    Args:
        version: 1 for SLaK's plan (LayerNorm blocks, patch-wise downsampling, sizes rounded
            down), 2 for UniRepLKNet's (batch norm, squeeze-excite and GRN blocks, 3x3
            convolutions for downsampling, sizes rounded up). Default: 2.
        kernel_sizes: K of each stage in pixels of its map, not smaller than ``small_kernel``. The kernel has ceil(K /
            s) * s taps, from -(K // 2) on: 49 means -24 to 26 with s = 3. Default: (51, 49, 47, 13).
        small_kernel: Size s of the filters, odd. Default: 3.
        ghost_ratio: Fraction of channels that pass an operator unchanged, in [0, 1). Version 1 rounds their number
            down; version 2 rounds the number of the others down to an even one. Default: 0.23.
        num_paths: Sets of filters which are summed. They differ in their initial values and
            masks only; deployment merges them. Default: 2.
        num_reps: Random orders in which the filters make up a kernel; the resulting kernels are summed. Default: 4.
        width_factor: Multiplies ``dims``. Default: 1.0.
        branch_norm: A batch norm behind each kernel. Default: True.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    family = FAMILY
    arch_settings = _ARCHS

    def __init__(
        self,
        arch: str | dict = 'tiny',
        version: int = 2,
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        small_kernel: int = 3,
        ghost_ratio: float = 0.23,
        num_paths: int = 2,
        num_reps: int = 4,
        width_factor: float = 1.0,
        branch_norm: bool = True,
        **common: Any,
    ) -> None:
        if version not in (1, 2):
            raise ValueError(f'version must be 1 or 2, got {version!r}')
        plan = _TINY_OF_VERSION_1 if arch == 'tiny' and version == 1 else arch
        super().__init__(plan, kernel_sizes, width_factor, **common)
        self.arch = arch
        # Version 2 divides the width by four in its squeeze-excite layers.
        self._require_channels(1 if version == 1 else 4)
        _check_kernels(self.kernel_sizes, small_kernel)
        if not 0 <= ghost_ratio < 1:
            raise ValueError(f'ghost_ratio must lie in [0, 1), got {ghost_ratio}')
        for name, number in (('num_paths', num_paths), ('num_reps', num_reps)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f'{name} must be a positive integer, got {number!r}')
        self.version = version
        self.small_kernel = small_kernel
        self.ghost_ratio = ghost_ratio
        self.num_paths = num_paths
        self.num_reps = num_reps
        self.branch_norm = branch_norm
        for i, channels in enumerate(self.dims):
            if _num_ghosts(version, channels, ghost_ratio) == channels:
                raise ValueError(
                    f'ghost_ratio {ghost_ratio} leaves none of the {channels} channels of stage {i} to be convolved'
                )
        self._build(self._block, patch_downsampling if version == 1 else conv_downsampling)

    def _block(self, stage: int, drop_path: float) -> nn.Module:
        channels, size, norm_cfg = self.dims[stage], self.kernel_sizes[stage], self.norm_cfg
        num_ghosts = _num_ghosts(self.version, channels, self.ghost_ratio)
        form = self.small_kernel, self.num_paths, self.num_reps, self.branch_norm
        layer = ShiftWiseConv(channels, num_ghosts, size, *form, norm_cfg, self.deploy, folds_norm=self.version == 2)
        rest = drop_path, self.layer_scale_init_value, self.with_cp
        if self.version == 1:
            return SLaKBlock(channels, layer, *rest)
        return ShiftWiseBlock(channels, layer, norm_cfg, *rest, self.deploy)

    @property
    def recipe(self) -> Mapping[str, Any] | None:
        """The published sparse training of this network."""
        return PRESETS['shiftwise']

    def _smallest_image(self) -> int:
        return super()._smallest_image() if self.version == 1 else 1

    def complete_state_dict(self, state_dict: dict[str, Any], prefix: str = '') -> list[str]:
        """Fit the filter paths and the index tables of a state dict to this backbone.

        A single path fills the first of several, and the others become zero; several paths are
        summed into a single one. Both compute the same. Official checkpoints have no tables and
        get the official ones; tables that are there are checked.

        Args:
            state_dict: Tensors by our names; changed in place.
            prefix: Prefix of this backbone's names.

        Returns:
            A sentence for each kind of change.

        Raises:
            CheckpointMismatch: A table cannot belong to this backbone.
        """
        remarks = super().complete_state_dict(state_dict, prefix)
        if self.deploy:
            return remarks
        fitted, remark = fit_paths(state_dict, self.num_paths, prefix)
        state_dict.clear()
        state_dict.update(fitted)
        remarks += [remark] if remark else []
        operators = {
            f'{prefix}{name}.': module for name, module in self.named_modules() if isinstance(module, ShiftWiseConv)
        }
        operators = {key: operator for key, operator in operators.items() if f'{key}filters.0.weight' in state_dict}
        if operators and not any(key + table in state_dict for key in operators for table in _TABLES):
            remarks.append(self._add_tables(state_dict, operators))
        for key, operator in operators.items():
            _check_tables(state_dict, key, operator)
        return remarks

    def _add_tables(self, state_dict: dict[str, Any], operators: dict[str, ShiftWiseConv]) -> str:
        for key, operator in operators.items():
            sizes = operator.kernel_size, self.small_kernel, self.num_reps
            tables = _tables(len(operator.rep), len(operator.ghost), *sizes)
            state_dict.update((key + name, table) for name, table in zip(_TABLES, tables))
        return f'the index tables of {len(operators)} blocks were generated: official checkpoints have none'


def _check_tables(state_dict: dict[str, Any], key: str, operator: ShiftWiseConv) -> None:
    """Raise CheckpointMismatch for tables which would lead the computation astray."""
    tables = [state_dict[key + name] for name in _TABLES if key + name in state_dict]
    shapes = [getattr(operator, name).shape for name in _TABLES]
    if [table.shape for table in tables] != shapes or any(table.is_meta for table in tables):
        return  # what is missing or of another shape is reported elsewhere
    shifts, picks, rep, ghost = tables
    reason = shift_table_error(shifts, picks, operator.kernel_size, operator.small_kernel)
    channels = torch.cat([rep, ghost]).long().sort().values.cpu()
    if reason is None and not torch.equal(channels, torch.arange(len(channels), device='cpu')):
        reason = 'rep and ghost do not name every channel once'
    if reason is not None:
        raise CheckpointMismatch(
            f'The index tables {key}* do not belong to this backbone: {reason}.',
            causes=['the checkpoint is of a model with other kernel_sizes or small_kernel'],
        )


def conv_downsampling(before: int, channels: int, is_stem: bool) -> nn.Sequential:
    """The layers between two stages of version 2, or between the image and the first stage: 3x3 convolutions."""
    layers: list[nn.Module] = []
    if is_stem:
        half = channels // 2
        layers += [nn.Conv2d(before, half, kernel_size=3, stride=2, padding=1), LayerNorm2d(half), nn.GELU()]
        before = half
    return nn.Sequential(
        *layers, nn.Conv2d(before, channels, kernel_size=3, stride=2, padding=1), LayerNorm2d(channels)
    )


def _num_ghosts(version: int, channels: int, ghost_ratio: float) -> int:
    # The order of the floating-point operations is the official one: it decides the rounding.
    if version == 1:
        return int(channels * ghost_ratio)
    return channels - int(channels * (1 - ghost_ratio)) // 2 * 2


def _check_kernels(kernel_sizes: Sequence[int], small_kernel: int) -> None:
    if not isinstance(small_kernel, int) or small_kernel < 1 or small_kernel % 2 == 0:
        raise ValueError(
            f'small_kernel must be an odd positive integer (an even filter has no center), got {small_kernel!r}'
        )
    for size in kernel_sizes:
        if not isinstance(size, int) or size < small_kernel:
            raise ValueError(
                f'kernel_sizes must be integers not smaller than small_kernel ({small_kernel}), got {size!r}'
            )
