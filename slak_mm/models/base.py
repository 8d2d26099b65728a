"""What the backbones of this package have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from slak_mm._config import type_name
from slak_mm.checkpoints import convert_state_dict, load_pretrained

from .layers import LayerNorm2d

# Cut at five standard deviations. The official code cuts at +-2, a hundred of them: the inverse
# error function behind the draw then returns -inf once in 2 ** 24, and that weight becomes -2.
_DEFAULT_INIT = [dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, a=-0.1, b=0.1, bias=0.0)]


class LargeKernelBackbone(BaseModule):
    """Four stages of residual blocks at strides 4, 8, 16 and 32.

    A subclass sets :attr:`checkpoint_family`, and fills :attr:`downsample_layers` and
    :attr:`stages` (as many of one as of the other) before it calls :meth:`_finish_init`.

    Official checkpoints may be loaded with ``load_state_dict`` as they are: their names are
    converted on the way. :func:`slak_mm.load_pretrained` also checks them.
    """

    checkpoint_family: ClassVar[str]
    """Table of :mod:`slak_mm.checkpoints` that converts this backbone's official names."""

    arch_settings: ClassVar[dict[str, dict[str, tuple[int, ...]]]]
    """``depths`` and ``dims`` of the named architectures."""

    depths: tuple[int, ...]
    """Blocks of each stage; set by the subclass."""

    def __init__(self, init_cfg: dict | list[dict] | None = None) -> None:
        cfgs = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
        pretrained = [cfg for cfg in cfgs if type_name(cfg) == 'Pretrained']
        others = [cfg for cfg in cfgs if type_name(cfg) != 'Pretrained']
        if len(pretrained) > 1:
            raise ValueError(f'init_cfg names {len(pretrained)} checkpoints; give one')
        super().__init__(init_cfg=others or copy.deepcopy(_DEFAULT_INIT))
        self.pretrained_cfg = copy.deepcopy(pretrained[0]) if pretrained else None
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        self._register_load_state_dict_pre_hook(_convert_names, with_module=True)

    @classmethod
    def _parse_arch(cls, arch: str | dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return depths and dims of a named or free architecture."""
        if isinstance(arch, str):
            if arch not in cls.arch_settings:
                raise ValueError(
                    f'{cls.__name__} has no arch {arch!r}; choose from '
                    f'{", ".join(cls.arch_settings)}, or give dict(depths=…, dims=…)'
                )
            arch = cls.arch_settings[arch]
        if set(arch) != {'depths', 'dims'}:
            raise ValueError(f'arch must be a name or dict(depths=…, dims=…), got the keys {sorted(arch)}')
        depths, dims = tuple(arch['depths']), tuple(arch['dims'])
        if len(depths) != len(dims) or not depths or min((*depths, *dims)) < 1:
            raise ValueError(
                f'arch needs as many depths as dims, all of them positive, got depths={depths}, dims={dims}'
            )
        return depths, dims

    @staticmethod
    def _widths(dims: Sequence[int], width_factor: float, least: int = 1) -> tuple[int, ...]:
        """Channels of each stage, rounded down as in the official code."""
        if width_factor <= 0:
            raise ValueError(f'width_factor must be positive, got {width_factor}')
        widths = tuple(int(dim * width_factor) for dim in dims)
        if min(widths) < least:
            raise ValueError(
                f'arch and width_factor {width_factor} leave {min(widths)} channels to a stage, '
                f'which needs at least {least}'
            )
        return widths

    def _for_each_stage(self, kernel_sizes: Sequence[int]) -> tuple[int, ...]:
        """Kernel sizes as a tuple, one for each stage."""
        if len(kernel_sizes) != len(self.depths):
            raise ValueError(
                f'kernel_sizes needs one entry for each of the {len(self.depths)} stages, got {tuple(kernel_sizes)}'
            )
        return tuple(kernel_sizes)

    @staticmethod
    def _drop_paths(drop_path_rate: float, num_blocks: int) -> Iterator[float]:
        """Drop-path rate of each block, rising linearly from 0."""
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must lie in [0, 1), got {drop_path_rate}')
        return iter([drop_path_rate * i / max(1, num_blocks - 1) for i in range(num_blocks)])

    def _finish_init(
        self, channels: Sequence[int], out_indices: Sequence[int] | int, out_norm: bool, frozen_stages: int
    ) -> None:
        """Add the output norms and set what is common, after the stages were built."""
        num_stages = len(self.stages)
        indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        if not indices or any(not -num_stages <= i < num_stages for i in indices):
            raise ValueError(f'out_indices must name stages 0 to {num_stages - 1}, got {out_indices}')
        self.out_indices = tuple(sorted({i % num_stages for i in indices}))
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f'frozen_stages must lie between -1 and {num_stages}, got {frozen_stages}')
        self.frozen_stages = frozen_stages
        self.out_norm = out_norm
        if out_norm:
            for i in self.out_indices:
                self.add_module(f'norm{i}', LayerNorm2d(channels[i]))
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Extract features.

        Args:
            x: Images of shape (N, in_channels, H, W), H and W at least 32 for four stages.

        Returns:
            For each stage of ``out_indices`` a tensor of shape (N, C_i, H_i, W_i).

        Raises:
            ValueError: The image is too small to be downsampled.
        """
        if x.device.type == 'cpu':
            # Large depthwise kernels, and LayerNorm over channels, are fastest in this layout.
            x = x.contiguous(memory_format=torch.channels_last)
        smallest = self._smallest_image()
        if min(x.shape[2:]) < smallest:
            raise ValueError(
                f'the image of {x.shape[2]} x {x.shape[3]} pixels is too small: stage '
                f'{self.out_indices[-1]} needs at least {smallest} x {smallest}'
            )
        outs = []
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = stage(downsample(x))
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x) if self.out_norm else x)
            if i == self.out_indices[-1]:
                break
        return tuple(outs)

    def _smallest_image(self) -> int:
        """Side of the smallest image that no stage reduces to nothing, in pixels."""
        return 4 * 2 ** self.out_indices[-1]

    def init_weights(self) -> None:
        """Initialize, and load the checkpoint of ``init_cfg=dict(type='Pretrained', …)``.

        Without a checkpoint: convolution and linear weights from a normal distribution with
        standard deviation 0.02, biases 0, as the official code.

        Raises:
            CheckpointError: The checkpoint is missing, unreadable or does not fit.
        """
        super().init_weights()
        if self.pretrained_cfg is not None:
            load_pretrained(self, self.pretrained_cfg['checkpoint'], prefix=self.pretrained_cfg.get('prefix'))

    def complete_state_dict(self, state_dict: dict[str, Any], prefix: str = '') -> list[str]:
        """Fit a state dict by our names to this backbone where that leaves the function as it is.

        Args:
            state_dict: Tensors by our names; changed in place.
            prefix: Prefix of this backbone's names.

        Returns:
            A sentence for each kind of change.

        Raises:
            CheckpointMismatch: A tensor cannot belong to this backbone.
        """
        return []

    def train(self, mode: bool = True) -> LargeKernelBackbone:
        """Set train or eval mode; frozen stages stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.downsample_layers[0]]
        for i in range(self.frozen_stages):
            frozen += [self.downsample_layers[i], self.stages[i]]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def switch_to_deploy(self) -> None:
        """Fold branches and norms of every block into the form for inference, in place."""
        for block in self.modules():
            if block is not self and hasattr(block, 'switch_to_deploy'):
                block.switch_to_deploy()
        # Else these weights would be reordered in every pass, as the maps have this layout.
        self.downsample_layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.deploy = True


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Fold the branches and norms of every backbone of this package within a model, in place.

    Load weights first: a deployed backbone takes deployed checkpoints only. The result agrees
    with the eval mode of the original. On a CPU its first pass in float32 without autograd copies
    the weights of the linear layers into oneDNN's layout, and keeps the copies.

    Args:
        model: A backbone, or any module that contains some.

    Returns:
        The same model.

    Raises:
        ValueError: The model contains no backbone of this package.
    """
    backbones = [m for m in model.modules() if isinstance(m, LargeKernelBackbone)]
    if not backbones:
        raise ValueError(f'{type(model).__name__} contains no backbone of slak_mm to deploy')
    for backbone in backbones:
        backbone.switch_to_deploy()
    return model


def _convert_names(module: LargeKernelBackbone, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Bring a backbone's part of a state dict into our names, before it is loaded."""
    own = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
    converted, _notes = convert_state_dict(own, prefix=prefix, family=module.checkpoint_family)
    module.complete_state_dict(converted, prefix)
    for key in own:
        del state_dict[key]
    state_dict.update(converted)
