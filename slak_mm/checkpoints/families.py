"""Families of backbones: all that reading, loading and counting need to know about one.

Three words, each with one meaning:

family
    Backbones of one class, with their checkpoints: a :class:`Family`, registered under its name by
    the file in :mod:`slak_mm.models` that has the class.
format
    In whose names a state dict of a family is written: 'ours', or those of some other code base.
    :func:`detect_format` tells them apart. Those that can be written are the *spellings* of the
    family's table of names.
variant
    Which member of the family it is, in constructor arguments: a
    :class:`~slak_mm.checkpoints.variants.Variant`, read off the tensors by :func:`describe`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from .variants import Variant
from .zoo import CONVENTIONS, PUBLISHED, ZOO, Convention, ModelInfo, Published

_STEM = 'downsample_layers.0.0.weight'


@dataclass(frozen=True)
class Family:
    """One family of backbones. See ``docs/adding-a-family.md``.

    Attributes:
        name: Its key in :data:`FAMILIES`.
        titles: Its networks in messages.
        spellings: Other code bases' names for the tensors, the official code first: the columns of
            the table after our own.
        table: Rows ``(ours, spelling 1, spelling 2, ...)``. ``{i}``, ``{j}`` and ``{p}`` stand for
            numbers; a name that ends in a dot stands for everything below it. ``=`` is our name,
            ``-`` means that this spelling has no such tensor.
        formats: ``(format, pattern of a telling key, spellings to read it with)``, the first match
            decides. Of several patterns each has to find a key. They may not match the names of a family that was
            registered before.
        variant: Reads constructor arguments off the tensors, and knows what may differ.
        finish: Called after names were converted to ours with the state dict, the prefix and the
            :class:`~slak_mm.checkpoints.formats.ConversionNotes`; returns the state dict.
        official: Called before our names are converted with the state dict, the prefix and the
            spelling; returns state dict and spelling.
        models: Published checkpoints.
        published: Parameters and FLOPs of further networks by the stem of their config.
        conventions: Ways to count which the published figures follow.
        head: What the classifiers have between the last stage and the linear layer ``head``, in order: 'pool, norm'
            is a LayerNorm ``norm`` of the pooled features, 'norm, pool' a batch norm ``norm`` of the map, and 'pool'
            neither.
        imagenet: Arguments of the backbone on ImageNet, where the defaults are those of downstream configs.
    """

    name: str
    titles: tuple[str, ...]
    spellings: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]
    formats: tuple[tuple[str, str | tuple[str, ...], tuple[str, ...]], ...]
    variant: type[Variant] = Variant
    finish: Callable[[dict[str, Any], str, Any], dict[str, Any]] = lambda state_dict, prefix, notes: state_dict
    official: Callable[[dict[str, Any], str, str], tuple[dict[str, Any], str]] = lambda state_dict, prefix, spelling: (
        state_dict,
        spelling,
    )
    models: tuple[ModelInfo, ...] = ()
    published: Mapping[str, Published] = field(default_factory=dict)
    conventions: Mapping[str, Convention] = field(default_factory=dict)
    head: Literal['pool, norm', 'norm, pool', 'pool'] = 'pool, norm'
    imagenet: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, spelling: str) -> list[tuple[str, str]]:
        """``(ours, theirs)`` of one spelling, in the order of the table."""
        column = 1 + self.spellings.index(spelling)
        rows = [(row[0], row[column]) for row in self.table]
        return [(ours, ours if theirs == '=' else theirs) for ours, theirs in rows if theirs != '-']

    @cached_property
    def stems(self) -> set[str]:
        """Every spelling of the first convolution's weight."""
        return {_STEM, *(Renamer(self.rows(spelling))(_STEM) or _STEM for spelling in self.spellings)}


class FamilyMember:
    """What this package asks of a backbone that it loads weights into; a base class for modules."""

    family: ClassVar[Family]

    def complete_state_dict(self, state_dict: dict[str, Any], prefix: str = '') -> list[str]:
        """Fit a state dict by our names to this backbone, in place; a sentence for each change."""
        return []

    def why_unused(self, name: str) -> str:
        """Why this backbone has no use for a tensor of its family, by our name; '' if it has, or never had."""
        return ''


#: Every registered family by its name.
FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known to everything that reads, loads, converts, lists or counts; returns it.

    Raises:
        ValueError: Its name, or that of one of its models, is taken.
    """
    taken = {family.name} & FAMILIES.keys() | {info.name for info in family.models} & ZOO.keys()
    if taken:
        raise ValueError(f'there is a family or published model of the name {min(taken)!r} already')
    FAMILIES[family.name] = family
    CONVENTIONS.update(family.conventions)
    PUBLISHED.update(family.published)
    for info in family.models:
        ZOO[info.name] = info
        if 'flops_g' in info.figures:
            PUBLISHED[Path(info.config).stem or info.name] = Published(
                info.figures['params_m'], info.figures['flops_g'], info.counted, info.source, info.size
            )
    return family


def known_backbones() -> str:
    """The networks of all families, for messages."""
    *others, last = (title for family in FAMILIES.values() for title in family.titles)
    return f'{", ".join(others)} or {last}' if others else last


class Renamer:
    """Renames by rows of ``(from, to)`` templates; the first row that matches decides."""

    def __init__(self, rows: Sequence[tuple[str, str]]) -> None:
        self._rows = [(_compile(source), target) for source, target in rows]

    def __call__(self, key: str) -> str | None:
        """The new name; None if no row matches."""
        for pattern, target in self._rows:
            match = pattern.match(key)
            if match:
                numbers = {k: v for k, v in match.groupdict().items() if k != 'rest'}
                return target.format(**numbers) + match.groupdict().get('rest', '')
        return None


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for index in 'ijp':
        pattern = pattern.replace(re.escape('{' + index + '}'), rf'(?P<{index}>\d+)')
    return re.compile(pattern + ('(?P<rest>.+)$' if template.endswith('.') else '$'))


def detect_format(state_dict: Mapping[str, Any], prefix: str = '') -> str:
    """Name the format of a backbone's state dict, such as 'ours' or 'ours-deployed'; 'unknown' if no family has it.

    Args:
        state_dict: Tensors by name; only the names are looked at.
        prefix: Look at the keys below this prefix only. Defaults to '', which finds a backbone at any depth.
    """
    return _detect(state_dict, prefix)[0]


def detect_family(state_dict: Mapping[str, Any], prefix: str = '') -> str:
    """Name the family of a backbone's state dict, a key of :data:`FAMILIES` or 'unknown'; as :func:`detect_format`."""
    return _detect(state_dict, prefix)[1]


def _detect(state_dict: Mapping[str, Any], prefix: str) -> tuple[str, str]:
    """Format and family; the family registered last is asked first."""
    for family in reversed(FAMILIES.values()):
        for name, patterns, _ in family.formats:
            if all(
                _finds(pattern, state_dict, prefix)
                for pattern in ([patterns] if isinstance(patterns, str) else patterns)
            ):
                return name, family.name
    return 'unknown', 'unknown'


def _finds(pattern: str, state_dict: Mapping[str, Any], prefix: str) -> bool:
    telling = re.compile((re.escape(prefix) if prefix else r'(?:.*\.)?') + pattern)
    return any(telling.match(key) for key in state_dict)


def find_roots(state_dict: Mapping[str, Any]) -> list[str]:
    """Prefixes below which a backbone lies in any spelling; ``['']`` for a bare one."""
    stems = {stem for family in FAMILIES.values() for stem in family.stems}
    found = re.compile(rf'(|.*\.)(?:{"|".join(map(re.escape, stems))})$')
    roots = {match[1] for key in state_dict if (match := found.match(key))}
    return sorted(
        root
        for root in roots
        if any(key.startswith(root + 'stages.') for key in state_dict) or detect_family(state_dict, root) != 'unknown'
    )


def describe(state_dict: Mapping[str, Any]) -> Variant:
    """Read the constructor arguments of a backbone off its tensors, by our names without a prefix."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if hasattr(value, 'shape')}
    family = detect_family(shapes)
    variant = FAMILIES[family].variant if family in FAMILIES else Variant
    return variant(family=family, **variant.read(shapes))
