"""Contribution maps over many images: reading them, going on where a run was interrupted."""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from slak_mm._files import replacing
from slak_mm.erf import MeanMap, contributions

from .demo_data import draw_scene
from .errors import ConfigOverrideError, reason
from .networks import Network

_SECONDS_BETWEEN_SAVES = 10


class Images:
    """Images of files and folders, or generated ones without end, resized to one size (height, width).

    They come in an order that mixes the folders (classes), the same in every run; officially in the order of
    torchvision's ``ImageFolder``. The aspect ratio is not kept.

    Raises:
        ConfigOverrideError: There is no such file or folder, or a folder has no images.
    """

    def __init__(self, sources: Sequence[str], size: tuple[int, int], official: bool = False, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.paths: list[Path] = []
        for source in map(Path, sources):
            if source.is_dir():
                inside = sorted(path for path in source.rglob('*') if path.suffix.lower() in IMG_EXTENSIONS)
                if not inside:
                    raise ConfigOverrideError(f'"{source}" has no images ({", ".join(IMG_EXTENSIONS)}).')
                self.paths += inside
            elif source.is_file():
                self.paths.append(source)
            else:
                raise ConfigOverrideError(f'There is no image or folder "{source}".')
        self.is_generated = not sources
        if not official:
            random.Random(seed).shuffle(self.paths)

    def digest(self) -> str:
        """Names and sizes of the files, or the seed, hashed."""
        files = [(str(path), path.stat().st_size) for path in self.paths] or self.seed
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def read(self, start: int = 0) -> Iterator[tuple[str, Tensor | None]]:
        """Name and RGB values 0 to 1 (3, H, W) of each image from a position on; None where it cannot be read."""
        height, width = self.size
        position = start
        while self.is_generated or position < len(self.paths):
            name = f'scene {position}' if self.is_generated else str(self.paths[position])
            try:
                if self.is_generated:
                    scene, _ = draw_scene(np.random.default_rng((self.seed, position)), max(height, width))
                    image = Image.fromarray(scene)
                else:
                    image = Image.open(self.paths[position]).convert('RGB')
                values = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                yield name, None
            else:
                yield name, torch.from_numpy(values).permute(2, 0, 1) / 255
            position += 1


@dataclass
class Progress:
    """How far the map of one network has come."""

    average: MeanMap
    position: int = 0
    unreadable: list[str] = field(default_factory=list)

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write everything, with what it belongs to."""
        notes = dict(settings=settings, position=self.position, unreadable=self.unreadable)
        notes.update(count=self.average.count, num_left_out=self.average.num_left_out)
        with replacing(path) as part, part.open('wb') as out:
            np.savez(out, total=np.asarray(self.average.total), notes=np.array(json.dumps(notes)))

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any]) -> Progress:
        """Go on with what was written.

        Raises:
            ConfigOverrideError: It belongs to something else, or cannot be read.
        """
        remedy = 'remove it, add --restart, or choose another --out-dir'
        try:
            with np.load(path) as file:
                total, notes = file['total'], json.loads(str(file['notes']))
            kept: dict[str, Any] = notes['settings']
            progress = cls(MeanMap(settings['official']), notes['position'], notes['unreadable'])
            progress.average.count, progress.average.num_left_out = notes['count'], notes['num_left_out']
        except Exception as error:  # whatever is in it
            raise ConfigOverrideError(f'{path} cannot be read ({reason(error)}): {remedy}.') from error
        others = [key for key in settings if kept.get(key) != settings[key]]
        if others:
            raise ConfigOverrideError(f'{path} is from a run with other {" and ".join(others)}: {remedy}.')
        progress.average.total = total
        return progress


def average_contributions(
    network: Network,
    images: Images,
    num_images: int,
    folder: Path,
    *,
    official: bool = False,
    device: str = 'cpu',
    restart: bool = False,
    report: Callable[[int], None] = lambda count: None,
) -> Progress:
    """Average the contributions of so many images, and go on where an earlier run was interrupted.

    Args:
        network: What to look at.
        images: Those that cannot be read are passed over, and the next ones take their places.
        num_images: How many to average over, or all there are if these are fewer.
        folder: Gets ``<name of the network>.npz``, written every ten seconds and at the end.
        official: See :func:`slak_mm.erf.contribution_map`. Defaults to False.
        device: Where to compute. Defaults to the CPU.
        restart: Begin anew. Defaults to False.
        report: Called with the number of images that are done.

    Raises:
        ConfigOverrideError: The file is from a run with another network, other images, another size or procedure, or
            has more images; the network does not take such images, or no image could be used.
    """
    path = folder / f'{file_name(network.name)}.npz'
    settings = dict(network=network.digest(), images=images.digest(), size=list(images.size), official=official)
    if path.exists() and not restart:
        progress = Progress.load(path, settings)
        if progress.average.count > num_images:
            raise ConfigOverrideError(
                f'{path} has {progress.average.count} images already: ask for as many or more, or add --restart.'
            )
    else:
        progress = Progress(MeanMap(official))
    model = network.model.to(device)
    report(progress.average.count)
    saved = time.monotonic()
    source = images.read(progress.position)
    try:
        while progress.average.count < num_images:
            name, image = next(source, ('', None))
            if not name:
                break
            if image is None:
                progress.unreadable.append(name)
            else:
                progress.average.add(_contributions_of(network, model, image.to(device), official))
                report(progress.average.count)
            progress.position += 1
            if progress.average.num_left_out > num_images:
                break  # of generated images there is no end
            if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                progress.save(path, settings)
                saved = time.monotonic()
    finally:
        progress.save(path, settings)
    if not progress.average.count:
        what = f'{len(progress.unreadable)} could not be read, {progress.average.num_left_out} gave NaN or nothing'
        raise ConfigOverrideError(f'{network.name}: no image could be used ({what}).')
    return progress


def _contributions_of(network: Network, model: Any, image: Tensor, official: bool) -> np.ndarray:
    try:
        return contributions(model, network.normalize(image)[None], official)[0]
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        height, width = image.shape[1:]
        raise ConfigOverrideError(
            f'{network.name} cannot be evaluated on an RGB image of {height}x{width}: {reason(error)}'
        ) from error


def file_name(name: str) -> str:
    """The name of a network as that of a file."""
    return re.sub(r'[^\w.+-]+', '_', name).strip('._') or 'network'
