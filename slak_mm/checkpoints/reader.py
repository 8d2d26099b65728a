"""Read a checkpoint from a path, an address or the zoo, without running code from it."""

from __future__ import annotations

import copy
import hashlib
import http.client
import json
import logging
import os
import pickle
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_local_rank, get_rank, is_distributed
from mmengine.logging import print_log

from slak_mm._files import cache_folder

from ._safe_pickle import RESTRICTED_PICKLE, safe_objects
from .errors import CheckpointError, CheckpointNotFound, CheckpointUnreadable, UnsafeCheckpoint
from .zoo import ModelInfo, find_model, normalize_url, similar_names

__all__ = ['cache_dir', 'cached_path', 'fetch', 'read_checkpoint']

_SCHEMES = ('http://', 'https://', 'file://')
_CONNECT_TIMEOUT = 30  # seconds without an answer
_PROGRESS_EVERY = 5  # seconds
_CHUNK = 1 << 20

# Extending torch's list of allowed names for one call needs torch 2.5.
_EXTENSIBLE = hasattr(torch.serialization, 'safe_globals')

_UNSAFE_NAMES = (
    re.compile(r'Unsupported global: GLOBAL ([\w.]+)'),
    re.compile(r'[Uu]nsupported (?:GLOBAL|class) ([\w.]+)'),
    re.compile(r'unrecognized function (.+)'),
    re.compile(r'(?:Can only create new object|Can only build)[^\n]*?got ([^\n]+)'),
)
_UNSAFE_OTHERS = ('Can only create new object', 'Can only build', 'Only persistent_load', 'persistent_load id')


def cache_dir() -> Path:
    """Where downloads go: ``checkpoints`` in the project's cache.

    The cache is ``$SLAK_MM_CACHE``, else ``$XDG_CACHE_HOME/slak_mm``, else ``~/.cache/slak_mm``.
    The folder is not created by this function.

    Returns:
        The folder.
    """
    return cache_folder() / 'checkpoints'


def cached_path(source: str) -> Path:
    """Path in the cache that belongs to a zoo name or an address.

    Args:
        source: A zoo name or a URL.

    Returns:
        Where a download is kept, and where a file fetched by hand is looked for.
    """
    info = find_model(source)
    if info is not None:
        return cache_dir() / info.filename
    # Many addresses end in the same word ('download'), so the name carries a hash of the address.
    parts = urllib.parse.urlsplit(source)
    name = re.sub(r'[^\w.-]+', '_', Path(urllib.parse.unquote(parts.path)).name) or 'checkpoint'
    stem, suffix = os.path.splitext(name)
    digest = hashlib.sha256(normalize_url(source).encode()).hexdigest()[:8]
    return cache_dir() / f'{stem}-{digest}{suffix or ".pth"}'


def read_checkpoint(
    source: str | os.PathLike | Mapping[str, Any], map_location: str | torch.device = 'cpu'
) -> dict[str, Any]:
    """Read a checkpoint as it is, safely.

    Nothing in the file is executed: only tensors, plain containers, ``argparse.Namespace`` and
    the log histories that mmengine stores are read. Files in torch's zip and older format are
    understood, and safetensors where that package is installed.

    Args:
        source: A path, an ``http(s)://`` or ``file://`` address, a
            zoo name (:data:`slak_mm.checkpoints.ZOO`), or a checkpoint already read, which is
            copied (the dict, not the tensors). An address or a zoo name is downloaded once, to
            :func:`cached_path`; when the default process group exists, by one process per node,
            and then every process has to make this call.
        map_location: Where to put the tensors. Defaults to 'cpu'.

    Returns:
        The content of the file, wrappers and all.

    Raises:
        CheckpointNotFound: No such file, or it could not be downloaded.
        CheckpointUnreadable: Truncated, an HTML page, not a checkpoint…
        UnsafeCheckpoint: The file wants to run code.
    """
    if isinstance(source, Mapping):
        # copy.copy keeps what `Module.state_dict` attaches to its dict.
        return copy.copy(source) if isinstance(source, dict) else dict(source)
    return _read_file(resolve(source), map_location)


def resolve(source: str | os.PathLike) -> Path:
    """Turn a path, an address or a zoo name into the path of a local file.

    Args:
        source: As for :func:`read_checkpoint`.

    Returns:
        An existing file.

    Raises:
        CheckpointNotFound: No such file, or it could not be downloaded.
        CheckpointUnreadable: A folder, or a download that failed its check.
    """
    text = os.fspath(source)
    is_local = not text.lower().startswith(_SCHEMES)
    path = Path(text).expanduser()
    if is_local and path.is_file():
        return path
    if is_local and path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in ('.pth', '.pt'))[:3]
        hint = f', for instance one of: {", ".join(inside)}' if inside else ''
        raise CheckpointUnreadable(f'{text} is a folder: name a file in it{hint}.')
    info = find_model(text)
    if info is not None or not is_local:
        return fetch(text)
    close = similar_names(path.name) if path.name == text else []
    hint = f' Did you mean the zoo name {" or ".join(close)}?' if close else ''
    raise CheckpointNotFound(
        f'There is no file {text} and no published checkpoint of that name.'
        f'{hint} `tools/checkpoint.py zoo` lists the published ones.'
    )


def fetch(source: str) -> Path:
    """Get a zoo entry or an address into the cache, if it is not there yet.

    In a distributed run one process per node downloads, the others wait; a failure is raised on
    every process, so that none is left waiting.

    Args:
        source: A zoo name or a URL.

    Returns:
        The file in the cache.

    Raises:
        CheckpointNotFound: It could not be downloaded; says where to get it and where to put it.
        CheckpointUnreadable: The server sent something else, or size or hash are wrong.
    """
    if not is_distributed():
        return _fetch_here(source)
    outcome: tuple[type[CheckpointError], str] | None = None
    if _node_rank() == 0:
        try:
            _fetch_here(source)
        except CheckpointError as error:
            outcome = (type(error), str(error))
        except Exception as error:  # noqa: BLE001 - the others wait below and must hear of any failure
            outcome = (CheckpointNotFound, f'Fetching {source} failed: {error!r}')
    for failure in all_gather_object(outcome):
        if failure is not None:
            raise failure[0](failure[1])
    return cached_path(source)


def _node_rank() -> int:
    """Rank within the node."""
    try:
        return get_local_rank()
    except RuntimeError:  # mmengine's group of the node does not exist
        return int(os.environ.get('LOCAL_RANK', get_rank()))


def _fetch_here(source: str) -> Path:
    info = find_model(source)
    path = cached_path(source)
    url = info.url if info is not None else source
    if path.is_file():
        if info is not None:
            _verify(path, info, str(path))
        return path
    if url is None:
        assert info is not None
        raise CheckpointNotFound(
            f'No address was published for {info.name} ({info.source}). If you have the file, put it at {path}.'
        )
    part = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
    except OSError as error:
        raise CheckpointNotFound(
            f'{url} cannot be kept, because the cache {path.parent} cannot be written to '
            f'({error}). Set SLAK_MM_CACHE to a folder that can.'
        ) from error
    try:
        with open(part, 'wb') as out:
            _download(url, out, path)
        _refuse_other_content(part, f'What {url} sent', f' Fetch it with a browser and put it at {path}.')
        if info is not None:
            _verify(part, info, url)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _download(url: str, out: Any, path: Path) -> None:
    """Copy an address into an open file, with a progress line every few seconds."""
    remedy = f'Get it with a browser or on another machine and put it at {path}.'
    print_log(f'Downloading {url} to {path}', logger='current')
    request = urllib.request.Request(normalize_url(url), headers={'User-Agent': 'slak_mm'})
    done, start, shown = 0, time.monotonic(), time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=_CONNECT_TIMEOUT) as answer:
            total = int(answer.headers.get('Content-Length') or 0)
            while chunk := answer.read(_CHUNK):
                out.write(chunk)
                done += len(chunk)
                if time.monotonic() - shown > _PROGRESS_EVERY:
                    shown = time.monotonic()
                    speed = done / (shown - start)
                    left = f', {(total - done) / speed:.0f} s left' if total else ''
                    print_log(
                        f'{done / 1e6:.0f} of {total / 1e6 or float("nan"):.0f} MB, {speed / 1e6:.1f} MB/s{left}',
                        logger='current',
                    )
    except urllib.error.HTTPError as error:
        raise CheckpointNotFound(f'{url} answered {error.code} ({error.reason}). {remedy}') from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or error
        raise CheckpointNotFound(f'{url} could not be downloaded ({reason}). {remedy}') from error
    if total and done != total:
        raise CheckpointUnreadable(f'The download of {url} ended after {done} of {total} bytes; try again.')


def _verify(path: Path, info: ModelInfo, source: str) -> None:
    """Compare a file with the hash in the zoo table, where it has one."""
    if info.sha256 is not None:
        digest = hashlib.sha256()
        with open(path, 'rb') as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != info.sha256:
            raise CheckpointUnreadable(
                f'{source} has sha256 {digest.hexdigest()}, {info.name} has {info.sha256}: the '
                'file is damaged or another one. Delete it and get it again.'
            )


def _refuse_other_content(path: Path, name: str, remedy: str = '') -> None:
    """Say what a file is if its first bytes show that it is no checkpoint."""
    with open(path, 'rb') as file:
        head = file.read(4096)
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if not head:
        raise CheckpointUnreadable(f'{name} is empty: get it again.{remedy}')
    if text.startswith((b'<!doctype', b'<html', b'<head', b'<?xml', b'<script')):
        drive = b'google' in text or b'drive' in text
        kind = (
            'Google Drive shows one for large files and over its quota'
            if drive
            else 'a log-in or error page of the server'
        )
        raise CheckpointUnreadable(
            f'{name} is an HTML page, not a checkpoint ({kind}): download the file itself, not its page.{remedy}'
        )
    if head.startswith(b'version https://git-lfs.github.com'):
        raise CheckpointUnreadable(
            f'{name} is a git-lfs pointer, not the file it points to: run `git lfs pull` where it comes from.{remedy}'
        )
    if head.startswith((b'\x1f\x8b', b'7z\xbc\xaf', b'BZh', b'\xfd7zXZ')):
        raise CheckpointUnreadable(f'{name} is a compressed archive: unpack it first.{remedy}')
    if head[257:262] == b'ustar':
        raise CheckpointUnreadable(f'{name} is a tar archive: unpack it first.{remedy}')


def _read_file(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    name = str(path)
    try:
        _refuse_other_content(path, name)
        with open(path, 'rb') as file:
            head = file.read(512)
        if _is_safetensors(path, head):
            return _read_safetensors(path, map_location)
        if head.startswith(b'PK\x03\x04'):
            _check_archive(path)
        elif not head.startswith(b'\x80'):
            raise CheckpointUnreadable(
                f'{name} is not a checkpoint: it is neither in the format of torch.save nor safetensors.'
            )
    except OSError as error:
        raise CheckpointNotFound(f'{name} cannot be read: {error}.') from error
    content = _load_safely(path, map_location)
    if not isinstance(content, dict):
        raise CheckpointUnreadable(f'{name} holds a {type(content).__name__}, not a dict with the weights by name.')
    return content


def _check_archive(path: Path) -> None:
    """Refuse zip files that ``torch.load`` could not or must not read."""
    damaged = f'{path} is truncated or damaged: the index at the end of the file is missing or wrong. Get it again.'
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointUnreadable(damaged) from error
    if any(n.endswith('/constants.pkl') or '/code/' in n for n in names):
        raise CheckpointUnreadable(
            f'{path} is a TorchScript archive, which holds a program and not only weights: save '
            'the state dict of the model instead.'
        )
    if not any(n.endswith('data.pkl') for n in names):
        raise CheckpointUnreadable(f'{path} is a zip archive without a checkpoint in it: unpack it first.')


def _load_safely(path: Path, map_location: str | torch.device) -> Any:
    try:
        if not _EXTENSIBLE:
            return torch.load(path, map_location=map_location, pickle_module=RESTRICTED_PICKLE, weights_only=False)
        known = set(torch.serialization.get_safe_globals())
        # `safe_globals` forgets on exit what it was given; leave what others have listed.
        ours = [item for item in safe_objects() if item not in known]
        with torch.serialization.safe_globals(ours):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unpickling_error(path, str(error)) from error
    except MemoryError as error:
        raise CheckpointUnreadable(f'There is not enough memory to read {path}, or it is damaged.') from error
    except OSError as error:
        raise CheckpointUnreadable(f'{path} cannot be read: {error}.') from error
    except Exception as error:  # a damaged pickle can end in almost any exception
        reason = str(error).strip().splitlines()
        raise CheckpointUnreadable(
            f'{path} is truncated or damaged and cannot be read '
            f'({type(error).__name__}{": " + reason[0] if reason else ""}). Get it again.'
        ) from error


def _unpickling_error(path: Path, message: str) -> CheckpointError:
    for pattern in _UNSAFE_NAMES:
        match = pattern.search(message)
        if match:
            wanted = match.group(1).rstrip('.')
            break
    else:
        if not any(text in message for text in _UNSAFE_OTHERS):
            reason = message.strip().splitlines()[-1] if message.strip() else 'no reason given'
            return CheckpointUnreadable(
                f'{path} is damaged or in a pickle format that torch does not write ({reason}). '
                'Get it again, or save it anew with torch.save.'
            )
        wanted = ''
    what = f'{wanted}, which' if wanted else 'something that'
    return UnsafeCheckpoint(
        f'{path} was refused: reading it would run code that it asks for ({what} is not on the '
        'list of safe names). If you trust its origin, read it once in an isolated environment '
        'with torch.load(..., weights_only=False) and save only its state dict with '
        'torch.save({"state_dict": ...}, new_file).',
        wanted,
    )


def _is_safetensors(path: Path, head: bytes) -> bool:
    if path.suffix == '.safetensors':
        return True
    length = int.from_bytes(head[:8], 'little')
    return head[8:9] == b'{' and 2 <= length <= path.stat().st_size - 8


def _read_safetensors(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointUnreadable(
            f'{path} is a safetensors file: install that package (pip install safetensors), or '
            'save the weights with torch.save.'
        ) from error
    try:
        return dict(load_file(path, device=str(map_location)))
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise CheckpointUnreadable(f'{path} is not an intact safetensors file ({error}).') from error
    except Exception as error:  # the package's own exception class derives from Exception alone
        raise CheckpointUnreadable(f'{path} is not an intact safetensors file ({error}).') from error


def log_report(text: str, level: int = logging.INFO) -> None:
    """Log on the first process only, to the current runner's logger."""
    if get_rank() == 0:
        print_log(text, logger='current', level=level)
