"""Read a backbone's constructor arguments off its tensors, and compare two backbones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

# Published widths first: a width can often be explained in two ways.
_WIDTH_FACTORS = (1.0, 1.3, *(round(0.05 * n, 2) for n in range(10, 61)))


class Sizes(tuple[int, ...]):
    """A number for each stage, written as 51/49/47/13."""

    def __str__(self) -> str:
        return '/'.join(map(str, self))


class Cause(NamedTuple):
    """A row of a diagnosis table.

    Attributes:
        applies: Whether the checkpoint's variant (first) and the model's differ in this way.
        sentence: What the user is told, with the remedy. ``{theirs.…}`` and ``{ours.…}`` stand for
            attributes of the two variants.
        is_final: Whether the rows that follow would only describe what this one explains.
    """

    applies: Callable[[Any, Any], bool]
    sentence: str
    is_final: bool = False


def differs(*names: str) -> Callable[[Any, Any], bool]:
    """Condition of a :class:`Cause`: the variants differ in one of these attributes."""
    return lambda theirs, ours: any(getattr(theirs, name) != getattr(ours, name) for name in names)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Which backbone of its family a set of tensors belongs to, as far as names and shapes tell.

    A family extends :meth:`read`, and :attr:`causes` by its own arguments.
    """

    family: str = 'unknown'  # its name; 'unknown' for another project's backbone
    depths: Sizes  # blocks per stage
    dims: Sizes  # channels per stage, width_factor included
    arch: str | None  # name of the architecture; None for one that has none
    width_factor: float | None  # the factor that explains dims, if arch is known
    in_channels: int | None  # of the image
    kernel_sizes: Sizes  # large kernel of each stage
    small_kernel: int | None = None
    branch_norm: bool  # batch norms within the large-kernel layer
    layer_scale: bool  # blocks have gamma
    deploy: bool  # the branches are folded
    output_norms: tuple[int, ...]  # stages with an output norm
    num_classes: int | None  # of a classification head

    title: ClassVar[str] = 'unknown'  # the family in messages
    kernel_unit: ClassVar[str] = ''  # what kernel_sizes count where it is not pixels
    # depths and dims of the named architectures, widths before width_factor
    archs: ClassVar[Mapping[str, Mapping[str, Sequence[int]]]] = {}
    # In what the members of this family differ, beside the arguments that all families have.
    causes: ClassVar[tuple[Cause, ...]] = ()

    @classmethod
    def read(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The attributes of a backbone whose tensors have these shapes, by our names."""
        last: dict[int, tuple[int, int]] = {}  # of each stage's downsampling: number of the layer, channels
        depths: dict[int, int] = {}
        kernels: dict[int, int] = {}
        for key, shape in shapes.items():
            if layer := re.match(r'downsample_layers\.(\d+)\.(\d+)\.', key):
                stage, number = map(int, layer.groups())
                last[stage] = max(last.get(stage, (-1, 0)), (number, shape[0] if shape else 0))
            elif block := re.match(r'stages\.(\d+)\.(\d+)\.(large_kernel\.)?', key):
                stage, number = int(block[1]), int(block[2])
                depths[stage] = max(depths.get(stage, 0), number + 1)
                if block[3] and len(shape) == 4:
                    kernels[stage] = max(kernels.get(stage, 0), *shape[2:])
        stem = shapes.get('downsample_layers.0.0.weight', ())
        head = shapes.get('head.weight', ())
        facts = dict(
            depths=Sizes(depths[stage] for stage in sorted(depths)),
            dims=Sizes(last[stage][1] for stage in sorted(last)),
            in_channels=stem[1] if len(stem) == 4 else None,
            kernel_sizes=Sizes(kernels[stage] for stage in sorted(kernels)),
            branch_norm=any('.large_kernel.' in key and '.bn' in key for key in shapes),
            layer_scale=any(re.match(r'stages\.\d+\.\d+\.gamma$', key) for key in shapes),
            deploy=any(re.match(r'stages\.\d+\.\d+\.large_kernel\.bias$', key) for key in shapes),
            output_norms=tuple(stage for stage in sorted(depths) if f'norm{stage}.weight' in shapes),
            num_classes=head[0] if len(head) == 2 else None,
        )
        return facts | cls.name_architecture(facts, cls.archs)

    @staticmethod
    def name_architecture(facts: Mapping[str, Any], archs: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """``arch`` and ``width_factor`` that explain ``depths`` and ``dims``."""
        for factor in _WIDTH_FACTORS:
            for name, arch in archs.items():
                if facts['depths'] == arch['depths'] and facts['dims'] == tuple(int(d * factor) for d in arch['dims']):
                    return dict(arch=name, width_factor=factor)
        return dict(arch=None, width_factor=None)

    def words(self) -> list[str]:
        """What the variant is, in parts of a sentence."""
        factor = f'width factor {self.width_factor:g}, ' if self.width_factor else ''
        return [
            f'{self.arch or "another architecture"} (depths {self.depths})',
            f'{factor}channels {self.dims}',
            *self.kernel_words(),
            'folded for deployment' if self.deploy else 'branch norms' if self.branch_norm else 'no branch norms',
        ]

    def kernel_words(self) -> list[str]:
        """The large kernels in words."""
        return [f'kernels {self.kernel_sizes}'] if self.kernel_sizes else []

    def __str__(self) -> str:
        parts = self.words()
        if self.output_norms:
            parts.append(f'output norms of stages {", ".join(map(str, self.output_norms))}')
        if self.num_classes:
            parts.append(f'classification head with {self.num_classes} classes')
        return ', '.join(parts)

    @property
    def named(self) -> str:
        """The architecture in a message."""
        return self.arch or 'no named architecture'


_WIDTH = (
    'another width: the checkpoint has {theirs.dims} channels ({theirs.named}, width_factor {theirs.width_factor}), '
    'the model {ours.dims} ({ours.named}, width_factor {ours.width_factor});'
)
_FIRST = (
    Cause(
        lambda theirs, ours: theirs.deploy and not ours.deploy,
        'the checkpoint is folded for deployment and the model is in training form: build the model with '
        'deploy=True or call switch_to_deploy on it first; folded kernels cannot be unfolded',
        is_final=True,
    ),
    Cause(
        differs('deploy'),
        'the checkpoint is in training form and the model is already folded for deployment: load the weights '
        'first and call switch_to_deploy afterwards',
        is_final=True,
    ),
)
_COMMON = (
    Cause(
        differs('depths'),
        'another architecture: the checkpoint has {theirs.depths} blocks ({theirs.named}), the model '
        '{ours.depths} ({ours.named}); set arch',
    ),
    Cause(
        lambda theirs, ours: theirs.dims != ours.dims and theirs.arch == ours.arch is not None,
        f'{_WIDTH} set width_factor',
    ),
    Cause(
        lambda theirs, ours: theirs.dims != ours.dims and (theirs.arch is None or theirs.arch != ours.arch),
        f'{_WIDTH} set arch or width_factor',
    ),
    Cause(
        differs('kernel_sizes'),
        'other kernel sizes: the checkpoint has {theirs.kernel_sizes}{theirs.kernel_unit}, the model '
        '{ours.kernel_sizes}{ours.kernel_unit}; set kernel_sizes',
    ),
    Cause(
        differs('small_kernel'),
        'another small kernel: the checkpoint has {theirs.small_kernel}, the model {ours.small_kernel}; '
        'set small_kernel',
    ),
    Cause(
        lambda theirs, ours: theirs.branch_norm and not ours.branch_norm,
        'the checkpoint has batch norms after its large kernels and the model has none; set branch_norm=True',
    ),
    Cause(
        lambda theirs, ours: ours.branch_norm and not theirs.branch_norm,
        'the checkpoint has no batch norms after its large kernels and the model has them; set branch_norm=False',
    ),
    Cause(
        lambda theirs, ours: theirs.layer_scale and not ours.layer_scale,
        'the checkpoint has layer scale (gamma); set layer_scale_init_value to a positive value',
    ),
    Cause(
        lambda theirs, ours: ours.layer_scale and not theirs.layer_scale,
        'the checkpoint has no layer scale (gamma); set layer_scale_init_value to 0',
    ),
    Cause(
        differs('in_channels'),
        'the checkpoint takes images of {theirs.in_channels} channels, the model of {ours.in_channels}; '
        'set in_channels',
    ),
    Cause(
        lambda theirs, ours: bool(ours.num_classes and not theirs.num_classes),
        'the checkpoint has no classification head; set num_classes=0',
    ),
    Cause(
        lambda theirs, ours: bool(ours.num_classes and theirs.num_classes and theirs.num_classes != ours.num_classes),
        'the head of the checkpoint is for {theirs.num_classes} classes, that of the model for {ours.num_classes}; '
        'set num_classes={theirs.num_classes}',
    ),
)


def _first_stages(variant: Variant, number: int) -> Variant:
    """The variant as far as its first stages tell."""
    values = {field.name: getattr(variant, field.name) for field in fields(variant)}
    first: dict[str, Any] = {name: Sizes(v[:number]) for name, v in values.items() if isinstance(v, Sizes)}
    return replace(variant, **first)


def likely_causes(theirs: Variant, ours: Variant) -> list[str]:
    """Say in which arguments a checkpoint's backbone (theirs) and a model's (ours) differ.

    Returns:
        One sentence per difference, with its remedy; the most telling first. Empty if the two are built alike.
    """
    if theirs.family == 'unknown' != ours.family:
        return ['the checkpoint holds the backbone of another project']
    if theirs.family != ours.family:
        return [
            f'the checkpoint holds {theirs.title} weights and the model is {ours.title}: build the model '
            'with the type of the weights'
        ]
    causes = []
    ends = len(theirs.depths) - 1, len(ours.depths) - 1
    if ends[0] < ends[1] and theirs.deploy == ours.deploy:
        causes.append(
            f'the checkpoint ends with stage {ends[0]}, the model with stage {ends[1]}: set out_indices, behind whose '
            'last stage nothing is built'
        )
    # A checkpoint's stages behind the model's last are left out.
    theirs, ours = (_first_stages(variant, min(ends) + 1) for variant in (theirs, ours))
    for cause in (*_FIRST, *ours.causes, *_COMMON):
        if cause.applies(theirs, ours):
            causes.append(cause.sentence.format(theirs=theirs, ours=ours))
            if cause.is_final:
                break
    return causes
