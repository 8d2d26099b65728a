"""Timing, checking, and reporting that all benchmarks share."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slak_mm.cli import ConfigOverrideError, image_size, output_file, positive_int

DTYPES = dict(float32=torch.float32, float64=torch.float64, bfloat16=torch.bfloat16, float16=torch.float16)
# Largest difference to the reference, as a fraction of its largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
# A run that takes longer than this is not repeated.
LONG_SECONDS = 5.0


class BenchmarkError(ConfigOverrideError):
    """The benchmark cannot run, or a contender computes something else; says what, and why."""


def add_command(commands: Any, module: Any, summary: str) -> argparse.ArgumentParser:
    """Add a module's sub-command, which has its last name, to the result of ``ArgumentParser.add_subparsers``."""
    name = module['__name__'].rpartition('.')[2]
    parser = commands.add_parser(name, help=summary, description=module['__doc__'])
    parser.set_defaults(run=module['run'])
    return parser


def add_measurement_arguments(
    parser: argparse.ArgumentParser,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (1,),
    repeats: int = 5,
    dtypes: Sequence[str] = ('float32', 'float64', 'bfloat16', 'float16'),
    memory: bool = True,
) -> None:
    """Add ``--device --size --batch --dtype --repeats --no-memory --json --plot``, with these defaults and choices.

    Without sizes (height, width) or batches there is no such option; the first dtype is the default.
    """
    add = parser.add_argument
    add('--device', default='cpu', help='cpu or cuda (default: cpu)')
    if sizes:
        what = f'image sizes (default: {" ".join(f"{height}x{width}" for height, width in sizes)})'
        add('--size', nargs='+', type=image_size, default=list(sizes), metavar='HxW', help=what)
    if batches:
        what = f'images at once (default: {" ".join(map(str, batches))})'
        add('--batch', nargs='+', type=positive_int, default=list(batches), metavar='N', help=what)
    add('--dtype', choices=list(dtypes), default=dtypes[0], help=f'(default: {dtypes[0]})')
    runs = f'timed runs of each after one that warms up (default: {repeats}), which counts if over {LONG_SECONDS:g} s'
    add('--repeats', type=positive_int, default=repeats, help=runs)
    if memory:
        add('--no-memory', action='store_true', help='do not measure memory')
    add('--json', type=output_file, metavar='OUT', help='write all figures to this file')
    add('--plot', type=output_file, metavar='OUT.png', help='draw the figures (needs matplotlib)')


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse, before anything is measured, what would fail after it.

    Raises:
        BenchmarkError: There is no such device, or no matplotlib.
    """
    device = getattr(args, 'device', 'cpu')
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ''
    if kind not in ('cpu', 'cuda'):
        raise BenchmarkError(f'--device is cpu or cuda, got {device}.')
    if kind == 'cuda' and not torch.cuda.is_available():
        raise BenchmarkError(f'--device {device} needs a CUDA device, and torch finds none.')
    if getattr(args, 'plot', None):
        if importlib.util.find_spec('matplotlib') is None:
            raise BenchmarkError('--plot needs matplotlib, which is not installed.')
        import matplotlib

        suffix = Path(args.plot).suffix.lstrip('.').lower()
        from matplotlib.backend_bases import FigureCanvasBase

        if suffix not in FigureCanvasBase.get_supported_filetypes():
            raise BenchmarkError(
                f'matplotlib {matplotlib.__version__} writes no "{suffix}" files; name --plot e.g. x.png.'
            )


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device != 'cpu':
        torch.cuda.synchronize()


def measure_times(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: str = 'cpu'
) -> tuple[dict[str, float], dict[str, Any]]:
    """Time contenders that take turns, so that a busy moment of the machine meets all of them.

    Args:
        steps: The contenders by name.
        repeats: Timed runs of each, after those that warm up: one on the CPU; on a GPU, where the first ones
            compile, until two agree within a tenth, but ten at most. A contender whose last warm-up takes over
            :data:`LONG_SECONDS` is not run again.
        device: 'cpu' or 'cuda', which is timed with events. Defaults to 'cpu'.

    Returns:
        Median seconds of each, and what the first run of each returned.
    """
    rounds, results = measure_rounds(steps, repeats, device)
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}, results


def measure_rounds(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: str = 'cpu'
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """As :func:`measure_times`, but with all seconds of each, round by round."""
    warm, results = {}, {}
    for name, step in steps.items():
        warm[name], results[name] = timed(step, device)
        for _ in range(9 if device != 'cpu' else 0):
            before, (warm[name], _) = warm[name], timed(step, device)
            if abs(warm[name] - before) <= 0.1 * before:
                break
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            if warm[name] < LONG_SECONDS:
                times[name].append(timed(step, device)[0])
    return {name: seconds or [warm[name]] for name, seconds in times.items()}, results


def timed(step: Callable[[], Any], device: str = 'cpu') -> tuple[float, Any]:
    """Seconds of a call, and its result; on a GPU from the launch of its first kernel to the end of its last."""
    if device == 'cpu':
        begin = time.perf_counter()
        result = step()
        return time.perf_counter() - begin, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


def worst_difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference of any tensor, as a fraction of its largest value; NaN where one is."""
    # torch.stack keeps a NaN, which max() would lose.
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True)]
    return float(torch.stack([((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).cpu() for a, b in pairs]).max())


def disagreeing(results: Mapping[str, Sequence[Tensor]], want: Sequence[Tensor], tolerance: float) -> list[str]:
    """Names of the contenders whose results differ from ``want`` by more than that fraction of its largest value."""
    return [name for name, got in results.items() if not worst_difference(got, want) <= tolerance]


def describe_machine(device: str = 'cpu', **settings: Any) -> dict[str, Any]:
    """Processor, cores, threads, load, device, versions, date, and further settings that figures depend on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = re.findall(r'^model name\s*: (.*)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
        processor = lines[0] if lines else processor
    return dict(
        processor=processor,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load_1min=round(os.getloadavg()[0], 1) if hasattr(os, 'getloadavg') else None,
        device=torch.cuda.get_device_name() if device != 'cpu' else 'cpu',
        torch=torch.__version__,
        **_gpu_versions(device),
        date=datetime.datetime.now().isoformat(timespec='minutes'),
        **settings,
    )


def _gpu_versions(device: str) -> dict[str, Any]:
    if device == 'cpu':
        return {}
    import triton

    return dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), triton=triton.__version__)


def report(
    args: argparse.Namespace,
    machine: Mapping[str, Any],
    columns: Sequence[str],
    measured: Iterable[dict[str, Any]],
    cells: Callable[[dict[str, Any]], Sequence[str]],
    label: Callable[[dict[str, Any]], str],
    milliseconds: Callable[[dict[str, Any]], Mapping[str, float | None]],
    title: str,
) -> Iterator[str]:
    """Report rows as they are measured: a Markdown table, ``--json`` and ``--plot``.

    Args:
        args: With ``json`` and ``plot``.
        machine: Of :func:`describe_machine`.
        columns: Header of the table.
        measured: The rows.
        cells: A row's cells as text.
        label: A row's name in the plot; rows of one name make one group of bars.
        milliseconds: A row's bars by contender; None where there is no figure.
        title: Of the plot.

    Raises:
        BenchmarkError: At the end, where a row has ``disagrees``.
    """
    widths = [max(9, len(column)) for column in columns]

    def line(texts: Sequence[str]) -> str:
        return '| ' + ' | '.join(text.ljust(width) for text, width in zip(texts, widths, strict=True)) + ' |'

    yield ', '.join(f'{key} {value}' for key, value in machine.items()) + '\n'
    yield line(columns)
    yield line(['-' * width for width in widths])
    rows = []
    for row in measured:
        rows.append(row)
        yield line(cells(row))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + '\n')
    if args.plot:
        groups = list(dict.fromkeys(map(label, rows)))
        series: dict[str, list[float | None]] = {}
        for row in rows:
            for name, value in milliseconds(row).items():
                series.setdefault(name, [None] * len(groups))[groups.index(label(row))] = value
        plot_bars(args.plot, groups, series, title, 'ms')
    if any(row.get('disagrees') for row in rows):
        raise BenchmarkError('a result disagrees with the reference; its figures are left out.')


def multiple(value: float, of: float | None) -> str:
    """`` (3.1x)``, or nothing where there is nothing to compare to."""
    return f' ({value / of:.1f}x)' if of else ''


def plot_bars(
    path: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], title: str, unit: str
) -> None:
    """Draw groups of bars on a logarithmic axis; needs matplotlib.

    ``series`` has for each contender its value in each group, such as an image size; None or NaN draws nothing.
    """
    # No pyplot: it would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 0.8 / max(len(series), 1)
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(groups) * (len(series) + 1)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, values) in enumerate(series.items()):
        shown = [math.nan if value is None else value for value in values]
        places = [row - 0.4 + (index + 0.5) * height for row in range(len(groups))]
        bars = axes.barh(places, shown, height=height * 0.92, label=name)
        labels = [f'{v:.0f}' if v >= 100 else f'{v:.3g}' if math.isfinite(v) else '' for v in shown]
        axes.bar_label(bars, labels, padding=2, fontsize=7)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    if any(value for values in series.values() for value in values):
        axes.set_xscale('log')
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
