"""Convert the names of one backbone's tensors, by the table of its family.

Conversion renames; values are left as they are, but for what a family's ``finish`` and ``official`` say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError, CheckpointMismatch
from .families import FAMILIES, Family, Renamer, describe, detect_family, detect_format, known_backbones

_UNKNOWN = Family('unknown', titles=(), spellings=(), table=(), formats=())


@dataclass
class ConversionNotes:
    """What a conversion did; the last two are filled where a backbone is loaded."""

    format: str  # as detect_format names it
    renamed: dict[str, str] = field(default_factory=dict)  # name in the source -> our name, where they differ
    unrecognized: list[str] = field(default_factory=list)  # names of no tensor of the family; left as they are
    dropped: dict[str, str] = field(default_factory=dict)  # our name -> why the backbone has no use for the tensor
    remarks: list[str] = field(default_factory=list)  # sentences on what was fitted to the backbone


def convert_state_dict(
    state_dict: Mapping[str, Any], prefix: str = '', family: str | None = None
) -> tuple[dict[str, Any], ConversionNotes]:
    """Rename the tensors of one backbone from any known spelling to ours.

    Names that are ours already stay; so does what is not below ``prefix``, and what no table
    knows (see :attr:`ConversionNotes.unrecognized`). Nothing is dropped and nothing is copied.

    Args:
        state_dict: Tensors by name.
        prefix: Prefix of the backbone's names, such as 'backbone.'. Defaults to ''.
        family: A key of :data:`FAMILIES`. Defaults to ``None``, for which the names decide.

    Returns:
        Tensors by our names, with the ``_metadata`` of the source, and what was done.

    Raises:
        CheckpointMismatch: Two names of the source stand for one tensor.
        CheckpointError: The family is unknown.
    """
    tables = _family(family or detect_family(state_dict, prefix))
    notes = ConversionNotes(detect_format(state_dict, prefix))
    spellings = next((s for name, _, s in tables.formats if name == notes.format), ())
    renamers = [Renamer([(theirs, ours) for ours, theirs in tables.rows(spelling)]) for spelling in spellings]
    # Our names after the others', because `head.` of ours also begins timm's `head.norm.`.
    renamers.append(Renamer([(row[0], row[0]) for row in tables.table]))

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
        if new in converted:
            raise CheckpointMismatch(
                f'Two tensors of the checkpoint stand for {new}: it mixes the names of two versions of the code.',
                unexpected=[key],
            )
        if new != key:
            notes.renamed[key] = new
        converted[new] = value
    return with_metadata(tables.finish(converted, prefix, notes), state_dict), notes


def to_official(
    state_dict: Mapping[str, Any], spelling: str | None = None, prefix: str = '', family: str | None = None
) -> dict[str, Any]:
    """Rename the tensors of one backbone from our names to another code base's.

    Args:
        state_dict: Tensors by our names, or by any known ones.
        spelling: One of the family's :attr:`~slak_mm.checkpoints.families.Family.spellings`.
            Defaults to ``None``, the official code.
        prefix: As for :func:`convert_state_dict`. Defaults to ''.
        family: As for :func:`convert_state_dict`. Defaults to ``None``.

    Raises:
        CheckpointError: The other code has no place for some tensor, as the official code has
            none for a folded pair of strips; or it would generate other index tables.
    """
    tables = _family(family or detect_family(state_dict, prefix))
    if tables is _UNKNOWN:
        raise CheckpointError(f'The names are not those of a {known_backbones()} backbone.')
    spelling = spelling or tables.spellings[0]
    if spelling not in tables.spellings:
        raise CheckpointError(f'Unknown spelling {spelling!r}: choose from {", ".join(tables.spellings)}.')
    ours, notes = convert_state_dict(state_dict, prefix, tables.name)
    refuse_unrecognized(notes)
    ours, spelling = tables.official(ours, prefix, spelling)
    rename = Renamer(tables.rows(spelling))
    official: dict[str, Any] = {}
    for key, value in ours.items():
        name = rename(key[len(prefix) :]) if key.startswith(prefix) else ''
        if name is None:
            folded = describe({k[len(prefix) :]: v for k, v in ours.items() if k.startswith(prefix)}).deploy
            raise CheckpointError(
                f'The {spelling} spelling has no place for {key}'
                + (' once it is folded for deployment: convert the training form.' if folded else '.')
            )
        official[prefix + name if name else key] = value
    return with_metadata(official, state_dict)


def refuse_unrecognized(notes: ConversionNotes) -> None:
    """Raise CheckpointError if a conversion met names that it does not know."""
    if notes.unrecognized:
        raise CheckpointError(
            f'{notes.unrecognized[0]} (of {len(notes.unrecognized)} such names) is no tensor of a '
            f'{known_backbones()} backbone.'
        )


def _family(name: str) -> Family:
    if name == _UNKNOWN.name:
        return _UNKNOWN
    if name not in FAMILIES:
        raise CheckpointError(f'Unknown family {name!r}: choose from {", ".join(FAMILIES)}.')
    return FAMILIES[name]


def with_metadata(converted: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the versions of modules that ``Module.state_dict`` records beside the tensors."""
    metadata = getattr(source, '_metadata', None)
    if metadata is None:
        return converted
    result = OrderedDict(converted)
    result._metadata = metadata  # type: ignore[attr-defined]
    return result
