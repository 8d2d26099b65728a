"""Draw what a model sees in images and videos.

Images are read as the config's test pipeline says; a picture has 8-bit colors, whatever its image has.
Segmentation gives a colored overlay with a legend of the classes found, the largest first;
detection gives boxes, and masks if the model has some. Results are written as PNG files named like the images;
those of videos as MP4 files of the same size and frame rate, without legend and sound.

Examples:
    slak-mm infer upernet_slak_t_ade20k checkpoint.pth street.jpg
    slak-mm infer cascade_mask_rcnn_slak_t_coco checkpoint.pth images/ --out-dir results --score-thr 0.5
    slak-mm infer upernet_slak_t_ade20k checkpoint.pth drive.mp4 --json drive.json
    slak-mm infer upernet_slak_t_ade20k checkpoint.pth large.tif --window 512
"""

import argparse
import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import VISUALIZERS
from rich.console import Console
from rich.progress import track

from slak_mm import cli
from slak_mm.checkpoints import read_checkpoint
from slak_mm.cli import video
from slak_mm.cli.coco import CocoResults, mask_api
from slak_mm.cli.overlay import class_shares, displayable, overlay, with_legend
from slak_mm.cli.predict import Predictor
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
    sources = 'files or addresses of images and videos, or folders to search for them'
    add('images', nargs='+', metavar='IMAGE_OR_VIDEO_OR_DIR', help=sources)
    out = 'where the pictures and videos go (default: %(default)s)'
    add('--out-dir', type=cli.output_folder, default='./infer_results', help=out)
    add('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)')
    colors = 'of the colors over the image, 0 to 1 (default: %(default)s)'
    add('--opacity', type=opacity, default=0.5, help=colors)
    score = 'detection: draw boxes from this score on (default: %(default)s)'
    add('--score-thr', type=opacity, default=0.3, help=score)
    results = "write the predictions in COCO's result format: masks of classes, or boxes of any score and masks"
    add('--json', type=cli.output_file, metavar='OUT.json', help=results)
    ids = 'for --json: take the ids of images and classes from this data set; without it they count from 1'
    add('--ann-file', metavar='COCO.json', help=ids)
    window = 'slide a window of this many pixels over larger images, to bound the memory'
    add('--window', type=cli.crop_size, metavar='N or HxW', help=window)
    add('--stride', type=cli.crop_size, metavar='N or HxW', help='of the window (default: two thirds of it)')
    cli.add_size_arguments(parser)
    cli.add_cfg_options(parser)
    return parser.parse_args()


def find_images(sources: list[str]) -> list[tuple[str, Path]]:
    """Image and video files and the paths of their results below the output folder."""
    suffixes = (*SUFFIXES, *video.SUFFIXES)
    found: list[tuple[str, Path]] = []
    for name in sources:
        source = Path(name)
        if source.is_dir():
            images = sorted(path for path in source.rglob('*') if path.suffix.lower() in suffixes and path.is_file())
            if not images:
                raise cli.ConfigOverrideError(f'"{source}" has no images or videos ({", ".join(suffixes)}).')
            found += [(str(path), path.relative_to(source)) for path in images]
        elif source.is_file() or '://' in name:  # an address is for the backend of the config's loader
            found.append((name, Path(source.name)))
        else:
            raise cli.ConfigOverrideError(f'There is no image, video or folder "{source}".')
    # Two images may differ in their suffix or folder only: number the later ones.
    results: list[tuple[str, Path]] = []
    taken: set[Path] = set()
    for path, relative in found:
        suffix = '.mp4' if is_video(path) else '.png'
        result, number = relative.with_suffix(suffix), 1
        while result in taken:
            number += 1
            result = relative.with_name(f'{relative.stem}_{number}{suffix}')
        taken.add(result)
        results.append((path, result))
    return results


def is_video(path: str) -> bool:
    return Path(path).suffix.lower() in video.SUFFIXES


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


class Look:
    """Predicts, draws, and notes the predictions."""

    def __init__(self, predictor: Predictor, classes: dict, results: CocoResults | None, args: argparse.Namespace):
        self.predictor = predictor
        self.names = classes['classes']
        palette = classes.get('palette')
        self.palette = palette or np.random.default_rng(0).integers(40, 256, (len(self.names), 3)).tolist()
        self.results = results
        self.args = args

    def segment(self, image: dict, name: str, what: str | None, **more: Any) -> tuple[np.ndarray, str]:
        """Overlay, with a legend unless it is a frame, and a line about it."""
        labels = self.predictor.labels(image, what)
        if self.results:
            self.results.add_labels(name, labels, **more)
        picture = overlay(displayable(image['img']), labels, self.palette, self.args.opacity)
        shares = class_shares(labels, len(self.names))
        entries = [(f'{self.names[index]} {100 * share:.1f}%', self.palette[index]) for index, share in shares]
        return picture if more else with_legend(picture, entries), ', '.join(text for text, _ in entries[:4])

    def detect(self, image: dict, name: str, what: str | None, **more: Any) -> tuple[np.ndarray, str]:
        """Masks, boxes by the framework's visualizer, and a line about them."""
        sample, picture = self.predictor.instances(image, what), displayable(image['img'])
        if self.results:
            self.results.add_instances(name, sample.pred_instances, picture.shape[:2], **more)
        shown = sample.pred_instances[sample.pred_instances.scores >= self.args.score_thr]
        for label, mask in zip(shown.labels, shown.pop('masks', ())):
            x, y, width, height = map(int, mask_api().toBbox(mask))
            place = slice(y, y + height), slice(x, x + width)
            inside = mask_api().decode(mask)[place] - 1  # 255 elsewhere
            picture[place] = overlay(picture[place], inside, [self.palette[label]], self.args.opacity)
        sample.pred_instances = shown
        visualizer: Any = VISUALIZERS.build(dict(type='DetLocalVisualizer', name='infer'))
        visualizer.dataset_meta = dict(classes=self.names, palette=[tuple(color) for color in self.palette])
        visualizer.add_datasample('result', picture, sample, draw_gt=False, show=False, pred_score_thr=-1)
        return visualizer.get_image(), f'{len(shown)} objects'


def draw_video(path: str, target: Path, draw: Callable, predictor: Predictor, what: str) -> str:
    """Draw all frames into an MP4 file, with a progress bar; gives a line about them."""
    movie, count = video.Video(path), 0
    with video.writing_video(target, movie.fps, movie.size) as write:
        for frame in track(movie, what, total=len(movie) or None, console=Console(stderr=True)):
            name = f'{path}#{count}'
            picture, _ = draw(predictor.frame(frame), name, None, video=path, frame_id=count)
            write(picture)
            count += 1
    return f'{count} frames'


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
    if args.stride and not args.window:
        raise cli.ConfigOverrideError('--stride is the step of a --window, and there is none.')
    if args.stride and any(step > side for step, side in zip(args.stride, args.window)):
        raise cli.ConfigOverrideError('--stride must not be larger than --window, or parts of an image are left out.')
    if args.ann_file and not args.json:
        raise cli.ConfigOverrideError('--ann-file has the ids for --json, and there is none.')
    for path, relative in images:
        if Path(args.out_dir, relative).resolve() == Path(path).resolve():
            raise cli.ConfigOverrideError(f'"{path}" would be overwritten: choose another --out-dir.')
    model, classes = build_model(cfg, args)
    predictor = Predictor(model, build_pipeline(cfg), args.window, args.stride)
    paths = [path for path, _ in images]
    results = CocoResults(classes['classes'], args.ann_file, paths) if args.json else None
    look = Look(predictor, classes, results, args)
    draw = look.segment if scope == 'mmseg' else look.detect
    unreadable = []
    with contextlib.ExitStack() as stack:
        if results:  # an interrupt too leaves what is there
            stack.callback(results.write, args.json)
        for number, (path, relative) in enumerate(images, 1):
            progress, target = f'[{number}/{len(images)}] {path}', Path(args.out_dir, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if is_video(path):
                    summary = draw_video(path, target, draw, predictor, progress)
                else:
                    picture, summary = draw(predictor.read(path), path, progress)
                    mmcv.imwrite(np.ascontiguousarray(picture[..., ::-1]), str(target))
            except DataError as error:
                unreadable.append(path)
                print(f'{progress}: skipped: {error}', file=sys.stderr, flush=True)
                continue
            print(f'{progress} -> {target}: {summary}', flush=True)
    if unreadable:
        names = ', '.join(unreadable)
        print(f'error: {len(unreadable)} of {len(images)} files could not be read: {names}', file=sys.stderr)
    return 1 if unreadable else 0
