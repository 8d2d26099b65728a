#!/usr/bin/env python
"""Measure what this package computes against what it replaces, side by side in one run.

No figure is printed for a result that disagrees with the reference.

Examples:
    python tools/benchmark.py op --family slak --size 512x512
    python tools/benchmark.py op --family shiftwise --stages 0 1 --json out.json --plot out.png
    python tools/benchmark.py model --size 800x1344 --batch 1 2
    python tools/benchmark.py infer configs/upernet_slak_t_ade20k.py --size 512x512
    python tools/benchmark.py segmentor configs/upernet_slak_t_ade20k.py --size 256x256
    python tools/benchmark.py gpu --out results
    python tools/benchmark.py sparse --size 512x512 --batch 1 2 --mode rigl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks import gpu, infer, model, op, segmentor, sparse
from slak_mm import cli

COMMANDS = (op, model, infer, segmentor, sparse, gpu)


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for line in args.run(args):
        print(line, flush=True)


if __name__ == '__main__':
    cli.run_tool(main)
