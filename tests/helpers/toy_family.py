"""A family in one file: what ``docs/adding-a-family.md`` goes through. One plain large kernel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from slak_mm.checkpoints import Cause, Family, ModelInfo, Variant, differs, register_family
from slak_mm.models import LargeKernelBackbone, LargeKernelLayer
from slak_mm.models.layers import batch_norm_affine, build_branch_norm
from slak_mm.sparsity import PRESETS

ARCHS = {'tiny': dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))}


class ToyConv(LargeKernelLayer):
    """A square depthwise kernel and its batch norm, or a bias when deployed."""

    def __init__(self, channels: int, kernel_size: int, norm_cfg: dict) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        self.bn = build_branch_norm(norm_cfg, channels)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if self.bias is None else self.conv(x) + self.bias.view(-1, 1, 1)


class ToyBlock(nn.Module):
    """``y = x + W relu(L(x))``."""

    def __init__(self, channels: int, kernel_size: int, gated: bool, norm_cfg: dict) -> None:
        super().__init__()
        self.large_kernel = ToyConv(channels, kernel_size, norm_cfg)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Parameter(torch.ones(channels, 1, 1)) if gated else None
        self.deploy = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.large_kernel(x).relu())
        return x + (y if self.gate is None else self.gate * y)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        large = self.large_kernel
        scale, shift = batch_norm_affine(large.bn)
        large.conv.weight.mul_(scale.view(-1, 1, 1, 1))
        large.bias, large.bn = nn.Parameter(shift), None
        self.deploy = True


@dataclass(frozen=True, kw_only=True)
class ToyVariant(Variant):
    """What the tensors tell of a :class:`Toy`."""

    gated: bool

    title = 'Toy'
    archs = ARCHS
    causes = (Cause(differs('gated'), 'gates in one of checkpoint and model only; set gated={theirs.gated}'),)

    @classmethod
    def read(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return super().read(shapes) | dict(gated=any(key.endswith('.gate') for key in shapes))


FAMILY = register_family(
    Family(
        name='toy',
        titles=('Toy',),
        spellings=('paper',),
        table=(
            ('downsample_layers.0.{i}.', 'patch_embed.{i}.'),
            ('downsample_layers.{i}.{j}.', 'levels.{i}.down.{j}.'),
            ('stages.{i}.{j}.large_kernel.conv.weight', 'levels.{i}.blocks.{j}.dw.weight'),
            ('stages.{i}.{j}.large_kernel.bn.', 'levels.{i}.blocks.{j}.dw_norm.'),
            ('stages.{i}.{j}.large_kernel.bias', '-'),
            ('stages.{i}.{j}.mix.', 'levels.{i}.blocks.{j}.pw.'),
            ('stages.{i}.{j}.gate', 'levels.{i}.blocks.{j}.gate'),
            ('norm{i}.', '='),
            ('norm.', 'last_norm.'),
            ('head.', 'classifier.'),
        ),
        formats=(
            ('toy-paper', r'levels\.\d+\.blocks\.\d+\.dw\.', ('paper',)),
            ('ours', r'stages\.\d+\.\d+\.large_kernel\.conv\.weight$', ()),
        ),
        variant=ToyVariant,
        head='norm, pool',
        imagenet=dict(layer_scale_init_value=1e-6),
        models=(
            ModelInfo(
                'toy_t_in1k',
                'https://example.org/toy_t.pth',
                'classification',
                dict(type='Toy'),
                'the paper, table 1',
                figures=dict(top1_percent=12.0, params_m=0.01, flops_g=0.1),
                evaluation=dict(input_size=(3, 96, 96), crop_pct=1.0),
            ),
        ),
    )
)
PRESETS['toy'] = dict(mode='set', distribution='erk', sparsity=0.5, selection='all')


@MODELS.register_module()
class Toy(LargeKernelBackbone):
    """A toy."""

    family = FAMILY
    arch_settings = ARCHS

    def __init__(
        self,
        arch: str | dict = 'tiny',
        kernel_sizes: tuple[int, ...] = (9, 7, 7, 5),
        gated: bool = True,
        norm_cfg: dict | None = None,
        **common: Any,
    ) -> None:
        super().__init__(arch, kernel_sizes, norm_cfg=norm_cfg or dict(type='BN'), **common)
        self._build(lambda stage, _: ToyBlock(self.dims[stage], self.kernel_sizes[stage], gated, self.norm_cfg))

    @property
    def recipe(self) -> Mapping[str, Any]:
        return PRESETS['toy']
