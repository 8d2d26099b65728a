"""Names of one backbone's tensors in every code base that trains it, and their conversion.

One table per family holds all spellings: its first column is ours, the others are those of the
official code and of other projects with the same network. Conversion renames; values are left as
they are, except that a 1x1 convolution is read as the linear layer it equals.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError, CheckpointMismatch
from .shiftwise import merge_paths, without_generated_tables

__all__ = [
    'FAMILIES',
    'ConversionNotes',
    'Family',
    'convert_state_dict',
    'detect_family',
    'detect_format',
    'to_official',
]


@dataclass(frozen=True)
class Family:
    """Spellings of one family of backbones.

    Attributes:
        name: The value of the backbones' ``checkpoint_family``.
        columns: Names of the spellings, in the order of the table's columns
            after the first.
        table: Rows ``(ours, spelling 1, spelling 2, ...)``. ``{i}`` and ``{j}`` stand for
            numbers; a name that ends in a dot stands for everything below it. ``=`` is our name,
            ``-`` means that this spelling has no such tensor.
        formats: ``(format, pattern of a telling key, spellings to read it with)``, the
            first match decides.
        generated: Pattern of tensors of ours which the other code does not store, because
            they follow from its arguments; '' for none.
    """

    name: str
    columns: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]
    formats: tuple[tuple[str, str, tuple[str, ...]], ...]
    generated: str = ''

    def rows(self, spelling: str) -> list[tuple[str, str]]:
        """``(ours, theirs)`` of one spelling, in the order of the table."""
        column = 1 + self.columns.index(spelling)
        rows = [(row[0], row[column]) for row in self.table]
        return [(ours, ours if theirs == '=' else theirs) for ours, theirs in rows if theirs != '-']


_BLOCK = 'stages.{i}.{j}.'
_LARGE = 'stages.{i}.{j}.large_kernel.'
_TIMM = 'stages.{i}.blocks.{j}.'

# `merged` is the official code's form of a square kernel after re-parameterization. ConvNeXt
# code bases have a bare biased convolution where SLaK has `lkb_origin`.
_SLAK = Family(
    name='slak',
    columns=('LoRA', 'Decom', 'merged', 'facebook', 'timm', 'mmpretrain'),
    table=(
        # ours                        LoRA, Decom, merged, facebook, timm, mmpretrain
        ('downsample_layers.0.0.', '=', '=', '=', '=', 'stem.0.', '='),
        ('downsample_layers.0.1.', '=', '=', '=', '=', 'stem.1.', '='),
        ('downsample_layers.{i}.0.', '=', '=', '=', '=', 'stages.{i}.downsample.0.', '='),
        ('downsample_layers.{i}.1.', '=', '=', '=', '=', 'stages.{i}.downsample.1.', '='),
        (_LARGE + 'tall.', _LARGE + 'LoRA1.', _LARGE + 'Decom1.', '-', '-', '-', '-'),
        (_LARGE + 'wide.', _LARGE + 'LoRA2.', _LARGE + 'Decom2.', '-', '-', '-', '-'),
        (_LARGE + 'small.', _LARGE + 'small_conv.', _LARGE + 'small_conv.', '-', '-', '-', '-'),
        (
            _LARGE + 'square.conv.weight',
            _LARGE + 'lkb_origin.conv.weight',
            _LARGE + 'lkb_origin.conv.weight',
            _LARGE + 'lkb_reparam.weight',
            _BLOCK + 'dwconv.weight',
            _TIMM + 'conv_dw.weight',
            _BLOCK + 'depthwise_conv.weight',
        ),
        (
            _LARGE + 'square.conv.bias',
            _LARGE + 'lkb_origin.conv.bias',
            _LARGE + 'lkb_origin.conv.bias',
            '-',
            _BLOCK + 'dwconv.bias',
            _TIMM + 'conv_dw.bias',
            _BLOCK + 'depthwise_conv.bias',
        ),
        (_LARGE + 'square.bn.', _LARGE + 'lkb_origin.bn.', _LARGE + 'lkb_origin.bn.', '-', '-', '-', '-'),
        (_LARGE + 'bias', '-', '-', _LARGE + 'lkb_reparam.bias', '-', '-', '-'),
        (_BLOCK + 'norm.', '=', '=', '=', '=', _TIMM + 'norm.', '='),
        (_BLOCK + 'pwconv1.', '=', '=', '=', '=', _TIMM + 'mlp.fc1.', _BLOCK + 'pointwise_conv1.'),
        (_BLOCK + 'pwconv2.', '=', '=', '=', '=', _TIMM + 'mlp.fc2.', _BLOCK + 'pointwise_conv2.'),
        (_BLOCK + 'gamma', '=', '=', '=', '=', _TIMM + 'gamma', '='),
        ('norm{i}.', '=', '=', '=', '=', '=', '='),
        ('norm.weight', '=', '=', '=', '=', 'head.norm.weight', '='),
        ('norm.bias', '=', '=', '=', '=', 'head.norm.bias', '='),
        ('head.weight', '=', '=', '=', '=', 'head.fc.weight', 'head.fc.weight'),
        ('head.bias', '=', '=', '=', '=', 'head.fc.bias', 'head.fc.bias'),
    ),
    formats=(
        ('official-LoRA', r'stages\.\d+\.\d+\.large_kernel\.LoRA[12]\.', ('LoRA',)),
        ('official-Decom', r'stages\.\d+\.\d+\.large_kernel\.Decom[12]\.', ('Decom',)),
        ('official-merged', r'stages\.\d+\.\d+\.large_kernel\.lkb_reparam\.', ('merged', 'LoRA')),
        ('official-lkb', r'stages\.\d+\.\d+\.large_kernel\.lkb_origin\.', ('LoRA',)),
        ('ours-deployed', r'stages\.\d+\.\d+\.large_kernel\.bias$', ()),
        ('ours', r'stages\.\d+\.\d+\.large_kernel\.(tall|wide|square)\.conv\.', ()),
        ('convnext-timm', r'stages\.\d+\.blocks\.\d+\.conv_dw\.', ('timm',)),
        ('convnext-mmpretrain', r'stages\.\d+\.\d+\.depthwise_conv\.', ('mmpretrain',)),
        ('convnext-facebook', r'stages\.\d+\.\d+\.dwconv\.', ('facebook',)),
    ),
)

# `LoRA` is the official code's form after it has merged the filter paths. Names below `ffn` exist
# in version 2 only, `pwconv1` and `pwconv2` of ours in version 1 only.
_SHIFTWISE = Family(
    name='shiftwise',
    columns=('LoRAs', 'LoRA'),
    table=(
        # ours                        LoRAs, LoRA
        ('downsample_layers.{i}.{j}.', '=', '='),
        (_LARGE + 'filters.0.weight', _LARGE + 'LoRAs.0.weight', _LARGE + 'LoRA.weight'),
        (_LARGE + 'filters.{p}.weight', _LARGE + 'LoRAs.{p}.weight', '-'),
        (_LARGE + 'bn_wide.', _LARGE + 'bn_lora1.', _LARGE + 'bn_lora1.'),
        (_LARGE + 'bn_tall.', _LARGE + 'bn_lora2.', _LARGE + 'bn_lora2.'),
        (_LARGE + 'bn_small.', '=', '='),
        *((_LARGE + table, '-', '-') for table in ('shifts', 'picks', 'rep', 'ghost')),
        *((_LARGE + folded, '-', '-') for folded in ('tall', 'wide', 'bias', 'ghost_scale', 'ghost_bias')),
        (_BLOCK + 'norm.', '=', '='),
        (_BLOCK + 'se.', '=', '='),
        (_BLOCK + 'ffn.fc1.', _BLOCK + 'pwconv1.1.', _BLOCK + 'pwconv1.1.'),
        (_BLOCK + 'ffn.grn.', _BLOCK + 'act.1.', _BLOCK + 'act.1.'),
        (_BLOCK + 'ffn.fc2.bias', '-', '-'),
        (_BLOCK + 'ffn.fc2.weight', _BLOCK + 'pwconv2.0.weight', _BLOCK + 'pwconv2.0.weight'),
        (_BLOCK + 'ffn.norm.', _BLOCK + 'pwconv2.2.', _BLOCK + 'pwconv2.2.'),
        (_BLOCK + 'pwconv1.', '=', '='),
        (_BLOCK + 'pwconv2.', '=', '='),
        (_BLOCK + 'gamma', '=', '='),
        ('norm{i}.', '=', '='),
        ('norm.', '=', '='),
        ('head.', '=', '='),
    ),
    formats=(
        ('shiftwise', r'stages\.\d+\.\d+\.large_kernel\.(LoRAs\.\d+|LoRA)\.weight$', ('LoRAs', 'LoRA')),
        ('ours-deployed', r'stages\.\d+\.\d+\.large_kernel\.tall$', ()),
        ('ours', r'stages\.\d+\.\d+\.large_kernel\.filters\.\d+\.weight$', ()),
    ),
    generated=r'stages\.\d+\.\d+\.large_kernel\.(shifts|picks|rep|ghost)$',
)

#: Every family of backbones whose checkpoints can be read, by its ``checkpoint_family``.
FAMILIES: dict[str, Family] = {family.name: family for family in (_SLAK, _SHIFTWISE)}


@dataclass
class ConversionNotes:
    """What :func:`convert_state_dict` did.

    Attributes:
        format: As :func:`detect_format` names it.
        renamed: Name in the source -> our name, of tensors whose name changed.
        reshaped: Our names of 1x1 convolutions that became linear weights.
        unrecognized: Names that belong to no tensor of the family; left as they are.
    """

    format: str
    renamed: dict[str, str] = field(default_factory=dict)
    reshaped: list[str] = field(default_factory=list)
    unrecognized: list[str] = field(default_factory=list)


class _Renamer:
    """Renames by rows of ``(from, to)`` templates; the first row that matches decides."""

    def __init__(self, rows: Sequence[tuple[str, str]]) -> None:
        self._rows = [(_compile(source), target) for source, target in rows]

    def __call__(self, key: str) -> str | None:
        for pattern, target in self._rows:
            match = pattern.match(key)
            if match:
                numbers = {k: v for k, v in match.groupdict().items() if k != 'rest'}
                rest = match.groupdict().get('rest', '')
                return target.format(**numbers) + rest
        return None


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for index in 'ijp':
        pattern = pattern.replace(re.escape('{' + index + '}'), rf'(?P<{index}>\d+)')
    return re.compile(pattern + ('(?P<rest>.+)$' if template.endswith('.') else '$'))


def detect_format(state_dict: Mapping[str, Any], prefix: str = '') -> str:
    """Name the code base whose spelling a backbone's state dict has.

    Args:
        state_dict: Tensors by name; only the names are looked at.
        prefix: Look at the keys below this prefix only. Defaults to '', which looks at all
            and finds the backbone at any depth.

    Returns:
        'official-LoRA', 'official-Decom', 'official-lkb' (a square kernel),
        'official-merged' (a re-parameterized square kernel), 'ours', 'ours-deployed',
        'convnext-facebook', 'convnext-timm', 'convnext-mmpretrain', 'shiftwise' or 'unknown'.
    """
    return _detect(state_dict, prefix)[0]


def detect_family(state_dict: Mapping[str, Any], prefix: str = '') -> str:
    """Name the family of a backbone's state dict in any spelling.

    Args:
        state_dict: Tensors by name; only the names are looked at.
        prefix: As for :func:`detect_format`. Defaults to ''.

    Returns:
        A key of :data:`FAMILIES`; 'slak' where no name tells.
    """
    return _detect(state_dict, prefix)[1]


def _detect(state_dict: Mapping[str, Any], prefix: str) -> tuple[str, str]:
    """Format and family; ShiftWise's patterns are the stricter ones."""
    for family in reversed(FAMILIES.values()):
        for name, pattern, _ in family.formats:
            telling = re.compile((re.escape(prefix) if prefix else r'(?:.*\.)?') + pattern)
            if any(telling.match(key) for key in state_dict):
                return name, family.name
    return 'unknown', _SLAK.name


def convert_state_dict(
    state_dict: Mapping[str, Any], prefix: str = '', family: str | None = None
) -> tuple[dict[str, Any], ConversionNotes]:
    """Rename the tensors of one backbone from any known spelling to ours.

    Names that are ours already stay; so does what is not below ``prefix``, and what no table
    knows (see :attr:`ConversionNotes.unrecognized`). Nothing is dropped and nothing is copied.

    Args:
        state_dict: Tensors by name.
        prefix: Prefix of the backbone's names, such as 'backbone.'. Defaults to ''.
        family: A key of :data:`FAMILIES`. Defaults to ``None``, for which the
            names decide.

    Returns:
        Tensors by our names, and what was done. The ``_metadata``
        of a state dict is passed on.

    Raises:
        CheckpointMismatch: Two names of the source stand for one tensor.
    """
    tables = _family(family or detect_family(state_dict, prefix))
    notes = ConversionNotes(detect_format(state_dict, prefix))
    spellings = next((s for name, _, s in tables.formats if name == notes.format), ())
    renamers = [_Renamer([(theirs, ours) for ours, theirs in tables.rows(spelling)]) for spelling in spellings]
    # Our names after the others', because `head.` of ours also begins timm's `head.norm.`.
    renamers.append(_Renamer([(row[0], row[0]) for row in tables.table]))

    converted: dict[str, Any] = {}
    for key, value in state_dict.items():
        new = key
        if key.startswith(prefix):
            name = key[len(prefix) :]
            found = next((n for n in (rename(name) for rename in renamers) if n is not None), None)
            if found is None:
                notes.unrecognized.append(key)
            else:
                new = prefix + found
                value = _as_linear(new, value, notes)
        if new in converted:
            raise CheckpointMismatch(
                f'Two tensors of the checkpoint stand for {new}: it mixes the names of two versions of the code.',
                unexpected=[key],
            )
        if new != key:
            notes.renamed[key] = new
        converted[new] = value
    if notes.format == 'convnext-mmpretrain':
        converted = _final_norm_of_mmpretrain(converted, prefix, notes)
    return _with_metadata(converted, state_dict), notes


def to_official(
    state_dict: Mapping[str, Any], spelling: str | None = None, prefix: str = '', family: str | None = None
) -> dict[str, Any]:
    """Rename the tensors of one backbone from our names to another code base's.

    Args:
        state_dict: Tensors by our names, or by any known ones.
        spelling: For SLaK 'LoRA' (the official code), 'Decom' (its state of July
            2022), and for the ConvNeXt mode 'facebook', 'timm' or 'mmpretrain'; for ShiftWise
            'LoRAs' (the official code) or 'LoRA' (the same with merged filter paths; several
            paths are summed). Defaults to ``None``, the official code.
        prefix: Prefix of the backbone's names. Defaults to ''.
        family: A key of :data:`FAMILIES`. Defaults to ``None``, for which the
            names decide.

    Returns:
        Tensors by the other names.

    Raises:
        CheckpointError: The other code has no place for some tensor, as the official code has
            none for a folded pair of strips; or it would generate other index tables.
    """
    family = family or detect_family(state_dict, prefix)
    tables = _family(family)
    spelling = spelling or tables.columns[0]
    if spelling not in tables.columns or spelling == 'merged':
        known = [c for c in tables.columns if c != 'merged']
        raise CheckpointError(f'Unknown spelling {spelling!r}: choose from {", ".join(known)}.')
    ours, notes = convert_state_dict(state_dict, prefix, family)
    if notes.unrecognized:
        raise CheckpointError(
            f'{notes.unrecognized[0]} (of {len(notes.unrecognized)} such names) is no tensor of a {family} backbone.'
        )
    if family == _SLAK.name and any(
        re.match(re.escape(prefix) + r'stages\.\d+\.\d+\.large_kernel\.bias$', key) for key in ours
    ):
        spelling = 'merged'
    if tables.generated:
        ours = without_generated_tables(ours, re.compile(re.escape(prefix) + tables.generated))
    if family == _SHIFTWISE.name and spelling == 'LoRA':
        ours = merge_paths(ours)
    rename = _Renamer(tables.rows(spelling))
    official: dict[str, Any] = {}
    for key, value in ours.items():
        new = key
        if key.startswith(prefix):
            name = rename(key[len(prefix) :])
            if name is None:
                reason = (
                    ' once it is folded for deployment: convert the training form.'
                    if spelling == 'merged' or tables.generated and any(k.endswith('large_kernel.tall') for k in ours)
                    else '.'
                )
                raise CheckpointError(f'The {spelling} spelling has no place for {key}{reason}')
            new = prefix + name
        official[new] = value
    return _with_metadata(official, state_dict)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise CheckpointError(f'Unknown family {name!r}: choose from {", ".join(FAMILIES)}.')
    return FAMILIES[name]


def _as_linear(key: str, value: Any, notes: ConversionNotes) -> Any:
    shape = tuple(getattr(value, 'shape', ()))
    if len(shape) == 4 and shape[2:] == (1, 1) and key.endswith(('pwconv1.weight', 'pwconv2.weight')):
        notes.reshaped.append(key)
        return value.reshape(shape[:2])
    return value


def _final_norm_of_mmpretrain(converted: dict[str, Any], prefix: str, notes: ConversionNotes) -> dict[str, Any]:
    """Tell mmpretrain's classification norm from an output norm.

    Its classifiers call the norm after global pooling `norm3`, as downstream code calls the
    output norm of the last stage. Downstream backbones have the other three as well.
    """
    if any(f'{prefix}norm{i}.weight' in converted for i in range(3)):
        return converted
    renamed = {}
    for key, value in converted.items():
        new = key
        if key in (f'{prefix}norm3.weight', f'{prefix}norm3.bias'):
            new = prefix + 'norm.' + key.rsplit('.', 1)[1]
            notes.renamed[key] = new
        renamed[new] = value
    return renamed


def _with_metadata(converted: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the versions of modules that ``Module.state_dict`` records beside the tensors."""
    metadata = getattr(source, '_metadata', None)
    if metadata is None:
        return converted
    result = OrderedDict(converted)
    result._metadata = metadata  # type: ignore[attr-defined]
    return result
