"""Measure a training step of a whole segmentor beside the same one with the official backbone.

A step is forward, loss, backward and AdamW on random images and labels. ``ours`` has the backbone
of the config; ``official`` the same weights, computed as the official code does (see ``model``);
``heads`` fixed features in place of a backbone: what no backbone can save. Nothing random is left
in the networks but the heads' dropout, which draws the same in all. Before a figure is printed, the
loss and a gradient of ``ours`` are compared with those of ``official``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slak_mm import cli
from slak_mm.models import ShiftWise, SLaK

from . import common
from .model import OfficialSLaK, official_shiftwise

CONTENDERS = ('ours', 'official', 'heads')


def add_parser(commands: Any) -> None:
    """Add the sub-command to the result of ``ArgumentParser.add_subparsers``."""
    parser = common.add_command(commands, globals(), "a segmentor's training step beside the official backbone")
    config = 'upernet_slak_t_ade20k'
    what = 'config of a segmentor with one of our backbones (default: %(default)s)'
    parser.add_argument('config', nargs='?', default=config, help=what)
    cli.add_cfg_options(parser)
    common.add_measurement_arguments(
        parser, sizes=[(256, 256)], batches=[4], repeats=3, dtypes=['float32'], memory=False
    )


def run(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and yield the lines of the report.

    Raises:
        BenchmarkError: What :func:`~benchmarks.common.check_arguments` refuses, the config has no such backbone, or
            the contenders disagree.
        ConfigOverrideError: The config cannot be read or built.
    """
    common.check_arguments(args)
    training = Training(args)
    yield 'Median time of a training step in ms, behind it the multiple of ours.'

    def cells(row: dict[str, Any]) -> list[str]:
        seconds = row['seconds']
        ours, *others = (seconds[name] for name in CONTENDERS)
        return [label(row), f'{1e3 * ours:.0f}', *(f'{1e3 * s:.0f}{common.multiple(s, ours)}' for s in others)]

    def label(row: dict[str, Any]) -> str:
        return f'{row["size"][0]}x{row["size"][1]}, batch {row["batch"]}'

    yield from common.report(
        args,
        common.describe_machine(args.device, config=Path(args.config).stem, dtype=args.dtype, repeats=args.repeats),
        ('image', *CONTENDERS),
        (training.measure(size, batch) for size in args.size for batch in args.batch),
        cells,
        label,
        lambda row: {name: 1e3 * row['seconds'][name] for name in CONTENDERS},
        f'A training step of {Path(args.config).stem}',
    )


class _Features(nn.Module):
    """Returns what it was given, as if it had been computed from the images."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        super().__init__()
        self.features = [f.detach().requires_grad_() for f in features]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The features, whatever the images (N, 3, H, W) are."""
        return tuple(self.features)


class Training:
    """A segmentor whose heads all contenders share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        cfg = cli.load_config(args.config)
        cfg.merge_from_dict(args.cfg_options or {})
        if cli.framework(cfg) != 'mmseg':
            raise common.BenchmarkError(f'{args.config} is no config of a segmentor.')
        cfg.model.backbone.drop_path_rate = 0.0
        cli.adapt_to_device(cfg, has_gpu=lambda: args.device != 'cpu')
        torch.manual_seed(0)
        self.model: Any = cli.build_model(cfg, cfg.model).to(args.device).train()
        self.backbone: Any = self.model.backbone
        if isinstance(self.backbone, SLaK) and self.backbone.decomposed:
            self.official: nn.Module = OfficialSLaK(self.backbone)
        elif isinstance(self.backbone, ShiftWise) and self.backbone.version == 2:
            self.official = official_shiftwise(self.backbone)
        else:
            other = 'neither a decomposed SLaK nor ShiftWise of version 2'
            raise common.BenchmarkError(f'The backbone of {args.config} is {other}.')

    def measure(self, size: tuple[int, int], batch: int) -> dict[str, Any]:
        """Seconds of the steps."""
        data = self.data(size, batch)
        with torch.no_grad():
            features = self.backbone(data['inputs'])
        backbones: dict[str, nn.Module] = dict(ours=self.backbone, official=self.official, heads=_Features(features))
        steps = {name: self.step(backbone, data) for name, backbone in backbones.items()}
        times, results = common.measure_times(steps, self.args.repeats, self.args.device)
        # Whole networks add up the rounding of their layers.
        wrong = common.disagreeing({'ours': results['ours']}, results['official'], 10 * common.TOLERANCE[torch.float32])
        if wrong:
            raise common.BenchmarkError('ours disagrees with the official backbone; no figure is given.')
        self.model.backbone = self.backbone
        return dict(size=list(size), batch=batch, seconds=times)

    def data(self, size: tuple[int, int], batch: int) -> dict[str, Any]:
        """Images and labels, as the data preprocessor hands them on."""
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        generator = torch.Generator().manual_seed(1)
        samples = []
        for _ in range(batch):
            labels = torch.randint(self.model.decode_head.num_classes, (1, *size), generator=generator)
            sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
            sample.set_metainfo(dict(img_shape=size, ori_shape=size, pad_shape=size))
            samples.append(sample.to(self.args.device))
        images = torch.randn(batch, 3, *size, generator=generator).to(self.args.device)
        return dict(inputs=images, data_samples=samples)

    def step(
        self, backbone: nn.Module, data: dict[str, Any], attach: Callable[[torch.optim.Optimizer], Any] | None = None
    ) -> Callable[[], list[Tensor]]:
        """A training step; returns the loss, and the gradient of the backbone's first weight.

        ``attach`` gets the optimizer, to add masks to it.
        """
        self.model.backbone = backbone
        # All compute with the same weights: a rate of 0 leaves them as they are.
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        if attach is not None:
            attach(optimizer)
        first = next(backbone.parameters(), None)

        def step() -> list[Tensor]:
            self.model.backbone = backbone
            torch.manual_seed(2)
            loss, _ = self.model.parse_losses(self.model(**data, mode='loss'))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return [loss.detach(), *([] if first is None or first.grad is None else [first.grad])]

        return step
