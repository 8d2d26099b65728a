"""Draw what a model sees in images.

Images are read as the config's test pipeline says; a picture has 8-bit colors, whatever its image has.
Segmentation gives a colored overlay with a legend of the classes found, the largest first;
detection gives boxes. Results are written as PNG files named like the images.

Examples:
    slak-mm infer upernet_slak_t_ade20k checkpoint.pth street.jpg
    slak-mm infer cascade_mask_rcnn_slak_t_coco checkpoint.pth images/ --out-dir results --score-thr 0.5
"""

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import VISUALIZERS

from slak_mm import cli
from slak_mm.checkpoints import read_checkpoint
from slak_mm.cli.overlay import class_shares, displayable, overlay, with_legend
from slak_mm.engine.hooks import load_whole_model
from slak_mm.engine.samples import DataError, check_loads

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')


def opacity(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'must be from 0 to 1, got {text}')
    return value


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help=cli.CONFIG_HELP)
    add('checkpoint', help='file, address or zoo name')
    add('images', nargs='+', metavar='IMAGE_OR_DIR', help='image files or addresses, or folders to search for images')
    out = 'where the pictures go (default: %(default)s)'
    add('--out-dir', type=cli.output_folder, default='./infer_results', help=out)
    add('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)')
    colors = 'of the colors over the image, 0 to 1 (default: %(default)s)'
    add('--opacity', type=opacity, default=0.5, help=colors)
    score = 'detection: draw boxes from this score on (default: %(default)s)'
    add('--score-thr', type=opacity, default=0.3, help=score)
    cli.add_size_arguments(parser)
    cli.add_cfg_options(parser)
    return parser.parse_args()


def find_images(sources: list[str]) -> list[tuple[str, Path]]:
    """Image files and the paths of their results below the output folder."""
    found: list[tuple[str, Path]] = []
    for name in sources:
        source = Path(name)
        if source.is_dir():
            images = sorted(path for path in source.rglob('*') if path.suffix.lower() in SUFFIXES and path.is_file())
            if not images:
                raise cli.ConfigOverrideError(f'"{source}" has no images ({", ".join(SUFFIXES)}).')
            found += [(str(path), path.relative_to(source)) for path in images]
        elif source.is_file() or '://' in name:  # an address is for the backend of the config's loader
            found.append((name, Path(source.name)))
        else:
            raise cli.ConfigOverrideError(f'There is no image or folder "{source}".')
    # Two images may differ in their suffix or folder only: number the later ones.
    results: list[tuple[str, Path]] = []
    taken: set[Path] = set()
    for path, relative in found:
        result, number = relative.with_suffix('.png'), 1
        while result in taken:
            number += 1
            result = relative.with_name(f'{relative.stem}_{number}.png')
        taken.add(result)
        results.append((path, result))
    return results


def build_model(cfg: Config, args: argparse.Namespace) -> tuple[Any, dict]:
    """The model with its weights, and names and colors of its classes."""
    checkpoint = read_checkpoint(args.checkpoint)
    cli.adapt_to_device(cfg)
    device = cli.usable_device(args.device)
    model = cli.build_model(cfg, cfg.model)
    load_whole_model(model, checkpoint, args.checkpoint)
    meta = checkpoint.get('meta') or {}
    classes = meta.get('dataset_meta') or {}
    if not classes.get('classes') and meta.get('CLASSES'):  # mmseg 0.x
        classes = dict(classes=meta['CLASSES'], palette=meta.get('PALETTE'))
    if not classes.get('classes'):
        _, dataset = next(cli.datasets_of(cfg, ('test_dataloader', 'val_dataloader')))
        kind = cli.dataset_class(dataset, cli.framework(cfg))
        classes = dict(getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {}))
    return model.to(device).eval(), dict(classes)


def without_annotations(node: Any) -> Any:
    """A pipeline without the transforms that load annotations, at any depth."""
    if isinstance(node, dict):
        return ConfigDict({key: without_annotations(value) for key, value in node.items()})
    if isinstance(node, (list, tuple)):
        kept = [without_annotations(item) for item in node if not re.match(r'Load\w*Annotation', cli.type_name(item))]
        # Test-time augmentation makes all combinations of its lists, and an empty one leaves none.
        return type(node)(item for item in kept if item != [])
    return node


def build_pipeline(cfg: Config) -> Compose:
    """The pipeline that ``slak-mm test`` reads with; its errors are :class:`DataError`."""
    for _, dataset in cli.datasets_of(cfg, ('test_dataloader', 'val_dataloader')):
        pipeline = Compose(without_annotations(dataset.get('pipeline')))
        check_loads(pipeline)
        return pipeline
    raise cli.ConfigOverrideError('This config has no test data set, whose pipeline says how images are read.')


def load(pipeline: Compose, path: str) -> tuple[dict, np.ndarray]:
    """What the model gets of an image, and a picture of it to draw on (RGB, uint8).

    Raises:
        DataError: The image cannot be read.
    """
    results: Any = dict(img_path=path, img_id=0, seg_fields=[])
    picture: Any = None
    for transform in pipeline.transforms:
        results = transform(results)
        if results is None:
            raise DataError(f'"{path}" cannot be read.')
        if picture is None and 'img' in results:
            picture = displayable(results['img'])
    return results, picture


def segment(sample: Any, picture: np.ndarray, classes: dict, args: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Overlay with legend, and a line about it."""
    labels = sample.pred_sem_seg.data[0].cpu().numpy()
    names = classes['classes']
    palette = classes.get('palette') or np.random.default_rng(0).integers(40, 256, (len(names), 3)).tolist()
    shares = class_shares(labels, len(names))
    entries = [(f'{names[index]} {100 * share:.1f}%', palette[index]) for index, share in shares]
    summary = ', '.join(text for text, _ in entries[:4])
    return with_legend(overlay(picture, labels, palette, args.opacity), entries), summary


def detect(sample: Any, picture: np.ndarray, classes: dict, args: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Boxes by the framework's visualizer, and a line about them."""
    visualizer: Any = VISUALIZERS.build(dict(type='DetLocalVisualizer', name='infer'))
    visualizer.dataset_meta = classes
    visualizer.add_datasample('result', picture, sample, draw_gt=False, show=False, pred_score_thr=args.score_thr)
    count = int((sample.pred_instances.scores >= args.score_thr).sum())
    return visualizer.get_image(), f'{count} objects'


def main() -> int:
    args = parse_args()
    cfg = cli.load_config(args.config)
    cli.apply_overrides(cfg, args)
    images = find_images(args.images)
    scope = cli.framework(cfg)
    if scope not in ('mmseg', 'mmdet'):
        raise cli.ConfigOverrideError(f'infer knows configs of mmseg and mmdet, this one is of "{scope}".')
    if importlib.util.find_spec(scope) is None:
        raise cli.ConfigOverrideError(f'"{scope}" is not installed.')
    model, classes = build_model(cfg, args)
    pipeline = build_pipeline(cfg)
    draw = segment if scope == 'mmseg' else detect
    unreadable = []
    for number, (path, relative) in enumerate(images, 1):
        progress = f'[{number}/{len(images)}] {path}'
        try:
            data, picture = load(pipeline, path)
        except DataError as error:
            unreadable.append(path)
            print(f'{progress}: skipped: {error}', file=sys.stderr, flush=True)
            continue
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([data]))[0]
        picture, summary = draw(sample, picture, classes, args)
        target = Path(args.out_dir, relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        mmcv.imwrite(np.ascontiguousarray(picture[..., ::-1]), str(target))
        print(f'{progress} -> {target}: {summary}', flush=True)
    if unreadable:
        names = ', '.join(unreadable)
        print(f'error: {len(unreadable)} of {len(images)} images could not be read: {names}', file=sys.stderr)
    return 1 if unreadable else 0
