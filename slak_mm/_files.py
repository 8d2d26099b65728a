"""Files of this package: where they are kept, and writing that leaves a whole file or none.

Locks are :class:`filelock.FileLock`: released by the operating system when their owner dies, never
unlinked, and through no symbolic link. PyTorch depends on that package.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ['CACHE_VARIABLE', 'cache_folder', 'replacing']

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


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file so that a reader, or a machine that lost power, sees the old one or the new one whole.

    Args:
        path: The file. Its folder must exist.

    Yields:
        The temporary file beside it to write to; it takes the place of ``path`` when the block ends,
        and is removed when the block raises.

    Raises:
        OSError: The file cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    part = path.with_name(f'.{path.name[:200]}.{uuid.uuid4().hex[:8]}.part')
    try:
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        if error.filename in (None, str(part)):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems have no fsync for folders
            raise
    finally:
        os.close(descriptor)
