"""Where the project keeps what it downloads and compiles."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ['CACHE_VARIABLE', 'cache_folder']

CACHE_VARIABLE = 'SLAK_MM_CACHE'


def cache_folder() -> Path:
    """``$SLAK_MM_CACHE``, else ``$XDG_CACHE_HOME/slak_mm``, else ``~/.cache/slak_mm``.

    It is not created by this function.

    Raises:
        RuntimeError: There is no home directory to put it in.
    """
    root = os.environ.get(CACHE_VARIABLE)
    if not root:
        base = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
        root = os.path.join(base, 'slak_mm')
    return Path(root).expanduser()
