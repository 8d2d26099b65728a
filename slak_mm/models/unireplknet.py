"""UniRepLKNet backbones.

Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and
Image Recognition", CVPR 2024, https://arxiv.org/abs/2311.15599. Official code: https://github.com/AILab-CVC/UniRepLKNet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slak_mm.checkpoints import Cause, ConversionNotes, Family, ModelInfo, Sizes, Variant, register_family
from slak_mm.ops import cross_dwconv2d
from slak_mm.ops._context import is_counted

from .base import LargeKernelBackbone, LargeKernelLayer
from .layers import DepthwiseBranch, batch_norm_affine, is_foldable, is_plain, sum_maps
from .shiftwise import ShiftWiseBlock, conv_downsampling

#: Size and dilation of the kernels beside a large one, by its size. Smaller kernels have none beside them.
DILATED: dict[int, tuple[tuple[int, int], ...]] = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
_SIZES = (0, 3, 5, *DILATED)


class DilatedReparamConv(LargeKernelLayer):
    """Depthwise convolution with a large kernel and dilated small ones beside it, each with its batch norm; their sum.

    In training form the branches are ``large``, K x K, and ``k{k}_r{r}`` for each kernel of size k and dilation r of
    :data:`DILATED`. A kernel of 3 or 5 is alone and has no norm: ``plain``. In deployed form there is ``large`` or
    ``plain`` with a bias. A dilated convolution is one with a larger kernel, and so is the sum of all branches where
    the norms do not look at the batch.

    Args:
        channels: C.
        kernel_size: K, 3, 5 or a key of :data:`DILATED`.
        norm_cfg: The batch norms.
        deploy: Build the deployed form. Default: False.
    """

    def __init__(self, channels: int, kernel_size: int, norm_cfg: dict, deploy: bool = False) -> None:
        super().__init__()
        self.deploy = deploy
        is_large = kernel_size in DILATED
        branches = {'large' if is_large else 'plain': (kernel_size, 1)}
        if is_large and not deploy:
            branches.update((f'k{k}_r{r}', (k, r)) for k, r in DILATED[kernel_size])
        self.branch_names = tuple(branches)
        for name, (size, dilation) in branches.items():
            norm = norm_cfg if is_large and not deploy else None
            self.add_module(name, DepthwiseBranch(channels, (size, size), deploy, norm, dilation))

    def _branches(self) -> list[Any]:
        return [getattr(self, name) for name in self.branch_names]

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        branches = self._branches()
        if not all(isinstance(branch, DepthwiseBranch) and branch.is_read() for branch in branches):
            return sum_maps([branch(x) for branch in branches])
        # A FLOP counter sees each branch as it is: the cost of the training form is that of training.
        counted = is_counted()
        if all(_is_affine(branch.bn) for branch in branches) and not counted:
            kernel, bias = self.merged()
            return cross_dwconv2d(x, kernel, bias=bias, reduce=True)
        # On CPUs PyTorch's dilated depthwise convolution takes four times as long as a kernel filled up with zeros.
        filled = x.device.type == 'cpu' and not counted
        return sum_maps(
            [
                branch.finish(cross_dwconv2d(x, branch.kernel)[0]) if filled or branch.dilation == 1 else branch(x)
                for branch in branches
            ]
        )

    def merged(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, K, K) and bias (C,) that give the sum of all branches in eval mode."""
        kernels, biases = zip(*(branch.folded() for branch in self._branches()))
        size = kernels[0].shape[-1]
        kernel = sum_maps([F.pad(k, ((size - k.shape[-1]) // 2,) * 4) for k in kernels])
        return kernel, sum_maps(biases)

    @torch.no_grad()
    def switch_to_deploy(self, norm: _BatchNorm | None = None) -> None:
        """Fold the branches, and a batch norm behind the layer, into one kernel and one bias.

        Nothing is done if something else than a convolution and its norm is in a branch, or than a batch norm behind.

        Args:
            norm: The batch norm behind the layer. Default: None.
        """
        branches = self._branches()
        if self.deploy or not all(isinstance(branch, DepthwiseBranch) and branch.is_foldable() for branch in branches):
            return
        kernel, bias = self.merged()
        if norm is not None:
            if not is_foldable(norm, _BatchNorm, (1, len(kernel), 1, 1)):
                return
            scale, shift = batch_norm_affine(norm)
            kernel, bias = kernel * scale.view(-1, 1, 1), bias * scale + shift
        first, *rest = self.branch_names
        for name in rest:
            delattr(self, name)
        branch = DepthwiseBranch(len(kernel), (kernel.shape[1], kernel.shape[2]), bias=True, norm_cfg=None)
        branch.conv.weight, branch.conv.bias = nn.Parameter(kernel.unsqueeze(1)), nn.Parameter(bias)
        setattr(self, first, branch.train(self.training))
        self.branch_names = (first,)
        self.deploy = True


def _is_affine(norm: _BatchNorm | None) -> bool:
    """Whether a norm multiplies and adds constants, or is not there."""
    return norm is None or (
        is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm) and not norm.training and norm.running_mean is not None
    )


_ARCHS = {
    'atto': dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    'femto': dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    'pico': dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    'nano': dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    'tiny': dict(depths=(3, 3, 18, 3), dims=(80, 160, 320, 640)),
    'small': dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    'base': dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    'large': dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    'xlarge': dict(depths=(3, 3, 27, 3), dims=(256, 512, 1024, 2048)),
}
# Published kernel sizes by depths; the blocks of a stage repeat its row.
_PATTERNS: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {
    (2, 2, 6, 2): ((3,), (13,), (13,), (13,)),
    (2, 2, 8, 2): ((3,), (13,), (13,), (13,)),
    (3, 3, 18, 3): ((3,), (13,), (13, 3), (13,)),
    (3, 3, 27, 3): ((3,), (13,), (13, 3, 3), (13,)),
}


class BlockSizes(Sizes):
    """Kernel size of each block of a stage, written as the sizes that are repeated."""

    def __str__(self) -> str:
        repeated = next(n for n in range(1, len(self) + 1) if self == (self[:n] * len(self))[: len(self)])
        return ' '.join(map(str, self[:repeated]))


@dataclass(frozen=True, kw_only=True)
class UniRepLKNetVariant(Variant):
    """Arguments of a :class:`UniRepLKNet` that its tensors tell.

    Attributes:
        block_kernels: :class:`BlockSizes` of each stage.
    """

    block_kernels: Sizes

    title = 'UniRepLKNet'
    archs = _ARCHS
    causes = (
        Cause(
            # Other depths have other kernels, and are said to be another architecture.
            lambda theirs, ours: theirs.depths == ours.depths and theirs.block_kernels != ours.block_kernels,
            'other kernel sizes: the blocks of the checkpoint have {theirs.block_kernels}, those of the model '
            '{ours.block_kernels}; set kernel_sizes',
        ),
    )

    @classmethod
    def read(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The attributes of a backbone whose tensors have these shapes, by our names."""
        facts = super().read(shapes)
        found = {
            match[1]: shape[-1]
            for key, shape in shapes.items()
            if (match := re.match(r'stages\.(\d+\.\d+)\.large_kernel\.(large|plain)\.conv\.weight$', key))
        }
        kernels = [
            BlockSizes(found.get(f'{stage}.{block}', 0) for block in range(depth))
            for stage, depth in enumerate(facts['depths'])
        ]
        return facts | dict(
            kernel_sizes=Sizes(),
            block_kernels=Sizes(kernels),  # type: ignore[arg-type]
            branch_norm=True,
            deploy=any(key.endswith('.ffn.fc2.bias') for key in shapes),
        )

    def words(self) -> list[str]:
        """What the variant is, in parts of a sentence."""
        return ['UniRepLKNet', *super().words()]

    def kernel_words(self) -> list[str]:
        """The kernels in words."""
        return [f'kernels {self.block_kernels}']


def _finish(state_dict: dict[str, Any], prefix: str, notes: ConversionNotes) -> dict[str, Any]:
    """Read what the official code wrote in its first week (up to revision 5349bce).

    Its deployed large kernels had the names of small ones, and its small ones a bias before their norm, which is
    subtracted from the running mean.
    """
    if notes.format != 'unireplknet':
        return state_dict
    plain = re.compile(rf'({re.escape(prefix)}stages\.\d+\.\d+\.)large_kernel\.plain\.conv\.(weight|bias)$')
    finished = {}
    for key, value in state_dict.items():
        match = plain.match(key)
        weight = state_dict.get(f'{match[1]}large_kernel.plain.conv.weight') if match else None
        if weight is not None and weight.dim() == 4 and weight.shape[-1] in DILATED:
            new = key.replace('.plain.', '.large.')
            notes.renamed.update((theirs, new) for theirs, ours in notes.renamed.items() if ours == key)
            finished[new] = value
        else:
            finished[key] = value
    for match in filter(None, map(plain.match, state_dict)):
        mean, bias = f'{match[1]}norm.running_mean', finished.get(match[0])
        if match[2] == 'bias' and bias is not None and mean in finished and finished[mean].shape == bias.shape:
            finished[mean] = finished[mean] - finished.pop(match[0])
    return finished


_BLOCK = 'stages.{i}.{j}.'
_LARGE = 'stages.{i}.{j}.large_kernel.'
_README = 'https://github.com/AILab-CVC/UniRepLKNet (README)'
_ADDRESS = 'https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/{}.pth'
_LETTERS = dict(zip(('a', 'f', 'p', 'n', 't', 's', 'b', 'l', 'xl'), _ARCHS))

# By the first word of a file: task, size of the image if it is not the usual one, and what the figures are.
_TASKS: dict[str, tuple[str, tuple[int, int] | None, tuple[str, ...]]] = {
    'unireplknet': ('classification', (384, 384), ('top1_percent',)),
    'upernet': ('segmentation', (640, 2560), ('miou_percent', 'miou_ms_percent')),
    'casc': ('detection', None, ('box_ap_percent', 'mask_ap_percent')),
}
# Published files and their figures, the last two in millions and 10^9. What the table of the ImageNet-22K weights
# gives as FLOPs are those of 384 x 384.
_FIGURES: dict[str, tuple[float, ...]] = {
    'unireplknet_a_in1k_224_acc77.03': (77.0, 4.4, 0.6),
    'unireplknet_f_in1k_224_acc78.58': (78.6, 6.2, 0.9),
    'unireplknet_p_in1k_224_acc80.23': (80.2, 10.7, 1.6),
    'unireplknet_n_in1k_224_acc81.64': (81.6, 18.3, 2.8),
    'unireplknet_t_in1k_224_acc83.21': (83.2, 31, 4.9),
    'unireplknet_s_in1k_224_acc83.91': (83.9, 56, 9.1),
    'unireplknet_s_in22k_to_in1k_384_acc86.44': (86.4, 56, 26.7),
    'unireplknet_b_in22k_to_in1k_384_acc87.40': (87.4, 98, 47.2),
    'unireplknet_l_in22k_to_in1k_384_acc87.88': (87.9, 218, 105.4),
    'unireplknet_xl_in22k_to_in1k_384_acc87.96': (88.0, 386, 187),
    'unireplknet_s_in22k_pretrain': (56,),
    'unireplknet_b_in22k_pretrain': (98,),
    'unireplknet_l_in22k_pretrain': (218,),
    'unireplknet_xl_in22k_pretrain': (386,),
    'upernet_unireplknet_t_512_160k_ade20k_miou48.56': (48.6, 49.1, 61, 946),
    'upernet_unireplknet_s_512_160k_ade20k_miou50.46': (50.5, 51.0, 86, 1036),
    'upernet_unireplknet_s_in22k_512_160k_ade20k_miou51.86': (51.9, 52.7, 86, 1036),
    'upernet_unireplknet_s_in22k_640_160k_ade20k_miou52.28': (52.3, 52.7, 86),
    'upernet_unireplknet_b_in22k_640_160k_ade20k_miou53.52': (53.5, 53.9, 130, 1850),
    'upernet_unireplknet_l_in22k_640_160k_ade20k_miou54.70': (54.5, 55.0, 254, 2507),
    'upernet_unireplknet_xl_in22k_640_160k_ade20k_miou55.18': (55.2, 55.6, 425, 3420),
    'casc_mask_rcnn_unireplknet_t_in1k_3x_coco_ap51.75': (51.7, 44.9, 89, 749),
    'casc_mask_rcnn_unireplknet_s_in1k_3x_coco_ap52.95': (53.0, 45.9, 113, 835),
    'casc_mask_rcnn_unireplknet_s_in22k_3x_coco_ap54.27': (54.3, 47.1, 113, 835),
    'casc_mask_rcnn_unireplknet_b_in22k_3x_coco_ap54.78': (54.8, 47.4, 155, 978),
    'casc_mask_rcnn_unireplknet_l_in22k_3x_coco_ap55.82': (55.8, 48.4, 276, 1385),
    'casc_mask_rcnn_unireplknet_xl_in22k_3x_coco_ap56.39': (56.4, 49.0, 443, 1952),
}
_CONFIGS = {
    'upernet_unireplknet_t_512_160k_ade20k': 'upernet_unireplknet_t_ade20k.py',
    'upernet_unireplknet_s_512_160k_ade20k': 'upernet_unireplknet_s_ade20k.py',
    'upernet_unireplknet_s_in22k_512_160k_ade20k': 'upernet_unireplknet_s_ade20k.py',
    'upernet_unireplknet_b_in22k_640_160k_ade20k': 'upernet_unireplknet_b_ade20k.py',
    'casc_mask_rcnn_unireplknet_t_in1k_3x_coco': 'cascade_mask_rcnn_unireplknet_t_coco.py',
    'casc_mask_rcnn_unireplknet_s_in1k_3x_coco': 'cascade_mask_rcnn_unireplknet_s_coco.py',
    'casc_mask_rcnn_unireplknet_s_in22k_3x_coco': 'cascade_mask_rcnn_unireplknet_s_coco.py',
}


def _model(file: str, values: tuple[float, ...]) -> ModelInfo:
    """The zoo entry of a published file; its name is the file's without the figure at the end."""
    name = re.sub(r'_[a-z]+[\d.]+$', '', file)
    parts = name.split('_')
    arch = _LETTERS[parts[parts.index('unireplknet') + 1]]
    task, size, keys = _TASKS[parts[0]]
    evaluation: dict[str, Any] = {}
    if name.endswith('_384'):  # images are warped, not cropped
        evaluation = dict(input_size=(3, 384, 384), crop_pct=1.0, crop_mode='squash')
    elif name.endswith('_pretrain'):
        side = 192 if arch in ('large', 'xlarge') else 224
        evaluation, keys = dict(input_size=(3, side, side), num_classes=21841), ()
    return ModelInfo(
        name,
        _ADDRESS.format(file),
        task,
        dict(type='UniRepLKNet', arch=arch),
        _README,
        _CONFIGS.get(name, ''),
        figures=dict(zip((*keys, 'params_m', 'flops_g'), values)),
        counted='deployed',
        evaluation=evaluation,
        size=size if size and str(size[0]) in parts else None,
    )


def _dilated_rows() -> Iterator[tuple[str, str]]:
    for k, r in sorted(set(chain.from_iterable(DILATED.values()))):
        yield f'{_LARGE}k{k}_r{r}.conv.weight', f'{_BLOCK}dwconv.dil_conv_k{k}_{r}.weight'
        yield f'{_LARGE}k{k}_r{r}.bn.', f'{_BLOCK}dwconv.dil_bn_k{k}_{r}.'


# The names of the deployed form differ in what there is, not in how it is called.
FAMILY = register_family(
    Family(
        name='unireplknet',
        titles=('UniRepLKNet',),
        spellings=('official',),
        table=(
            (_LARGE + 'large.conv.weight', _BLOCK + 'dwconv.lk_origin.weight'),
            (_LARGE + 'large.conv.bias', _BLOCK + 'dwconv.lk_origin.bias'),
            (_LARGE + 'large.bn.', _BLOCK + 'dwconv.origin_bn.'),
            *_dilated_rows(),
            (_LARGE + 'plain.conv.weight', _BLOCK + 'dwconv.weight'),
            (_LARGE + 'plain.conv.bias', _BLOCK + 'dwconv.bias'),
            (_BLOCK + 'ffn.fc1.', _BLOCK + 'pwconv1.1.'),
            (_BLOCK + 'ffn.grn.', _BLOCK + 'act.1.'),
            (_BLOCK + 'ffn.fc2.', _BLOCK + 'pwconv2.0.'),
            (_BLOCK + 'ffn.norm.', _BLOCK + 'pwconv2.2.'),
            *((_BLOCK + same, '=') for same in ('norm.', 'se.', 'gamma')),
            *((same, '=') for same in ('downsample_layers.{i}.{j}.', 'norm{i}.', 'norm.', 'head.')),
        ),
        formats=(
            ('unireplknet', r'stages\.\d+\.\d+\.dwconv\.lk_origin\.', ('official',)),
            # Where no kernel is large: ConvNeXt has the one, ShiftWise the other.
            ('unireplknet', (r'stages\.\d+\.\d+\.dwconv\.', r'stages\.\d+\.\d+\.pwconv1\.1\.'), ('official',)),
            ('ours-deployed', r'stages\.\d+\.\d+\.large_kernel\.(large|plain)\.conv\.bias$', ()),
            ('ours', r'stages\.\d+\.\d+\.large_kernel\.(large|plain)\.conv\.weight$', ()),
        ),
        variant=UniRepLKNetVariant,
        finish=_finish,
        models=tuple(_model(file, values) for file, values in _FIGURES.items()),
    )
)


@MODELS.register_module()
class UniRepLKNet(LargeKernelBackbone):
    """UniRepLKNet.

    A block is a depthwise convolution of a large or small kernel (:class:`DilatedReparamConv`), batch norm,
    squeeze-excite, and a feed-forward layer with GRN and batch norm:
    :class:`~slak_mm.models.shiftwise.ShiftWiseBlock`.

    The other arguments are those of :class:`~slak_mm.models.LargeKernelBackbone`.

    Args:
        arch: 'atto', 'femto', 'pico', 'nano', 'tiny', 'small', 'base', 'large', 'xlarge' or ``dict(depths=…,
            dims=…)``. Default: 'tiny'.
        kernel_sizes: An entry for each stage, a size for all of its blocks or one for each of them; or one size for
            each block of the network. In pixels of the map: 0 (neither convolution nor norm), 3, 5, 7, 9, 11, 13, 15
            or 17. Default: the published sizes for these depths.
        width_factor: Multiplies ``dims``. Default: 1.0.
        layer_scale_init_value: Initial layer scale; 0 or less for none. Default: 1e-6.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    family = FAMILY
    arch_settings = _ARCHS

    def __init__(
        self,
        arch: str | dict = 'tiny',
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        width_factor: float = 1.0,
        *,
        layer_scale_init_value: float = 1e-6,
        **common: Any,
    ) -> None:
        sizes = _by_blocks(kernel_sizes, self._parse_arch(arch)[0])
        super().__init__(arch, sizes, width_factor, layer_scale_init_value=layer_scale_init_value, **common)  # type: ignore[arg-type]
        self._require_channels(4)  # the squeeze-excite layers divide the width by four
        sizes_of_blocks = chain.from_iterable(sizes)
        self._build(lambda stage, rate: self._block(stage, next(sizes_of_blocks), rate), conv_downsampling)

    def _block(self, stage: int, kernel_size: int, drop_path: float) -> ShiftWiseBlock:
        channels, form = self.dims[stage], (self.norm_cfg, self.deploy)
        layer = DilatedReparamConv(channels, kernel_size, *form) if kernel_size else nn.Identity()
        rest = drop_path, self.layer_scale_init_value, self.with_cp, self.deploy
        block = ShiftWiseBlock(channels, layer, self.norm_cfg, *rest)
        if not kernel_size:
            block.norm = None
        return block

    def _smallest_image(self) -> int:
        return 1


def _by_blocks(
    kernel_sizes: Sequence[int | Sequence[int]] | None, depths: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The kernel size of each block, by stages."""
    if kernel_sizes is None:
        if tuple(depths) not in _PATTERNS:
            raise ValueError(
                f'there are no usual kernel_sizes for the depths {tuple(depths)}: give one entry for each stage or '
                'block'
            )
        return tuple((row * depth)[:depth] for row, depth in zip(_PATTERNS[tuple(depths)], depths))
    entries = iter(kernel_sizes)
    if len(kernel_sizes) == sum(depths) != len(depths):
        kernel_sizes = [[next(entries) for _ in range(depth)] for depth in depths]  # type: ignore[misc]
    if len(kernel_sizes) != len(depths):
        raise ValueError(
            f'kernel_sizes needs one entry for each of the {len(depths)} stages or the {sum(depths)} blocks, '
            f'got {len(kernel_sizes)}'
        )
    sizes = tuple((s,) * depth if isinstance(s, int) else tuple(s) for s, depth in zip(kernel_sizes, depths))
    if [len(stage) for stage in sizes] != list(depths):
        raise ValueError(
            f'kernel_sizes needs one entry for each of the {"/".join(map(str, depths))} blocks of the stages, got '
            f'{"/".join(str(len(stage)) for stage in sizes)}'
        )
    for size in chain.from_iterable(sizes):
        if size not in _SIZES:
            raise ValueError(f'kernel_sizes must be among {", ".join(map(str, _SIZES))}, got {size!r}')
    return sizes
