"""Small generated data sets in the layouts of ADE20K, VOC and COCO.

For segmentation, outdoor scenes of eight ADE20K classes, drawn with numpy and Pillow: a few dozen
of them can be learned from scratch within minutes, and yet no class is a color. Sky and water,
grass and trees, roads and house fronts share their colors and differ in texture, shape and place;
light, color cast and noise change from scene to scene.

For detection, objects of four classes that VOC and COCO have in common, of any color, before sky
and grass.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

#: The classes that occur, by their value in ADE20K's annotations (0 is unlabeled).
DEMO_CLASSES = {2: 'building', 3: 'sky', 5: 'tree', 7: 'road', 10: 'grass', 17: 'mountain', 21: 'car', 22: 'water'}
_IDS = {name: value for value, name in DEMO_CLASSES.items()}

Color = tuple[float, float, float]


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

    def color(self, base: Color, spread: float) -> np.ndarray:
        """A color near another one, 0..255."""
        return np.asarray(base, np.float32) + self.rng.uniform(-spread, spread, 3)

    def mask(self, draw: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
        """What a drawing covers."""
        picture = Image.new('L', (self.size, self.size))
        draw(ImageDraw.Draw(picture))
        return np.asarray(picture) > 0

    def paint(self, mask: np.ndarray, name: str | None, texture: np.ndarray) -> None:
        """Put a texture (size, size, 3) or color (3,) where the mask is, with its label."""
        self.image[mask] = np.broadcast_to(texture, self.image.shape)[mask]
        self.labels[mask] = _IDS[name] if name else 0


def _sky(canvas: _Canvas, horizon: float) -> None:
    size, rng = canvas.size, canvas.rng
    top = canvas.color([(90, 130, 190), (130, 140, 155), (150, 120, 130)][rng.integers(3)], 15)
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
    color = canvas.color([(105, 105, 115), (110, 100, 85), (90, 105, 100)][rng.integers(3)], 12)
    # Slanted ridges: fine noise on sheared coordinates.
    yy, xx = np.mgrid[:size, :size].astype(np.float32)
    ridges = np.sin((xx + 0.7 * yy) / size * rng.uniform(60, 90) + 5 * canvas.noise(4, 4)[..., 0])[..., None]
    texture = color + 16 * ridges + 14 * canvas.noise(10, 10)
    canvas.paint(canvas.mask(lambda d: d.polygon(outline, fill=255)), 'mountain', texture)


def _ground(canvas: _Canvas, horizon: float) -> None:
    size = canvas.size
    below = np.zeros((size, size), bool)
    below[int(horizon) :] = True
    blades = canvas.noise(size // 5, size)
    canvas.paint(below, 'grass', canvas.color((95, 125, 60), 18) + 26 * blades + 14 * canvas.noise(5, 5))


def _water(canvas: _Canvas, horizon: float) -> None:
    size, rng = canvas.size, canvas.rng
    top = rng.uniform(horizon, horizon + 0.15 * size)
    bottom = rng.uniform(top + 0.15 * size, size)
    left, right = rng.uniform(-0.4, 0.2) * size, rng.uniform(0.7, 1.4) * size
    ripples = canvas.noise(size // 2, size // 12)
    color = canvas.color([(85, 120, 160), (110, 130, 140)][rng.integers(2)], 15)
    mask = canvas.mask(lambda d: d.ellipse((left, top, right, bottom), fill=255))
    canvas.paint(mask, 'water', color + 24 * ripples)


def _road(canvas: _Canvas, horizon: float) -> tuple[float, float]:
    size, rng = canvas.size, canvas.rng
    far, near = rng.uniform(0.2, 0.8) * size, rng.uniform(0.1, 0.9) * size
    thin, wide = rng.uniform(0.03, 0.08) * size, rng.uniform(0.25, 0.45) * size
    outline = [(far - thin, horizon), (far + thin, horizon), (near + wide, size), (near - wide, size)]
    asphalt = canvas.color((105, 102, 100), 18) + 9 * canvas.noise(size, size)
    canvas.paint(canvas.mask(lambda d: d.polygon(outline, fill=255)), 'road', asphalt)
    for start in np.arange(0.05, 1, 0.22):
        stop = start + 0.1
        ends = [(far + (near - far) * t, horizon + (size - horizon) * t) for t in (start, stop)]

        def dash(draw: ImageDraw.ImageDraw, ends: list = ends, width: int = 1 + int(3 * stop)) -> None:
            draw.line(ends, fill=255, width=width)

        canvas.paint(canvas.mask(dash), 'road', canvas.color((205, 205, 195), 10))
    t = rng.uniform(0.45, 0.85)
    return far + (near - far) * t, horizon + (size - horizon) * t


def _building(canvas: _Canvas, horizon: float) -> None:
    size, rng = canvas.size, canvas.rng
    width, height = rng.uniform(0.18, 0.35) * size, rng.uniform(0.25, 0.5) * size
    left, bottom = rng.uniform(-0.05, 0.85) * size, horizon + rng.uniform(0.02, 0.1) * size
    box = (left, bottom - height, left + width, bottom)
    wall = canvas.color([(150, 110, 90), (125, 125, 130), (175, 160, 130), (110, 120, 135)][rng.integers(4)], 15)
    wall = wall + 8 * canvas.noise(size // 3, size // 6)
    canvas.paint(canvas.mask(lambda d: d.rectangle(box, fill=255)), 'building', wall)
    pane, step = rng.integers(4, 6), rng.integers(8, 11)
    glass = canvas.color([(60, 70, 90), (190, 185, 150)][rng.integers(2)], 20)

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
    canvas.paint(trunk, 'tree', canvas.color((80, 60, 45), 12))
    blobs = [
        (x + rng.uniform(-0.2, 0.2) * height, foot - rng.uniform(0.5, 0.9) * height, rng.uniform(0.16, 0.26) * height)
        for _ in range(6)
    ]

    def crown(draw: ImageDraw.ImageDraw) -> None:
        for cx, cy, r in blobs:
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)

    leaves = canvas.color([(65, 95, 50), (90, 105, 50), (120, 95, 50)][rng.integers(3)], 14)
    canvas.paint(canvas.mask(crown), 'tree', leaves + 34 * canvas.noise(size // 3, size // 3))


def _car(canvas: _Canvas, x: float, y: float) -> None:
    size, rng = canvas.size, canvas.rng
    width = rng.uniform(0.16, 0.26) * size
    height = 0.3 * width
    paints = [(170, 40, 40), (40, 60, 140), (200, 200, 200), (40, 40, 45), (190, 160, 50)]
    paint = canvas.color(paints[rng.integers(5)], 15)
    left, right = x - width / 2, x + width / 2
    cabin = [(left + 0.2 * width, y - height), (left + 0.32 * width, y - 1.8 * height)]
    cabin += [(right - 0.3 * width, y - 1.8 * height), (right - 0.14 * width, y - height)]

    def body(draw: ImageDraw.ImageDraw) -> None:
        draw.rectangle((left, y - height, right, y), fill=255)
        draw.polygon(cabin, fill=255)

    def wheels(draw: ImageDraw.ImageDraw) -> None:
        radius = 0.32 * height + 1
        for cx in (left + 0.22 * width, right - 0.22 * width):
            draw.ellipse((cx - radius, y - radius, cx + radius, y + radius), fill=255)

    canvas.paint(canvas.mask(body), 'car', paint + 5 * canvas.noise(size // 4, size // 4))
    glass = [(0.85 * px + 0.15 * x, 0.85 * py + 0.15 * (y - 1.4 * height)) for px, py in cabin]
    canvas.paint(canvas.mask(lambda d: d.polygon(glass, fill=255)), 'car', canvas.color((60, 75, 90), 10))
    canvas.paint(canvas.mask(wheels), 'car', canvas.color((25, 25, 25), 6))


def draw_scene(rng: np.random.Generator, size: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Draw one square scene of ``size`` pixels, with all randomness from ``rng``.

    Returns:
        RGB image (size, size, 3) and annotation (size, size), both uint8; the annotation has the values of
        :data:`DEMO_CLASSES`, and 0 where nothing is labeled.
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
        # Something that nobody labeled.
        x = rng.uniform(0.05, 0.95) * size
        pole = canvas.mask(lambda d: d.line((x, 0.3 * size, x, rng.uniform(0.7, 0.95) * size), fill=255, width=3))
        canvas.paint(pole, None, canvas.color((60, 60, 60), 20))

    return _photograph(canvas), canvas.labels


def _photograph(canvas: _Canvas) -> np.ndarray:
    """The painted image in some light, with a color cast and grain."""
    size, rng = canvas.size, canvas.rng
    light = rng.uniform(0.65, 1.2)
    side = 1 + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, size, dtype=np.float32)[None, :, None]
    cast = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    grain = rng.normal(0, rng.uniform(4, 9), canvas.image.shape)
    return np.clip(canvas.image * light * side * cast + grain, 0, 255).astype(np.uint8)


def write_demo_data(root: str | Path, num_train: int = 48, num_val: int = 12, size: int = 160, seed: int = 0) -> Path:
    """Write scenes as ADE20K has them, as a function of the seed; returns the root, which is made.

    It gets ``images/{training,validation}/*.jpg`` and ``annotations/{training,validation}/*.png`` of ``size`` pixels.
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


Point = tuple[float, float]


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _disc(x: float, y: float, radius_x: float, radius_y: float) -> list[Point]:
    angles = [2 * math.pi * step / 16 for step in range(16)]
    return [(x + radius_x * math.cos(angle), y + radius_y * math.sin(angle)) for angle in angles]


class _Shape(NamedTuple):
    """A kind of object: width by height, outline, and what is painted over it in another color.

    Coordinates are shares of width and height.
    """

    coco_name: str
    aspect: float
    outline: list[list[Point]]
    details: list[list[Point]]


_SHAPES = {
    'boat': _Shape(
        'boat',
        1.2,
        [
            [(0.0, 0.7), (1.0, 0.7), (0.82, 1.0), (0.18, 1.0)],
            _box(0.45, 0.0, 0.52, 0.72),
            [(0.5, 0.02), (0.95, 0.62), (0.5, 0.62)],
            [(0.46, 0.1), (0.46, 0.62), (0.1, 0.62)],
        ],
        [_box(0.05, 0.74, 0.95, 0.8)],
    ),
    'bottle': _Shape(
        'bottle',
        0.42,
        [[(0.33, 0.0), (0.67, 0.0), (0.67, 0.22), (1.0, 0.42), (1.0, 1.0), (0.0, 1.0), (0.0, 0.42), (0.33, 0.22)]],
        [_box(0.0, 0.58, 1.0, 0.82)],
    ),
    'bus': _Shape(
        'bus',
        1.9,
        [_box(0.0, 0.0, 1.0, 0.84), _disc(0.22, 0.84, 0.085, 0.16), _disc(0.78, 0.84, 0.085, 0.16)],
        [_box(0.05 + 0.235 * index, 0.14, 0.22 + 0.235 * index, 0.44) for index in range(4)],
    ),
    'tvmonitor': _Shape(
        'tv',
        1.3,
        [_box(0.0, 0.0, 1.0, 0.8), _box(0.42, 0.78, 0.58, 0.95), _box(0.22, 0.93, 0.78, 1.0)],
        [_box(0.06, 0.07, 0.94, 0.72)],
    ),
}

#: The kinds of objects of the detection sets, by VOC's names; COCO calls a tvmonitor tv.
DEMO_OBJECTS = tuple(_SHAPES)


class DemoObject(NamedTuple):
    """An object in an image."""

    name: str  # one of DEMO_OBJECTS
    polygons: list[np.ndarray]  # (n, 2) points x, y in pixels; the object covers their union
    box: tuple[float, float, float, float]  # left, top, right and bottom in pixels


def draw_objects(rng: np.random.Generator, size: int = 160) -> tuple[np.ndarray, list[DemoObject]]:
    """Draw one to three objects, whole and apart; RGB image (size, size, 3), uint8, and what it shows."""
    canvas = _Canvas(size, rng)
    horizon = rng.uniform(0.4, 0.7) * size
    _sky(canvas, horizon)
    _ground(canvas, horizon)
    objects: list[DemoObject] = []
    wanted = rng.integers(1, 4)
    for _ in range(12):
        name = DEMO_OBJECTS[rng.integers(len(DEMO_OBJECTS))]
        shape = _SHAPES[name]
        scale = rng.uniform(0.3, 0.5) * size
        width, height = scale * math.sqrt(shape.aspect), scale / math.sqrt(shape.aspect)
        left, top = rng.uniform(0, size - width), rng.uniform(0, size - height)
        box = (left, top, left + width, top + height)
        if len(objects) < wanted and not any(_overlap(box, other.box) for other in objects):
            objects.append(DemoObject(name, _paint_object(canvas, shape, box), box))
    return _photograph(canvas), objects


def _overlap(box: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _cover(size: int, polygons: list[np.ndarray]) -> np.ndarray:
    """Mask (size, size) of what polygons cover."""
    picture = Image.new('1', (size, size))
    for polygon in polygons:
        ImageDraw.Draw(picture).polygon([tuple(point) for point in polygon], fill=1)
    return np.asarray(picture)


def _paint_object(canvas: _Canvas, shape: _Shape, box: tuple[float, float, float, float]) -> list[np.ndarray]:
    """Paint an object into its box; its outline in pixels."""

    def place(polygons: list[list[Point]]) -> list[np.ndarray]:
        corner, extent = np.asarray(box[:2]), np.asarray([box[2] - box[0], box[3] - box[1]])
        return [corner + np.asarray(polygon) * extent for polygon in polygons]

    color = canvas.rng.uniform(30, 200, 3)
    # The details are lighter or darker than the rest, by enough to be seen in any light.
    second = np.where(color.mean() > 115, color - 85, color + 85)
    outline = place(shape.outline)
    for polygons, texture in ((outline, color), (place(shape.details), second)):
        grain = 6 * canvas.noise(canvas.size // 4, canvas.size // 4)
        canvas.paint(_cover(canvas.size, polygons), None, texture + grain)
    return outline


def write_demo_voc(
    root: str | Path,
    num_train: int = 24,
    num_test: int = 8,
    size: int = 160,
    seed: int = 0,
    years: Sequence[int] = (2007,),
) -> Path:
    """Write a detection set as VOC has it, as a function of the seed; returns the root, which is made.

    It stands for ``VOCdevkit`` and gets ``VOC<year>/{JPEGImages,Annotations,ImageSets/Main}`` with the lists
    ``trainval`` (``num_train`` images in each year) and ``test`` (in 2007 alone).
    """
    root = Path(root)
    for year in years:
        folder = root / f'VOC{year}'
        for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
            (folder / name).mkdir(parents=True, exist_ok=True)
        splits = [('trainval', num_train, 0)] + [('test', num_test, 1)] * (year == 2007)
        number = 0
        for split, count, stream in splits:
            names = []
            for index in range(count):
                image, objects = draw_objects(np.random.default_rng((seed, stream, index, year)), size)
                number += 1
                names.append(f'{number:06d}')
                Image.fromarray(image).save(folder / f'JPEGImages/{names[-1]}.jpg', quality=95)
                _voc_annotation(names[-1], size, objects).write(folder / f'Annotations/{names[-1]}.xml')
            (folder / f'ImageSets/Main/{split}.txt').write_text(''.join(f'{name}\n' for name in names))
    return root


def _voc_annotation(name: str, size: int, objects: list[DemoObject]) -> ElementTree.ElementTree:
    top = ElementTree.Element('annotation')

    def add(parent: ElementTree.Element, **entries: object) -> None:
        for tag, text in entries.items():
            ElementTree.SubElement(parent, tag).text = str(text)

    add(top, filename=f'{name}.jpg')
    add(ElementTree.SubElement(top, 'size'), width=size, height=size, depth=3)
    for item in objects:
        entry = ElementTree.SubElement(top, 'object')
        add(entry, name=item.name, truncated=0, difficult=0)
        # VOC counts pixels from 1, and the last one belongs to the box.
        left, upper, right, lower = item.box
        low, high = (math.floor(left) + 1, math.floor(upper) + 1), (math.ceil(right), math.ceil(lower))
        sides = dict(zip(('xmin', 'ymin', 'xmax', 'ymax'), low + high))
        add(ElementTree.SubElement(entry, 'bndbox'), **sides)
    return ElementTree.ElementTree(top)


def write_demo_coco(root: str | Path, num_train: int = 24, num_val: int = 8, size: int = 160, seed: int = 0) -> Path:
    """Write an instance segmentation set as COCO 2017 has it, as a function of the seed; returns the root.

    It gets ``{train,val}2017/*.jpg`` and ``annotations/instances_{train,val}2017.json``. Needs mmdet, for its classes.
    """
    from mmdet.datasets import CocoDataset

    # All 80, since their order gives the labels. The numbers are not COCO's, which have gaps.
    numbers = {name: number for number, name in enumerate(CocoDataset.METAINFO['classes'], 1)}
    root = Path(root)
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    for split, count, stream in (('train2017', num_train, 0), ('val2017', num_val, 1)):
        (root / split).mkdir(exist_ok=True)
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(count):
            image, objects = draw_objects(np.random.default_rng((seed, stream, index)), size)
            name = f'{index + 1:012d}.jpg'
            Image.fromarray(image).save(root / split / name, quality=95)
            images.append(dict(id=index + 1, file_name=name, height=size, width=size))
            for item in objects:
                left, upper, right, lower = item.box
                entry: dict = dict(id=len(annotations) + 1, image_id=index + 1, iscrowd=0)
                entry['category_id'] = numbers[_SHAPES[item.name].coco_name]
                entry['bbox'] = [round(value, 2) for value in (left, upper, right - left, lower - upper)]
                entry['area'] = int(_cover(size, item.polygons).sum())
                entry['segmentation'] = [np.round(polygon, 2).ravel().tolist() for polygon in item.polygons]
                annotations.append(entry)
        categories = [dict(id=number, name=name) for name, number in numbers.items()]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return root
