"""What the backbones of this package have in common."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from slak_mm._config import type_name
from slak_mm.checkpoints import FamilyMember, convert_on_load, load_pretrained, prepare_state_dict

from .layers import LayerNorm2d, patch_downsampling

# Cut at five standard deviations. The official code cuts at +-2, a hundred of them: the inverse
# error function behind the draw then returns -inf once in 2 ** 24, and that weight becomes -2.
_DEFAULT_INIT = [dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, a=-0.1, b=0.1, bias=0.0)]

_PRETRAINED_KEYS = ('type', 'checkpoint', 'prefix', 'map_location')
"""Keys of ``init_cfg=dict(type='Pretrained', …)``; the last is mmengine's, and has no effect here."""


def prepare_images(x: Tensor, smallest: int, last_stage: int) -> Tensor:
    """Images as a backbone takes them.

    Args:
        x: Images of shape (N, C, H, W).
        smallest: Side of the smallest image, in pixels.
        last_stage: The stage that needs it.

    Raises:
        ValueError: They are smaller than that.
    """
    if min(x.shape[2:]) < smallest:
        raise ValueError(
            f'the image of {x.shape[2]} x {x.shape[3]} pixels is too small: stage '
            f'{last_stage} needs at least {smallest} x {smallest}'
        )
    # Large depthwise kernels, and LayerNorm over channels, are fastest in this layout on a CPU.
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == 'cpu' else x


def prepare_map(x: Tensor) -> Tensor:
    """A map as the blocks of a stage take it: NCHW on GPUs, whatever the images' and weights' layout is.

    Large kernels run along rows there, and pixels of odd channel counts would not be aligned.
    """
    return x.contiguous() if x.device.type in ('cuda', 'meta') else x


@dataclass(frozen=True)
class KernelCost:
    """What a large-kernel layer costs; ``elements`` are multiply-adds for each pixel of its map."""

    elements: int
    masked_elements: int = 0
    path_parameters: int = 0
    """Those of parallel paths beyond the first, which can be merged into it."""
    filter_elements: int = 0
    """If the small filters that kernels are made up of were applied instead; 0 if there are none."""


class LargeKernelLayer(nn.Module):
    """A layer of large depthwise kernels, whose weights are those with more than two dimensions."""

    def cost(self, masked: Mapping[str, int | Tensor]) -> KernelCost:
        """Count the multiply-adds for each pixel.

        Args:
            masked: By the names of the layer's weights how many are masked, or a tensor that is zero where they are.
        """
        weights = {name: weight for name, weight in self.named_parameters() if weight.dim() > 2}
        return KernelCost(
            sum(weight.numel() for weight in weights.values()),
            sum(num_masked(masked[name]) for name in weights if name in masked),
        )


def num_masked(mask: int | Tensor) -> int:
    """Number of weights that are masked."""
    return mask if isinstance(mask, int) else mask.numel() - int(mask.count_nonzero())


class LargeKernelBackbone(FamilyMember, BaseModule):
    """Four stages of residual blocks at strides 4, 8, 16 and 32.

    A subclass sets :attr:`family` and :attr:`arch_settings`; its constructor hands on the arguments below and calls
    :meth:`_build`.

    Official checkpoints may be loaded with ``load_state_dict`` as they are: their names are
    converted on the way, and all is checked before a value is overwritten.
    :func:`slak_mm.load_pretrained` also drops what the backbone has no use for, and reports.

    The constructors of all subclasses take the following arguments; those from ``drop_path_rate`` on by keyword.

    Args:
        arch: 'tiny', 'small', 'base', 'large' or ``dict(depths=…, dims=…)`` with one entry per stage. Default: 'tiny'.
        kernel_sizes: Size of the large kernels of each stage, in pixels of its map.
        width_factor: Multiplies ``dims``. Default: 1.0.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 at the first. Default: 0.
        layer_scale_init_value: Initial layer scale; 0 or less for none. Default: 1.0, as the
            official downstream configs (1e-6 on ImageNet).
        out_indices: Stages to return; those behind the last one are not built. Default: (0, 1, 2, 3).
        out_norm: A LayerNorm ``norm{i}`` on each returned map, as the official downstream code. Default: True.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages with
            the downsampling before them. Output norms stay trainable. Default: -1.
        norm_cfg: Batch norms. Default: ``dict(type='SyncBN')``, which becomes BN where there is no CUDA device.
        with_cp: Recompute each block in the backward pass to save memory. Default: False.
        deploy: Build the form for inference, which :meth:`switch_to_deploy` produces. Default: False.
        in_channels: Channels of the image. Default: 3.
        init_cfg: ``dict(type='Pretrained', checkpoint=…)`` with a path, an address or a name of
            :data:`slak_mm.checkpoints.ZOO`, or any initialization config of mmengine.
            Default: truncated normal of standard deviation 0.02.
    """

    arch_settings: ClassVar[Mapping[str, Mapping[str, Sequence[int]]]]
    """``depths`` and ``dims`` of the named architectures."""
    default_init_cfg: ClassVar[list[dict]] = _DEFAULT_INIT
    """Initialization without ``init_cfg``; an empty list leaves what PyTorch's layers begin with."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        timm_models = sys.modules.get('slak_mm.timm_models')
        if timm_models is not None and 'family' in vars(cls):
            timm_models.register(cls)

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        kernel_sizes: Sequence[int] = (),
        width_factor: float = 1.0,
        *,
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
        cfgs = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
        pretrained = [cfg for cfg in cfgs if type_name(cfg) == 'Pretrained']
        if len(pretrained) > 1:
            raise ValueError(f'init_cfg names {len(pretrained)} checkpoints; give one')
        for cfg in pretrained:
            _check_pretrained(cfg)
        others = [cfg for cfg in cfgs if type_name(cfg) != 'Pretrained']
        super().__init__(init_cfg=others or copy.deepcopy(self.default_init_cfg))
        self.checkpoint_cfg = copy.deepcopy(pretrained[0]) if pretrained else None
        self.arch = arch
        self.depths, dims = self._parse_arch(arch)
        if width_factor <= 0:
            raise ValueError(f'width_factor must be positive, got {width_factor}')
        self.width_factor = width_factor
        self.dims = tuple(int(dim * width_factor) for dim in dims)  # rounded down as in the official code
        self._require_channels(1)
        if len(kernel_sizes) != len(self.depths):
            raise ValueError(
                f'kernel_sizes needs one entry for each of the {len(self.depths)} stages, got {tuple(kernel_sizes)}'
            )
        self.kernel_sizes = tuple(kernel_sizes)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must lie in [0, 1), got {drop_path_rate}')
        self.drop_path_rate = drop_path_rate
        self.layer_scale_init_value = layer_scale_init_value
        self.norm_cfg = norm_cfg or dict(type='SyncBN', requires_grad=True)
        self.with_cp = with_cp
        self.deploy = deploy
        self.in_channels = in_channels
        indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        num_stages = len(self.depths)
        if not indices or any(not -num_stages <= i < num_stages for i in indices):
            raise ValueError(f'out_indices must name stages 0 to {num_stages - 1}, got {out_indices}')
        self.out_indices = tuple(sorted({i % num_stages for i in indices}))
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f'frozen_stages must lie between -1 and {num_stages}, got {frozen_stages}')
        self.frozen_stages = frozen_stages
        self.out_norm = out_norm
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        self._register_load_state_dict_pre_hook(convert_on_load, with_module=True)

    @classmethod
    def _parse_arch(cls, arch: str | Mapping) -> tuple[tuple[int, ...], tuple[int, ...]]:
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

    def _require_channels(self, least: int) -> None:
        if min(self.dims) < least:
            raise ValueError(
                f'arch and width_factor {self.width_factor} leave {min(self.dims)} channels to a stage, '
                f'which needs at least {least}'
            )

    def _build(
        self,
        block: Callable[[int, float], nn.Module | tuple[nn.Module, ...]],
        downsampling: Callable[[int, int, bool], nn.Module] = patch_downsampling,
    ) -> None:
        """Build the stages up to the last of ``out_indices``, and the output norms.

        Nothing would use the stages behind, and parameters without a gradient stop distributed training.

        Args:
            block: Makes a block, or several that count as one, of a stage with a drop-path rate.
            downsampling: Makes the layers before a stage from the channels before and behind them, and whether they
                are the stem. Default: :func:`~slak_mm.models.layers.patch_downsampling`.
        """
        last_block = max(1, sum(self.depths) - 1)
        before, done = self.in_channels, 0
        for stage, (depth, channels) in enumerate(zip(self.depths, self.dims)):
            if stage > self.out_indices[-1]:
                break
            self.downsample_layers.append(downsampling(before, channels, stage == 0))
            rates = [self.drop_path_rate * i / last_block for i in range(done, done + depth)]
            made = [block(stage, rate) for rate in rates]
            self.stages.append(nn.Sequential(*(b for one in made for b in (one if isinstance(one, tuple) else (one,)))))
            before, done = channels, done + depth
        if self.out_norm:
            for i in self.out_indices:
                self.add_module(f'norm{i}', self._output_norm(self.dims[i]))
        self._freeze_stages()

    def _output_norm(self, channels: int) -> nn.Module:
        """Make the norm of a returned map."""
        return LayerNorm2d(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Extract features.

        Args:
            x: Images of shape (N, in_channels, H, W), H and W at least 32 for four stages.

        Returns:
            For each stage of ``out_indices`` a tensor of shape (N, C_i, H_i, W_i).

        Raises:
            ValueError: The image is too small to be downsampled.
        """
        x = prepare_images(x, self._smallest_image(), self.out_indices[-1])
        outs = []
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = stage(prepare_map(downsample(x)))
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x) if self.out_norm else x)
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
        if self.checkpoint_cfg is not None:
            load_pretrained(self, self.checkpoint_cfg['checkpoint'], prefix=self.checkpoint_cfg.get('prefix'))

    def why_unused(self, name: str) -> str:
        """Why a tensor of the whole network is left out: its stage lies behind the last one of ``out_indices``."""
        last = self.out_indices[-1]
        stage = re.match(r'(?:downsample_layers|stages)\.(\d+)\.', name)
        is_behind = stage is not None and last < int(stage[1]) < len(self.depths)
        return f'behind stage {last}, the last one that out_indices returns' if is_behind else ''

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors by our or official names; all of them, or with an error none.

        Raises:
            CheckpointError: A name (with ``strict``), a shape or a value does not fit.
        """
        return super().load_state_dict(prepare_state_dict(self, state_dict, strict), strict, assign)

    @property
    def recipe(self) -> Mapping[str, Any] | None:
        """The published sparse training of this network, as :data:`slak_mm.sparsity.PRESETS` has it."""
        return None

    def num_layers(self) -> int:
        """Number L of layers for layer-wise learning-rate decay.

        Raises:
            ValueError: It is not defined for this number of stages.
        """
        if len(self.depths) != 4:
            raise ValueError(f'layer numbers are defined for four stages, the backbone has {len(self.depths)}')
        return 3 + math.ceil(self.depths[2] / 3)

    def layer_id(self, name: str, num_layers: int, decay_type: str) -> int:
        """Number of the layer that a parameter belongs to, for learning-rate decay.

        See the table of :class:`slak_mm.engine.LargeKernelLayerDecayConstructor`.

        Args:
            name: Parameter name within the backbone, such as ``stages.2.5.norm.weight``; anything
                else for a parameter outside it.
            num_layers: L of the table.
            decay_type: 'layer_wise' or 'stage_wise'.

        Returns:
            A number from 0, nearest to the image, to ``num_layers + 1``.
        """
        kind, *indices = name.split('.')
        if kind == 'downsample_layers':
            return (0, 2, 3, num_layers)[int(indices[0])] if decay_type == 'layer_wise' else 0
        if kind == 'stages':
            stage, block = int(indices[0]), int(indices[1])
            return (1, 2, 3 + block // 3, num_layers)[stage] if decay_type == 'layer_wise' else stage + 1
        return num_layers + 1

    def train(self, mode: bool = True) -> LargeKernelBackbone:
        """Set train or eval mode; frozen stages stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.downsample_layers[0], *self.downsample_layers[: self.frozen_stages]]
        for module in [*frozen, *self.stages[: self.frozen_stages]]:
            module.eval()
            module.requires_grad_(False)

    def switch_to_deploy(self) -> None:
        """Fold branches and norms of every block into the form for inference, in place.

        What does not compute as the layers it stands for, such as an adapter, stays as it is with
        what would be folded into it; a warning names it.
        """
        for name, block in self.named_modules():
            if block is not self and hasattr(block, 'switch_to_deploy'):
                block.switch_to_deploy()
                if not block.deploy:
                    print_log(
                        f'{name} stays in training form: one of its layers was replaced, or has hooks that change '
                        'its results. Merge or remove them first to fold it.',
                        logger='current',
                        level=logging.WARNING,
                    )
        # Else these weights would be reordered in every pass, as the maps have this layout.
        self.downsample_layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.deploy = True


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Fold the branches and norms of every backbone of this package within a model, in place.

    Load weights first: a deployed backbone takes deployed checkpoints only. The result agrees
    with the eval mode of the original.

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


def registered_backbones() -> dict[str, type[LargeKernelBackbone]]:
    """Every backbone of this package's kind that is registered, by its name in configs."""
    return {
        name: kind
        for name, kind in MODELS.module_dict.items()
        if inspect.isclass(kind) and issubclass(kind, LargeKernelBackbone)
    }


def _check_pretrained(cfg: Mapping[str, Any]) -> None:
    unknown = sorted(set(cfg) - set(_PRETRAINED_KEYS))
    if unknown:
        raise ValueError(
            f'init_cfg of a checkpoint has the unknown keys {unknown}; it takes {", ".join(_PRETRAINED_KEYS)}. '
            'It is loaded strictly, and its first convolution is fitted to in_channels'
        )
    if not cfg.get('checkpoint'):
        raise ValueError("init_cfg=dict(type='Pretrained') needs checkpoint=, a path, an address or a zoo name")
