"""Parameters, FLOPs, activation memory and time against the size of the kernels, from 7 to 151.

SLaK-T's plan with a square kernel and a small one (as RepLKNet), with the two rectangular kernels of
SLaK, dense and with 40 % of the weights masked, at width 1.0 and 1.3; and ShiftWise-T. A size K stands
for kernels of K, K - 2, K - 4 and 13 in the four stages, none below 7, as in the published networks.

FLOPs are multiply-adds of one image with the head for ImageNet; activations are what a training step
keeps for its backward pass; the time is that of the deployed backbone. Masked weights cost as much
memory and time as others, so sparse networks have the figures of dense ones there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

from slak_mm import cli
from slak_mm.checkpoints import ZOO
from slak_mm.cost import DEFAULT_SIZES, count_backbone, saved_for_backward
from slak_mm.models import switch_to_deploy

from . import common

_SQUARE = dict(type='SLaK', width_factor=1.0, decomposed=False)
_DECOMPOSED = dict(type='SLaK', width_factor=1.0)
_WIDE = dict(type='SLaK', width_factor=1.3)
#: Arguments and sparsity by the name in the table.
FORMS: dict[str, tuple[dict[str, Any], float]] = {
    'square + small': (_SQUARE, 0.0),
    'decomposed': (_DECOMPOSED, 0.0),
    'decomposed, sparse': (_DECOMPOSED, 0.4),
    'decomposed, width 1.3': (_WIDE, 0.0),
    'decomposed, width 1.3, sparse': (_WIDE, 0.4),
    'ShiftWise': (dict(type='ShiftWise'), 0.0),
}
SIZES = (7, 13, 21, 31, 41, 51, 61, 81, 101, 121, 151)
# Distinguishable for color-blind readers (Okabe and Ito); sparse forms are dashed in the color of the dense ones.
_COLORS = {'square + small': '#D55E00', 'decomposed': '#56B4E9', 'decomposed, width 1.3': '#0072B2'}
_COLORS['ShiftWise'] = '#009E73'


def kernel_sizes(size: int) -> tuple[int, int, int, int]:
    """Kernel of each stage."""
    return size, max(7, size - 2), max(7, size - 4), min(13, size)


def published() -> dict[str, tuple[int, float, float]]:
    """Size of the largest kernel, published parameters (M) and FLOPs (G) of ImageNet networks, by their zoo name."""
    return {
        info.name: (info.backbone['kernel_sizes'][0], info.figures['params_m'], info.figures['flops_g'])
        for info in ZOO.values()
        if info.backbone.get('type') == 'SLaK' and info.backbone.get('arch') == 'tiny'
        if info.task == 'classification' and 'l2s' not in info.name
    }


def odd_kernel(text: str) -> int:
    """Argument type: an odd kernel size from 7."""
    size = int(text)
    if size < 7 or size % 2 == 0:
        raise argparse.ArgumentTypeError(f'a kernel size is odd and at least 7, got {text}')
    return size


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line of ``slak-mm cost scaling``."""
    parser = cli.ArgumentParser(
        prog='cost.py scaling', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = f'sizes of the largest kernel (default: {" ".join(map(str, SIZES))})'
    add('--kernels', nargs='+', type=odd_kernel, default=list(SIZES), metavar='K', help=sizes)
    size = DEFAULT_SIZES['classification']
    add('--size', type=cli.image_size, default=size, metavar='HxW', help=f'image (default: {size[0]}x{size[1]})')
    add('--no-time', action='store_true', help='count, but do not measure times')
    common.add_measurement_arguments(parser, batches=(), repeats=3, memory=False)
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> Iterator[str]:
    """Count and measure, and yield the lines of the report.

    Raises:
        BenchmarkError: What :func:`~benchmarks.common.check_arguments` refuses.
    """
    common.check_arguments(args)
    height, width = args.size
    yield f'One image of {height}x{width}; activations and times in float32 and {args.dtype}.'
    rows: list[dict[str, Any]] = []

    def measured() -> Iterator[dict[str, Any]]:
        for size in dict.fromkeys(args.kernels):
            for row in measure(size, args):
                rows.append(row)
                yield row

    yield from common.report(
        argparse.Namespace(json=args.json, plot=None),
        common.describe_machine(args.device, dtype=args.dtype, repeats=args.repeats, size=f'{height}x{width}'),
        ['kernel', 'form'.ljust(30), 'parameters (M)', 'FLOPs (G)', 'activations (MiB)', 'ms'],
        measured(),
        cells,
        lambda row: '',
        lambda row: {},
        '',
    )
    yield from summary(rows)
    if args.plot:
        plot(args.plot, rows, args)


def measure(size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures for one kernel size."""
    rows: list[dict[str, Any]] = []
    backbones = {name: dict(form, kernel_sizes=kernel_sizes(size)) for name, (form, _) in FORMS.items()}
    dense = {name: backbone for name, backbone in backbones.items() if not FORMS[name][1]}
    times = {} if args.no_time else _times(dense, args)
    for name, backbone in backbones.items():
        sparsity = FORMS[name][1]
        cost = count_backbone(backbone, args.size, sparsity=sparsity)
        row: dict[str, Any] = dict(
            kernel=size,
            form=name,
            kernel_sizes=backbone['kernel_sizes'],
            sparsity=sparsity,
            parameters=cost.parameters - cost.masked_parameters,
            flops=cost.flops - cost.masked_flops,
            activation_bytes=None,
            seconds=times.get(name),
        )
        if not sparsity:
            with torch.device('meta'):
                model = _backbone(backbone)
                row['activation_bytes'] = saved_for_backward(model, torch.empty(1, 3, *args.size))
        rows.append(row)
    return rows


def _backbone(arguments: Mapping[str, Any]) -> Any:
    return MODELS.build(dict(arguments, norm_cfg=dict(type='BN'), out_norm=False))


def _times(backbones: Mapping[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a forward pass of each, deployed."""
    dtype = common.DTYPES[args.dtype]
    image = torch.randn(1, 3, *args.size, generator=torch.Generator().manual_seed(0)).to(args.device, dtype)
    steps = {}
    for name, arguments in backbones.items():
        model = switch_to_deploy(_backbone(arguments).eval()).to(args.device, dtype)

        def step(model: Any = model) -> Tensor:
            with torch.no_grad():
                return model(image)[-1]

        steps[name] = step
    return common.measure_times(steps, args.repeats, args.device)[0]


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    memory = '' if row['activation_bytes'] is None else f'{row["activation_bytes"] / 2**20:.0f}'
    milliseconds = '' if row['seconds'] is None else f'{1e3 * row["seconds"]:.3g}'
    figures = f'{row["parameters"] / 1e6:.2f}', f'{row["flops"] / 1e9:.2f}', memory, milliseconds
    return [str(row['kernel']), row['form'].ljust(30), *figures]


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """FLOPs beside the square kernel's, where there is a published figure."""
    flops = {(row['kernel'], row['form']): row['flops'] / 1e9 for row in rows}
    for name, (size, _, figure) in published().items():
        square = flops.get((size, 'square + small'))
        if square and size > 7:
            own = flops[size, 'decomposed']
            shares = f'{own / square - 1:+.0%}', f'{figure / square - 1:+.0%}'
            yield (
                f'\n{size}x{size}: {square:.2f} G with a square kernel; decomposed {own:.2f} G ({shares[0]}) at the '
                f'same width; published for {name}: {figure:g} G ({shares[1]})'
            )


def plot(path: str, rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Draw each figure against the kernel size, with published points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, tuple[str, float]] = {
        'parameters (M)': ('parameters', 1e-6),
        'FLOPs (G)': ('flops', 1e-9),
        'activations of a training step (MiB)': ('activation_bytes', 2**-20),
        'time of a forward pass (ms)': ('seconds', 1e3),
    }
    panels = {title: key for title, key in panels.items() if any(row[key[0]] for row in rows)}
    columns = 2 if len(panels) == 4 else len(panels)
    lines = len(panels) // columns
    figure = Figure(figsize=(4.6 * columns, 0.8 + 3.5 * lines), dpi=90, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns).ravel()
    handles: dict[str, Any] = {}
    for axis, (title, (key, scale)) in zip(axes, panels.items()):
        for form, (_, sparsity) in FORMS.items():
            points = [(row['kernel'], row[key] * scale) for row in rows if row['form'] == form and row[key]]
            if points:
                style = dict(color=_COLORS[form.removesuffix(', sparse')], linestyle='--' if sparsity else '-')
                (handles[form],) = axis.plot(*zip(*points), marker='o', markersize=3, linewidth=1.6, **style)
        for size, *figures in published().values() if key in ('parameters', 'flops') else ():
            value = figures[key == 'flops']
            handles['published: ConvNeXt-T, SLaK-T'] = axis.scatter(
                size, value, marker='*', s=90, color='black', zorder=3, linewidths=0
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel('kernel size', fontsize=9)
        axis.set_xticks(sorted({row['kernel'] for row in rows}))
        axis.tick_params(labelsize=7)
        axis.set_ylim(0, None)
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
    _note_saving(axes[list(panels).index('FLOPs (G)')], rows)
    figure.legend(handles.values(), handles.keys(), loc='outside upper center', ncols=4, frameon=False, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _note_saving(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw what the largest published network saves against the square kernel of its size."""
    size, _, figure = max(published().values())
    square = [row['flops'] / 1e9 for row in rows if (row['kernel'], row['form']) == (size, 'square + small')]
    if square:
        arrow = dict(arrowstyle='->', color='black', linewidth=1)
        axis.annotate('', (size, figure), (size, square[0]), arrowprops=arrow)
        axis.text(size - 2, (figure + square[0]) / 2 + 2, f'{figure / square[0] - 1:.0%}', fontsize=9, ha='right')
