"""A small generated data set in the layout of ADE20K.

Outdoor scenes of eight ADE20K classes, drawn with numpy and Pillow: a few dozen of them can be
learned from scratch within minutes, and yet no class is a colour. Sky and water, grass and trees,
roads and house fronts share their colours and differ in texture, shape and place; light, colour
cast and noise change from scene to scene.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ['DEMO_CLASSES', 'draw_scene', 'write_demo_data']

#: The classes that occur, by their value in ADE20K's annotations (0 is unlabelled).
DEMO_CLASSES = {
    2: 'building', 3: 'sky', 5: 'tree', 7: 'road', 10: 'grass', 17: 'mountain', 21: 'car',
    22: 'water'
}
_IDS = {name: value for value, name in DEMO_CLASSES.items()}

Colour = tuple[float, float, float]


class _Canvas:
    """Image and annotation that are painted together, back to front."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size = size
        self.rng = rng
        self.image = np.zeros((size, size, 3), np.float32)
        self.labels = np.zeros((size, size), np.uint8)

    def noise(self, height: int, width: int) -> np.ndarray:
        """Smooth noise of about -1..1 with the given number of cells along each side."""
        grid = self.rng.standard_normal((max(2, height), max(2, width))).astype(np.float32)
        picture = Image.fromarray(grid).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(picture)[..., None] * 0.6

    def colour(self, base: Colour, spread: float) -> np.ndarray:
        """A colour near another one, 0..255."""
        return np.asarray(base, np.float32) + self.rng.uniform(-spread, spread, 3)

    def mask(self, draw: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
        """What a drawing covers."""
        picture = Image.new('L', (self.size, self.size))
        draw(ImageDraw.Draw(picture))
        return np.asarray(picture) > 0

    def paint(self, mask: np.ndarray, name: str | None, texture: np.ndarray) -> None:
        """Put a texture (size, size, 3) or colour (3,) where the mask is, with its label."""
        self.image[mask] = np.broadcast_to(texture, self.image.shape)[mask]
        self.labels[mask] = _IDS[name] if name else 0


def _sky(canvas: _Canvas, horizon: float) -> None:
    size, rng = canvas.size, canvas.rng
    top = canvas.colour([(90, 130, 190), (130, 140, 155), (150, 120, 130)][rng.integers(3)], 15)
    bottom = top + rng.uniform(20, 60)
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    clouds = np.clip(canvas.noise(3, 4) + 0.3 * canvas.noise(8, 10), 0, None) * 55
    everywhere = np.ones((size, size), bool)
    canvas.paint(everywhere, 'sky', top * (1 - ramp) + bottom * ramp + clouds)


def _mountains(canvas: _Canvas, horizon: float) -> None:
    size, rng = canvas.size, canvas.rng
    xs = np.linspace(0, size, 8)
    ys = horizon - rng.uniform(0.05, 0.3, 8) * size
    outline = [(0, size), *zip(xs.tolist(), ys.tolist()), (size, size)]
    colour = canvas.colour([(105, 105, 115), (110, 100, 85), (90, 105, 100)][rng.integers(3)], 12)
    # Slanted ridges: fine noise on sheared coordinates.
    yy, xx = np.mgrid[:size, :size].astype(np.float32)
    ridges = np.sin((xx + 0.7 * yy) / size * rng.uniform(60, 90)
                    + 5 * canvas.noise(4, 4)[..., 0])[..., None]
    canvas.paint(canvas.mask(lambda d: d.polygon(outline, fill=255)), 'mountain',
                 colour + 16 * ridges + 14 * canvas.noise(10, 10))


def _ground(canvas: _Canvas, horizon: float) -> None:
    size = canvas.size
    below = np.zeros((size, size), bool)
    below[int(horizon):] = True
    blades = canvas.noise(size // 5, size)
    canvas.paint(below, 'grass',
                 canvas.colour((95, 125, 60), 18) + 26 * blades + 14 * canvas.noise(5, 5))


def _water(canvas: _Canvas, horizon: float) -> None:
    size, rng = canvas.size, canvas.rng
    top = rng.uniform(horizon, horizon + 0.15 * size)
    bottom = rng.uniform(top + 0.15 * size, size)
    left, right = rng.uniform(-0.4, 0.2) * size, rng.uniform(0.7, 1.4) * size
    ripples = canvas.noise(size // 2, size // 12)
    canvas.paint(canvas.mask(lambda d: d.ellipse((left, top, right, bottom), fill=255)), 'water',
                 canvas.colour([(85, 120, 160), (110, 130, 140)][rng.integers(2)], 15)
                 + 24 * ripples)


def _road(canvas: _Canvas, horizon: float) -> tuple[float, float]:
    size, rng = canvas.size, canvas.rng
    far, near = rng.uniform(0.2, 0.8) * size, rng.uniform(0.1, 0.9) * size
    thin, wide = rng.uniform(0.03, 0.08) * size, rng.uniform(0.25, 0.45) * size
    outline = [(far - thin, horizon), (far + thin, horizon), (near + wide, size),
               (near - wide, size)]
    canvas.paint(canvas.mask(lambda d: d.polygon(outline, fill=255)), 'road',
                 canvas.colour((105, 102, 100), 18) + 9 * canvas.noise(size, size))
    for start in np.arange(0.05, 1, 0.22):
        stop = start + 0.1
        ends = [(far + (near - far) * t, horizon + (size - horizon) * t) for t in (start, stop)]

        def dash(draw: ImageDraw.ImageDraw, ends: list = ends, width: int = 1 + int(3 * stop)
                 ) -> None:
            draw.line(ends, fill=255, width=width)
        canvas.paint(canvas.mask(dash), 'road', canvas.colour((205, 205, 195), 10))
    t = rng.uniform(0.45, 0.85)
    return far + (near - far) * t, horizon + (size - horizon) * t


def _building(canvas: _Canvas, horizon: float) -> None:
    size, rng = canvas.size, canvas.rng
    width, height = rng.uniform(0.18, 0.35) * size, rng.uniform(0.25, 0.5) * size
    left, bottom = rng.uniform(-0.05, 0.85) * size, horizon + rng.uniform(0.02, 0.1) * size
    box = (left, bottom - height, left + width, bottom)
    wall = canvas.colour([(150, 110, 90), (125, 125, 130), (175, 160, 130),
                          (110, 120, 135)][rng.integers(4)], 15)
    canvas.paint(canvas.mask(lambda d: d.rectangle(box, fill=255)), 'building',
                 wall + 8 * canvas.noise(size // 3, size // 6))
    pane, step = rng.integers(4, 6), rng.integers(8, 11)
    glass = canvas.colour([(60, 70, 90), (190, 185, 150)][rng.integers(2)], 20)

    def windows(draw: ImageDraw.ImageDraw) -> None:
        for x in np.arange(box[0] + 3, box[2] - pane, step):
            for y in np.arange(box[1] + 4, box[3] - pane, step):
                draw.rectangle((x, y, x + pane, y + pane), fill=255)
    canvas.paint(canvas.mask(windows), 'building', glass)


def _tree(canvas: _Canvas, horizon: float) -> None:
    size, rng = canvas.size, canvas.rng
    x, foot = rng.uniform(0, 1) * size, horizon + rng.uniform(0.05, 0.3) * size
    height = rng.uniform(0.2, 0.4) * size
    trunk = canvas.mask(lambda d: d.rectangle((x - 2, foot - 0.5 * height, x + 2, foot), fill=255))
    canvas.paint(trunk, 'tree', canvas.colour((80, 60, 45), 12))
    blobs = [(x + rng.uniform(-0.2, 0.2) * height, foot - rng.uniform(0.5, 0.9) * height,
              rng.uniform(0.16, 0.26) * height) for _ in range(6)]

    def crown(draw: ImageDraw.ImageDraw) -> None:
        for cx, cy, r in blobs:
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    canvas.paint(canvas.mask(crown), 'tree',
                 canvas.colour([(65, 95, 50), (90, 105, 50), (120, 95, 50)][rng.integers(3)], 14)
                 + 34 * canvas.noise(size // 3, size // 3))


def _car(canvas: _Canvas, x: float, y: float) -> None:
    size, rng = canvas.size, canvas.rng
    width = rng.uniform(0.16, 0.26) * size
    height = 0.3 * width
    paint = canvas.colour([(170, 40, 40), (40, 60, 140), (200, 200, 200), (40, 40, 45),
                           (190, 160, 50)][rng.integers(5)], 15)
    left, right = x - width / 2, x + width / 2
    cabin = [(left + 0.2 * width, y - height), (left + 0.32 * width, y - 1.8 * height),
             (right - 0.3 * width, y - 1.8 * height), (right - 0.14 * width, y - height)]

    def body(draw: ImageDraw.ImageDraw) -> None:
        draw.rectangle((left, y - height, right, y), fill=255)
        draw.polygon(cabin, fill=255)

    def wheels(draw: ImageDraw.ImageDraw) -> None:
        radius = 0.32 * height + 1
        for cx in (left + 0.22 * width, right - 0.22 * width):
            draw.ellipse((cx - radius, y - radius, cx + radius, y + radius), fill=255)
    canvas.paint(canvas.mask(body), 'car', paint + 5 * canvas.noise(size // 4, size // 4))
    glass = [(0.85 * px + 0.15 * x, 0.85 * py + 0.15 * (y - 1.4 * height)) for px, py in cabin]
    canvas.paint(canvas.mask(lambda d: d.polygon(glass, fill=255)), 'car',
                 canvas.colour((60, 75, 90), 10))
    canvas.paint(canvas.mask(wheels), 'car', canvas.colour((25, 25, 25), 6))


def draw_scene(rng: np.random.Generator, size: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        rng (np.random.Generator): The only source of randomness.
        size (int): Side of the square image in pixels. Defaults to 160.

    Returns:
        tuple[np.ndarray, np.ndarray]: RGB image (size, size, 3) and annotation (size, size),
        both uint8; the annotation has the values of :data:`DEMO_CLASSES`, and 0 where nothing is
        labelled.
    """
    canvas = _Canvas(size, rng)
    horizon = rng.uniform(0.4, 0.6) * size
    _sky(canvas, horizon)
    if rng.random() < 0.6:
        _mountains(canvas, horizon)
    _ground(canvas, horizon)
    if rng.random() < 0.5:
        _water(canvas, horizon)
    for _ in range(rng.integers(1, 3)):
        if rng.random() < 0.8:
            _building(canvas, horizon)
    if rng.random() < 0.85:
        place = _road(canvas, horizon)
        if rng.random() < 0.85:
            _car(canvas, *place)
    for _ in range(rng.integers(1, 4)):
        _tree(canvas, horizon)
    if rng.random() < 0.4:
        # Something that nobody labelled.
        x = rng.uniform(0.05, 0.95) * size
        pole = canvas.mask(lambda d: d.line(
            (x, 0.3 * size, x, rng.uniform(0.7, 0.95) * size), fill=255, width=3))
        canvas.paint(pole, None, canvas.colour((60, 60, 60), 20))

    light = rng.uniform(0.65, 1.2)
    side = 1 + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, size, dtype=np.float32)[None, :, None]
    cast = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    grain = rng.normal(0, rng.uniform(4, 9), canvas.image.shape)
    image = canvas.image * light * side * cast + grain
    return np.clip(image, 0, 255).astype(np.uint8), canvas.labels


def write_demo_data(root: str | Path, num_train: int = 48, num_val: int = 12, size: int = 160,
                    seed: int = 0) -> Path:
    """Write the data set as ADE20K has it.

    Args:
        root (str | Path): Folder to write to, created if missing; it gets
            ``images/{training,validation}/*.jpg`` and ``annotations/{training,validation}/*.png``.
        num_train (int): Number of training scenes. Defaults to 48.
        num_val (int): Number of held-out scenes. Defaults to 12.
        size (int): Side of the images in pixels. Defaults to 160.
        seed (int): Scenes are a function of the seed. Defaults to 0.

    Returns:
        Path: The root.
    """
    root = Path(root)
    for split, count, stream in (('training', num_train, 0), ('validation', num_val, 1)):
        images, annotations = root / 'images' / split, root / 'annotations' / split
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, labels = draw_scene(np.random.default_rng((seed, stream, index)), size)
            name = f'demo_{split}_{index:04d}'
            Image.fromarray(image).save(images / f'{name}.jpg', quality=95)
            Image.fromarray(labels).save(annotations / f'{name}.png')
    return root
