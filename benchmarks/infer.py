"""``infer``: whole segmentors and detectors, beside the same ones with Swin-T and ConvNeXt-T.

A pass is the model's ``test_step`` on random images: normalization, network, and what follows it up to the label map
or the boxes. Each CONFIG is run as built and, with a backbone of this package, deployed; ``--amp`` and ``--compile``
add a row each. Beside it are its heads on the backbones of mmsegmentation's or mmdetection's own Swin-T and ConvNeXt-T
configs; the latter need mmpretrain, without which ConvNeXt-T is this package's, and the table says so. All take turns,
so that a ratio is between neighbors in time; behind it is its range. Weights are random: a detector looks at as many
proposals as its config allows and is sure of none, so that its mask head rests. No figure is given for a form whose
features differ from those as built.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from torch import Tensor

from slak_mm import cli
from slak_mm._config import CONFIGS
from slak_mm.bases import framework_configs
from slak_mm.models import registered_backbones, switch_to_deploy

from . import common
from .model import draw_statistics
from .peak import measure_peak

SIZES = dict(mmseg=(512, 512), mmdet=(800, 1344))
CONVNEXT = 'ConvNeXt-T'
#: Configs of the frameworks whose backbones are compared with.
SWIN_CONFIGS = dict(
    mmseg='mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    mmdet='mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
)
CONVNEXT_CONFIGS = dict(
    mmseg='mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
    mmdet='mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
)
OUR_CONVNEXT_CONFIGS = dict(
    mmseg=str(CONFIGS / 'upernet_convnext_t_ade20k.py'), mmdet=str(CONFIGS / 'cascade_mask_rcnn_convnext_t_coco.py')
)


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = common.add_command(commands, globals(), 'whole segmentors and detectors beside Swin-T and ConvNeXt-T')
    add = parser.add_argument
    default = ['upernet_slak_t_ade20k', 'upernet_shiftwise_t_ade20k']
    what = 'config files or names, or mmseg::FOLDER/CONFIG.py of an installed framework (default: %(default)s)'
    add('configs', nargs='*', metavar='CONFIG', default=default, help=what)
    add('--alone', action='store_true', help='without Swin-T and ConvNeXt-T beside them')
    add('--amp', action='store_true', help='also in mixed precision (float16, on the CPU bfloat16)')
    add('--compile', action='store_true', help='also compiled by torch.compile')
    common.add_measurement_arguments(parser, batches=(1,), repeats=5, dtypes=('float32',))
    sizes = ', '.join(f'{height}x{width} for {name}' for name, (height, width) in SIZES.items())
    add('--size', nargs='+', type=cli.image_size, metavar='HxW', help=f'image sizes (default: {sizes})')
    cli.add_cfg_options(parser)


def load(name: str, options: dict[str, Any] | None = None) -> Config:
    """A config from a file, or as ``mmseg::FOLDER/CONFIG.py`` from an installed framework.

    Raises:
        ConfigOverrideError: It cannot be read.
    """
    package, is_installed, path = name.partition('::')
    try:
        cfg = cli.load_config(framework_configs(package, f'../{path}')[0] if is_installed else name)
    except (ImportError, FileNotFoundError) as error:
        raise common.BenchmarkError(str(error)) from error
    cfg.merge_from_dict(options or {})
    if cli.framework(cfg) not in SIZES:
        raise common.BenchmarkError(f'{name} is for "{cli.framework(cfg)}"; infer knows {" and ".join(SIZES)}.')
    return cfg


def replace_backbone(cfg: Config, source: Config) -> None:
    """Put the backbone of another config in a config, and its channels in the neck or heads.

    Raises:
        BenchmarkError: What is behind the backbone does not take four maps.
    """
    model, other = cli.model_of(cfg), cli.model_of(source)
    channels = (other.get('neck') or other.decode_head).in_channels
    first = model.get('neck') or model.get('decode_head') or {}
    if not isinstance(first.get('in_channels'), (list, tuple)) or len(first.in_channels) != len(channels):
        raise common.BenchmarkError('A config whose neck or head does not take four maps is measured --alone.')
    model.backbone, first.in_channels = copy.deepcopy(other.backbone), list(channels)
    heads = model.get('auxiliary_head') or []
    for head in [] if model.get('neck') else heads if isinstance(heads, list) else [heads]:
        head.in_channels = channels[head.in_index]


def beside(scope: str) -> dict[str, str]:
    """Configs whose backbones are compared with, by what the table calls them."""
    has_convnext = importlib.util.find_spec('mmpretrain') is not None
    convnext, whose = (CONVNEXT_CONFIGS, 'mmpretrain') if has_convnext else (OUR_CONVNEXT_CONFIGS, 'slak_mm')
    return {f'Swin-T ({scope})': SWIN_CONFIGS[scope], f'{CONVNEXT} ({whose})': convnext[scope]}


class Case:
    """A model in one form, ready to be timed.

    Args:
        config: Of the heads, and of the backbone unless ``backbone`` names another config to take that from.
        size: Height and width of the images.
        batch: Images at once.
        device: 'cpu' or 'cuda'.
        backbone: As above. Default: None.
        form: Words of 'deploy', 'amp', 'compile'. Defaults to as built.
        options: Of the config. Default: None.
    """

    def __init__(
        self,
        config: str,
        size: Sequence[int],
        batch: int,
        device: str,
        backbone: str | None = None,
        form: Sequence[str] = (),
        options: dict[str, Any] | None = None,
    ) -> None:
        cfg = load(config, options)
        if backbone is not None:
            replace_backbone(cfg, load(backbone))
        self.scope, self.device, self.amp = cli.framework(cfg), device, 'amp' in form
        cli.adapt_to_device(cfg, has_gpu=lambda: device != 'cpu')
        node = cli.model_of(cfg)
        if cli.type_name(node.backbone) in registered_backbones():
            # With random weights the maps would grow from block to block, beyond what half precision holds.
            node.backbone.layer_scale_init_value = 0.01
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model: Any = cli.build_model(cfg, node)
            draw_statistics(self.model)
        self.model.eval()
        if 'deploy' in form:
            switch_to_deploy(self.model)
        self.model.to(device)
        if 'compile' in form:
            self.model.forward = torch.compile(self.model.forward)
        generator = torch.Generator().manual_seed(1)
        self.images = list(torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator))

    def _data(self) -> dict[str, Any]:
        if self.scope == 'mmseg':
            from mmseg.structures import SegDataSample as Sample
        else:
            from mmdet.structures import DetDataSample as Sample
        shape = tuple(self.images[0].shape[1:])
        meta = dict(dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), shape), scale_factor=(1.0, 1.0))
        return dict(inputs=self.images, data_samples=[Sample(metainfo=meta) for _ in self.images])

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        dtype = torch.bfloat16 if self.device == 'cpu' else torch.float16
        precision = torch.autocast(torch.device(self.device).type, dtype, enabled=self.amp)
        with torch.no_grad(), precision, DefaultScope.overwrite_default_scope(self.scope):
            yield

    def step(self) -> Any:
        """The data samples of the images."""
        with self._context():
            return self.model.test_step(self._data())

    def features(self) -> list[Tensor]:
        """What the heads get; a compiled model computes it on its way to them."""
        seen: list[Tensor] = []
        part = self.model.neck if self.model.with_neck else self.model.backbone
        with self._context(), contextlib.ExitStack() as stack:
            handle = part.register_forward_hook(lambda module, args, maps: seen.extend(maps))
            stack.callback(handle.remove)
            self.model.test_step(self._data())
        return [maps.float().cpu() for maps in seen]


def peak_step(*, size: Sequence[int], **case: Any) -> Callable[[], Any]:
    """What :func:`~benchmarks.peak.measure_peak` measures: a step of a :class:`Case` with these arguments."""
    Case(size=(128, 128), **{**case, 'batch': 1}).step()
    return Case(size=size, **case).step


def contenders(args: argparse.Namespace) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """By framework the name in the table and arguments of :class:`Case` of all that is to be compared.

    Raises:
        BenchmarkError: There is no mixed precision for these.
    """
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    compared: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    seen: set[str] = set()
    for config in args.configs:
        cfg = load(config, args.cfg_options)
        scope = cli.framework(cfg)
        if args.amp and scope == 'mmdet' and args.device == 'cpu':
            raise common.BenchmarkError("--amp: mmcv's operators have no bfloat16 on the CPU, which detectors need.")
        others = {} if args.alone else beside(scope)
        for name, backbone in {Path(config).stem: None, **others}.items():
            whole = copy.deepcopy(cfg)
            if backbone is not None:
                replace_backbone(whole, load(backbone))
            cli.remove_weights(whole)
            model = cli.model_of(whole)
            if str(model) in seen:  # the same heads of another config
                continue
            seen.add(str(model))
            case = dict(config=config, backbone=backbone, options=args.cfg_options, device=args.device)
            is_ours = backbone is None and cli.type_name(model.backbone) in registered_backbones()
            last = ['deploy'] if is_ours else []
            more = [[*last, word] for word in ('amp', 'compile') if getattr(args, word)]
            forms = [[], *([last] if last else []), *more]
            rows = compared if backbone else found
            rows.setdefault(scope, []).extend((name, dict(case, form=form)) for form in forms)
    return {scope: [*rows, *compared.get(scope, [])] for scope, rows in found.items()}


def run(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and yield the lines of the report.

    Raises:
        BenchmarkError: What :func:`~benchmarks.common.check_arguments` refuses, a config does not fit, or, after
            everything else, a form disagreed.
        ConfigOverrideError: A config cannot be read or built.
    """
    common.check_arguments(args)
    MMLogger.get_current_instance().setLevel('WARNING')  # it would write into the table
    everything = contenders(args)
    measured = (
        row
        for scope, cases in everything.items()
        for size in args.size or [SIZES[scope]]
        for batch in args.batch
        for row in measure(cases, size, batch, args)
    )
    yield f'Median of a pass, its multiple of {CONVNEXT} (of the first row without it) and the range of that.'
    yield from common.report(
        args,
        common.describe_machine(args.device, repeats=args.repeats),
        ['image', 'model', 'form', 'ms', 'ratio', 'images/s', 'peak MiB'],
        measured,
        cells,
        _label,
        lambda row: {f'{row["model"]} {row["form"]}': row['seconds'] and 1e3 * row['seconds']},
        f'whole models, {args.device}, {torch.get_num_threads()} threads',
    )


def _label(row: dict[str, Any]) -> str:
    return f'{row["size"][0]}x{row["size"][1]}, batch {row["batch"]}'


def measure(
    named: Sequence[tuple[str, dict[str, Any]]], size: tuple[int, int], batch: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """All figures for one batch of images."""
    cases: dict[str, Case] = {}
    reference: dict[str, list[Tensor]] = {}
    disagrees = set()
    arguments = {}
    for name, case in named:
        key = json.dumps([name, case['form']])
        arguments[key] = dict(case, size=list(size), batch=batch)
        cases[key] = Case(**arguments[key])
        got = cases[key].features()
        want = reference.setdefault(json.dumps([name, []]), got)
        precision = torch.float32 if not cases[key].amp else torch.bfloat16
        if common.disagreeing({key: got}, want, 10 * common.TOLERANCE[precision]):
            disagrees.add(key)
    del reference
    steps = {key: case.step for key, case in cases.items() if key not in disagrees}
    rounds, _ = common.measure_rounds(steps, args.repeats, args.device)
    base = next((key for key in rounds if CONVNEXT in key), next(iter(rounds), ''))
    for key, case in arguments.items():
        name, form = json.loads(key)
        row = dict(size=list(size), batch=batch, model=name, form=', '.join(form) or 'as built', seconds=None)
        row['disagrees'] = key in disagrees
        if key in rounds:
            ratios = sorted(ours / theirs for ours, theirs in zip(rounds[key], rounds[base]))
            row.update(seconds=statistics.median(rounds[key]), all_seconds=rounds[key])
            row.update(images_per_second=batch / row['seconds'], ratio=statistics.median(ratios))
            row.update(ratio_range=[ratios[0], ratios[-1]])
            row.update(peak_mib=None if args.no_memory else measure_peak(__name__, case))
        yield row


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    if row['disagrees']:
        return [_label(row), row['model'], row['form'], 'disagrees', '', '', '']
    low, high = row['ratio_range']
    memory = '' if row['peak_mib'] is None else f'{row["peak_mib"]:.0f}'
    figures = f'{1e3 * row["seconds"]:.4g}', f'{row["ratio"]:.2f}x ({low:.2f}-{high:.2f})'
    return [_label(row), row['model'], row['form'], *figures, f'{row["images_per_second"]:.3g}', memory]
