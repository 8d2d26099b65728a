"""RepLKNet backbones.

Ding et al., "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", CVPR 2022,
https://arxiv.org/abs/2203.06717. Official code: https://github.com/DingXiaoH/RepLKNet-pytorch.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn

from slak_mm.checkpoints import Cause, ConversionNotes, Family, ModelInfo, Sizes, Variant, differs, register_family

from .base import LargeKernelBackbone
from .layers import RecomputableBlock, build_branch_norm, passes
from .slak import LargeKernelConv, check_kernels


class _Layers(RecomputableBlock):
    """Layers in a row, as ``nn.Sequential``."""

    def __init__(self, layers: Sequence[nn.Module], with_cp: bool) -> None:
        super().__init__(with_cp)
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    def _forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def _conv(before: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, channels, size, stride, padding=size // 2, groups=groups, bias=False)


def _downsampling(before: int, channels: int, is_stem: bool, norm_cfg: dict, with_cp: bool) -> _Layers:
    """The stem, or the transition between two stages: convolutions, each with batch norm and ReLU; sizes round up."""
    convs = [_conv(channels if is_stem else before, channels, 1), _conv(channels, channels, 3, 2, channels)]
    if is_stem:
        convs = [_conv(before, channels, 3, 2), _conv(channels, channels, 3, 1, channels), *convs]
    layers = [layer for conv in convs for layer in (conv, build_branch_norm(norm_cfg, channels), nn.ReLU(inplace=True))]
    return _Layers(layers, with_cp)


def _pointwise(before: int, channels: int, norm_cfg: dict) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=_conv(before, channels, 1), bn=build_branch_norm(norm_cfg, channels)))


class _ResidualBlock(RecomputableBlock):
    """``y = x + DropPath(f(x))``."""

    def __init__(self, channels: int, hidden: int, drop_path: float, norm_cfg: dict, with_cp: bool) -> None:
        super().__init__(with_cp)
        self.pw1 = _pointwise(channels, hidden, norm_cfg)
        self.pw2 = _pointwise(hidden, channels, norm_cfg)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _forward(self, x: Tensor) -> Tensor:
        y = self._residual(x)
        return x + (y if passes(self.drop_path) else self.drop_path(y))

    @abstractmethod
    def _residual(self, x: Tensor) -> Tensor:
        """What is added to the input."""


class RepLKBlock(_ResidualBlock):
    """Large-kernel convolution between two 1x1 convolutions: ``f = BN W2 relu(L(relu(BN W1 BN(x))))``."""

    def __init__(
        self,
        channels: int,
        large_kernel: LargeKernelConv,
        hidden: int,
        drop_path: float,
        norm_cfg: dict,
        with_cp: bool = False,
    ) -> None:
        super().__init__(channels, hidden, drop_path, norm_cfg, with_cp)
        self.large_kernel = large_kernel
        self.prelkb_bn = build_branch_norm(norm_cfg, channels)

    def _residual(self, x: Tensor) -> Tensor:
        y = F.relu(self.pw1(self.prelkb_bn(x)))
        return self.pw2(F.relu(self.large_kernel(y)))


class ConvFFN(_ResidualBlock):
    """Two 1x1 convolutions with the expansion ratio 4: ``f = BN W2 GELU(BN W1 BN(x))``."""

    def __init__(self, channels: int, drop_path: float, norm_cfg: dict, with_cp: bool = False) -> None:
        super().__init__(channels, 4 * channels, drop_path, norm_cfg, with_cp)
        self.preffn_bn = build_branch_norm(norm_cfg, channels)

    def _residual(self, x: Tensor) -> Tensor:
        return self.pw2(F.gelu(self.pw1(self.preffn_bn(x))))


_DEPTHS = (2, 2, 18, 2)
_ARCHS = {
    '31B': dict(depths=_DEPTHS, dims=(128, 256, 512, 1024)),
    '31L': dict(depths=_DEPTHS, dims=(192, 384, 768, 1536)),
    'XL': dict(depths=_DEPTHS, dims=(256, 512, 1024, 2048)),
}
_KERNELS: dict[str, Any] = dict(kernel_sizes=(31, 29, 27, 13), small_kernel=5, dw_ratio=1.0)
_KERNELS_XL: dict[str, Any] = dict(kernel_sizes=(27, 27, 27, 13), small_kernel=None, dw_ratio=1.5)


@dataclass(frozen=True, kw_only=True)
class RepLKNetVariant(Variant):
    """Arguments of a :class:`RepLKNet` that its tensors tell.

    Attributes:
        dw_ratio: Channels of the large kernels as a multiple of the stage's.
        fused: Whether batch norms behind other convolutions are folded, as ``deep_fuse_BN`` of the official code does.
    """

    dw_ratio: float | None
    fused: bool

    title = 'RepLKNet'
    archs = _ARCHS
    causes = (
        Cause(
            differs('fused'),
            'the batch norms of all convolutions are folded (deep_fuse_BN), which cannot be undone: use the '
            'checkpoint in training form, or with merged kernels only (structural_reparam)',
            is_final=True,
        ),
        Cause(
            lambda theirs, ours: theirs.dw_ratio and ours.dw_ratio and theirs.dw_ratio != ours.dw_ratio,
            "large kernels on {theirs.dw_ratio:g} times the stage's channels in the checkpoint, on {ours.dw_ratio:g} "
            'times in the model; set dw_ratio={theirs.dw_ratio:g}',
        ),
    )

    @classmethod
    def read(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The attributes of a backbone whose tensors have these shapes, by our names."""
        facts = super().read(shapes)
        facts['depths'] = Sizes(depth // 2 for depth in facts['depths'])  # pairs of blocks
        small = next((s[-1] for key, s in shapes.items() if key.endswith('.large_kernel.small.conv.weight')), None)
        pw1 = shapes.get('stages.0.0.pw1.conv.weight')
        return facts | dict(
            cls.name_architecture(facts, cls.archs),
            small_kernel=small,
            dw_ratio=pw1[0] / pw1[1] if pw1 else None,
            fused=any(key.endswith('.pw1.conv.bias') for key in shapes),
        )


def _finish(state_dict: dict[str, Any], prefix: str, notes: ConversionNotes) -> dict[str, Any]:
    """Take the only norm of a stage for the one before the head, as mmpretrain's classifiers keep it."""
    norms = {int(match[1]) for key in state_dict if (match := re.match(re.escape(prefix) + r'norm(\d+)\.', key))}
    if notes.format == 'ours' or len(norms) != 1:
        return state_dict
    own = f'{prefix}norm{norms.pop()}.'
    finished = {}
    for key, value in state_dict.items():
        new = f'{prefix}norm.{key.removeprefix(own)}' if key.startswith(own) else key
        if new != key:
            old = next((old for old, renamed in notes.renamed.items() if renamed == key), key)
            notes.renamed[old] = new
        finished[new] = value
    return finished


def _official(state_dict: dict[str, Any], prefix: str, spelling: str) -> tuple[dict[str, Any], str]:
    """Take the spelling of merged kernels for them."""
    merged = any(re.match(re.escape(prefix) + r'stages\.\d+\.\d+\.large_kernel\.bias$', key) for key in state_dict)
    return state_dict, dict(official='merged', mmpretrain='mmpretrain-merged').get(spelling, spelling) if merged else (
        spelling
    )


_README = 'https://github.com/DingXiaoH/RepLKNet-pytorch (README)'
_METAFILE = 'https://github.com/open-mmlab/mmpretrain (configs/replknet/metafile.yml)'
_DRIVE = 'https://drive.google.com/file/d/{}/view'
_OPENMMLAB = 'https://download.openmmlab.com/mmclassification/v0/replknet/replknet-{}.pth'
_COST = {  # parameters in millions and FLOPs by architecture and side of the image
    ('31B', 224): (79, 15.3),
    ('31B', 384): (79, 45.1),
    ('31L', 384): (172, 96.0),
    ('XL', 320): (335, 128.7),
}


def _imagenet(name: str, arch: str, side: int, top1: float | None, url: str, source: str = _README) -> ModelInfo:
    figures = dict(zip(('params_m', 'flops_g'), _COST[arch, side]))
    if top1 is not None:
        figures = dict(top1_percent=top1, **figures)
    evaluation: dict[str, Any] = {} if side == 224 else dict(input_size=(3, side, side))
    if side == 384:  # images are warped, not cropped
        evaluation |= dict(crop_pct=1.0, crop_mode='squash')
    if arch == 'XL':
        evaluation |= dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    if name.endswith('_in22k'):
        evaluation |= dict(num_classes=21841)
    return ModelInfo(
        f'replknet_{name}',
        url,
        'classification',
        dict(type='RepLKNet', arch=arch),
        source,
        figures=figures,
        counted='deployed',
        evaluation=evaluation,
        size=(side, side),
    )


def _whole(name: str, task: str, config: str, drive: str, figures: dict[str, float], **size: Any) -> ModelInfo:
    arch = next(arch for arch in _ARCHS if f'replknet_{arch.lower()}' in name)
    backbone: dict[str, Any] = dict(type='RepLKNet', arch=arch, **(dict(out_norm=True) if arch == 'XL' else {}))
    return ModelInfo(name, _DRIVE.format(drive), task, backbone, _README, config, figures, **size)


def _upernet(
    name: str, drive: str, miou: float, multi_scale: float, params: float, flops: float, config: str = ''
) -> ModelInfo:
    figures = dict(miou_percent=miou, miou_ms_percent=multi_scale, params_m=params, flops_g=flops)
    size = {} if config else dict(size=(640, 2560))
    return _whole(f'upernet_replknet_{name}', 'segmentation', config, drive, figures, **size)


def _cascade(
    name: str, drive: str, box: float, mask: float, params: float, flops: float, config: str = ''
) -> ModelInfo:
    figures = dict(box_ap_percent=box, mask_ap_percent=mask, params_m=params, flops_g=flops)
    return _whole(f'cascade_mask_rcnn_replknet_{name}_coco_3x', 'detection', config, drive, figures)


_MODELS = (
    *(
        _imagenet(name, arch, side, top1, _DRIVE.format(drive))
        for (name, arch, side, top1), drive in (
            (('31b_in1k', '31B', 224, 83.5), '1azQUiCxK9feYVkkrPqwVPBtNsTzDrX7S'),
            (('31b_in1k_384', '31B', 384, 84.8), '1vo-P3XB6mRLUeDzmgv90dOu73uCeLfZN'),
            (('31b_in22k', '31B', 224, None), '1PYJiMszZYNrkZOeYwjccvxX8UHMALB7z'),
            (('31b_in22k_in1k', '31B', 224, 85.2), '1DslZ2voXZQR1QoFY9KnbsHAeF84hzS0s'),
            (('31b_in22k_in1k_384', '31B', 384, 86.0), '1Sc46BWdXXm2fVP-K_hKKU_W8vAB-0duX'),
            (('31l_in22k_in1k_384', '31L', 384, 86.6), '1JYXoNHuRvC33QV1pmpzMTKEni1hpWfBl'),
            (('31l_in22k', '31L', 384, None), '16jcPsPwo5rko7ojWS9k_W-svHX-iFknY'),
            (('xl_meg73m_in1k_320', 'XL', 320, 87.8), '1tPC60El34GntXByIRHb-z-Apm4Y5LX1T'),
            (('xl_meg73m', 'XL', 320, None), '1CBHAEUlCzoHfiAQmMIjZhDMAIyHUmAAj'),
        )
    ),
    # The same weights, with figures of their own.
    *(
        _imagenet(f'{name}_mmpretrain', arch, size, top1, _OPENMMLAB.format(file), _METAFILE)
        for name, arch, size, top1, file in (
            ('31b_in1k', '31B', 224, 83.48, '31B_3rdparty_in1k_20221118-fd08e268'),
            ('31b_in1k_384', '31B', 384, 84.84, '31B_3rdparty_in1k-384px_20221118-03a170ce'),
            ('31b_in22k_in1k', '31B', 224, 85.20, '31B_in21k-pre_3rdparty_in1k_20221118-54ed5c46'),
            ('31b_in22k_in1k_384', '31B', 384, 85.99, '31B_in21k-pre_3rdparty_in1k-384px_20221118-76c92b24'),
            ('31l_in22k_in1k_384', '31L', 384, 86.63, '31L_in21k-pre_3rdparty_in1k-384px_20221118-dc3fc07c'),
            ('xl_meg73m_in1k_320', 'XL', 320, 87.57, 'XL_meg73m-pre_3rdparty_in1k-320px_20221118-88259b1d'),
        )
    ),
    _upernet(
        '31b_ade20k_160k', '1ZV1CP1KzeSdH6_wKw4ytVe9BlCGHf89s', 49.9, 50.6, 112, 1170, 'upernet_replknet_31b_ade20k.py'
    ),
    _upernet('31b_in22k_ade20k_640_160k', '1W2W4nD2HzTsG_yP9ppLYAqMo3T3JHBNW', 51.5, 52.3, 112, 1829),
    _upernet('31l_in22k_ade20k_640_160k', '1nrZ723LC3QYjcVHJm8jpOOcecfWMsjxL', 52.4, 52.7, 207, 2404),
    _upernet('xl_meg73m_ade20k_640_160k', '14GbBI8tdeEl_ECytDCdrfAfNm1McqMv4', 55.2, 56.0, 374, 3431),
    _whole(
        'upernet_replknet_31b_cityscapes_80k',
        'segmentation',
        '',
        '1j3YwToRqTHHi7ocln0iBz1tE6hItD_JO',
        dict(miou_percent=83.1, params_m=110, flops_g=2315),
        size=(1024, 2048),
    ),
    _cascade(
        '31b', '1XqWSkQZSLMIhyaQvaIhGbuFhdDoRJQ4Z', 52.2, 45.2, 137, 965, 'cascade_mask_rcnn_replknet_31b_coco.py'
    ),
    _cascade('31b_in22k', '1faI-MiNuPidum6dC6dGADfYWe6J-bTAz', 53.0, 46.0, 137, 965),
    _cascade('31l_in22k', '1qLQONhIjCEuykhdy-wHx1Ah9lT3v2OXh', 53.9, 46.5, 229, 1321),
    _cascade('xl_meg73m', '1i0TqfwQJQUVHWdB5oyDgxlUUqzPZmIVr', 55.5, 48.0, 392, 1958),
    _whole(
        'fcos_replknet_31b_coco_2x',
        'detection',
        '',
        '1g0jSpONBF2wJDXYhB7P3mbqAVE587Myi',
        dict(box_ap_percent=47.0, params_m=87, flops_g=437),
    ),
)

_BLOCK = 'stages.{i}.{j}.'
_THEIRS = 'stages.{i}.blocks.{j}.'
_LARGE = 'large_kernel.'


def _pairs(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Our name and the official one of the convolutions of a stem or transition and of their batch norms."""
    number = int(ours.rpartition('.')[2])
    stem = ours.rpartition('.')[0]
    return [(f'{stem}.{3 * number + i}.', f'{theirs}.{kind}.') for i, kind in enumerate(('conv', 'bn'))]


# Spellings differ in the kernel that the small one is merged into, and in the head: mmpretrain has the final norm
# in the last stage.
FAMILY = register_family(
    Family(
        name='replknet',
        titles=('RepLKNet',),
        spellings=('official', 'mmpretrain', 'merged', 'mmpretrain-merged'),
        table=(
            # ours, official, mmpretrain, merged, mmpretrain-merged
            *(
                (ours, *[theirs] * 4)
                for stage in range(8)
                for k in range(2 if stage else 4)
                for ours, theirs in _pairs(
                    f'downsample_layers.{stage}.{k}', f'transitions.{stage - 1}.{k}' if stage else f'stem.{k}'
                )
            ),
            (_BLOCK + _LARGE + 'square.conv.weight', *[_THEIRS + _LARGE + 'lkb_origin.conv.weight'] * 2)
            + tuple([_THEIRS + _LARGE + 'lkb_reparam.weight'] * 2),
            (_BLOCK + _LARGE + 'square.', *[_THEIRS + _LARGE + 'lkb_origin.'] * 2, '-', '-'),
            (_BLOCK + _LARGE + 'small.', *[_THEIRS + _LARGE + 'small_conv.'] * 2, '-', '-'),
            (_BLOCK + _LARGE + 'bias', '-', '-', *[_THEIRS + _LARGE + 'lkb_reparam.bias'] * 2),
            (_BLOCK, *[_THEIRS] * 4),
            ('norm{i}.', *['stages.{i}.norm.'] * 4),
            ('norm.', *['=', 'stages.3.norm.'] * 2),
            *((f'head.{kind}', *['=', f'head.fc.{kind}'] * 2) for kind in ('weight', 'bias')),
        ),
        formats=(
            ('replknet-merged', r'stages\.\d+\.blocks\.\d+\.large_kernel\.lkb_reparam\.', ('merged', 'mmpretrain')),
            ('replknet', r'stages\.\d+\.blocks\.\d+\.large_kernel\.lkb_origin\.', ('official', 'mmpretrain')),
            ('ours', r'stages\.\d+\.\d+\.prelkb_bn\.', ()),
        ),
        variant=RepLKNetVariant,
        finish=_finish,
        official=_official,
        models=_MODELS,
        head='norm, pool',
    )
)


@MODELS.register_module()
class RepLKNet(LargeKernelBackbone):
    """RepLKNet.

    Pairs of a block with a large square kernel and one of two 1x1 convolutions, with batch norms everywhere; layers of
    a stage are counted in pairs. Sizes of maps are rounded up. A small kernel beside the large one is merged into it by
    :meth:`switch_to_deploy`, as ``structural_reparam`` of the official code does; the other batch norms stay.

    Arguments that are not listed are those of :class:`~slak_mm.models.LargeKernelBackbone`; there is no layer scale.

    Args:
        arch: '31B', '31L', 'XL' or ``dict(layers=…, channels=…)`` with one entry per stage. Default: '31B'.
        kernel_sizes: Size of the large kernels of each stage in pixels of its map, odd. Default: that of ``arch``, (27,
            27, 27, 13) for 'XL', else (31, 29, 27, 13).
        small_kernel: Size of the small kernel, odd and smaller than every large one; None for no small kernel, 'arch'
            for what ``arch`` has, which is none for 'XL', else 5. Default: 'arch'.
        dw_ratio: Channels of the large kernels as a multiple of the stage's. Default: that of ``arch``, 1.5 for 'XL',
            else 1.
        out_norm: A batch norm ``norm{i}`` on each returned map, which the official code has for XL only
            (``norm_intermediate_features``). Default: False.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    family = FAMILY
    arch_settings = _ARCHS
    default_init_cfg = []  # PyTorch's own, as in the official code

    def __init__(
        self,
        arch: str | Mapping = '31B',
        kernel_sizes: Sequence[int] | None = None,
        small_kernel: int | Literal['arch'] | None = 'arch',
        dw_ratio: float | None = None,
        *,
        out_norm: bool = False,
        **common: Any,
    ) -> None:
        defaults = _KERNELS_XL if arch == 'XL' else _KERNELS
        kernel_sizes = defaults['kernel_sizes'] if kernel_sizes is None else kernel_sizes
        super().__init__(arch, kernel_sizes, out_norm=out_norm, layer_scale_init_value=0, **common)
        self.small_kernel: Any = defaults['small_kernel'] if small_kernel == 'arch' else small_kernel
        self.dw_ratio = defaults['dw_ratio'] if dw_ratio is None else dw_ratio
        check_kernels(self.kernel_sizes, self.small_kernel, decomposed=False)
        if min(self.dims) * self.dw_ratio < 1:
            raise ValueError(f'dw_ratio {self.dw_ratio} leaves no channel to the large kernels of a stage')
        self._build(self._blocks, partial(_downsampling, norm_cfg=self.norm_cfg, with_cp=self.with_cp))

    @classmethod
    def _parse_arch(cls, arch: str | Mapping) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not isinstance(arch, str):
            arch = {dict(layers='depths', channels='dims').get(key, key): value for key, value in arch.items()}
        return super()._parse_arch(arch)

    def _blocks(self, stage: int, drop_path: float) -> tuple[nn.Module, ...]:
        channels = self.dims[stage]
        hidden = int(channels * self.dw_ratio)
        form = self.small_kernel, False, True, False
        large_kernel = LargeKernelConv(hidden, self.kernel_sizes[stage], *form, self.norm_cfg, self.deploy)
        rest = drop_path, self.norm_cfg, self.with_cp
        return RepLKBlock(channels, large_kernel, hidden, *rest), ConvFFN(channels, *rest)

    def _output_norm(self, channels: int) -> nn.Module:
        return build_branch_norm(self.norm_cfg, channels)

    def _smallest_image(self) -> int:
        return 1

    def num_layers(self) -> int:
        """Number L of layers for layer-wise learning-rate decay, 12 for the published depths."""
        super().num_layers()
        return 3 + math.ceil(self.depths[2] / 2)

    def layer_id(self, name: str, num_layers: int, decay_type: str) -> int:
        """Number of the layer that a parameter belongs to, as the official code gives it for ImageNet.

        A transition belongs to the stage before it, and four blocks of stage 2 are a layer; there is no official number
        for ``decay_type`` 'stage_wise'.
        """
        kind, *indices = name.split('.')
        if decay_type == 'layer_wise' and kind == 'downsample_layers':
            return (0, 1, 2, num_layers - 1)[int(indices[0])]
        if decay_type == 'layer_wise' and kind == 'stages':
            return (1, 2, 3 + int(indices[1]) // 4, num_layers)[int(indices[0])]
        return super().layer_id(name, num_layers, decay_type)
