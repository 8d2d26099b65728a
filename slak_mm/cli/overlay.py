"""Drawing of label maps: colored overlays, legends, pictures side by side.

Images are RGB arrays (H, W, 3) of uint8, label maps integer arrays (H, W) of class indices from
0; indices without a class (255, for example) are unlabeled and keep the image's own colors.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Palette = Sequence[Sequence[int]]
_BACKGROUND, _INK = (255, 255, 255), (20, 20, 20)


def _bands(image: np.ndarray) -> Iterator[slice]:
    """Rows of an image, some at a time: what is computed of them takes more memory than they do."""
    yield from (slice(top, top + 256) for top in range(0, len(image), 256))


def class_shares(labels: np.ndarray, num_classes: int) -> list[tuple[int, float]]:
    """Index and share of all pixels, 0..1, of the classes in a label map (H, W), the largest first."""
    counts = np.zeros(num_classes, np.int64)
    for rows in _bands(labels):
        part = labels[rows]
        counts += np.bincount(part[(part >= 0) & (part < num_classes)], minlength=num_classes)
    order = np.argsort(-counts, kind='stable')
    return [(int(index), float(counts[index] / labels.size)) for index in order if counts[index]]


def colorize(labels: np.ndarray, palette: Palette, unlabeled: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Paint every class of a label map (H, W) in its color of the palette; RGB (H, W, 3), uint8."""
    colors = np.asarray([*palette, unlabeled], np.uint8)
    known = (labels >= 0) & (labels < len(palette))
    return colors[np.where(known, labels, len(palette))]


def displayable(image: np.ndarray) -> np.ndarray:
    """Make an RGB picture (H, W, 3), uint8, of an image of any depth and number of channels.

    An image is gray (H, W), or has channels (H, W, C), the first three of which are blue, green and red; fewer are
    shown as gray. Values beyond 0..255 are scaled so that the smallest is black and the largest white.
    """
    image = image.reshape(*image.shape[:2], -1)
    image = image[..., 2::-1] if image.shape[2] >= 3 else image[..., [0, 0, 0]]
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    image = np.nan_to_num(image.astype(np.float64))
    low, high = image.min(), image.max()
    if low < 0 or high > 255:
        image = (image - low) * (255 / max(high - low, 1e-12))
    return np.rint(image).astype(np.uint8)


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette, opacity: float = 0.5) -> np.ndarray:
    """Lay the colors of a label map (H, W) over its RGB image (H, W, 3), uint8; opacity 0 gives the image alone.

    Raises:
        ValueError: Image and label map differ in size, or opacity is not within 0..1.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(f'Image {image.shape[:2]} and label map {labels.shape} differ in size.')
    if not 0 <= opacity <= 1:
        raise ValueError(f'Opacity must be from 0 to 1, got {opacity}.')
    picture = image.copy()
    for rows in _bands(image):
        mixed = (1 - opacity) * image[rows] + opacity * colorize(labels[rows], palette)
        known = (labels[rows] >= 0) & (labels[rows] < len(palette))
        picture[rows][known] = np.rint(mixed[known])
    return picture


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size only
        return ImageFont.load_default()


def _text_size(text: str, font: Any) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(text)
    return int(right - left), int(bottom)


def with_legend(
    picture: np.ndarray, entries: Sequence[tuple[str, Sequence[int]]], font_size: int | None = None
) -> np.ndarray:
    """Put a legend of text and RGB color to the right of an RGB picture (H, W, 3), uint8; without entries give it back.

    What does not fit in the height goes on in further columns. The font has a fortieth of the height by default, at
    least 12 pixels.
    """
    if not entries:
        return picture
    font_size = font_size or max(12, picture.shape[0] // 40)
    font = _font(font_size)
    line, gap = round(1.5 * font_size), round(0.5 * font_size)
    height = max(picture.shape[0], line + 2 * gap)
    rows = (height - 2 * gap) // line
    columns = [entries[start : start + rows] for start in range(0, len(entries), rows)]
    widths = [max(_text_size(text, font)[0] for text, _ in column) + line + 2 * gap for column in columns]
    canvas = Image.new('RGB', (picture.shape[1] + sum(widths) + gap, height), _BACKGROUND)
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    left = picture.shape[1] + gap
    for column, width in zip(columns, widths):
        for row, (text, color) in enumerate(column):
            top = gap + row * line
            square = (left, top, left + font_size, top + font_size)
            draw.rectangle(square, fill=tuple(map(int, color)), outline=_INK)
            draw.text((left + line, top), text, fill=_INK, font=font)
        left += width
    return np.asarray(canvas)


def panel(pictures: Sequence[np.ndarray], titles: Sequence[str], font_size: int | None = None) -> np.ndarray:
    """Put RGB pictures (uint8) of any sizes side by side, each under its title.

    The font has a twentieth of the height by default, at least 12 pixels.

    Raises:
        ValueError: There are not as many titles as pictures, or none.
    """
    if len(pictures) != len(titles) or not pictures:
        raise ValueError(f'{len(pictures)} pictures need as many titles, got {len(titles)}.')
    height = max(picture.shape[0] for picture in pictures)
    font_size = font_size or max(12, height // 20)
    font, gap = _font(font_size), max(4, font_size // 3)
    top = 2 * gap + _text_size('Ag', font)[1]
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) + 1)
    canvas = Image.new('RGB', (width, top + height + gap), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    left = gap
    for picture, title in zip(pictures, titles):
        draw.text((left, gap), title, fill=_INK, font=font)
        canvas.paste(Image.fromarray(picture), (left, top))
        left += picture.shape[1] + gap
    return np.asarray(canvas)
