"""Read a backbone's constructor arguments off its tensors, and compare two backbones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ['Variant', 'describe', 'likely_causes']

# (depths, dims) of the named architectures, widths before `width_factor`.
_ARCHS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    'tiny': ((3, 3, 9, 3), (96, 192, 384, 768)),
    'small': ((3, 3, 27, 3), (96, 192, 384, 768)),
    'base': ((3, 3, 27, 3), (128, 256, 512, 1024)),
    'large': ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
# Where version 2 of ShiftWise differs.
_ARCHS_V2 = {**_ARCHS, 'tiny': ((3, 3, 18, 3), (80, 160, 320, 640))}
# Published widths first: a width can often be explained in two ways.
_WIDTH_FACTORS = (1.0, 1.3, *(round(0.05 * n, 2) for n in range(10, 61)))

_BLOCK = re.compile(r'stages\.(\d+)\.(\d+)\.')
_KERNEL = re.compile(r'stages\.(\d+)\.\d+\.large_kernel\.(tall|wide|small|square)\.conv\.weight$')
_SHIFTWISE = re.compile(r'stages\.\d+\.\d+\.large_kernel\.((LoRAs\.\d+|LoRA|filters\.\d+)\.weight|tall)$')
_OFFICIAL_SLAK = re.compile(r'stages\.\d+\.\d+\.large_kernel\.(LoRA[12]|Decom[12]|lkb_origin|small_conv)\.')


@dataclass(frozen=True)
class Variant:
    """Which backbone a set of tensors belongs to, as far as names and shapes tell.

    Attributes:
        depths: Blocks per stage.
        dims: Channels per stage, ``width_factor`` included.
        arch: 'tiny', 'small', 'base' or 'large', ``None`` for anything else.
        width_factor: The factor that explains ``dims``, if ``arch`` is known.
        in_channels: Channels of the image.
        kernel_sizes: Large kernel of each stage; for ShiftWise its length in
            taps, a multiple of the small kernel, which is all that the tensors tell.
        small_kernel: Size of the small kernel.
        decomposed: Tall and wide kernels, or a square one.
        branch_norm: Whether the branches have batch norms.
        conv_bias: Whether the branches' convolutions have biases.
        layer_scale: Whether blocks have ``gamma``.
        deploy: Whether the branches are folded.
        output_norms: Stages with an output norm.
        num_classes: Size of a classification head.
        family: 'slak', 'shiftwise' or 'unknown'.
        version: Version of ShiftWise.
        num_paths: Filter paths of ShiftWise.
        num_reps: Random orders of ShiftWise's filters, where the tables are there.
        convolved: Channels of each stage that ShiftWise convolves, which are
            those that are no ghosts.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    arch: str | None
    width_factor: float | None
    in_channels: int | None
    kernel_sizes: tuple[int, ...]
    small_kernel: int | None
    decomposed: bool | None
    branch_norm: bool
    conv_bias: bool
    layer_scale: bool
    deploy: bool
    output_norms: tuple[int, ...]
    num_classes: int | None
    family: str
    version: int | None = None
    num_paths: int | None = None
    num_reps: int | None = None
    convolved: tuple[int, ...] = ()

    @property
    def is_convnext(self) -> bool:
        """Whether this is ConvNeXt: one square biased kernel without a norm."""
        return (
            self.family == 'slak'
            and self.decomposed is False
            and not self.branch_norm
            and self.conv_bias
            and self.small_kernel is None
        )

    def __str__(self) -> str:
        arch = self.arch or 'another architecture'
        parts = [f'{arch} (depths {_join(self.depths)})']
        factor = f'width factor {self.width_factor:g}, ' if self.width_factor else ''
        parts.append(f'{factor}channels {_join(self.dims)}')
        if self.family == 'shiftwise':
            if self.kernel_sizes:
                parts.append(f'kernels of {_join(self.kernel_sizes)} taps from filters of size {self.small_kernel}')
            if self.convolved:
                parts.append(f'{_join(self.convolved)} of the channels convolved')
            if self.num_paths:
                parts.append(f'{self.num_paths} filter paths' if self.num_paths > 1 else 'one filter path')
        elif self.kernel_sizes:
            form = 'decomposed' if self.decomposed else 'square'
            small = f' with small {self.small_kernel}' if self.small_kernel else ''
            parts.append(f'kernels {_join(self.kernel_sizes)} {form}{small}')
        parts.append(
            'folded for deployment' if self.deploy else 'branch norms' if self.branch_norm else 'no branch norms'
        )
        if self.family == 'shiftwise':
            parts.insert(0, f'ShiftWise version {self.version}')
        elif self.family != 'slak':
            parts.insert(0, f'family {self.family}')
        elif self.is_convnext:
            parts.insert(0, 'ConvNeXt')
        if self.output_norms:
            parts.append(f'output norms of stages {_join(self.output_norms, ", ")}')
        if self.num_classes:
            parts.append(f'classification head with {self.num_classes} classes')
        return ', '.join(parts)


def _join(numbers: Sequence[int], separator: str = '/') -> str:
    return separator.join(map(str, numbers))


def describe(state_dict: Mapping[str, Any]) -> Variant:
    """Read the constructor arguments of a backbone off its tensors.

    Args:
        state_dict: Tensors of one backbone by our names, without a prefix.

    Returns:
        What names and shapes tell.
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if hasattr(value, 'shape')}
    depth_of: dict[int, int] = {}
    kernel_of: dict[int, int] = {}
    small: int | None = None
    branches = set()
    for key, shape in shapes.items():
        block = _BLOCK.match(key)
        if block:
            stage, index = map(int, block.groups())
            depth_of[stage] = max(depth_of.get(stage, 0), index + 1)
        kernel = _KERNEL.match(key)
        if kernel and len(shape) == 4:
            branches.add(kernel.group(2))
            stage = int(kernel.group(1))
            if kernel.group(2) == 'small':
                small = max(shape[2:])
            else:
                kernel_of[stage] = max(shape[2:])
                if kernel.group(2) != 'square':
                    # The folded form keeps no small kernel of its own; it is as long as the
                    # strips are wide.
                    small = small or min(shape[2:])
    depths = tuple(depth_of[stage] for stage in sorted(depth_of))
    # Folded blocks of ShiftWise's version 2 have no norm.
    widths = (
        shapes.get(f'stages.{stage}.0.norm.weight', shapes.get(f'stages.{stage}.0.se.up.bias'))
        for stage in sorted(depth_of)
    )
    dims = tuple(width[0] for width in widths if width)
    shiftwise = _shiftwise(shapes) if any(map(_SHIFTWISE.match, shapes)) else None
    version = None if shiftwise is None else shiftwise['version']
    arch, factor = _name_architecture(depths, dims, _ARCHS_V2 if version == 2 else _ARCHS)
    stem = shapes.get('downsample_layers.0.0.weight', ())
    head = shapes.get('head.weight', ())
    is_slak = bool(branches) or any(map(_OFFICIAL_SLAK.match, shapes))
    variant = Variant(
        depths=depths,
        dims=dims,
        arch=arch,
        width_factor=factor,
        in_channels=stem[1] if len(stem) == 4 else None,
        kernel_sizes=tuple(kernel_of[stage] for stage in sorted(kernel_of)),
        small_kernel=small,
        decomposed=('tall' in branches) if branches else None,
        branch_norm=any('.large_kernel.' in key and '.bn' in key for key in shapes),
        conv_bias=any(re.search(r'large_kernel\.\w+\.conv\.bias$', key) for key in shapes),
        layer_scale=any(re.match(r'stages\.\d+\.\d+\.gamma$', key) for key in shapes),
        deploy=any(re.match(r'stages\.\d+\.\d+\.large_kernel\.bias$', key) for key in shapes),
        output_norms=tuple(i for i in range(len(depths)) if f'norm{i}.weight' in shapes),
        num_classes=head[0] if len(head) == 2 else None,
        family='slak' if is_slak else 'unknown',
    )
    return variant if shiftwise is None else replace(variant, family='shiftwise', **shiftwise)


def _shiftwise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the tensors of a ShiftWise backbone tell beyond those of all families."""
    first = re.compile(r'stages\.(\d+)\.0\.large_kernel\.(.*)$')
    stages: dict[int, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = first.match(key)
        if match:
            stages.setdefault(int(match.group(1)), {})[match.group(2)] = shape
    convolved, taps = [], []
    small = num_paths = num_reps = None
    for _, tensors in sorted(stages.items()):
        channels = next((tensors[name][0] for name in ('bn_wide.weight', 'picks', 'tall') if name in tensors), None)
        filters = [
            shape for name, shape in tensors.items() if name.startswith(('filters.', 'LoRA')) and len(shape) == 4
        ]
        if filters:
            small, num_paths = filters[0][-1], len(filters)
        elif 'tall' in tensors:
            small = tensors['tall'][-1]
        if 'picks' in tensors:
            num_reps = tensors['picks'][1]
        if channels:
            convolved.append(channels)
            if filters and small:
                taps.append(filters[0][0] // channels * small)
    is_second = any(re.match(r'stages\.\d+\.\d+\.se\.', key) for key in shapes)
    return dict(
        version=2 if is_second else 1,
        kernel_sizes=tuple(taps),
        small_kernel=small,
        decomposed=None,
        num_paths=num_paths,
        num_reps=num_reps,
        convolved=tuple(convolved),
    )


def _name_architecture(
    depths: tuple[int, ...], dims: tuple[int, ...], archs: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[str | None, float | None]:
    for factor in _WIDTH_FACTORS:
        for name, (known_depths, known_dims) in archs.items():
            if depths == known_depths and dims == tuple(int(d * factor) for d in known_dims):
                return name, factor
    return None, None


def likely_causes(theirs: Variant, ours: Variant) -> list[str]:
    """Say in which arguments a checkpoint's backbone and a model's differ.

    Args:
        theirs: The checkpoint's backbone.
        ours: The model's backbone.

    Returns:
        One sentence per difference, with its remedy; the most telling first. Empty if
        the two are built alike.
    """
    if theirs.family != ours.family:
        if theirs.family == 'unknown':
            return ['the checkpoint holds the backbone of another project']
        return [
            (
                f'the checkpoint holds {_family_name(theirs)} weights and the model is '
                f'{_family_name(ours)}: build the model with the type of the weights'
            )
        ]
    if theirs.deploy != ours.deploy:
        return [_deploy_cause(theirs.deploy)]
    if theirs.is_convnext and not ours.is_convnext:
        return [
            'the checkpoint holds ConvNeXt weights (a biased square kernel without branch '
            'norms): build the model with ' + _arguments(theirs)
        ]
    if ours.is_convnext and not theirs.is_convnext:
        return [
            'the model is in ConvNeXt mode and the checkpoint holds SLaK weights: build the '
            'model with ' + _arguments(theirs)
        ]
    causes = []
    if theirs.version != ours.version:
        return [
            f'the checkpoint is of version {theirs.version} of ShiftWise and the model of '
            f'version {ours.version}; set version={theirs.version}'
        ]
    if theirs.decomposed != ours.decomposed:
        causes.append(
            'the checkpoint has square kernels (lkb_origin) and the model tall and wide ones, '
            'which cannot be computed from them: use decomposed=False or other weights'
            if not theirs.decomposed
            else 'the checkpoint has tall and wide kernels (LoRA1, LoRA2) and the model square ones: '
            'use decomposed=True'
        )
    if theirs.depths != ours.depths:
        causes.append(
            f'another architecture: the checkpoint has {_join(theirs.depths)} blocks '
            f'({theirs.arch or "no named one"}), the model {_join(ours.depths)} '
            f'({ours.arch or "no named one"}); set arch'
        )
    if theirs.dims != ours.dims:
        same = theirs.arch is not None and theirs.arch == ours.arch
        causes.append(
            f'another width: the checkpoint has {_join(theirs.dims)} channels '
            f'({theirs.arch or "no named architecture"}, width_factor {theirs.width_factor or "?"}'
            f'), the model {_join(ours.dims)} ({ours.arch or "no named architecture"}, '
            f'width_factor {ours.width_factor or "?"}); set '
            f'{"width_factor" if same else "arch or width_factor"}'
        )
    if theirs.kernel_sizes != ours.kernel_sizes:
        taps = ' taps' if ours.family == 'shiftwise' else ''
        causes.append(
            f'other kernel sizes: the checkpoint has {_join(theirs.kernel_sizes)}{taps}, '
            f'the model {_join(ours.kernel_sizes)}{taps}; set kernel_sizes'
        )
    if theirs.small_kernel != ours.small_kernel:
        causes.append(
            f'another small kernel: the checkpoint has {theirs.small_kernel}, the model '
            f'{ours.small_kernel}; set small_kernel'
        )
    if theirs.convolved != ours.convolved and theirs.dims == ours.dims:
        causes.append(
            f'another number of ghost channels: the checkpoint convolves '
            f'{_join(theirs.convolved)} channels, the model {_join(ours.convolved)}; '
            'set ghost_ratio'
        )
    for name in ('num_paths', 'num_reps'):
        their, our = getattr(theirs, name), getattr(ours, name)
        if None not in (their, our) and their != our:
            causes.append(f'the checkpoint was trained with {name}={their}, the model has {our}; set {name}')
    if theirs.branch_norm != ours.branch_norm:
        causes.append(
            'the checkpoint has batch norms after its large kernels and the model has none; set branch_norm=True'
            if theirs.branch_norm
            else 'the checkpoint has no batch norms after its large kernels and the model has them; '
            'set branch_norm=False'
        )
    if theirs.conv_bias != ours.conv_bias:
        causes.append(
            f'the large kernels of the checkpoint have {_some(theirs.conv_bias)} and '
            f'those of the model {_some(ours.conv_bias)}; set '
            f'conv_bias={theirs.conv_bias}'
        )
    if theirs.layer_scale != ours.layer_scale:
        causes.append(
            f'the checkpoint has {"" if theirs.layer_scale else "no "}layer scale (gamma); '
            f'set layer_scale_init_value to '
            f'{"a positive value" if theirs.layer_scale else "0"}'
        )
    if theirs.in_channels != ours.in_channels:
        causes.append(
            f'the checkpoint takes images of {theirs.in_channels} channels, the model '
            f'of {ours.in_channels}; set in_channels'
        )
    return causes


def _deploy_cause(folded_checkpoint: bool) -> str:
    if folded_checkpoint:
        return (
            'the checkpoint is folded for deployment and the model is in training form: build '
            'the model with deploy=True or call switch_to_deploy on it first; folded kernels '
            'cannot be unfolded'
        )
    return (
        'the checkpoint is in training form and the model is already folded for deployment: '
        'load the weights first and call switch_to_deploy afterwards'
    )


def _family_name(variant: Variant) -> str:
    return {'shiftwise': 'ShiftWise', 'slak': 'SLaK'}.get(variant.family, 'unknown')


def _arguments(variant: Variant) -> str:
    named = (
        f'arch={variant.arch!r}, width_factor={variant.width_factor:g}, '
        if variant.arch and variant.width_factor
        else ''
    )
    return (
        f'{named}kernel_sizes={variant.kernel_sizes}, small_kernel={variant.small_kernel}, '
        f'decomposed={variant.decomposed}, branch_norm={variant.branch_norm}, '
        f'conv_bias={variant.conv_bias}'
    )


def _some(has_bias: bool) -> str:
    return 'biases' if has_bias else 'no biases'
