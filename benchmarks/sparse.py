"""Measure what sparse training costs: steps with and without masks take turns in one run.

A step is forward and backward of the backbone with a simple loss, and AdamW. `dense` has no masks,
`static` keeps masks after the step, `update` also changes them, which the published settings do
every 100 or 2000 steps. What the masks take is timed within the steps as well: whole steps vary by
more than that. Before a figure is printed, the zeros of the weights and of AdamW's moments are
checked bit for bit, and the number of weights in every layer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn

from slak_mm.cli import positive_int
from slak_mm.sparsity import PRESETS, SparseTraining, select_parameters

from . import common

CONTENDERS = ('dense', 'static', 'update')


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = common.add_command(commands, globals(), 'training steps without masks, with masks, and with their update')
    add = parser.add_argument
    add('--backbone', choices=('SLaK', 'ShiftWise'), default='SLaK')
    add('--arch', default='tiny', help='tiny, small or base (default: tiny)')
    how = 'how masks change (default: set, the published one)'
    add('--mode', choices=('set', 'rigl', 'momentum'), default='set', help=how)
    add('--sparsity', type=float, default=0.4, help='(default: 0.4)')
    intervals = sorted({int(p['update_interval']) for p in PRESETS.values()})
    steps = 'steps between two updates, for the averages (default: those of the presets)'
    add('--intervals', nargs='+', type=positive_int, metavar='STEPS', default=intervals, help=steps)
    common.add_measurement_arguments(parser, sizes=[(512, 512)], dtypes=('float32',), memory=False)


def run(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and yield the lines of the report.

    Raises:
        BenchmarkError: A weight that should be zero is not, or a count is wrong.
    """
    common.check_arguments(args)
    name = f'{args.backbone} {args.arch}'
    settings = dict(backbone=name, mode=args.mode, sparsity=args.sparsity, repeats=args.repeats)
    machine = common.describe_machine(args.device, **settings)
    averages = ['static', *(f'every {interval} steps' for interval in args.intervals)]
    training = _Training(args)
    yield from common.report(
        args,
        machine,
        ['image', *CONTENDERS, 'masks, static', 'masks, update', *averages],
        (training.measure(size, batch) for size in args.size for batch in args.batch),
        lambda row: [
            row['name'],
            *(f'{1e3 * row["seconds"][name]:.1f} ms' for name in CONTENDERS),
            *(f'{1e3 * row["masks"][name]:.1f} ms' for name in ('static', 'update')),
            *(f'{share:.2%}' for share in row['overhead'].values()),
        ],
        lambda row: row['name'],
        lambda row: {name: 1e3 * row['seconds'][name] for name in CONTENDERS},
        f'A training step of {name}',
    )


class _Training:
    """One model and one optimizer, which all contenders share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(0)
        network = dict(type=args.backbone, arch=args.arch, norm_cfg=dict(type='BN'))
        self.model: nn.Module = MODELS.build(network).to(args.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        options: dict[str, Any] = dict(
            distribution='uniform', sparsity=args.sparsity, prune_rate=0.3, per_filter=args.backbone == 'ShiftWise'
        )
        parameters = select_parameters(self.model, 'all' if args.backbone == 'SLaK' else 'shiftwise_filters')
        self.masks = dict(
            static=SparseTraining(parameters, **options),
            update=SparseTraining(parameters, mode=args.mode, total_steps=10**6, update_interval=1, **options),
        )
        for sparse in self.masks.values():
            sparse.initialize()
        self.seconds: dict[str, list[float]] = {name: [] for name in self.masks}

    def measure(self, size: tuple[int, int], batch: int) -> dict[str, Any]:
        """Seconds of the steps, of what masks take in them, and its share of the dense step."""
        generator = torch.Generator(self.args.device).manual_seed(1)
        x = torch.randn(batch, 3, *size, device=self.args.device, generator=generator)
        for name, sparse in self.masks.items():
            self.step(name, x)()
            self.check(name, sparse)
        self.seconds = {name: [] for name in self.masks}
        steps = {name: self.step(name, x) for name in CONTENDERS}
        times, _ = common.measure_times(steps, self.args.repeats, self.args.device)
        # The first of each warms up, if it was not the only one.
        masks = {name: statistics.median(seconds[1:] or seconds) for name, seconds in self.seconds.items()}
        overhead = {'static': masks['static'] / times['dense']}
        for interval in self.args.intervals:
            mean = ((interval - 1) * masks['static'] + masks['update']) / interval
            overhead[f'every {interval}'] = mean / times['dense']
        name = f'{size[0]}x{size[1]}, batch {batch}'
        return dict(name=name, batch=batch, seconds=times, masks=masks, overhead=overhead)

    def step(self, name: str, x: torch.Tensor) -> Callable[[], None]:
        """A training step of a contender."""
        sparse = self.masks.get(name)

        def step() -> None:
            self.optimizer.zero_grad()
            loss = sum((y.square().mean() for y in self.model(x)), start=x.new_zeros(()))
            loss.backward()
            spent = 0.0
            if sparse is not None:
                spent += common.timed(lambda: sparse.gather_gradients(self.optimizer), self.args.device)[0]
            self.optimizer.step()
            if sparse is not None:
                spent += common.timed(lambda: sparse.step(self.optimizer), self.args.device)[0]
                self.seconds[name].append(spent)

        return step

    def check(self, name: str, sparse: SparseTraining) -> None:
        """Look for a weight or a moment that is not zero, and for a wrong number of weights."""
        for layer, mask in sparse.masks.items():
            parameter = sparse.parameters[layer]
            state = self.optimizer.state[parameter]
            tensors = [parameter.detach(), state['exp_avg'], state['exp_avg_sq']]
            if any(bool(t.view(torch.int32)[~mask].any()) for t in tensors):
                raise common.BenchmarkError(f'{name}: pruned entries of {layer} are not zero')
            # Filters count as one, with all their taps.
            units = len(mask) if self.args.backbone == 'ShiftWise' else mask.numel()
            want = round((1 - self.args.sparsity) * units) * (mask.numel() // units)
            if int(mask.count_nonzero()) != want:
                raise common.BenchmarkError(f'{name}: {layer} should have {want} active weights')
