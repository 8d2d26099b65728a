"""Draw what a model sees in images.

``python tools/infer.py CONFIG CHECKPOINT IMAGE_OR_DIR...``

Segmentation gives a colored overlay with a legend of the classes found, the largest first;
detection gives boxes. Results are written as PNG files named like the images.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from torch import nn

from slak_mm import cli
from slak_mm.checkpoints import read_checkpoint
from slak_mm.cli.overlay import class_shares, overlay, with_legend
from slak_mm.engine.hooks import load_whole_model

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')


def opacity(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'must be from 0 to 1, got {text}')
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='file, address or zoo name')
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE_OR_DIR', help='image files, or folders that are searched for images'
    )
    parser.add_argument('--out-dir', default='./infer_results', help='where the pictures go (default: %(default)s)')
    parser.add_argument(
        '--device', default='cuda:0' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)'
    )
    parser.add_argument(
        '--opacity', type=opacity, default=0.5, help='of the colors over the image, 0 to 1 (default: %(default)s)'
    )
    parser.add_argument(
        '--score-thr', type=opacity, default=0.3, help='detection: draw boxes from this score on (default: %(default)s)'
    )
    cli.add_size_arguments(parser)
    parser.add_argument(
        '--cfg-options', nargs='+', action=cli.KeyValuePairs, metavar='KEY=VALUE', help='override any key of the config'
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of every error')
    return parser.parse_args()


def find_images(sources: list[str]) -> list[tuple[Path, Path]]:
    """Image files and the paths of their results below the output folder."""
    found: list[tuple[Path, Path]] = []
    for source in map(Path, sources):
        if source.is_dir():
            images = sorted(path for path in source.rglob('*') if path.suffix.lower() in SUFFIXES and path.is_file())
            if not images:
                raise cli.ConfigOverrideError(f'"{source}" has no images ({", ".join(SUFFIXES)}).')
            found += [(path, path.relative_to(source)) for path in images]
        elif source.is_file():
            found.append((source, Path(source.name)))
        else:
            raise cli.ConfigOverrideError(f'There is no image or folder "{source}".')
    # Two images may differ in their suffix or folder only: number the later ones.
    results: list[tuple[Path, Path]] = []
    taken: set[Path] = set()
    for path, relative in found:
        result, number = relative.with_suffix('.png'), 1
        while result in taken:
            number += 1
            result = relative.with_name(f'{relative.stem}_{number}.png')
        taken.add(result)
        results.append((path, result))
    return results


def build_model(cfg: Config, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The model with its weights, and names and colors of its classes."""
    checkpoint = read_checkpoint(args.checkpoint)
    cli.adapt_to_device(cfg)
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise cli.ConfigOverrideError(
            f'The device "{args.device}" cannot be used here: {str(error).splitlines()[0]}'
        ) from error
    model = cli.build_model(cfg, cli.model_of(cfg))
    load_whole_model(model, checkpoint, args.checkpoint)
    meta = checkpoint.get('meta') or {}
    classes = meta.get('dataset_meta') or {}
    if not classes.get('classes') and meta.get('CLASSES'):  # mmseg 0.x
        classes = dict(classes=meta['CLASSES'], palette=meta.get('PALETTE'))
    if not classes.get('classes'):
        _, dataset = next(cli.datasets_of(cfg, ('test_dataloader', 'val_dataloader')))
        kind = cli.dataset_class(dataset, cfg.get('default_scope'))
        classes = dict(getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {}))
    # Where the framework's inference functions look for the pipeline.
    cfg.setdefault('test_pipeline', cfg.test_dataloader.dataset.get('pipeline'))
    model.cfg = cfg
    return model.to(device).eval(), dict(classes)


def segment(model: nn.Module, image: np.ndarray, classes: dict, args: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Overlay with legend, and a line about it; ``image`` is BGR."""
    from mmseg.apis import inference_model

    labels = inference_model(model, image).pred_sem_seg.data[0].cpu().numpy()
    names = classes['classes']
    palette = classes.get('palette') or np.random.default_rng(0).integers(40, 256, (len(names), 3)).tolist()
    shares = class_shares(labels, len(names))
    entries = [(f'{names[index]} {100 * share:.1f}%', palette[index]) for index, share in shares]
    picture = overlay(image[..., ::-1], labels, palette, args.opacity)
    return with_legend(picture, entries), ', '.join(text for text, _ in entries[:4])


def detect(model: nn.Module, image: np.ndarray, classes: dict, args: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Boxes by the framework's visualizer, and a line about them; ``image`` is BGR."""
    from mmdet.apis import inference_detector

    result = inference_detector(model, image)
    visualizer: Any = VISUALIZERS.build(dict(type='DetLocalVisualizer', name='infer'))
    visualizer.dataset_meta = classes
    visualizer.add_datasample(
        'result',
        np.ascontiguousarray(image[..., ::-1]),
        result,
        draw_gt=False,
        show=False,
        pred_score_thr=args.score_thr,
    )
    count = int((result.pred_instances.scores >= args.score_thr).sum())
    return visualizer.get_image(), f'{count} objects'


def main() -> int:
    args = parse_args()
    cfg = cli.load_config(args.config)
    cli.apply_overrides(cfg, args)
    images = find_images(args.images)
    scope = cfg.get('default_scope')
    if scope not in ('mmseg', 'mmdet'):
        raise cli.ConfigOverrideError(f'infer.py knows configs of mmseg and mmdet, this one is of "{scope}".')
    if importlib.util.find_spec(scope) is None:
        raise cli.ConfigOverrideError(f'"{scope}" is not installed.')
    model, classes = build_model(cfg, args)
    run = segment if scope == 'mmseg' else detect
    unreadable = []
    for number, (path, relative) in enumerate(images, 1):
        progress = f'[{number}/{len(images)}] {path}'
        try:
            image = mmcv.imread(str(path), 'color')
        except Exception:  # backends raise what they like on damaged files
            image = None
        if image is None:
            unreadable.append(path)
            print(f'{progress}: cannot be read as an image, skipped', file=sys.stderr, flush=True)
            continue
        picture, summary = run(model, image, classes, args)
        target = Path(args.out_dir, relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        mmcv.imwrite(np.ascontiguousarray(picture[..., ::-1]), str(target))
        print(f'{progress} -> {target}: {summary}', flush=True)
    if unreadable:
        print(
            f'error: {len(unreadable)} of {len(images)} images could not be read: '
            f'{", ".join(str(path) for path in unreadable)}',
            file=sys.stderr,
        )
    return 1 if unreadable else 0


if __name__ == '__main__':
    cli.run_tool(main)
