"""Files of this package: where they are kept, downloads, and writing that leaves a whole file or none.

Locks are :class:`filelock.FileLock`: released by the operating system when their owner dies, never
unlinked, and through no symbolic link. PyTorch depends on that package.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CACHE_VARIABLE = 'SLAK_MM_CACHE'

#: Called with what is done, how much of it and how much in all (bytes; 0 where that is not known).
Report = Callable[[str, int, int], None]

_TIMEOUT = 30  # seconds without an answer
_CHUNK = 1 << 20
_ATTEMPTS = 5  # in a row without a byte


class DownloadError(RuntimeError):
    """A file cannot be had; says from where, why, and what to do."""


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


def need_space(folder: Path, size: int, what: str) -> None:
    """Check that a disk has room.

    Raises:
        DownloadError: It has less than ``size`` bytes left.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DownloadError(
            f'{what} need {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left: make room, or choose '
            'another folder.'
        )


def download(
    urls: Sequence[str],
    path: Path,
    *,
    verify: Callable[[Path], None] = lambda part: None,
    report: Report = lambda what, done, total: None,
    room: int = 1,
) -> None:
    """Get a file from the first address that has it; go on where an earlier call was interrupted.

    A file that is there already is left alone. Whoever calls holds a lock on the folder.

    Args:
        urls: ``http(s)://`` or ``file://`` addresses of the same file, the preferred one first.
        path: Its place, in a folder that exists.
        verify: Looks at the complete download before it gets its name; it is deleted if this raises.
        report: Called again and again with the name of the file and the bytes done and in all.
        room: How many times its own size the file needs on the disk. Defaults to 1.

    Raises:
        DownloadError: No address has it, or the disk has too little room.
        OSError: The folder cannot be written to.
    """
    if path.is_file():
        return
    part = path.with_name(f'{path.name}.part')
    for url in urls:
        problem = _download_from(url, part, report, room)
        if not problem:
            break
    else:
        kept = ', or try again later: what was downloaded is kept' if _validator(part) else ''
        if not kept:
            _forget(part)
        raise DownloadError(
            f'{" and ".join(urls)} could not be downloaded ({problem}). Get it with a browser or on another '
            f'machine and put it at {path}{kept}.'
        )
    try:
        verify(part)
    except Exception:
        _forget(part)
        raise
    _sync(part)
    os.replace(part, path)
    _forget(part)


class _Problem(Exception):
    """The network failed, not the disk; ``is_final`` if trying again is of use only where it has worked before."""

    def __init__(self, reason: object, is_final: bool = False) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.is_final = is_final


def _notes(part: Path) -> Path:
    return part.with_suffix('.json')


def _validator(part: Path) -> str:
    """The server's identifier of the file that a partial download belongs to; '' if it cannot be continued."""
    try:
        return json.loads(_notes(part).read_text())['validator'] if part.stat().st_size else ''
    except (OSError, ValueError, KeyError):
        return ''


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)


def _download_from(url: str, part: Path, report: Report, room: int) -> str:
    """Download from one address, however often the connection breaks off; gives the reason of a failure."""
    failures, received = 0, False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, report, room)
            return ''
        except _Problem as error:
            problem = error
        grown = part.exists() and part.stat().st_size > before
        received |= grown
        failures = 0 if grown else failures + 1
        if failures >= _ATTEMPTS or (problem.is_final and not received):
            return str(problem)
        time.sleep(min(2**failures, 30) / 4)


def _transfer(url: str, part: Path, report: Report, room: int) -> None:
    """Download to the end, from where the file ends on if the server has the same file still."""
    validator = _validator(part)
    offset = part.stat().st_size if validator else 0
    # Without a validator the beginning may be from another file: begin again.
    headers = {'Range': f'bytes={offset}-', 'If-Range': validator} if validator else {}
    answer = _open(url, headers)
    if answer.status == 416:
        if answer.headers.get('Content-Range') == f'bytes */{offset}':
            return  # there is nothing behind the end
        part.unlink()
        raise _Problem('the server has another file now')
    with answer:
        if 'html' in (answer.headers.get('Content-Type') or ''):
            raise _Problem('an HTML page was sent', is_final=True)
        is_rest = answer.status == 206 and answer.headers.get('Content-Range', '').startswith(f'bytes {offset}-')
        if answer.status == 206 and not is_rest:
            part.unlink()
            raise _Problem('the server sent another part than it was asked for')
        offset = offset if is_rest else 0
        length = answer.headers.get('Content-Length')
        total = offset + int(length) if length else 0
        if total:
            need_space(part.parent, room * total - offset, f'{part.stem} and what is in it')
        etag = answer.headers.get('ETag') or ''
        strong = etag if etag.startswith('"') else answer.headers.get('Last-Modified') or ''
        _notes(part).write_text(json.dumps(dict(url=url, validator=strong)))
        with part.open('ab' if is_rest else 'wb') as out:
            done = offset
            while chunk := _read(answer):
                out.write(chunk)
                done += len(chunk)
                report(part.stem, done, total)
    if total and done != total:
        raise _Problem(f'the connection ended after {done} of {total} bytes')


def _open(url: str, headers: dict[str, str]) -> Any:
    import http.client
    import urllib.error
    import urllib.request

    try:
        request = urllib.request.Request(url, headers={'User-Agent': 'slak_mm', **headers})
        return urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        raise _Problem(f'it answered {error.code} {error.reason}', is_final=True) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _Problem(getattr(error, 'reason', None) or error, is_final=True) from error


def _read(answer: Any) -> bytes:
    import http.client

    try:
        return answer.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Problem(error) from error
