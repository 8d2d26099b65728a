#!/usr/bin/env python
"""Measure the operators against what they replace, side by side in one run.

`op --family slak` compares the backend of the package with PyTorch's own depthwise convolution,
branch by branch, in either memory layout. `op --family shiftwise` compares the convolution with
assembled kernels to the shifted sum of filtered maps, which the official code computes: once with
a hand-written adjoint, as the official CUDA code has, and once left to autograd.

No figure is printed for a result that disagrees with the reference.

Examples:
    python tools/benchmark.py op --family slak --size 512x512
    python tools/benchmark.py op --family shiftwise --stages 0 1 --json out.json
"""
from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slak_mm.ops import choose_backend, cross_dwconv2d
from slak_mm.ops.shift_tables import assemble_kernels, num_filters, shift_tables

# The shifted sum is kept with the tests, which show that it is the official one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))

# SLaK-T, and the convolved channels of ShiftWise-T.
CHANNELS = dict(slak=(124, 249, 499, 998), shiftwise=(60, 122, 246, 492))
KERNELS = (51, 49, 47, 13)
SMALL_KERNEL = dict(slak=5, shiftwise=3)
CONTENDERS = dict(
    slak=('ours', 'NCHW', 'channels-last'),
    shiftwise=('ours', 'shifted, own adjoint', 'shifted, autograd'))
NUM_REPS = 4
DTYPES = dict(float32=torch.float32, float64=torch.float64, bfloat16=torch.bfloat16)
# Largest difference to the reference, as a fraction of its largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05}
# A run that takes longer than this is not repeated.
LONG_SECONDS = 5.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    op = commands.add_parser('op', help='the large-kernel operator, stage by stage')
    op.add_argument('--family', choices=list(CHANNELS), default='slak')
    op.add_argument('--device', default='cpu', help='cpu or cuda (default: cpu)')
    op.add_argument('--size', nargs='+', type=image_size, default=[(512, 512), (800, 1344)],
                    metavar='HxW', help='image sizes (default: 512x512 800x1344)')
    op.add_argument('--batch', nargs='+', type=positive_int, default=[1], metavar='N')
    op.add_argument('--stages', nargs='+', type=int, choices=range(4), default=[0, 1, 2, 3])
    op.add_argument('--dtype', choices=list(DTYPES), default='float32')
    op.add_argument('--repeats', type=positive_int, default=5,
                    help='timed runs of each, after one that warms up (default: 5); '
                    f'one if it takes over {LONG_SECONDS:g} s')
    op.add_argument('--skip', nargs='+', default=[], metavar='NAME',
                    choices=sorted({c for names in CONTENDERS.values() for c in names[1:]}),
                    help='competitors to leave out, such as one that takes minutes')
    op.add_argument('--no-memory', action='store_true', help='do not measure memory')
    op.add_argument('--json', metavar='OUT', help='write all figures to this file')
    peak = commands.add_parser('peak', help='peak memory of one case; used by op')
    peak.add_argument('case', help='JSON')
    return parser.parse_args(argv)


def image_size(text: str) -> tuple[int, int]:
    """Parse ``HxW``."""
    try:
        height, width = map(int, text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'a size is HxW, such as 512x512, got {text}') from None
    if min(height, width) < 32:
        raise argparse.ArgumentTypeError(f'a size must be at least 32x32, got {text}')
    return height, width


def positive_int(text: str) -> int:
    """Parse a number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a positive integer, got {text}')
    return int(text)


# ------------------------------------------------------------------------------------- cases


class Case:
    """Inputs of one operator at one stage, and the ways to compute it.

    Args:
        family: A key of :data:`CHANNELS`.
        stage: 0 to 3.
        size: Height and width of the image.
        batch: Images.
        dtype: A key of :data:`DTYPES`.
        device: 'cpu' or 'cuda'.
        channels: Instead of those of the published tiny network. Default: None.
    """

    def __init__(self, family: str, stage: int, size: Sequence[int], batch: int, dtype: str,
                 device: str, channels: int | None = None) -> None:
        self.family, self.stage, self.batch = family, stage, batch
        self.size = tuple(size)
        self.kernel = KERNELS[stage]
        self.small = SMALL_KERNEL[family]
        self.channels = channels or CHANNELS[family][stage]
        self.map = tuple(math.ceil(n / 2 ** (stage + 2)) if family == 'shiftwise'
                         else n // 2 ** (stage + 2) for n in size)
        self.dtype = DTYPES[dtype]
        self.device = device
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        c, m, n = self.channels, self.kernel, self.small
        self.x = normal(batch, c, *self.map)
        self.grads = [normal(batch, c, *self.map) for _ in range(3)]
        if family == 'slak':
            self.weights = [normal(c, m, n), normal(c, n, m), normal(c, n, n)]
        else:
            self.weights = [normal(c * num_filters(m, n), 1, n, n)]
            tables = shift_tables(c, m, n, NUM_REPS)
            self.shifts, self.picks = (t.to(device) for t in tables)
        # Sums over hundreds of products of size 1 would leave bfloat16 little to agree on.
        self.weights = [(w / w[0].numel() ** 0.5).requires_grad_() for w in self.weights]

    def prepare(self, contender: str) -> tuple[Callable[[], list[Tensor]], Tensor, list[Tensor]]:
        """The computation, its input and the gradients of its results, in the right layout."""
        layout = torch.contiguous_format
        if contender in ('ours', 'channels-last'):
            # The backbones run in channels-last on the CPU.
            if contender == 'channels-last' or self.device == 'cpu':
                layout = torch.channels_last
        x = self.x.clone(memory_format=layout).requires_grad_()
        grads = [g.contiguous(memory_format=layout) for g in self.grads]
        return lambda: list(self._run(contender, x)), x, grads

    def _run(self, contender: str, x: Tensor) -> Sequence[Any]:
        if self.family == 'slak':
            if contender == 'ours':
                return cross_dwconv2d(x, *self.weights)
            return [
                F.conv2d(x, w.unsqueeze(1), padding=(w.shape[1] // 2, w.shape[2] // 2),
                         groups=self.channels) for w in self.weights]  # fmt: skip
        filters, = self.weights
        if contender == 'ours':
            tall, wide, small = assemble_kernels(filters, self.shifts, self.picks, self.kernel)
            y_tall, y_wide, y_small = cross_dwconv2d(
                x, tall, wide, small, center=self.kernel // 2)
            return y_wide, y_tall, y_small
        from shiftwise_reference import activation_space
        return activation_space(
            x, filters, self.shifts, self.picks, fused=contender == 'shifted, own adjoint')

    def step(self, contender: str, backward: bool) -> Callable[[], list[Tensor]]:
        """One forward pass, or forward and backward; returns results and gradients."""
        run, x, grads = self.prepare(contender)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return run()

        def both() -> list[Tensor]:
            outs = run()
            return [*(o.detach() for o in outs),
                    *torch.autograd.grad(outs, (x, *self.weights), grads)]

        return both if backward else forward


def worst_difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference of any tensor, as a fraction of its largest value."""
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
               for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------------------ measurements


def measure_times(
    steps: dict[str, Callable[[], list[Tensor]]], repeats: int, device: str
) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
    """Median seconds of each step, the contenders taking turns; and what the first run gave."""
    def timed(step: Callable[[], list[Tensor]]) -> tuple[float, list[Tensor]]:
        synchronise(device)
        begin = time.perf_counter()
        result = step()
        synchronise(device)
        return time.perf_counter() - begin, result

    first, results = {}, {}
    for name, step in steps.items():
        first[name], results[name] = timed(step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            if first[name] < LONG_SECONDS:
                times[name].append(timed(step)[0])
    return {name: statistics.median(t) if t else first[name] for name, t in times.items()}, results


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if device != 'cpu':
        torch.cuda.synchronize()


def measure_peak(case: dict[str, Any], contender: str, backward: bool) -> float | None:
    """Peak memory of a pass above that of its inputs, in MiB, in a process of its own."""
    environment = dict(
        os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()),
        PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    # Freed blocks go back to the system at once, so that the resident size is what is in use.
    environment.update(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')
    text = json.dumps(dict(case, contender=contender, backward=backward))
    done = subprocess.run(
        [sys.executable, __file__, 'peak', text], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'the memory measurement of {contender} failed: '
                           f'{(done.stderr.strip() or "killed").splitlines()[-1]}')
    return json.loads(done.stdout.splitlines()[-1])


def run_peak(args: argparse.Namespace) -> None:
    """Print the peak memory of one case in MiB, or null where the system does not tell it."""
    options = json.loads(args.case)
    contender, backward = options.pop('contender'), options.pop('backward')
    # What is loaded at first use is no memory of the operator.
    tiny = Case(**{**options, 'size': (128, 128), 'batch': 1, 'channels': 8})
    tiny.step(contender, backward)()
    step = Case(**options).step(contender, backward)
    if options['device'] != 'cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronise(options['device'])
        print(json.dumps((torch.cuda.max_memory_allocated() - before) / 2**20))
        return
    try:
        Path('/proc/self/clear_refs').write_text('5')  # sets the peak to the present size
        before_kib = _status('VmRSS')
        step()
        print(json.dumps((_status('VmHWM') - before_kib) / 2**10))
    except (OSError, KeyError):
        print('null')


def _status(name: str) -> int:
    """An entry of /proc/self/status in KiB."""
    lines = (line.split() for line in Path('/proc/self/status').read_text().splitlines())
    return {words[0].rstrip(':'): int(words[1]) for words in lines if words[-1:] == ['kB']}[name]


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                processor = line.split(':', 1)[1].strip()
                break
    except OSError:
        pass
    return dict(
        processor=processor, cores=os.cpu_count(), threads=torch.get_num_threads(),
        load_1min=round(os.getloadavg()[0], 1) if hasattr(os, 'getloadavg') else None,
        device=torch.cuda.get_device_name() if args.device != 'cpu' else 'cpu',
        torch=torch.__version__, date=datetime.datetime.now().isoformat(timespec='minutes'),
        dtype=args.dtype, repeats=args.repeats)


# ------------------------------------------------------------------------------------ output


def run_op(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the JSON file."""
    machine = describe_machine(args)
    print(', '.join(f'{key} {value}' for key, value in machine.items()))
    names = [name for name in CONTENDERS[args.family] if name not in args.skip]
    with_memory = args.family == 'shiftwise' and not args.no_memory
    print(f'{args.family}: median times in ms and, after @, peak memory above the inputs in MiB; '
          'behind them the multiple of ours. fwd: forward, f+b: forward and backward.\n'
          if with_memory else
          f'{args.family}: median times in ms, behind them the multiple of ours. fwd: forward, '
          'f+b: forward and backward.\n')
    header = ['image', 'batch', 'stage', 'map', 'channels', 'kernel', 'pass', *names]
    widths = [9, 5, 5, 7, 8, 6, 4, *(29 if with_memory else 20 for _ in names)]
    print_row(header, widths)
    print_row(['-' * width for width in widths], widths)
    rows, failed = [], False
    for size in args.size:
        for batch in args.batch:
            for stage in args.stages:
                options = dict(family=args.family, stage=stage, size=size, batch=batch,
                               dtype=args.dtype, device=args.device)
                case = Case(**options)
                for backward in (False, True):
                    row = measure(case, options, names, backward, args, with_memory)
                    rows.append(row)
                    failed |= bool(row['disagrees'])
                    print_row(cells(case, row, names), widths)
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + '\n')
    if failed:
        print('error: a result disagrees with the reference; its figures are left out.',
              file=sys.stderr)
    return int(failed)


def measure(case: Case, options: dict[str, Any], names: Sequence[str], backward: bool,
            args: argparse.Namespace, with_memory: bool) -> dict[str, Any]:
    """All figures of one pass at one stage."""
    steps = {name: case.step(name, backward) for name in names}
    times, results = measure_times(steps, args.repeats, args.device)
    # The reference: the plain convolutions, or the shifted sum of the official code.
    judge = 'channels-last' if case.family == 'slak' else 'shifted, own adjoint'
    if judge in results and case.dtype is not torch.bfloat16:
        want = results[judge]
    else:
        exact = 'float64' if case.dtype is torch.bfloat16 else args.dtype
        want = Case(**{**options, 'dtype': exact}).step(judge, backward)()
    disagrees = []
    for name, result in results.items():
        difference = worst_difference(
            [t.double() for t in result], [t.double() for t in want])
        if not difference <= TOLERANCE[case.dtype]:
            disagrees.append(name)
            times[name] = math.nan
    del results, want
    memory = {name: measure_peak(options, name, backward)
              for name in names if name not in disagrees} if with_memory else {}
    return dict(
        **{**options, 'size': list(options['size'])}, map=list(case.map), channels=case.channels,
        kernel=case.kernel, backward=backward,
        backend=choose_backend(case.x, [w.detach() for w in case.weights]),
        seconds={k: v for k, v in times.items() if k not in disagrees},
        peak_mib=memory, disagrees=disagrees)


def cells(case: Case, row: dict[str, Any], names: Sequence[str]) -> list[str]:
    """A row of the table as text."""
    height, width = case.size
    texts = [f'{height}x{width}', str(case.batch), str(case.stage + 1),
             f'{case.map[0]}x{case.map[1]}', str(case.channels), str(case.kernel),
             'f+b' if row['backward'] else 'fwd']
    for name in names:
        if name in row['disagrees']:
            texts.append('disagrees')
            continue
        text = f'{1e3 * row["seconds"][name]:.1f}'
        peak, ours_peak = row['peak_mib'].get(name), row['peak_mib'].get('ours')
        ours = row['seconds'].get('ours')
        if name != 'ours' and ours:
            text += f' ({row["seconds"][name] / ours:.1f}x)'
        if peak is not None:
            text += f' @ {peak:.0f}'
            if name != 'ours' and ours_peak:
                text += f' ({peak / ours_peak:.1f}x)'
        texts.append(text)
    return texts


def print_row(texts: Sequence[str], widths: Sequence[int]) -> None:
    """Print one line of a Markdown table."""
    print('| ' + ' | '.join(text.ljust(width) for text, width in zip(texts, widths)) + ' |',
          flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of the user end in one sentence on stderr and exit code 1."""
    args = parse_args(argv)
    if args.command == 'peak':
        run_peak(args)
        return 0
    if args.device != 'cpu' and not torch.cuda.is_available():
        print(f'error: --device {args.device} needs a CUDA device, and torch finds none.',
              file=sys.stderr)
        return 1
    if args.family == 'shiftwise' and importlib.util.find_spec('shiftwise_reference') is None:
        print('error: --family shiftwise needs tests/shiftwise_reference.py, the shifted sum: run '
              'it in a checkout of the project.', file=sys.stderr)
        return 1
    if args.json and not Path(args.json).resolve().parent.is_dir():
        print(f'error: there is no folder {Path(args.json).parent} to write --json into.',
              file=sys.stderr)
        return 1
    try:
        return run_op(args)
    except (RuntimeError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
