"""Published checkpoints: names, addresses and the figures their authors give.

The figures are copied from the pages named in ``source``; none of them was measured with this
project. No checksums are published, so ``size`` and ``sha256`` are ``None`` and a download can
only be checked by reading it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ['ZOO', 'ModelInfo', 'find_model', 'normalize_url', 'zoo_table']

_SLAK_README = 'https://github.com/VITA-Group/SLaK (README)'
_SHIFTWISE_README = 'https://github.com/lidc54/shift-wiseConv (README)'
_CONVNEXT_README = 'https://github.com/facebookresearch/ConvNeXt (README)'


@dataclass(frozen=True)
class ModelInfo:
    """One published checkpoint.

    Attributes:
        name: The name by which ``load_pretrained`` and ``init_cfg`` know it.
        url: Direct download address; ``None`` where none was published.
        task: 'classification', 'segmentation' or 'detection'.
        backbone: Arguments of our backbone class that fit the weights.
        config: The config of this project it belongs to, '' for a bare backbone.
        figures: Published figures, units in the names: ``top1_percent``,
            ``miou_percent`` (single scale), ``box_ap_percent``, ``mask_ap_percent``,
            ``params_m`` (millions), ``flops_g`` (multiply-adds, 10^9).
        source: Where address and figures are from.
        size: Size in bytes, where published.
        sha256: Hash, where published.
        notes: What a user should know.
    """

    name: str
    url: str | None
    task: str
    backbone: Mapping[str, Any]
    config: str = ''
    figures: Mapping[str, float] = field(default_factory=dict)
    source: str = _SLAK_README
    size: int | None = None
    sha256: str | None = None
    notes: str = ''

    @property
    def filename(self) -> str:
        """Name of the file in the cache."""
        return f'{self.name}.pth'


def _drive(file_id: str) -> str:
    return f'https://drive.google.com/file/d/{file_id}/view'


def _surf(share: str) -> str:
    return f'https://surfdrive.surf.nl/files/index.php/s/{share}/download'


def _slak(arch: str, large: int = 51) -> dict[str, Any]:
    kernels = {31: (31, 29, 27, 13), 51: (51, 49, 47, 13), 61: (61, 59, 57, 13)}[large]
    return dict(type='SLaK', arch=arch, kernel_sizes=kernels, small_kernel=5, width_factor=1.3)


def _shiftwise(arch: str) -> dict[str, Any]:
    return dict(
        type='ShiftWise',
        arch=arch,
        version=2,
        kernel_sizes=(51, 49, 47, 13),
        small_kernel=3,
        ghost_ratio=0.23,
        num_paths=2,
        num_reps=4,
    )


def _convnext(arch: str) -> dict[str, Any]:
    return dict(
        type='SLaK',
        arch=arch,
        kernel_sizes=(7, 7, 7, 7),
        small_kernel=None,
        decomposed=False,
        width_factor=1.0,
        branch_norm=False,
        conv_bias=True,
    )


_SPARSE = (
    'The published parameter count and FLOPs are those of the non-zero weights (about 40% '
    'of the weights are zeros); the dense network has more.'
)
_KERNELS = _SPARSE + (' The source gives the largest kernel only; the sizes of the other stages are the usual reading.')
_L2S = (
    'Distilled from SLaK. The source does not say whether the 7x7 convolution is followed by '
    'a batch norm: if this class refuses the weights, its error says which form they have.'
)


def _cls(top1: float, params: float, flops: float) -> dict[str, float]:
    return dict(top1_percent=top1, params_m=params, flops_g=flops)


def _seg(miou: float, params: float, flops: float) -> dict[str, float]:
    return dict(miou_percent=miou, params_m=params, flops_g=flops)


_MODELS = (
    ModelInfo(
        'slak_t_in1k_300e',
        _drive('1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4'),
        'classification',
        _slak('tiny'),
        figures=_cls(82.5, 30, 5.0),
        notes=_SPARSE,
    ),
    ModelInfo(
        'slak_s_in1k_300e',
        _drive('1etM6KQbnlsgDAZ37adsQJ3UI8Bbv2AVe'),
        'classification',
        _slak('small'),
        figures=_cls(83.8, 55, 9.8),
        notes=_SPARSE,
    ),
    ModelInfo(
        'slak_b_in1k_300e',
        _drive('1duUxUD3RSblQ6eDHd0n-u0aulwGypf1j'),
        'classification',
        _slak('base'),
        figures=_cls(84.0, 95, 17.1),
        notes=_SPARSE,
    ),
    ModelInfo(
        'slak_t_k31_in1k_120e',
        _surf('VXzBxFXQdlAQ7h8'),
        'classification',
        _slak('tiny', 31),
        figures=_cls(81.5, 30, 4.8),
        notes=_KERNELS,
    ),
    ModelInfo(
        'slak_t_k51_in1k_120e',
        _surf('WiQYWNclJ9bW5XV'),
        'classification',
        _slak('tiny', 51),
        figures=_cls(81.6, 30, 5.0),
        notes=_SPARSE,
    ),
    ModelInfo(
        'slak_t_k61_in1k_120e',
        _surf('VpR1te71NmVImJb'),
        'classification',
        _slak('tiny', 61),
        figures=_cls(81.5, 31, 5.2),
        notes=_KERNELS,
    ),
    ModelInfo(
        'convnext_l2s_t_in1k_300e',
        _surf('cR6KLvxjlUshUQA'),
        'classification',
        _convnext('tiny'),
        figures=_cls(83.1, 29, 4.5),
        notes=_L2S,
    ),
    ModelInfo(
        'convnext_l2s_s_in1k_300e',
        _surf('PYqL3rVff3Nu2sP'),
        'classification',
        _convnext('small'),
        figures=_cls(84.3, 50, 8.7),
        notes=_L2S,
    ),
    ModelInfo(
        'upernet_slak_t_ade20k_160k',
        _surf('cc6Pqb7IZaecWMv'),
        'segmentation',
        _slak('tiny'),
        'upernet_slak_t_ade20k.py',
        _seg(47.6, 65, 936),
    ),
    ModelInfo(
        'upernet_slak_s_ade20k_160k',
        _surf('HMLBXtKUDY6wyFF'),
        'segmentation',
        _slak('small'),
        'upernet_slak_s_ade20k.py',
        _seg(49.4, 91, 1028),
    ),
    ModelInfo(
        'upernet_slak_b_ade20k_160k',
        _surf('JDZ6dMBMZDxUHQG'),
        'segmentation',
        _slak('base'),
        'upernet_slak_b_ade20k.py',
        _seg(50.0, 135, 1172),
    ),
    ModelInfo(
        'cascade_mask_rcnn_slak_t_coco_1x',
        _surf('2IvPyGgSTT2RvPu'),
        'detection',
        _slak('tiny'),
        'cascade_mask_rcnn_slak_t_coco_1x.py',
        dict(box_ap_percent=48.4, mask_ap_percent=41.8),
        notes='12 epochs, from the 120-epoch ImageNet weights.',
    ),
    ModelInfo(
        'cascade_mask_rcnn_slak_t_coco_3x',
        None,
        'detection',
        _slak('tiny'),
        'cascade_mask_rcnn_slak_t_coco.py',
        dict(box_ap_percent=51.3, mask_ap_percent=44.3),
        notes='36 epochs, from the 300-epoch ImageNet weights. No address was published.',
    ),
    ModelInfo(
        'shiftwise_t_in1k_300e',
        _drive('1U4DOZv5V9_7wJdqdicjp0tCmNIdRNJOc'),
        'classification',
        _shiftwise('tiny'),
        figures=dict(top1_percent=83.39),
        source=_SHIFTWISE_README,
    ),
    ModelInfo(
        'convnext_t_in1k_300e',
        'https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224_ema.pth',
        'classification',
        _convnext('tiny'),
        figures=_cls(82.1, 28, 4.5),
        source=_CONVNEXT_README,
    ),
    ModelInfo(
        'convnext_s_in1k_300e',
        'https://dl.fbaipublicfiles.com/convnext/convnext_small_1k_224_ema.pth',
        'classification',
        _convnext('small'),
        figures=_cls(83.1, 50, 8.7),
        source=_CONVNEXT_README,
    ),
    ModelInfo(
        'convnext_b_in1k_300e',
        'https://dl.fbaipublicfiles.com/convnext/convnext_base_1k_224_ema.pth',
        'classification',
        _convnext('base'),
        figures=_cls(83.8, 89, 15.4),
        source=_CONVNEXT_README,
    ),
)

#: Every published checkpoint by its name.
ZOO: dict[str, ModelInfo] = {info.name: info for info in _MODELS}

_DRIVE_ID = re.compile(r'^https?://(?:drive|docs)\.google\.com/(?:file/d/([\w-]+)|(?:open|uc)\?(?:.*&)?id=([\w-]+))')
_SURF_SHARE = re.compile(r'^(https?://surfdrive\.surf\.nl/files/index\.php/s/\w+)/?$')


def normalize_url(url: str) -> str:
    """Turn the address of a viewing page into the address of the file behind it.

    Knows Google Drive's ``/file/d/<id>/view``, ``open?id=`` and ``uc?id=`` links and SURFdrive's
    shares; every other address is returned as it is.

    Args:
        url: An address as people paste it.

    Returns:
        The address to download from.
    """
    match = _DRIVE_ID.match(url)
    if match:
        file_id = match.group(1) or match.group(2)
        # `confirm=t` answers the question that Drive asks about files too large to be scanned.
        return f'https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t'
    match = _SURF_SHARE.match(url)
    if match:
        return match.group(1) + '/download'
    return url


def find_model(source: str) -> ModelInfo | None:
    """Look up a zoo entry by its name or by one of its addresses.

    Args:
        source: A name of :data:`ZOO`, or a URL.

    Returns:
        The entry, or ``None``.
    """
    if source in ZOO:
        return ZOO[source]
    if '://' not in source:
        return None
    address = normalize_url(source)
    for info in ZOO.values():
        if info.url is not None and normalize_url(info.url) == address:
            return info
    return None


def similar_names(name: str) -> list[str]:
    """Zoo names that look like a mistyped one, at most three."""
    return difflib.get_close_matches(name.lower().replace('-', '_'), ZOO, n=3, cutoff=0.5)


def zoo_table() -> list[list[str]]:
    """The zoo as rows of text: a header, then one row per model.

    Returns:
        Name, task, published figures, address, source.
    """
    units = dict(
        top1_percent='{:g}% top-1',
        miou_percent='{:g}% mIoU ss',
        box_ap_percent='{:g} box AP',
        mask_ap_percent='{:g} mask AP',
        params_m='{:g}M',
        flops_g='{:g}G',
    )
    rows = [['name', 'task', 'published', 'address', 'source']]
    for info in ZOO.values():
        figures = ', '.join(units[key].format(value) for key, value in info.figures.items())
        rows.append([info.name, info.task, figures, info.url or 'not published', info.source])
    return rows
