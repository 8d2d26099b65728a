"""SLaK backbones.

Liu et al., "More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity", ICLR
2023, https://arxiv.org/abs/2207.03620. Official code: https://github.com/VITA-Group/SLaK.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn

from slak_mm.checkpoints import (
    Cause,
    Convention,
    ConversionNotes,
    Family,
    ModelInfo,
    Published,
    Variant,
    differs,
    register_family,
)
from slak_mm.ops import cross_dwconv2d
from slak_mm.sparsity import PRESETS

from .base import LargeKernelBackbone, LargeKernelLayer
from .layers import Branches, DepthwiseBranch, RecomputableBlock, is_plain, perceptron, sum_maps


class LargeKernelConv(LargeKernelLayer):
    """Parallel depthwise convolutions, each with its batch norm, and their sum.

    In training form there are up to three of the following branches, in deployed form one
    ``bias`` and the branches ``tall`` and ``wide``, or ``square``, without norms. M is ``kernel_size``, N the smaller
    ``small_kernel``, both odd.

    ========= ===== ===========================================================
    branch    size  exists
    ========= ===== ===========================================================
    tall      M x N if decomposed (``LoRA1`` or ``Decom1`` in the official code)
    wide      N x M if decomposed (``LoRA2`` or ``Decom2``)
    square    M x M if not decomposed (``lkb_origin``)
    small     N x N if ``small_kernel`` is given (``small_conv``)
    ========= ===== ===========================================================
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
        return self.convolve(x).sum()

    def convolve(self, x: Tensor) -> Branches:
        """The results of the convolutions, and the norms that they are to pass before they are added up."""
        branches: dict[str, Any] = {name: getattr(self, name) for name in self.branch_names}
        if not all(isinstance(branch, DepthwiseBranch) and branch.is_read() for branch in branches.values()):
            y = sum_maps([branch(x) for branch in branches.values()])
            return Branches([y if self.bias is None else y + self.bias.view(-1, 1, 1)])
        kernels: dict[str, Tensor] = {name: branch.kernel for name, branch in branches.items()}
        k_v, k_h, k_s = kernels.get('tall', kernels.get('square')), kernels.get('wide'), kernels.get('small')
        assert k_v is not None
        if self.deploy:
            return Branches([cross_dwconv2d(x, k_v, k_h, bias=self.bias, reduce=True)])
        results = [y for y in cross_dwconv2d(x, k_v, k_h, k_s) if y is not None]
        maps = [branch.with_bias(y) for branch, y in zip(branches.values(), results)]
        return Branches(maps, [branch.bn for branch in branches.values() if branch.bn is not None])

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

    ``y = x + DropPath(gamma * W2 GELU(W1 LayerNorm(L(x))))`` with the expansion ratio 4. There is no
    ``gamma`` if its initial value is 0 or less.
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
        large_kernel: Any = self.large_kernel
        y = large_kernel.convolve(x) if is_plain(large_kernel, LargeKernelConv) else large_kernel(x)
        behind: Any = dict(scale=self.gamma, drop_path=self.drop_path, residual=x)
        return perceptron(y, self.pwconv1, self.act, self.pwconv2, norm=self.norm, **behind)


_ARCHS = {
    'tiny': dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    'small': dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    'base': dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    'large': dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
}


@dataclass(frozen=True, kw_only=True)
class SLaKVariant(Variant):
    """Arguments of a :class:`SLaK` that its tensors tell.

    Attributes:
        decomposed: Tall and wide kernels, or a square one; None if there is none.
        conv_bias: Whether the branches' convolutions have biases.
    """

    decomposed: bool | None
    conv_bias: bool

    title = 'SLaK'
    archs = _ARCHS
    causes = (
        Cause(
            lambda theirs, ours: theirs.is_convnext and not ours.is_convnext,
            'the checkpoint holds ConvNeXt weights (a biased square kernel without branch norms): build the '
            'model with {theirs.arguments}',
            is_final=True,
        ),
        Cause(
            lambda theirs, ours: ours.is_convnext and not theirs.is_convnext,
            'the model is in ConvNeXt mode and the checkpoint holds SLaK weights: build the model with '
            '{theirs.arguments}',
            is_final=True,
        ),
        Cause(
            lambda theirs, ours: ours.decomposed and not theirs.decomposed,
            'the checkpoint has square kernels (lkb_origin) and the model tall and wide ones, which cannot be '
            'computed from them: use decomposed=False or other weights',
        ),
        Cause(
            lambda theirs, ours: theirs.decomposed and not ours.decomposed,
            'the checkpoint has tall and wide kernels (LoRA1, LoRA2) and the model square ones: use decomposed=True',
        ),
        Cause(
            differs('conv_bias'),
            'the large kernels have biases in one of checkpoint and model and none in the other; set '
            'conv_bias={theirs.conv_bias}',
        ),
    )

    @classmethod
    def read(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The attributes of a backbone whose tensors have these shapes, by our names."""
        facts = super().read(shapes)
        kernels = [
            (match[1], shape)
            for key, shape in shapes.items()
            if (match := re.match(r'stages\.\d+\.\d+\.large_kernel\.(\w+)\.conv\.weight$', key))
        ]
        # The folded form keeps no small kernel; it is as long as the rectangles are wide.
        small = [min(shape[2:]) for name, shape in kernels if name != 'square']
        return facts | dict(
            small_kernel=min(small, default=None),
            decomposed=any(name == 'tall' for name, _ in kernels) if kernels else None,
            conv_bias=any(re.search(r'large_kernel\.\w+\.conv\.bias$', key) for key in shapes),
        )

    @property
    def is_convnext(self) -> bool:
        """Whether this is ConvNeXt: one square biased kernel without a norm."""
        return self.decomposed is False and not self.branch_norm and self.conv_bias and self.small_kernel is None

    def words(self) -> list[str]:
        """What the variant is, in parts of a sentence."""
        return (['ConvNeXt'] if self.is_convnext else []) + super().words()

    def kernel_words(self) -> list[str]:
        """The large kernels in words."""
        form = 'decomposed' if self.decomposed else 'square'
        small = f' with small {self.small_kernel}' if self.small_kernel else ''
        return [f'{words} {form}{small}' for words in super().kernel_words()]

    @property
    def arguments(self) -> str:
        """What :class:`SLaK` is called with for such weights."""
        named = f'arch={self.arch!r}, width_factor={self.width_factor:g}, ' if self.arch and self.width_factor else ''
        return (
            f'{named}kernel_sizes={tuple(self.kernel_sizes)}, small_kernel={self.small_kernel}, '
            f'decomposed={self.decomposed}, branch_norm={self.branch_norm}, conv_bias={self.conv_bias}'
        )


def _finish(state_dict: dict[str, Any], prefix: str, notes: ConversionNotes) -> dict[str, Any]:
    """Read 1x1 convolutions as linear layers, and tell mmpretrain's two kinds of norm apart.

    Its classifiers call the norm after global pooling `norm3`, as downstream code calls the
    output norm of the last stage. Downstream backbones have the other three as well.
    """
    is_classifier = notes.format == 'convnext-mmpretrain' and not any(
        f'{prefix}norm{i}.weight' in state_dict for i in range(3)
    )
    finished = {}
    for key, value in state_dict.items():
        shape = tuple(getattr(value, 'shape', ()))
        if len(shape) == 4 and shape[2:] == (1, 1) and re.search(r'\.pwconv[12]\.weight$', key):
            value = value.flatten(1)
        new = key
        if is_classifier and key.startswith(f'{prefix}norm3.'):
            new = notes.renamed[key] = f'{prefix}norm.{key.removeprefix(f"{prefix}norm3.")}'
        finished[new] = value
    return finished


def _official(state_dict: dict[str, Any], prefix: str, spelling: str) -> tuple[dict[str, Any], str]:
    """Take the official spelling of folded kernels for them."""
    folded = re.compile(re.escape(prefix) + r'stages\.\d+\.\d+\.large_kernel\.bias$')
    return state_dict, 'merged' if any(map(folded.match, state_dict)) else spelling


_BLOCK = 'stages.{i}.{j}.'
_LARGE = 'stages.{i}.{j}.large_kernel.'
_LKB = _LARGE + 'lkb_origin.'
_MERGED = _LARGE + 'lkb_reparam.'
_TIMM = 'stages.{i}.blocks.{j}.'

_README = 'https://github.com/VITA-Group/SLaK (README)'
_CONVNEXT_README = 'https://github.com/facebookresearch/ConvNeXt (README)'
_CONVNEXT_PAPER = 'ConvNeXt, tables 1 to 3'
_CONVNEXT_FILES = 'https://dl.fbaipublicfiles.com/convnext/convnext_{}_1k_224_ema.pth'
_DRIVE = 'https://drive.google.com/file/d/{}/view'
_SURF = 'https://surfdrive.surf.nl/files/index.php/s/{}/download'


def _slak(arch: str, *kernel_sizes: int) -> dict[str, Any]:
    return dict(type='SLaK', arch=arch, kernel_sizes=kernel_sizes or (51, 49, 47, 13), small_kernel=5, width_factor=1.3)


def _convnext(arch: str) -> dict[str, Any]:
    sizes = dict(kernel_sizes=(7, 7, 7, 7), small_kernel=None, width_factor=1.0)
    return dict(type='SLaK', arch=arch, **sizes, decomposed=False, branch_norm=False, conv_bias=True)


def _imagenet(
    name: str, url: str, backbone: dict[str, Any], top1: float, params: float, flops: float, source: str = _README
) -> ModelInfo:
    # The published weights of SLaK have about 40 % zeros, and the figures count the others.
    counted = 'nonzero' if name.startswith('slak') else 'all'
    figures = dict(top1_percent=top1, params_m=params, flops_g=flops)
    return ModelInfo(name, url, 'classification', backbone, source, figures=figures, counted=counted)


def _upernet(size: str, url: str, backbone: dict[str, Any], miou: float, params: float, flops: float) -> ModelInfo:
    config = f'upernet_slak_{size}_ade20k'
    figures = dict(miou_percent=miou, params_m=params, flops_g=flops)
    name, counted = f'{config}_160k', 'no_large_kernels'
    return ModelInfo(name, url, 'segmentation', backbone, _README, f'{config}.py', figures, counted)


def _cascade(schedule: str, url: str | None, config: str, box: float, mask: float) -> ModelInfo:
    name, figures = f'cascade_mask_rcnn_slak_t_coco_{schedule}', dict(box_ap_percent=box, mask_ap_percent=mask)
    return ModelInfo(name, url, 'detection', _slak('tiny'), _README, config, figures)


_MODELS = (
    _imagenet('slak_t_in1k_300e', _DRIVE.format('1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4'), _slak('tiny'), 82.5, 30, 5.0),
    _imagenet('slak_s_in1k_300e', _DRIVE.format('1etM6KQbnlsgDAZ37adsQJ3UI8Bbv2AVe'), _slak('small'), 83.8, 55, 9.8),
    _imagenet('slak_b_in1k_300e', _DRIVE.format('1duUxUD3RSblQ6eDHd0n-u0aulwGypf1j'), _slak('base'), 84.0, 95, 17.1),
    # Of 31 and 61 the source gives the largest kernel only; the others are the usual reading.
    _imagenet('slak_t_k31_in1k_120e', _SURF.format('VXzBxFXQdlAQ7h8'), _slak('tiny', 31, 29, 27, 13), 81.5, 30, 4.8),
    _imagenet('slak_t_k51_in1k_120e', _SURF.format('WiQYWNclJ9bW5XV'), _slak('tiny'), 81.6, 30, 5.0),
    _imagenet('slak_t_k61_in1k_120e', _SURF.format('VpR1te71NmVImJb'), _slak('tiny', 61, 59, 57, 13), 81.5, 31, 5.2),
    # Distilled from SLaK. The source does not say whether a norm follows the 7x7 convolution; if it does, the weights
    # are refused and the error says so.
    _imagenet('convnext_l2s_t_in1k_300e', _SURF.format('cR6KLvxjlUshUQA'), _convnext('tiny'), 83.1, 29, 4.5),
    _imagenet('convnext_l2s_s_in1k_300e', _SURF.format('PYqL3rVff3Nu2sP'), _convnext('small'), 84.3, 50, 8.7),
    _upernet('t', _SURF.format('cc6Pqb7IZaecWMv'), _slak('tiny'), 47.6, 65, 936),
    _upernet('s', _SURF.format('HMLBXtKUDY6wyFF'), _slak('small'), 49.4, 91, 1028),
    _upernet('b', _SURF.format('JDZ6dMBMZDxUHQG'), _slak('base'), 50.0, 135, 1172),
    # From the weights of 120 epochs, and from those of 300.
    _cascade('1x', _SURF.format('2IvPyGgSTT2RvPu'), 'cascade_mask_rcnn_slak_t_coco_1x.py', 48.4, 41.8),
    _cascade('3x', None, 'cascade_mask_rcnn_slak_t_coco.py', 51.3, 44.3),
    *(
        _imagenet(name, _CONVNEXT_FILES.format(arch), _convnext(arch), top1, params, flops, _CONVNEXT_README)
        for name, arch, top1, params, flops in (
            ('convnext_t_in1k_300e', 'tiny', 82.1, 28, 4.5),
            ('convnext_s_in1k_300e', 'small', 83.1, 50, 8.7),
            ('convnext_b_in1k_300e', 'base', 83.8, 89, 15.4),
        )
    ),
)


def _depthwise(kind: str) -> list[str]:
    """A tensor of ConvNeXt's depthwise convolution in its code bases."""
    return [f'{name}.{kind}' for name in (_BLOCK + 'dwconv', _TIMM + 'conv_dw', _BLOCK + 'depthwise_conv')]


# `merged` is the official code's form of a square kernel after re-parameterization. ConvNeXt
# code bases have a bare biased convolution where SLaK has `lkb_origin`.
FAMILY = register_family(
    Family(
        name='slak',
        titles=('SLaK', 'ConvNeXt'),
        spellings=('LoRA', 'Decom', 'merged', 'facebook', 'timm', 'mmpretrain'),
        table=(
            # ours, LoRA, Decom, merged, facebook, timm, mmpretrain
            ('downsample_layers.0.0.', '=', '=', '=', '=', 'stem.0.', '='),
            ('downsample_layers.0.1.', '=', '=', '=', '=', 'stem.1.', '='),
            ('downsample_layers.{i}.0.', '=', '=', '=', '=', 'stages.{i}.downsample.0.', '='),
            ('downsample_layers.{i}.1.', '=', '=', '=', '=', 'stages.{i}.downsample.1.', '='),
            (_LARGE + 'tall.', _LARGE + 'LoRA1.', _LARGE + 'Decom1.', '-', '-', '-', '-'),
            (_LARGE + 'wide.', _LARGE + 'LoRA2.', _LARGE + 'Decom2.', '-', '-', '-', '-'),
            (_LARGE + 'small.', _LARGE + 'small_conv.', _LARGE + 'small_conv.', '-', '-', '-', '-'),
            (_LARGE + 'square.conv.weight', *[_LKB + 'conv.weight'] * 2, _MERGED + 'weight', *_depthwise('weight')),
            (_LARGE + 'square.conv.bias', *[_LKB + 'conv.bias'] * 2, '-', *_depthwise('bias')),
            (_LARGE + 'square.bn.', _LKB + 'bn.', _LKB + 'bn.', '-', '-', '-', '-'),
            (_LARGE + 'bias', '-', '-', _MERGED + 'bias', '-', '-', '-'),
            (_BLOCK + 'norm.', '=', '=', '=', '=', _TIMM + 'norm.', '='),
            (_BLOCK + 'pwconv1.', '=', '=', '=', '=', _TIMM + 'mlp.fc1.', _BLOCK + 'pointwise_conv1.'),
            (_BLOCK + 'pwconv2.', '=', '=', '=', '=', _TIMM + 'mlp.fc2.', _BLOCK + 'pointwise_conv2.'),
            (_BLOCK + 'gamma', '=', '=', '=', '=', _TIMM + 'gamma', '='),
            ('norm{i}.', '=', '=', '=', '=', '=', '='),
            *((f'norm.{kind}', '=', '=', '=', '=', f'head.norm.{kind}', '=') for kind in ('weight', 'bias')),
            *((f'head.{kind}', '=', '=', '=', '=', *[f'head.fc.{kind}'] * 2) for kind in ('weight', 'bias')),
        ),
        formats=(
            ('official-LoRA', r'stages\.\d+\.\d+\.large_kernel\.LoRA[12]\.', ('LoRA',)),
            ('official-Decom', r'stages\.\d+\.\d+\.large_kernel\.Decom[12]\.', ('Decom',)),
            ('official-merged', r'stages\.\d+\.\d+\.large_kernel\.lkb_reparam\.', ('merged', 'LoRA')),
            ('official-lkb', r'stages\.\d+\.\d+\.large_kernel\.lkb_origin\.', ('LoRA',)),
            ('ours-deployed', r'stages\.\d+\.\d+\.large_kernel\.bias$', ()),
            ('ours', r'stages\.\d+\.\d+\.large_kernel\.(tall|wide|square)\.conv\.', ()),
            ('convnext-timm', r'stages\.\d+\.blocks\.\d+\.conv_dw\.', ('timm',)),
            ('convnext-mmpretrain', r'stages\.\d+\.\d+\.depthwise_conv\.', ('mmpretrain',)),
            ('convnext-facebook', r'stages\.\d+\.\d+\.dwconv\.', ('facebook',)),
        ),
        variant=SLaKVariant,
        finish=_finish,
        official=_official,
        models=_MODELS,
        published={
            'upernet_convnext_t_ade20k': Published(60, 939, 'all', _CONVNEXT_PAPER),
            'cascade_mask_rcnn_convnext_t_coco': Published(86, 741, 'all', _CONVNEXT_PAPER),
        },
        conventions=dict(
            nonzero=Convention(
                'non-zero weights. Here every layer is equally sparse; the published masks are not '
                '(SNIP), which costs as many parameters and fewer FLOPs: the densities that SNIP gives for '
                'random weights and images come to 5.02, 9.73 and 16.96 G for SLaK-T, -S and -B',
                lambda cost: (cost.parameters - cost.masked_parameters, cost.flops - cost.masked_flops),
                needs_masks=True,
            ),
            no_large_kernels=Convention(
                'the counter of mmcv did not know the large kernels, a CUDA operator of the '
                'official code: their FLOPs are missing, and their masked weights count as parameters. PeLK '
                '(CVPR 2024, table 2) counts non-zero weights and all FLOPs of SLaK-T, -S and -B: 64, 89 and '
                '131 M, 957, 1057 and 1210 G',
                lambda cost: (
                    cost.parameters - cost.masked_parameters + cost.masked_large_parameters,
                    cost.flops - cost.masked_flops - cost.large_flops + cost.masked_large_flops,
                ),
                needs_masks=True,
            ),
        ),
    )
)
_RECIPE = dict(mode='set', distribution='snip', sparsity=0.4, stop_fraction=1.0, dense_above=0.99, selection='all')
PRESETS['slak_t'] = dict(_RECIPE, update_interval=2000, prune_rate=0.5)
PRESETS['slak_s'] = PRESETS['slak_b'] = dict(_RECIPE, update_interval=100, prune_rate=0.3)


@MODELS.register_module()
class SLaK(LargeKernelBackbone):
    """SLaK, and with other arguments RepLKNet-like and ConvNeXt backbones.

    The paper's networks are the defaults with ``arch`` 'tiny', 'small' or 'base'. The width of stage i is ``int(dims[i]
    * width_factor)``: 124, 249, 499, 998 for tiny and small, 166, 332, 665, 1331 for base.

    ``kernel_sizes=(7, 7, 7, 7), small_kernel=None, decomposed=False, width_factor=1.0`` is the
    ConvNeXt mode of the official code; with ``branch_norm=False, conv_bias=True`` as well it is
    ConvNeXt (Liu et al., CVPR 2022) itself, whose checkpoints are accepted.

    The other arguments are those of :class:`~slak_mm.models.LargeKernelBackbone`.

    Args:
        kernel_sizes: M of each stage in pixels of its map, odd. Default: (51, 49, 47, 13).
        small_kernel: N, the short side of the rectangular kernels and the size of the small one, odd and smaller than
            every M; None for no small kernel, which needs ``decomposed=False``. Default: 5.
        width_factor: Multiplies ``dims``. Default: 1.3.
        decomposed: M x N and N x M kernels in place of an M x M one. Default: True.
        branch_norm: A batch norm behind each kernel. Default: True.
        conv_bias: A bias in each depthwise convolution. Default: False.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    family = FAMILY
    arch_settings = _ARCHS

    def __init__(
        self,
        arch: str | dict = 'tiny',
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        small_kernel: int | None = 5,
        width_factor: float = 1.3,
        decomposed: bool = True,
        branch_norm: bool = True,
        conv_bias: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(arch, kernel_sizes, width_factor, **common)
        _check_kernels(self.kernel_sizes, small_kernel, decomposed)
        self.small_kernel = small_kernel
        self.decomposed = decomposed
        self.branch_norm = branch_norm
        self.conv_bias = conv_bias
        self._build(self._block)

    def _block(self, stage: int, drop_path: float) -> SLaKBlock:
        channels, size = self.dims[stage], self.kernel_sizes[stage]
        form = self.small_kernel, self.decomposed, self.branch_norm, self.conv_bias
        large_kernel = LargeKernelConv(channels, size, *form, self.norm_cfg, self.deploy)
        return SLaKBlock(channels, large_kernel, drop_path, self.layer_scale_init_value, self.with_cp)

    @property
    def recipe(self) -> Mapping[str, Any] | None:
        """The published sparse training of this network; ConvNeXt is dense."""
        return PRESETS['slak_t'] if self.decomposed else None


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
