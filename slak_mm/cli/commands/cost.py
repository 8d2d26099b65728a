"""Print parameters and FLOPs of configs and ImageNet networks, beside the published ones.

FLOPs are multiply-adds, as in the papers. Nothing is computed but shapes: no weights, no GPU and
hardly any memory are needed.

Examples:
    slak-mm cost                                    # everything there is
    slak-mm cost upernet_slak_t_ade20k --size 512x512
    slak-mm cost slak_t_in1k_300e --sparsity 0.4 --distribution erk
    slak-mm cost upernet_slak_t_ade20k --checkpoint work_dirs/iter_160000.pth
    slak-mm cost scaling --plot scaling.png         # against the kernel size; see scaling --help
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from mmengine.logging import MMLogger

from slak_mm import cli
from slak_mm._config import config_names
from slak_mm._tables import table
from slak_mm.bases import benchmark
from slak_mm.checkpoints import CONVENTIONS, ZOO
from slak_mm.cli import ConfigOverrideError
from slak_mm.cost import Cost, count


def parse_args() -> argparse.Namespace:
    if sys.argv[1:2] == ['scaling']:
        return benchmark('scaling').parse_args(sys.argv[2:])
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    what = 'config files, or zoo names of ImageNet checkpoints (default: all)'
    add('networks', nargs='*', metavar='CONFIG_OR_NAME', help=what)
    size = 'image (default: 224x224 for ImageNet, 512x2048 for segmentation, 800x1280 for detection)'
    add('--size', type=cli.image_size, metavar='HxW', help=size)
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument('--checkpoint', help='leave out the zeros of this checkpoint')
    sparsity = "leave out this fraction of the weights (default: the config's, else that of the published weights)"
    masks.add_argument('--sparsity', type=float, metavar='FRACTION', help=sparsity)
    how = 'of --sparsity over the layers (default: uniform)'
    add('--distribution', choices=['uniform', 'erk'], default='uniform', help=how)
    add('--parts', action='store_true', help='list backbone, neck and heads too')
    add('--json', type=cli.output_file, metavar='OUT', help='write all figures to this file')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # What replaces SyncBN and the like is of no concern here.
    MMLogger.get_current_instance().setLevel('WARNING')
    if sys.argv[1:2] == ['scaling']:
        for line in benchmark('scaling').run(args):
            print(line, flush=True)
        return
    if args.checkpoint and len(args.networks) != 1:
        raise ConfigOverrideError('--checkpoint belongs to one network: name its config.')
    networks = args.networks or [
        *(info.name for info in ZOO.values() if info.task == 'classification'),
        *config_names(),
    ]
    masks = dict(checkpoint=args.checkpoint, sparsity=args.sparsity, distribution=args.distribution)
    costs = [count(name, args.size, **masks) for name in networks]
    notes = [key for key in CONVENTIONS if any(cost.published and cost.published.counted == key for cost in costs)]
    header = 'network,image,parameters,FLOPs,masks,not masked,FLOPs,published,counted the same way,difference,note'
    print('Parameters in millions, FLOPs in 10^9 multiply-adds.\n')
    print(table([header.split(','), *(row(cost, notes) for cost in costs)]))
    if notes:
        print('\nWhat the published figures count (whole millions of parameters are often cut off, not rounded):')
        for number, key in enumerate(notes, 1):
            print(f'  {number}. {CONVENTIONS[key].text}.')
    if args.parts:
        print()
        for cost in costs:
            parts = ', '.join(f'{part} {flops / 1e9:.2f}' for part, flops in cost.parts.items())
            print(f'{Path(cost.name).stem}: {parts}; large kernels {cost.large_flops / 1e9:.2f}')
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps([entry(cost) for cost in costs], indent=1) + '\n')


def row(cost: Cost, notes: list[str]) -> list[str]:
    """A row of the table."""

    def figures(parameters: float, flops: float) -> list[str]:
        return [f'{parameters / 1e6:.2f}', f'{flops / 1e9:.2f}']

    size = f'{cost.size[0]}x{cost.size[1]}'
    texts = [Path(cost.name).stem, size, *figures(cost.parameters, cost.flops), cost.masks]
    kept = figures(cost.parameters - cost.masked_parameters, cost.flops - cost.masked_flops)
    texts += kept if cost.masks != 'none' else ['', '']
    if cost.published is None:
        return [*texts, '', '', '', '']
    published = cost.published.parameters_m, cost.published.flops_g
    texts.append(' / '.join(f'{value:g}' for value in published))
    note = str(notes.index(cost.published.counted) + 1)
    if cost.masks == 'none' and CONVENTIONS[cost.published.counted].needs_masks:
        return [*texts, '', '', note]
    counted = [value / scale for value, scale in zip(cost.as_published(), (1e6, 1e9))]
    differences = ' / '.join(f'{value / other - 1:+.1%}' for value, other in zip(counted, published))
    return [*texts, ' / '.join(f'{value:.2f}' for value in counted), differences, note]


def entry(cost: Cost) -> dict[str, object]:
    """A cost for JSON."""
    parameters, flops = cost.as_published()
    return dict(asdict(cost), counted_as_published=dict(parameters=parameters, flops=flops) if cost.published else None)
