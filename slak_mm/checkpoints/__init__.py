"""Official checkpoints: reading them safely, renaming their tensors, loading them strictly."""

from __future__ import annotations

from .errors import CheckpointError, CheckpointMismatch, CheckpointNotFound, CheckpointUnreadable, UnsafeCheckpoint
from .families import (
    FAMILIES,
    Family,
    FamilyMember,
    describe,
    detect_format,
    find_roots,
    known_backbones,
    register_family,
)
from .formats import ConversionNotes, convert_state_dict, to_official
from .hashes import Hashes, cached_files, hashes_of
from .load import (
    LoadReport,
    convert_on_load,
    find_backbones,
    load_foreign,
    load_pretrained,
    prepare_checkpoint,
    prepare_state_dict,
)
from .reader import cache_dir, cached_path, read_checkpoint
from .unwrap import unwrap, unwrap_model
from .variants import Cause, Sizes, Variant, differs, likely_causes
from .writer import convert_checkpoint, write_checkpoint
from .zoo import CONVENTIONS, PUBLISHED, ZOO, Convention, ModelInfo, Published, find_model, normalize_url, zoo_table

__all__ = [
    'CONVENTIONS',
    'FAMILIES',
    'PUBLISHED',
    'ZOO',
    'Cause',
    'CheckpointError',
    'CheckpointMismatch',
    'CheckpointNotFound',
    'CheckpointUnreadable',
    'Convention',
    'ConversionNotes',
    'Family',
    'FamilyMember',
    'Hashes',
    'LoadReport',
    'ModelInfo',
    'Published',
    'Sizes',
    'UnsafeCheckpoint',
    'Variant',
    'cache_dir',
    'cached_files',
    'cached_path',
    'convert_checkpoint',
    'convert_on_load',
    'convert_state_dict',
    'describe',
    'detect_format',
    'differs',
    'find_backbones',
    'find_model',
    'find_roots',
    'hashes_of',
    'known_backbones',
    'likely_causes',
    'load_foreign',
    'load_pretrained',
    'normalize_url',
    'prepare_checkpoint',
    'prepare_state_dict',
    'read_checkpoint',
    'register_family',
    'to_official',
    'unwrap',
    'unwrap_model',
    'write_checkpoint',
    'zoo_table',
]
