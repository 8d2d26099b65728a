"""Download, unpack and verify data sets, in the layout that the configs expect.

An interrupted download goes on where it was. Archives are deleted when their data set is
complete. ADE20K takes 2 GB while it is unpacked, VOC 2007 2 GB, VOC 2012 4 GB, COCO 40 GB.

Examples:
    slak-mm data ade20k --root data
    slak-mm data voc2007 voc2012 --root data --keep-archives
    slak-mm data coco --root data --check
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from slak_mm import cli
from slak_mm.cli.prepare_data import DATA_SETS, check, prepare


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='+', choices=list(DATA_SETS), metavar='NAME', help=', '.join(DATA_SETS))
    parser.add_argument('--root', default='data', metavar='DIR', help='folder of the data sets (default: data)')
    parser.add_argument('--check', action='store_true', help='only verify, and name the first thing that is missing')
    kept = 'keep what was downloaded, in .downloads below the root'
    parser.add_argument('--keep-archives', action='store_true', help=kept)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    names = list(dict.fromkeys(args.names))
    if args.check:
        problems = {name: check(name, args.root) for name in names}
        for name, missing in problems.items():
            print(f'{name}: ' + ('complete' if missing is None else f'NOT complete: {missing}'))
        return int(any(problems.values()))
    cli.check_output(args.root, is_folder=True)
    columns = TextColumn('{task.description}'), BarColumn(), TextColumn('{task.fields[amount]}'), TimeRemainingColumn()
    for name in names:
        with Progress(*columns, console=Console(file=sys.stderr)) as progress:
            tasks: dict[str, TaskID] = {}

            def report(
                what: str, done: int, total: int, progress: Progress = progress, tasks: dict[str, TaskID] = tasks
            ) -> None:
                if what not in tasks:
                    tasks[what] = progress.add_task(what, amount='')
                of = f' of {amount(total)}' if total else ''
                progress.update(tasks[what], completed=done, total=total or None, amount=f'{amount(done)}{of}')

            folder = prepare(name, args.root, keep_archives=args.keep_archives, report=report)
        print(f'{name} is complete: {folder}')
    return 0


def amount(number: int) -> str:
    """Bytes or files as text."""
    return f'{number / 1e6:.1f} M' if number >= 1e6 else str(number)
