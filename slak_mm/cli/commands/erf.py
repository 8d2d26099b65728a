"""Effective receptive field: how far a network sees, as heat maps and area ratios.

The contribution of each pixel of the image to the central pixel of the last stage is averaged over
images. A network is written as [NAME=]NETWORK[@WEIGHTS] and has random weights unless some are named:

    slak_t_in1k_300e                       a zoo name, with its weights (@random: without)
    configs/upernet_slak_t_ade20k.py@CKPT  the backbone of a config of any framework
    "SLaK kernel_sizes=[31,29,27,13]"      a registered backbone and its arguments
    "timm:convnext_tiny ls_init_value=1.0" a model of timm and its arguments (@pretrained: timm's weights)

Written to --out-dir are erf.png, erf.json, and for each network NAME.npy, the map. An interrupted run
goes on where it was; so does one that is asked for more images.

Examples:
    slak-mm erf SLaK ShiftWise timm:convnext_tiny
    slak-mm erf slak_t_in1k_300e --images data/imagenet/val --num 50 --size 1024x1024
    slak-mm erf slak_t_in1k_300e --images data/imagenet/val --official
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from slak_mm import cli
from slak_mm._files import replacing
from slak_mm._tables import table
from slak_mm.cli.contributions import Images, average_contributions, file_name
from slak_mm.cli.networks import SYNTAX, build_network
from slak_mm.erf import THRESHOLDS, area_ratios, draw_maps


def parse_args() -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('networks', nargs='+', metavar='NETWORK', help=SYNTAX.replace('%', '%%'))
    sources = 'image files, or folders to search for images (default: generated scenes)'
    add('--images', nargs='+', default=[], metavar='PATH', help=sources)
    num, size = (50, (1024, 1024)) if has_gpu else (20, (512, 512))
    add('--num', type=cli.positive_int, metavar='N', help='images (default: 50 with a GPU, else 20; official: 50)')
    what = 'of the images (default: 1024x1024 with a GPU, else 512x512; official: 1024x1024)'
    add('--size', type=cli.image_size, metavar='HxW', help=what)
    official = "compute exactly what the published scripts compute, by RepLKNet's rule where they differ"
    add('--official', action='store_true', help=official)
    add('--device', default='cuda:0' if has_gpu else 'cpu', help='(default: %(default)s)')
    add('--seed', type=int, default=0, help='of random weights, generated images and their order (default: 0)')
    add('--out-dir', type=cli.output_folder, default='erf_results', metavar='DIR', help='(default: %(default)s)')
    add('--restart', action='store_true', help='begin anew where there are results already')
    args = parser.parse_args()
    args.num = args.num or (50 if args.official else num)
    args.size = args.size or ((1024, 1024) if args.official else size)
    return args


def main() -> None:
    args = parse_args()
    cli.usable_device(args.device)
    MMLogger.get_current_instance().setLevel('WARNING')
    networks = [build_network(text, args.seed) for text in args.networks]
    names = [file_name(network.name) for network in networks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise cli.ConfigOverrideError(f'Two networks are named {twice[0]}: write NAME=NETWORK to tell them apart.')
    images = Images(args.images, args.size, args.official, args.seed)
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows, maps = [], {}
    with Bar(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr)) as bar:
        tasks = [bar.add_task(network.name, total=args.num) for network in networks]
        for network, name, task in zip(networks, names, tasks):
            done = average_contributions(
                network,
                images,
                args.num,
                folder,
                official=args.official,
                device=args.device,
                restart=args.restart,
                report=lambda count, task=task: bar.update(task, completed=count),  # type: ignore[misc]
            )
            maps[network.name] = done.average.mean()
            with replacing(folder / f'{name}.npy') as part, part.open('wb') as out:
                np.save(out, maps[network.name])
            rows.append(
                dict(
                    name=network.name,
                    weights=network.weights,
                    images=done.average.count,
                    unreadable=done.unreadable,
                    left_out=done.average.num_left_out,
                    map=f'{name}.npy',
                    areas=areas(maps[network.name], args.official),
                )
            )
    height, width = args.size
    settings = dict(
        size=[height, width], official=args.official, seed=args.seed, images=args.images or 'generated', networks=rows
    )
    with replacing(folder / 'erf.json') as part:
        part.write_text(json.dumps(settings, indent=1) + '\n')
    title = f'Contribution to the central pixel of the last stage: {height}x{width}, {rows[0]["images"]} images'
    picture = draw_maps(maps, args.official, title)
    with replacing(folder / 'erf.png') as part:
        Image.fromarray(picture).save(part, format='png')
    print(report(rows))
    print(f'\n{folder}: erf.png, erf.json, {", ".join(str(row["map"]) for row in rows)}')


def areas(scores: np.ndarray, official: bool) -> list[dict[str, Any]]:
    """The squares of a map, for JSON."""
    squares = area_ratios(scores, THRESHOLDS, official)
    return [
        dict(threshold=threshold, side=square and square[0], ratio=square and square[1])
        for threshold, square in zip(THRESHOLDS, squares)
    ]


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and what was passed over."""
    header = ['network', 'weights', 'images', *(f'{threshold:.0%}: area (side)' for threshold in THRESHOLDS)]
    lines = [header]
    notes = []
    for row in rows:
        squares = [f'{a["ratio"]:.1%} ({a["side"]})' if a['side'] else 'not reached' for a in row['areas']]
        lines.append([row['name'], row['weights'], str(row['images']), *squares])
        if row['unreadable']:
            notes.append(f'{row["name"]}: {len(row["unreadable"])} images could not be read: {row["unreadable"][0]} …')
        if row['left_out']:
            notes.append(f'{row["name"]}: {row["left_out"]} images gave NaN or no contribution and were left out.')
    return '\n'.join([table(lines), *notes])
