"""SHA-256 of what is downloaded: recorded at the first use, compared at every later one."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from slak_mm._files import replacing

from .errors import CheckpointUnreadable
from .zoo import ModelInfo

_SUFFIX = '.sha256'


class Hashes(NamedTuple):
    """The hash that a file has, and those that it should have."""

    found: str  # '' if there is no file
    first: str | None  # recorded at its first use; None if that has not been
    pinned: str | None  # by the zoo

    @property
    def is_same(self) -> bool:
        """Whether it is the file that is expected."""
        return self.found == (self.pinned or self.first or self.found)

    @property
    def verdict(self) -> str:
        """What became of a file in the cache, for a table."""
        if not self.found:
            return 'not here any more'
        if self.pinned:
            return 'as the zoo pins' if self.is_same else 'NOT THE FILE THAT THE ZOO PINS'
        if self.first is None:
            return 'not used yet'
        return 'as at its first use' if self.is_same else 'CHANGED SINCE ITS FIRST USE'


def record_of(path: Path) -> Path:
    """Where the hash of a cached file is recorded: beside it, as ``sha256sum`` writes it."""
    return path.with_name(path.name + _SUFFIX)


def hashes_of(file: Path, path: Path, info: ModelInfo | None) -> Hashes:
    """Hash a file and look up what its hash should be.

    Args:
        file: The file, or its complete download.
        path: Its place in the cache.
        info: Its entry of the zoo, if it has one.
    """
    digest = hashlib.sha256()
    if exists := file.is_file():
        with open(file, 'rb') as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    record = record_of(path)
    match = re.match(r'[0-9a-f]{64}\b', record.read_text(errors='replace')) if record.is_file() else None
    return Hashes(digest.hexdigest() if exists else '', match and match[0], info.sha256 if info else None)


def check_hash(file: Path, path: Path, info: ModelInfo | None, sender: str = '') -> None:
    """Refuse a file that is another one than the zoo pins or than was used first; record the hash of the first.

    Args:
        file: As in :func:`hashes_of`.
        path: As in :func:`hashes_of`.
        info: As in :func:`hashes_of`.
        sender: The address that it was downloaded from just now; '' for a file that was in the cache.

    Raises:
        CheckpointUnreadable: It is another file; says whose hash differs and what to do.
    """
    hashes = hashes_of(file, path, info)
    record = record_of(path)
    if hashes.is_same:
        if hashes.found != hashes.first:
            # A cache that others keep, and that cannot be written to, has no records.
            with contextlib.suppress(OSError), replacing(record) as part:
                part.write_text(f'{hashes.found}  {path.name}\n')
        return
    expected = f'the zoo pins {hashes.pinned}' if hashes.pinned else f'{hashes.first} was recorded at its first use'
    if sender:
        verdict = 'the server has another file now'
        remedy = f'Put the {"published" if hashes.pinned else "earlier"} file at {path}'
        excuse = 'to take the new one'
    else:
        # Whether it had the hash at its first use, before the zoo pinned another.
        verdict = 'it is not the published file' if hashes.first == hashes.found else 'it has changed on this disk'
        remedy = 'Delete it to get it again'
        excuse = 'if you have replaced it on purpose'
    if not hashes.pinned:
        remedy += f', or delete {record} {excuse}'
    what = f'What {sender} sent' if sender else f'The cached file {path}'
    raise CheckpointUnreadable(f'{what} has sha256 {hashes.found}, and {expected}: {verdict}. {remedy}.')


def cached_files(folder: Path) -> list[Path]:
    """Every whole file of the cache, and every one of which only the record is left."""
    names = {path.name.removesuffix(_SUFFIX) for path in folder.iterdir()} if folder.is_dir() else set()
    return [folder / name for name in sorted(names) if not name.endswith(('.part', '.json')) and name[0] != '.']
