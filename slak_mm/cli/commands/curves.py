"""Draw the curves of training runs.

Loss, density and exploration of sparse training, learning rate and validation metrics, as far as
the runs have them, from the ``scalars.json`` files that mmengine writes.

Examples:
    slak-mm curves work_dirs/upernet_slak_t_ade20k
    slak-mm curves dense=work_dirs/a sparse=work_dirs/b --keys loss "sparsity/*" --out both.png
"""

import argparse
from pathlib import Path

from PIL import Image

from slak_mm import cli
from slak_mm.cli import ConfigOverrideError
from slak_mm.cli.curves import draw_curves, read_scalars


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    runs = 'work directory of a run; NAME=WORK_DIR names it in the legend'
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help=runs)
    out = 'picture to write (default: %(default)s)'
    parser.add_argument('--out', type=cli.output_file, default='curves.png', metavar='FILE', help=out)
    keys = 'such as loss lr "sparsity/*" (default: loss, density, exploration, churn, lr and validation metrics)'
    parser.add_argument('--keys', nargs='+', metavar='KEY', help=f'scalars to draw, {keys}')
    parser.add_argument('--title', help='written above the curves')
    return parser.parse_args()


def named(argument: str) -> tuple[str, Path]:
    """Name and folder of ``NAME=FOLDER`` or ``FOLDER``."""
    name, separator, folder = argument.partition('=')
    if separator and not Path(argument).exists():
        return name, Path(folder)
    path = Path(argument)
    return path.resolve().name, path


def main() -> None:
    args = parse_args()
    runs = {}
    out = Path(args.out)
    if out.suffix.lower() not in Image.registered_extensions():
        raise ConfigOverrideError(f'{out} has no suffix of a picture format; use one such as .png.')
    for argument in args.work_dirs:
        name, folder = named(argument)
        runs[name if name not in runs else str(folder)] = read_scalars(folder)
    picture = draw_curves(runs, args.keys, args.title)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(out)
    height, width = picture.shape[:2]
    print(f'{len(runs)} runs: {out} ({width}x{height})')
