"""``op``: the large-kernel operator against what it replaces, stage by stage.

``--family slak`` compares the operator of the package with PyTorch's own depthwise convolutions.
``ours`` is the automatic choice, and the other backends that could run are measured beside it.
``NCHW`` is the official formulation, one convolution for each branch; ``best mix`` takes for each
branch the faster of NCHW and channels-last, and leaves out the copies between them. Behind ours
stands its rate in GFLOP/s, and as a fraction of that of a matrix product of this run; taps that
meet padding do not count.

``--family replknet`` and ``--family unireplknet`` do the same for square kernels: RepLKNet-31B with the small kernel
beside each, and UniRepLKNet-T, whose dilated branches are one kernel.

``--family shiftwise`` compares the convolution with assembled kernels to the shifted sum of
filtered maps, which the official code computes: once with a hand-written adjoint, as the official
CUDA code has, and once left to autograd.

The passes: ``fwd`` is forward in training form, with one result for each branch; ``sum`` the
deployed form, with one result and a bias (not shiftwise; the small kernel has been added to the wide
one, for ``best mix`` too, or to the square one, for all); ``f+b`` forward and backward with the
gradients of the input and all weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slak_mm.ops import BACKENDS, choose_backend, cross_dwconv2d, use_backend
from slak_mm.ops.shift_tables import assemble_kernels, num_filters, shift_tables

from . import common
from .peak import measure_peak
from .shifted_sum import activation_space

# SLaK-T, RepLKNet-31B, UniRepLKNet-T, and the convolved channels of ShiftWise-T.
CHANNELS = dict(
    slak=(124, 249, 499, 998),
    replknet=(128, 256, 512, 1024),
    unireplknet=(80, 160, 320, 640),
    shiftwise=(60, 122, 246, 492),
)
KERNELS = dict(
    slak=(51, 49, 47, 13), replknet=(31, 29, 27, 13), unireplknet=(3, 13, 13, 13), shiftwise=(51, 49, 47, 13)
)
SMALL_KERNEL = dict(slak=5, replknet=5, unireplknet=None, shiftwise=3)
CONTENDERS: dict[str, tuple[str, ...]] = dict.fromkeys(CHANNELS, ('ours', 'NCHW', 'channels-last', 'best mix'))
CONTENDERS['shiftwise'] = ('ours', 'shifted, own adjoint', 'shifted, autograd')
PASSES: dict[str, tuple[str, ...]] = dict.fromkeys(CHANNELS, ('fwd', 'sum', 'f+b'))
PASSES['shiftwise'] = ('fwd', 'f+b')
LAYOUTS = {'NCHW': torch.contiguous_format, 'channels-last': torch.channels_last}
# The plain convolutions, or the shifted sum of the official code.
JUDGE = dict.fromkeys(CHANNELS, 'channels-last')
JUDGE['shiftwise'] = 'shifted, own adjoint'
NUM_REPS = 4
MATRIX_SIZE = 2048


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = common.add_command(commands, globals(), 'the large-kernel operator, stage by stage')
    parser.add_argument('--family', choices=list(CHANNELS), default='slak')
    common.add_measurement_arguments(parser, sizes=[(512, 512), (800, 1344)])
    parser.add_argument('--stages', nargs='+', type=int, choices=range(4), default=[0, 1, 2, 3])
    others = sorted({c for names in CONTENDERS.values() for c in names[1:]} | set(BACKENDS))
    what = 'competitors to leave out, such as one that takes minutes'
    parser.add_argument('--skip', nargs='+', default=[], metavar='NAME', choices=others, help=what)


class Case:
    """Inputs of one operator at one stage (0 to 3), and the ways to compute it, on 'cpu' or 'cuda'.

    ``size`` is (height, width) of the image; ``channels`` replace those of the published tiny network.
    """

    def __init__(
        self,
        family: str,
        stage: int,
        size: Sequence[int],
        batch: int,
        dtype: str,
        device: str,
        channels: int | None = None,
    ) -> None:
        self.family, self.stage, self.batch = family, stage, batch
        self.size = tuple(size)
        self.kernel = KERNELS[family][stage]
        self.small = SMALL_KERNEL[family]
        self.channels = channels or CHANNELS[family][stage]
        stride = 2 ** (stage + 2)
        self.map = tuple(n // stride if family == 'slak' else math.ceil(n / stride) for n in size)
        self.dtype = common.DTYPES[dtype]
        self.device = device
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        c, m, n = self.channels, self.kernel, self.small
        self.x = normal(batch, c, *self.map)
        self.grads = [normal(batch, c, *self.map) for _ in range(3)]
        if family == 'slak':
            self.weights = [normal(c, m, n), normal(c, n, m), normal(c, n, n)]
        elif family != 'shiftwise':
            self.weights = [normal(c, m, m), *(() if n is None else (normal(c, n, n),))]
        else:
            self.weights = [normal(c * num_filters(m, n), 1, n, n)]
            tables = shift_tables(c, m, n, NUM_REPS)
            self.shifts, self.picks = (t.to(device) for t in tables)
        if family != 'shiftwise':
            del self.grads[len(self.weights) :]
        # Sums over hundreds of products of size 1 would leave bfloat16 little to agree on.
        self.weights = [(w / w[0].numel() ** 0.5).requires_grad_() for w in self.weights]
        self.bias = normal(c)
        if family != 'shiftwise':
            *self.merged, last = (w.detach() for w in self.weights)
            if n is None:
                self.merged = [last]
            else:  # the small kernel becomes a part of the one before
                rows, columns = ((self.merged[-1].shape[i] - n) // 2 for i in (1, 2))
                self.merged[-1] = self.merged[-1] + F.pad(last, (columns, columns, rows, rows))

    def kernels(self, passing: str) -> Sequence[Tensor]:
        """What PyTorch convolves with; the official code merges the small kernel into a square one only."""
        return self.merged if passing == 'sum' and self.family != 'slak' else self.weights

    def contenders(self) -> list[str]:
        """All of them, ours first, with the backends that could take its place."""
        ours, *others = CONTENDERS[self.family]
        weights = [w.detach() for w in self.weights]
        backends = [
            name
            for name, backend in BACKENDS.items()
            if self.family != 'shiftwise'
            and name not in ('reference', choose_backend(self.x, weights))
            and backend.unavailable_reason(self.x, weights) is None
            and (not hasattr(backend, 'is_preferred') or backend.is_preferred(self.x, weights))
        ]
        return [ours, *backends, *others]

    def layout(self, contender: str) -> torch.memory_format:
        """The memory format in which a contender gets its input."""
        if contender in LAYOUTS:
            return LAYOUTS[contender]
        # The backbones run in channels-last on the CPU.
        is_ours = contender == 'ours' or contender in BACKENDS
        return torch.channels_last if is_ours and self.device == 'cpu' else torch.contiguous_format

    def _run(self, contender: str, x: Tensor, reduce: bool) -> Sequence[Any]:
        if self.family != 'shiftwise':
            if contender != 'ours':
                with use_backend(contender):
                    return self._run('ours', x, reduce)
            if reduce:
                return [cross_dwconv2d(x, *self.merged, bias=self.bias, reduce=True)]
            first, *others = self.weights
            others = others if self.family == 'slak' else [None, *others]
            return [y for y in cross_dwconv2d(x, first, *others) if y is not None]
        (filters,) = self.weights
        if contender == 'ours':
            tall, wide, small = assemble_kernels(filters, self.shifts, self.picks, self.kernel)
            y_tall, y_wide, y_small = cross_dwconv2d(x, tall, wide, small, center=self.kernel // 2)
            return y_wide, y_tall, y_small
        return activation_space(x, filters, self.shifts, self.picks, fused=contender == 'shifted, own adjoint')

    def step(self, contender: str, passing: str) -> Callable[[], list[Tensor]]:
        """One pass, a value of :data:`PASSES`; returns results and gradients."""
        if contender in LAYOUTS:
            steps = [self.branch(contender, i, passing) for i in range(len(self.kernels(passing)))]
            return lambda: self.joined([step() for step in steps], passing)
        layout = self.layout(contender)
        x = self.x.clone(memory_format=layout).requires_grad_()
        grads = [g.contiguous(memory_format=layout) for g in self.grads]

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return list(self._run(contender, x, passing == 'sum'))

        def both() -> list[Tensor]:
            outs = list(self._run(contender, x, False))
            return [*(o.detach() for o in outs), *torch.autograd.grad(outs, (x, *self.weights), grads)]

        return both if passing == 'f+b' else forward

    def branch(self, layout: str, index: int, passing: str) -> Callable[[], list[Tensor]]:
        """PyTorch's convolution with one of the kernels; result, and gradients of both."""
        weight = self.kernels(passing)[index]
        x = self.x.clone(memory_format=LAYOUTS[layout]).requires_grad_()
        grad = self.grads[index].contiguous(memory_format=LAYOUTS[layout])
        padding = (weight.shape[1] // 2, weight.shape[2] // 2)

        def convolve() -> Tensor:
            return F.conv2d(x, weight.unsqueeze(1), padding=padding, groups=self.channels)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [convolve()]

        def both() -> list[Tensor]:
            out = convolve()
            return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]

        return both if passing == 'f+b' else forward

    def joined(self, branches: Sequence[Sequence[Tensor]], passing: str) -> list[Tensor]:
        """What :meth:`step` returns, from what the branches return."""
        outs = [parts[0] for parts in branches]
        if passing == 'sum':
            return [sum(outs[1:], outs[0]) + self.bias.view(-1, 1, 1)]
        if passing == 'fwd':
            return outs
        inputs = [parts[1] for parts in branches]
        return [*outs, sum(inputs[1:], inputs[0]), *(parts[2] for parts in branches)]

    def flops(self, passing: str) -> int:
        """Floating-point operations of the convolutions, without taps that meet padding."""
        kernels = self.merged if passing == 'sum' else self.weights
        taps = sum(_taps(k.shape[1], self.map[0]) * _taps(k.shape[2], self.map[1]) for k in kernels)
        return 2 * self.batch * self.channels * taps * (3 if passing == 'f+b' else 1)


def _taps(kernel: int, size: int) -> int:
    """Taps of a centered kernel that meet a row of pixels, summed over its outputs."""
    middle = kernel // 2
    return sum(min(size - 1, i + middle) - max(0, i - middle) + 1 for i in range(size))


def matrix_product_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP per second of a large matrix product, the best of some."""
    # Random numbers: a GPU is faster, and cooler, on ones.
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=device).to(dtype)
    times = [common.measure_times({'product': lambda: a @ b}, 1, device)[0]['product'] for _ in range(10)]
    return 2 * MATRIX_SIZE**3 / min(times)


def peak_step(*, contender: str, passing: str, **options: Any) -> Callable[[], list[Tensor]]:
    """What :func:`~benchmarks.peak.measure_peak` measures: a contender's pass, with arguments of :class:`Case`."""
    Case(**{**options, 'size': (128, 128), 'batch': 1, 'channels': 8}).step(contender, passing)()
    return Case(**options).step(contender, passing)


def run(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and yield the lines of the report.

    Raises:
        BenchmarkError: What :func:`~benchmarks.common.check_arguments` refuses;
            or, after everything else, a contender disagreed with the reference.
    """
    common.check_arguments(args)
    rate = matrix_product_rate(common.DTYPES[args.dtype], args.device)
    settings = dict(dtype=args.dtype, repeats=args.repeats, matrix_product_gflops=round(rate / 1e9, 1))
    machine = common.describe_machine(args.device, **settings)
    with_memory = args.family == 'shiftwise' and not args.no_memory
    memory_note = ' and, after @, peak memory above the inputs in MiB' if with_memory else ''
    yield f'{args.family}: median times in ms{memory_note}; behind them the multiple of ours.'
    options = [
        dict(family=args.family, stage=stage, size=size, batch=batch, dtype=args.dtype, device=args.device)
        for size, batch, stage in itertools.product(args.size, args.batch, args.stages)
    ]
    names = [name for name in Case(**options[0]).contenders() if name not in args.skip]
    if not set(LAYOUTS) <= set(names) and 'best mix' in names:
        names.remove('best mix')
    yield from common.report(
        args,
        machine,
        ['image, batch, stage, pass', 'map', 'channels', 'kernel', 'GFLOP/s', *names],
        (measure(Case(**o), o, names, p, args, with_memory, rate) for o in options for p in PASSES[args.family]),
        lambda row: cells(row, names),
        label,
        lambda row: {name: 1e3 * row['seconds'][name] if name in row['seconds'] else None for name in names},
        f'{args.family}, {args.dtype}, {machine["device"]}, {machine["threads"]} threads',
    )


def measure(
    case: Case,
    options: dict[str, Any],
    names: Sequence[str],
    passing: str,
    args: argparse.Namespace,
    with_memory: bool,
    rate: float,
) -> dict[str, Any]:
    """All figures of one pass at one stage."""
    steps = {name: case.step(name, passing) for name in names if name != 'best mix'}
    count = range(len(case.kernels(passing))) if 'best mix' in names else ()
    # Branch by branch, with one result in memory at a time.
    steps.update((f'{layout} {i}', case.branch(layout, i, passing)) for layout in LAYOUTS for i in count)
    times, results = common.measure_times(steps, args.repeats, args.device)
    branches = {layout: [times[f'{layout} {i}'] for i in count] for layout in LAYOUTS if 'best mix' in names}
    results = {name: result for name, result in results.items() if name in names}
    judge = JUDGE[case.family]
    is_short = case.dtype in (torch.bfloat16, torch.float16)
    if judge in results and not is_short:
        want = results[judge]
    else:
        exact = 'float64' if is_short else args.dtype
        want = Case(**{**options, 'dtype': exact}).step(judge, passing)()
    disagrees = common.disagreeing(results, want, common.TOLERANCE[case.dtype])
    del results, want
    seconds = {name: times[name] for name in names if name in times and name not in disagrees}
    if 'best mix' in names and not set(LAYOUTS) & set(disagrees):
        # The small kernel of the deployed form is part of a larger one.
        fastest = [min(pair) for pair in zip(*branches.values(), strict=True)]
        seconds['best mix'] = sum(fastest[: len(case.merged)] if passing == 'sum' else fastest)
    memory = {}
    if with_memory:
        for name in set(names) - set(disagrees):
            memory[name] = measure_peak(__name__, dict(options, contender=name, passing=passing))
    flops = None if case.family == 'shiftwise' else case.flops(passing)
    return dict(
        **{**options, 'size': list(options['size'])},
        map=list(case.map),
        channels=case.channels,
        kernel=case.kernel,
        passing=passing,
        backend=choose_backend(case.x, [w.detach() for w in case.weights]),
        seconds=seconds,
        branch_seconds=branches,
        peak_mib=memory,
        disagrees=disagrees,
        flops=flops,
        of_matrix_product=flops / seconds['ours'] / rate if flops and 'ours' in seconds else None,
    )


def label(row: dict[str, Any]) -> str:
    """Image, batch, stage and pass of a row."""
    height, width = row['size']
    return f'{height}x{width}, batch {row["batch"]}, stage {row["stage"] + 1}, {row["passing"]}'


def cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    """A row of the table as text."""
    seconds, peaks = row['seconds'], row['peak_mib']
    share = row['of_matrix_product']
    rate = f'{row["flops"] / seconds["ours"] / 1e9:.0f} ({share:.0%})' if share else ''
    texts = [label(row), '{}x{}'.format(*row['map']), str(row['channels']), str(row['kernel']), rate]
    for name in names:
        if name not in seconds:
            texts.append('disagrees' if name in row['disagrees'] else '')
            continue
        others = name != 'ours'
        time = 1e3 * seconds[name]
        text = f'{time:.2f}' if time < 10 else f'{time:.1f}'
        text += common.multiple(seconds[name], others and seconds.get('ours'))
        if peaks.get(name) is not None:
            text += f' @ {peaks[name]:.0f}' + common.multiple(peaks[name], others and peaks.get('ours'))
        texts.append(text)
    return texts
