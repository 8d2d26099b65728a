"""Official checkpoints: reading them safely, renaming their tensors, loading them strictly."""

from __future__ import annotations

from .errors import CheckpointError, CheckpointMismatch, CheckpointNotFound, CheckpointUnreadable, UnsafeCheckpoint
from .formats import FAMILIES, ConversionNotes, Family, convert_state_dict, detect_family, detect_format, to_official
from .load import LoadReport, find_backbones, load_pretrained, prepare_checkpoint
from .reader import cache_dir, cached_path, fetch, read_checkpoint
from .shiftwise import fit_paths, merge_paths
from .unwrap import Unwrapped, find_roots, unwrap, unwrap_model
from .variants import Variant, describe, likely_causes
from .writer import convert_checkpoint, write_checkpoint
from .zoo import ZOO, ModelInfo, find_model, normalize_url, zoo_table

__all__ = [
    'FAMILIES',
    'ZOO',
    'CheckpointError',
    'CheckpointMismatch',
    'CheckpointNotFound',
    'CheckpointUnreadable',
    'ConversionNotes',
    'Family',
    'LoadReport',
    'ModelInfo',
    'UnsafeCheckpoint',
    'Unwrapped',
    'Variant',
    'cache_dir',
    'cached_path',
    'convert_checkpoint',
    'convert_state_dict',
    'describe',
    'detect_family',
    'detect_format',
    'fetch',
    'find_backbones',
    'find_model',
    'find_roots',
    'fit_paths',
    'likely_causes',
    'load_pretrained',
    'merge_paths',
    'normalize_url',
    'prepare_checkpoint',
    'read_checkpoint',
    'to_official',
    'unwrap',
    'unwrap_model',
    'write_checkpoint',
    'zoo_table',
]
