"""Measure what this package computes against what it replaces, side by side in one run.

No figure is printed for a result that disagrees with the reference.

Examples:
    slak-mm benchmark op --family slak --size 512x512
    slak-mm benchmark op --family replknet --size 224x224 512x512
    slak-mm benchmark op --family shiftwise --stages 0 1 --json out.json --plot out.png
    slak-mm benchmark model --size 800x1344 --batch 1 2
    slak-mm benchmark infer upernet_slak_t_ade20k --size 512x512
    slak-mm benchmark segmentor upernet_slak_t_ade20k --size 256x256
    slak-mm benchmark gpu --out results
    slak-mm benchmark sparse --size 512x512 --batch 1 2 --mode rigl
"""

from __future__ import annotations

import argparse

from slak_mm import cli
from slak_mm.bases import benchmark

COMMANDS = ('op', 'model', 'infer', 'segmentor', 'sparse', 'gpu')


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    for name in COMMANDS:
        benchmark(name).add_parser(commands)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for line in args.run(args):
        print(line, flush=True)
