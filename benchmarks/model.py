"""``model``: whole backbones beside ConvNeXt-T and Swin-T, at the small batches of detection.

All networks return four maps. ``SLaK-T`` and ``ShiftWise-T`` are run as built and, without
``--train``, deployed; ``official`` is the same network as the official code computes it: three
depthwise ``nn.Conv2d`` and norms in NCHW for SLaK, and for ShiftWise filtered maps that are shifted
and added. ConvNeXt-T and Swin-T are timm's, the former in channels-last; mmdet's and mmseg's Swin
does the same arithmetic. All weights are random. The networks of each family are compared with
their form as built on the reference operator, and no figure is given for one that disagrees.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slak_mm.models import switch_to_deploy
from slak_mm.models.layers import LayerNorm2d
from slak_mm.models.shiftwise import FeedForward, ShiftWiseConv
from slak_mm.models.slak import SLaKBlock
from slak_mm.ops import use_backend

from . import common
from .peak import measure_peak
from .shifted_sum import activation_space

#: Configs of the two families. With random weights and a layer scale of 1 the maps grow from block
#: to block, and with them the rounding that the comparison sees; a small one keeps them in bounds.
CONFIGS: dict[str, dict[str, Any]] = {
    family: dict(type=name, arch='tiny', norm_cfg=dict(type='BN'), layer_scale_init_value=0.01)
    for family, name in (('SLaK-T', 'SLaK'), ('ShiftWise-T', 'ShiftWise'))
}
#: What is compared, in the order of the table.
NETWORKS = (*(name + form for name in CONFIGS for form in ('', ' deploy', ' official')), *('ConvNeXt-T', 'Swin-T'))
_BASELINE = 'ConvNeXt-T'


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = common.add_command(commands, globals(), 'whole backbones beside ConvNeXt-T and Swin-T')
    common.add_measurement_arguments(parser, sizes=[(800, 1344)], batches=(1, 2), repeats=3)
    names = f'what to compare (default: all of {", ".join(NETWORKS)})'
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, metavar='NAME', default=list(NETWORKS), help=names)
    train = 'forward and backward in training mode, instead of forward'
    parser.add_argument('--train', action='store_true', help=train)


class OfficialSLaK(nn.Module):
    """A decomposed SLaK backbone in training form as the official code computes it, with the same weights.

    Everything is in NCHW: each branch is a depthwise convolution of PyTorch with its batch norm, and the norms over
    channels are written out.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (N, 3, H, W) to the features of the stages."""
        x = x.contiguous()
        outs = []
        for i, (downsample, stage) in enumerate(zip(self.backbone.downsample_layers, self.backbone.stages)):
            for layer in downsample:
                x = _norm_of_channels(x, layer) if isinstance(layer, LayerNorm2d) else layer(x)
            for block in stage:
                x = self._block(block, x)
            outs.append(_norm_of_channels(x, getattr(self.backbone, f'norm{i}')))
        return tuple(outs)

    @staticmethod
    def _block(block: SLaKBlock, x: Tensor) -> Tensor:
        branches: list[Any] = [getattr(block.large_kernel, name) for name in ('tall', 'wide', 'small')]
        y = sum(branch.bn(branch.conv(x)) for branch in branches)
        y = block.norm(y.permute(0, 2, 3, 1))
        y = block.pwconv2(block.act(block.pwconv1(y)))
        if block.gamma is not None:
            y = block.gamma * y
        return x + y.permute(0, 3, 1, 2)


def _norm_of_channels(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centered = x - x.mean(1, keepdim=True)
    scaled = centered / torch.sqrt(centered.pow(2).mean(1, keepdim=True) + norm.eps)
    return norm.weight.view(-1, 1, 1) * scaled + norm.bias.view(-1, 1, 1)


class _ShiftedSum(nn.Module):
    """A ShiftWise layer on filtered maps, with the paths merged."""

    def __init__(self, layer: ShiftWiseConv) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        layer: Any = self.layer
        own, ghosts = x[:, layer.rep].contiguous(), x[:, layer.ghost]
        filters = sum(path.weight for path in layer.filters)
        wide, tall, small = activation_space(own, filters, layer.shifts, layer.picks, fused=True)
        y = layer.bn_wide(wide) + layer.bn_tall(tall) + layer.bn_small(small) + own
        return torch.cat([y, ghosts], dim=1)


def official_shiftwise(backbone: nn.Module) -> nn.Module:
    """A copy of a ShiftWise backbone whose large kernels are shifted sums, as officially."""
    backbone = copy.deepcopy(backbone)
    for block in backbone.modules():
        layer = getattr(block, 'large_kernel', None)
        if isinstance(layer, ShiftWiseConv):
            block.large_kernel = _ShiftedSum(layer)
        if isinstance(block, FeedForward):
            # Within another module they are called as they are, and PyTorch computes them.
            for name in ('fc1', 'fc2'):
                setattr(block, name, nn.Sequential(getattr(block, name)))
    return backbone


def draw_statistics(network: nn.Module) -> None:
    """Give batch norms random statistics and weights: those of a fresh norm would leave nothing to fold."""
    for norm in network.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)


def _build(name: str, size: Sequence[int], dtype: torch.dtype) -> nn.Module:
    """A network in eval mode; networks of one family have the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family, _, form = name.partition(' ')
        if family not in CONFIGS:
            import timm

            options: dict[str, Any] = dict(features_only=True, pretrained=False)
            if family == 'ConvNeXt-T':
                return timm.create_model('convnext_tiny', **options).eval()
            return timm.create_model('swin_tiny_patch4_window7_224', img_size=tuple(size), **options).eval()
        network: nn.Module = MODELS.build(dict(CONFIGS[family]))
        draw_statistics(network)
    # What is folded is folded in float32 at least.
    network.eval().to(torch.promote_types(dtype, torch.float32))
    if form == 'deploy':
        return switch_to_deploy(network)
    if form == 'official':
        return OfficialSLaK(network) if family == 'SLaK-T' else official_shiftwise(network)
    return network


class Case:
    """Images of a (height, width) and a network of :data:`NETWORKS`, ready to be timed on 'cpu' or 'cuda'.

    With ``train`` a step is forward and backward in training mode.
    """

    def __init__(self, contender: str, size: Sequence[int], batch: int, dtype: str, device: str, train: bool) -> None:
        network = _build(contender, size, common.DTYPES[dtype])
        self.network = network.to(device, common.DTYPES[dtype]).train(train)
        if contender == 'ConvNeXt-T':
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(batch, 3, *size, generator=generator)
        if contender == 'ConvNeXt-T':
            images = images.contiguous(memory_format=torch.channels_last)
        self.images = images.to(device, common.DTYPES[dtype])
        self.is_training = train
        self.grads: list[Tensor] | None = None

    def step(self) -> list[Tensor]:
        """Features; in training also the gradient by the images of a random sum of them."""
        if not self.is_training:
            with torch.no_grad():
                return list(self.network(self.images))
        self.network.zero_grad()
        images = self.images.detach().requires_grad_()
        features = list(self.network(images))
        if self.grads is None:
            generator = torch.Generator().manual_seed(2)
            self.grads = [torch.randn(f.shape, generator=generator).to(f) for f in features]
        torch.autograd.backward(features, self.grads)
        assert images.grad is not None
        return [*(f.detach() for f in features), images.grad]


def peak_step(*, contender: str, size: Sequence[int], **options: Any) -> Callable[[], list[Tensor]]:
    """What :func:`~benchmarks.peak.measure_peak` measures: a contender, with further arguments of :class:`Case`."""
    Case(contender, (64, 64), **{**options, 'batch': 2}).step()
    return Case(contender, size, **options).step


def run(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and yield the lines of the report.

    Raises:
        BenchmarkError: What :func:`~benchmarks.common.check_arguments` refuses, or timm is not installed; or, after
            everything else, a network disagreed.
    """
    common.check_arguments(args)
    names = [name for name in NETWORKS if name in args.networks and not (args.train and name.endswith('deploy'))]
    if not names:
        raise common.BenchmarkError('--train leaves nothing of --networks: deployed forms do not train.')
    if set(names) & {'ConvNeXt-T', 'Swin-T'} and importlib.util.find_spec('timm') is None:
        raise common.BenchmarkError(
            'ConvNeXt-T and Swin-T are those of timm, which is not installed '
            '(pip install timm); leave them out with --networks.'
        )
    what = 'training pass (forward and backward)' if args.train else 'forward pass'
    yield f'Median time of a {what}, behind it the multiple of {_BASELINE}.'
    yield from common.report(
        args,
        common.describe_machine(args.device, dtype=args.dtype, repeats=args.repeats, train=args.train),
        ['image', 'network', 'ms', f'x {_BASELINE}', 'images/s', 'peak MiB'],
        (row for size in args.size for batch in args.batch for row in measure(names, args, size, batch)),
        cells,
        _label,
        lambda row: {row['network']: row['seconds'] and 1e3 * row['seconds']},
        f'{what}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads',
    )


def _label(row: dict[str, Any]) -> str:
    return f'{row["size"][0]}x{row["size"][1]}, batch {row["batch"]}'


def measure(names: Sequence[str], args: argparse.Namespace, size: tuple[int, int], batch: int) -> list[dict[str, Any]]:
    """All figures for one batch of images."""
    options: dict[str, Any] = dict(size=list(size), batch=batch, dtype=args.dtype, device=args.device, train=args.train)
    cases = {name: Case(name, **options) for name in names}
    times, results = common.measure_times({name: case.step for name, case in cases.items()}, args.repeats, args.device)
    # Low precision is compared with a sharper one. Whole networks add up the rounding of their
    # layers: allow ten times the difference of one operator.
    exact = args.dtype if common.DTYPES[args.dtype].itemsize >= 4 else 'float32'
    disagrees = []
    for family in CONFIGS:
        own = {name: result for name, result in results.items() if name.startswith(family)}
        if own:
            with use_backend('reference'):
                want = Case(family, **{**options, 'dtype': exact}).step()
            disagrees += common.disagreeing(own, want, 10 * common.TOLERANCE[common.DTYPES[args.dtype]])
    del cases, results
    base = None if _BASELINE in disagrees else times.get(_BASELINE)
    rows = []
    for name in names:
        row: dict[str, Any] = dict(options, network=name, disagrees=name in disagrees, seconds=None, peak_mib=None)
        if not row['disagrees']:
            row.update(seconds=times[name], images_per_second=batch / times[name])
            row.update(of_baseline=common.multiple(times[name], base))
            if not args.no_memory:
                row.update(peak_mib=measure_peak(__name__, dict(options, contender=name)))
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    if row['disagrees']:
        return [_label(row), row['network'], 'disagrees', '', '', '']
    memory = '' if row['peak_mib'] is None else f'{row["peak_mib"]:.0f}'
    figures = f'{1e3 * row["seconds"]:.3g}', row['of_baseline'].strip(' ()'), f'{row["images_per_second"]:.4g}'
    return [_label(row), row['network'], *figures, memory]
