"""ImageNet accuracy of a classifier, with timm's transforms and loader."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_loader, resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from slak_mm import switch_to_deploy, timm_models
from slak_mm.checkpoints import (
    ZOO,
    CheckpointError,
    ModelInfo,
    Variant,
    convert_state_dict,
    describe,
    find_model,
    join_head,
    likely_causes,
    load_foreign,
    load_pretrained,
    read_checkpoint,
    unwrap,
)
from slak_mm.engine.samples import DataError
from slak_mm.models import LargeKernelBackbone

from .errors import ConfigOverrideError, reason

WITHIN = 0.1  # percentage points between a figure and the published one, which has one or two decimals
ALL_IMAGES = 50_000


@dataclass
class Network:
    """A classifier with its weights, and what is published about it."""

    model: Any
    name: str  # in timm
    published: dict[str, float] = field(default_factory=dict)  # top-1 in percent, by the zoo names that it may be


def load_network(source: str, name: str | None = None, use_ema: bool = False) -> Network:
    """Build a classifier and load its weights, head and all.

    Args:
        source: A file or address of a checkpoint, a zoo name, or the name of a timm model, whose own weights are taken.
        name: Name in timm of the network that the checkpoint is of. Default: found from its tensors.
        use_ema: Take the moving average in the checkpoint. Default: False.

    Raises:
        ConfigOverrideError: There is no such network, or it has no head.
        CheckpointError: The weights are missing, unreadable or do not fit.
    """
    is_file = Path(source).expanduser().is_file()
    info = None if is_file else find_model(source) or _published_as(source)
    if not is_file and info is None and timm.is_model(source.partition('.')[0]):
        return Network(_create(source, pretrained=True), source)
    if info is not None:
        if info.name not in timm_models.NAMES:
            raise ConfigOverrideError(f'{info.name} is a checkpoint for {info.task}, without an ImageNet classifier.')
        source, name = info.name, timm_models.NAMES[info.name]
    weights = unwrap(read_checkpoint(source), 'ema' if use_ema else 'model').state_dict
    if name and name.partition('.')[0] not in timm_models.NETWORKS:
        model = _create(name)
        load_foreign(model, dict(state_dict=weights), source)
        return Network(model, name)
    variant = describe(convert_state_dict(join_head(weights))[0])
    name = name or _network_of(variant)
    if variant.family != 'unknown' and not variant.num_classes:
        raise ConfigOverrideError(f'{source} has no classification head: give an ImageNet checkpoint.')
    if name is None or variant.family == 'unknown':
        raise ConfigOverrideError(
            f'{source} is of none of the known networks, but {variant}. If timm has it, name it with --model.'
        )
    model = _create(name, num_classes=variant.num_classes, deploy=variant.deploy)
    load_pretrained(model, source, use_ema=use_ema)
    network = timm_models.NETWORKS[name.partition('.')[0]]
    infos = [
        ZOO[zoo]
        for zoo, tagged in timm_models.NAMES.items()
        if timm_models.NETWORKS[tagged.partition('.')[0]] == network
    ]
    figures = {i.name: i.figures['top1_percent'] for i in ([info] if info else infos) if 'top1_percent' in i.figures}
    return Network(model, name, figures)


def _published_as(name: str) -> ModelInfo | None:
    """The zoo entry of a model's name in timm, with or without a tag."""
    cfg = timm.get_pretrained_cfg(name) if name.partition('.')[0] in timm_models.NETWORKS else None
    return ZOO.get(cfg.file) if cfg is not None and cfg.file else None


def _network_of(variant: Variant) -> str | None:
    """Name in timm of the network that tensors are of, the shortest."""
    for name, (kind, arguments) in sorted(timm_models.NETWORKS.items(), key=lambda item: len(item[0])):
        if kind.family.name == variant.family and variant.arch in (None, arguments['arch']):
            with torch.device('meta'):
                network = kind(**arguments, num_classes=variant.num_classes or 0, deploy=variant.deploy)
            if not likely_causes(variant, describe(network.state_dict())):
                return name
    return None


def _create(name: str, **options: Any) -> nn.Module:
    try:
        return timm.create_model(name, **options)
    except CheckpointError:
        raise
    except Exception as error:  # timm's hub and its loading raise many kinds
        raise ConfigOverrideError(f'timm cannot make {name}: {reason(error)}') from error


class LabelledImages(Dataset):
    """Images with their classes, in the folders of the classes or in one folder with a file of labels.

    Args:
        root: A folder with one folder per class, or with a folder ``val`` that has them, or with the images.
        num_classes: Of the classifier.
        labels: A file with a line ``NAME CLASS`` for each image, where the images are in one folder. A class is a
            number from 0, or a WordNet id such as n01440764. Default: None.

    Raises:
        ConfigOverrideError: Images and classes are not those of the classifier.
    """

    def __init__(self, root: Path, num_classes: int, labels: Path | None = None) -> None:
        self.transform: Any = None  # set by timm's create_loader
        root = root / 'val' if (root / 'val').is_dir() else root
        if not root.is_dir():
            raise ConfigOverrideError(f'There is no folder {root}.')
        self.samples = _listed(root, num_classes, labels) if labels else _in_folders(root, num_classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        try:
            with Image.open(path) as image:
                rgb = image.convert('RGB')
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f'The image {path} cannot be read: {error}.') from error
        return self.transform(rgb), label


def _classes(num_classes: int) -> dict[str, int]:
    """Numbers of ImageNet's classes by their WordNet ids; empty for a classifier of something else."""
    names = ImageNetInfo().label_names() if num_classes == 1000 else []
    return {name: number for number, name in enumerate(names)}


def _in_folders(root: Path, num_classes: int) -> list[tuple[str, int]]:
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    classes = _classes(num_classes)
    if not folders:
        raise ConfigOverrideError(
            f'{root} has no folders of classes: sort the images into one folder per class, or give --labels FILE.'
        )
    unknown = [name for name in folders if name not in classes]
    if unknown and len(folders) != num_classes:
        raise ConfigOverrideError(
            f'{root} has {len(folders)} folders, of which {len(unknown)} (such as {unknown[0]}) are no classes of '
            f'ImageNet, and the head is for {num_classes} classes: give the folder whose folders are the classes.'
        )
    if unknown:
        classes = {name: number for number, name in enumerate(folders)}
    samples, _ = find_images_and_targets(str(root), class_to_idx=classes)
    if not samples:
        raise ConfigOverrideError(f'The folders in {root} have no images.')
    return samples


def _listed(root: Path, num_classes: int, labels: Path) -> list[tuple[str, int]]:
    classes, samples = _classes(num_classes), []
    for number, line in enumerate(labels.read_text().splitlines(), 1):
        words = re.split(r'[\s,]+', line.strip())
        if words == [''] or (number == 1 and words[0].lower() in ('image', 'imageid', 'filename')):
            continue
        if len(words) < 2:
            raise ConfigOverrideError(
                f'Line {number} of {labels} is no "NAME CLASS", such as "ILSVRC2012_val_00000001.JPEG 65": {line!r}. '
                "The numbers of ImageNet's development kit are in another order."
            )
        name, label = words[0], words[1]
        label_number = classes.get(label, int(label) if label.isdecimal() else -1)
        if not 0 <= label_number < num_classes:
            raise ConfigOverrideError(
                f'Line {number} of {labels} has the class {label!r}; the head knows the numbers 0 to {num_classes - 1}.'
            )
        path = root / name if (root / name).suffix else root / f'{name}.JPEG'
        if not path.is_file():
            raise ConfigOverrideError(f'Line {number} of {labels} names {name}, which is not in {root}.')
        samples.append((str(path), label_number))
    if not samples:
        raise ConfigOverrideError(f'{labels} names no images.')
    return samples


def data_config(model: nn.Module, size: tuple[int, int] | None = None, crop_pct: float | None = None) -> dict[str, Any]:
    """How images are prepared: as the ``pretrained_cfg`` of the model says, but for the arguments that are given.

    Args:
        model: A timm model.
        size: Height and width of the images. Default: the model's.
        crop_pct: Side of the center that is cut out, as a fraction of the resized image. Default: the model's.
    """
    config = resolve_data_config({}, model=model, use_test_size=True)
    if size is not None:
        config['input_size'] = (config['input_size'][0], *size)
    return config if crop_pct is None else {**config, 'crop_pct': crop_pct}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: LabelledImages,
    config: Mapping[str, Any],
    device: torch.device,
    batch_size: int = 64,
    workers: int = 2,
    amp: bool = False,
) -> dict[str, Any]:
    """Count the images whose class is the best guess, or among the best five.

    Args:
        model: A classifier, in any mode.
        images: The images.
        config: What :func:`data_config` gives.
        device: Where to compute.
        batch_size: Images at a time. Default: 64.
        workers: Processes that read images. Default: 2.
        amp: Compute in float16 on a GPU, in bfloat16 elsewhere. Default: False.

    Returns:
        ``images``, ``correct1`` and ``correct5`` as numbers, ``top1`` and ``top5`` in percent, ``images_per_second``.
    """
    model = model.to(device).eval()
    if device.type == 'cpu' and not isinstance(model, LargeKernelBackbone):  # whose operators choose their own layouts
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = create_loader(
        images,
        batch_size=batch_size,
        num_workers=workers,
        device=device,
        use_prefetcher=device.type == 'cuda',
        pin_memory=device.type == 'cuda',
        persistent_workers=False,
        **{key: config[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')},
    )
    dtype = torch.float16 if device.type == 'cuda' else torch.bfloat16
    correct1 = correct5 = seen = 0
    begin = time.perf_counter()
    with tqdm(total=len(images), unit='img', mininterval=0.5) as bar:
        for batch, labels in loader:
            with torch.autocast(device.type, dtype, enabled=amp):
                logits = model(batch.to(device))
            hits = logits.float().topk(min(5, logits.shape[1])).indices == labels.to(device)[:, None]
            correct1 += int(hits[:, 0].sum())
            correct5 += int(hits.any(1).sum())
            seen += len(labels)
            bar.set_postfix_str(f'top-1 {correct1 / seen:.2%}, top-5 {correct5 / seen:.2%}', refresh=False)
            bar.update(len(labels))
    return dict(
        images=seen,
        correct1=correct1,
        correct5=correct5,
        top1=100 * correct1 / seen,
        top5=100 * correct5 / seen,
        images_per_second=seen / (time.perf_counter() - begin),
    )


def verdict(network: Network, result: Mapping[str, Any]) -> tuple[str, bool | None]:
    """Compare an accuracy with the published one.

    Returns:
        A sentence; and whether the two are within 0.1 percentage points, None where that cannot be said.
    """
    if not network.published:
        return 'No accuracy of this network is on record here.', None
    figures = ', '.join(f'{value:g} % ({name})' for name, value in network.published.items())
    if result['images'] != ALL_IMAGES:
        return f'Published on {ALL_IMAGES:,} images: {figures}; {result["images"]:,} of them tell little.', None
    close = [name for name, value in network.published.items() if abs(result['top1'] - value) <= WITHIN + 1e-9]
    outcome = f'within {WITHIN} of that of {" and ".join(close)}' if close else f'NOT within {WITHIN}'
    return f'Published: {figures}. The top-1 measured here is {outcome}.', bool(close)


def fold(model: nn.Module) -> nn.Module:
    """Fold the branches of a network for inference, in place."""
    if isinstance(model, LargeKernelBackbone):
        return switch_to_deploy(model)
    return timm.utils.reparameterize_model(model, inplace=True)
