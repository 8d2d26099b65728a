"""Published checkpoints and figures: names, addresses, and what their authors give.

Each family adds its own. The figures are copied from the pages named in ``source``; none of them
was measured with this project.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelInfo:
    """One published checkpoint.

    Attributes:
        name: The name by which ``load_pretrained`` and ``init_cfg`` know it.
        url: Direct download address, or ``hf://owner/repo/file``; ``None`` where none was published.
        task: 'classification', 'segmentation' or 'detection'.
        backbone: Arguments of our backbone class that fit the weights.
        source: Where address and figures are from.
        config: The config of this project it belongs to, '' for a bare backbone.
        figures: Published figures, units in the names: ``top1_percent``, ``miou_percent`` (single scale),
            ``miou_ms_percent`` (multiple scales and flipping), ``box_ap_percent``, ``mask_ap_percent``, ``params_m``
            (millions), ``flops_g`` (multiply-adds, 10^9).
        counted: How parameters and FLOPs were counted, a key of :data:`CONVENTIONS`.
        sha256: Hash of the file, where published; a download is compared with it.
        evaluation: How a classifier was evaluated, in the words of timm's ``pretrained_cfg``, where it differs from
            1000 classes and the center of images of 224 pixels: ``input_size``, ``crop_pct``, ``crop_mode``,
            ``interpolation``, ``mean``, ``std``, ``num_classes``.
        size: Height and width of the image that the FLOPs are for; None for the usual ones of the task.
    """

    name: str
    url: str | None
    task: str
    backbone: Mapping[str, Any]
    source: str = ''
    config: str = ''
    figures: Mapping[str, float] = field(default_factory=dict)
    counted: str = 'all'
    sha256: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Convention:
    """A way to count parameters and FLOPs."""

    text: str  # what is counted, for the table of costs
    count: Callable[[Any], tuple[int, int]]  # parameters and FLOPs of a slak_mm.cost.Cost in this way
    needs_masks: bool = False  # whether a dense network cannot be counted so
    needs_deploy: bool = False  # whether the deployed form has to be counted as well


@dataclass(frozen=True)
class Published:
    """Published parameters and FLOPs of a network."""

    parameters_m: float  # millions
    flops_g: float  # multiply-adds, 10^9
    counted: str  # how they were counted, a key of CONVENTIONS
    source: str  # where they are from
    size: tuple[int, int] | None = None  # of the image; None for the usual one of the task


#: Every published checkpoint of the registered families by its name.
ZOO: dict[str, ModelInfo] = {}
#: Published parameters and FLOPs by the stem of a config, or the zoo name of a backbone.
PUBLISHED: dict[str, Published] = {}
#: What the published figures count, found by comparing them with all ways to count.
CONVENTIONS: dict[str, Convention] = dict(
    all=Convention('all weights', lambda cost: (cost.parameters, cost.flops)),
    deployed=Convention(
        'all weights of the deployed form',
        lambda cost: (cost.deployed_parameters, cost.deployed_flops),
        needs_deploy=True,
    ),
)

#: May stand before a zoo name, where a framework tells names from paths by it.
ZOO_SCHEME = 'slak_mm://'
_DRIVE_ID = re.compile(r'^https?://(?:drive|docs)\.google\.com/(?:file/d/([\w-]+)|(?:open|uc)\?(?:.*&)?id=([\w-]+))')
_SURF_SHARE = re.compile(r'^(https?://surfdrive\.surf\.nl/files/index\.php/s/\w+)/?$')


def normalize_url(url: str) -> str:
    """Turn the address of a viewing page into the address of the file behind it.

    Knows Google Drive's ``/file/d/<id>/view``, ``open?id=`` and ``uc?id=`` links and SURFdrive's shares; every other
    address is returned as it is.
    """
    if match := _DRIVE_ID.match(url):
        # `confirm=t` answers the question that Drive asks about files too large to be scanned.
        return f'https://drive.usercontent.google.com/download?id={match[1] or match[2]}&export=download&confirm=t'
    return f'{match[1]}/download' if (match := _SURF_SHARE.match(url)) else url


def find_model(source: str) -> ModelInfo | None:
    """The zoo entry of a name or address, or ``None``."""
    if source in ZOO or '://' not in source:
        return ZOO.get(source)
    address = normalize_url(source)
    return next((info for info in ZOO.values() if info.url and normalize_url(info.url) == address), None)


def similar_names(name: str) -> list[str]:
    """Zoo names that look like a mistyped one, at most three."""
    return difflib.get_close_matches(name.lower().replace('-', '_'), ZOO, n=3, cutoff=0.5)


def zoo_table() -> list[list[str]]:
    """The zoo as rows of text, the first a header: name, task, published figures, address, source."""
    units = dict(
        top1_percent='{:g}% top-1',
        miou_percent='{:g}% mIoU ss',
        miou_ms_percent='{:g}% mIoU ms',
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
