"""Read a checkpoint from a path, an address or the zoo, without running code from it."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from mmengine.dist import all_gather_object, get_local_rank, get_rank, is_distributed
from mmengine.logging import print_log
from mmengine.utils import digit_version

from slak_mm._files import DownloadError, cache_folder, download, replacing

from ._pickle_check import PickleCheck, safe_names
from .errors import CheckpointError, CheckpointNotFound, CheckpointUnreadable, shown
from .hashes import check_hash
from .zoo import ZOO_SCHEME, find_model, normalize_url, similar_names

HUB_SCHEME = 'hf://'
SCHEMES = ('http://', 'https://', 'file://', HUB_SCHEME)
_PROGRESS_EVERY = 5  # seconds

# Pairs of an object and its name in torch's list of safe names came with torch 2.6.
_EXTENSIBLE = digit_version(torch.__version__) >= digit_version('2.6')


def cache_dir() -> Path:
    """Folder for downloads within :func:`~slak_mm._files.cache_folder`; it need not exist."""
    return cache_folder() / 'checkpoints'


def cached_path(source: str) -> Path:
    """Where the download of a zoo name or an address is kept, and a file fetched by hand is looked for."""
    info = find_model(source)
    if info is not None:
        return cache_dir() / f'{info.name}.pth'
    import urllib.parse

    # Many addresses end in the same word ('download'), so the name carries a hash of the address.
    parts = urllib.parse.urlsplit(source)
    name = re.sub(r'[^\w.-]+', '_', Path(urllib.parse.unquote(parts.path)).name) or 'checkpoint'
    stem, suffix = os.path.splitext(name)
    digest = hashlib.sha256(normalize_url(source).encode()).hexdigest()[:8]
    return cache_dir() / f'{stem[:100]}-{digest}{suffix[:20] or ".pth"}'


def read_checkpoint(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint as it is, safely.

    Nothing in the file is executed: only tensors, plain containers, ``argparse.Namespace`` and the log histories that
    mmengine stores are read. Files in torch's zip and older format are understood, and safetensors where that package
    is installed. Checksums (zip only) and the sizes of all tensors are compared with the file before anything is
    built, so that a small file cannot ask for much memory. Several threads may read at once.

    Args:
        source: A path, an ``http(s)://`` or ``file://`` address, ``hf://owner/repo/file`` or
            ``hf://owner/repo@revision/file`` of the Hugging Face hub, a zoo name (:data:`slak_mm.checkpoints.ZOO`), or
            a checkpoint already read, which is copied (the dict, not the tensors). An address or a zoo name is
            downloaded once, to :func:`cached_path`, and compared with its hash at every later use; when the default
            process group exists, by one process per node, and then every process has to make this call.

    Returns:
        The content of the file, wrappers and all, with its tensors on the CPU.

    Raises:
        CheckpointNotFound: No such file, or it could not be downloaded.
        CheckpointUnreadable: Truncated, damaged, an HTML page, not a checkpoint…
        UnsafeCheckpoint: The file wants to run code.
    """
    if isinstance(source, Mapping):
        # copy.copy keeps what `Module.state_dict` attaches to its dict.
        return copy.copy(source) if isinstance(source, dict) else dict(source)
    return _read_file(resolve(source))


def resolve(source: str | os.PathLike) -> Path:
    """Turn a path, an address or a zoo name into the path of an existing local file.

    Raises:
        CheckpointNotFound: No such file, or it could not be downloaded.
        CheckpointUnreadable: A folder, or a download that failed its check.
    """
    text = os.fspath(source).removeprefix(ZOO_SCHEME)
    is_local = not text.lower().startswith(SCHEMES)
    path = Path(text)
    try:
        path = path.expanduser()
        is_file, is_folder = (path.is_file(), path.is_dir()) if is_local else (False, False)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null character, no such user
        raise CheckpointNotFound(f'There is no file {shown(text)}: {shown(str(error))}.') from error
    if is_file:
        return path
    if is_folder:
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

    In a distributed run one process per node downloads, the others wait; a failure is raised on every process, so
    that none is left waiting.

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
        check_hash(path, path, info)
        return path
    if url is None:
        assert info is not None  # for mypy
        raise CheckpointNotFound(
            f'No address was published for {info.name} ({info.source}). If you have the file, put it at {path}.'
        )

    def verify(part: Path) -> None:
        with open(part, 'rb') as file:
            head = file.read(4096)
        _refuse_other_content(head, f'What {url} sent', f' Fetch it with a browser and put it at {path}.')
        check_hash(part, path, info, url)

    from filelock import FileLock  # a tenth of a second, and few calls come here

    print_log(f'Downloading {url} to {path}', logger='current')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent.with_suffix('.lock')):
            if not url.lower().startswith(HUB_SCHEME):
                download([normalize_url(url)], path, verify=verify, report=_Progress())
            elif not path.is_file():
                _download_from_hub(url, path, verify)
    except DownloadError as error:
        raise CheckpointNotFound(str(error)) from error
    except OSError as error:
        raise CheckpointNotFound(
            f'{url} cannot be kept, because the cache {path.parent} cannot be written to '
            f'({error}). Set SLAK_MM_CACHE to a folder that can.'
        ) from error
    return path


def _download_from_hub(url: str, path: Path, verify: Callable[[Path], None]) -> None:
    """Get a file of the Hugging Face hub; that package resumes, retries and logs in.

    Raises:
        CheckpointNotFound: It is not there, or the package is not here.
        CheckpointUnreadable: It is another file than before.
    """
    match = re.fullmatch(r'hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)', url)
    if match is None:
        raise CheckpointNotFound(
            f'{url} is no address of a file: write hf://owner/repo/file or hf://owner/repo@revision/file.'
        )
    from urllib.parse import unquote

    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointNotFound(
            f'{url} needs the package of the Hugging Face hub: pip install huggingface_hub, or put the file at {path}.'
        ) from error
    try:
        kept = Path(huggingface_hub.hf_hub_download(match[1], match[3], revision=match[2] and unquote(match[2])))
    except Exception as error:  # of many kinds, of that package, its transports and its arguments
        reason = ': '.join([type(error).__name__, *str(error).splitlines()[:1]])
        raise CheckpointNotFound(
            f'{url} could not be downloaded ({shown(reason, 300)}). Check owner, repository, revision and file, log in '
            f'if it is not public, or put it at {path}.'
        ) from error
    verify(kept)
    with replacing(path) as part:  # its cache has links and names of its own; where it can, the bytes are shared
        try:
            os.link(kept.resolve(), part)
        except OSError:
            shutil.copyfile(kept, part)


class _Progress:
    """Logs a line every few seconds."""

    def __init__(self) -> None:
        self.shown, self.before = time.monotonic(), 0

    def __call__(self, what: str, done: int, total: int) -> None:
        seconds = time.monotonic() - self.shown
        if seconds > _PROGRESS_EVERY:
            speed = (done - self.before) / seconds
            left = f', {(total - done) / speed:.0f} s left' if total and speed else ''
            amount = f'{done / 1e6:.0f}' + (f' of {total / 1e6:.0f}' if total else '')
            print_log(f'{amount} MB of {what}, {speed / 1e6:.1f} MB/s{left}', logger='current')
            self.shown, self.before = time.monotonic(), done


def _refuse_other_content(head: bytes, name: str, remedy: str = '') -> None:
    """Say what a file is if its first bytes show that it is no checkpoint."""
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    drive = b'google' in text or b'drive' in text
    page = (
        'Google Drive shows one for large files and over its quota' if drive else 'a log-in or error page of the server'
    )
    for found, what in (
        (not head, 'is empty: get it again.'),
        (
            text.startswith((b'<!doctype', b'<html', b'<head', b'<?xml', b'<script')),
            f'is an HTML page, not a checkpoint ({page}): download the file itself, not its page.',
        ),
        (
            head.startswith(b'version https://git-lfs.github.com'),
            'is a git-lfs pointer, not the file it points to: run `git lfs pull` where it comes from.',
        ),
        (
            head.startswith((b'\x1f\x8b', b'7z\xbc\xaf', b'BZh', b'\xfd7zXZ')),
            'is a compressed archive: unpack it first.',
        ),
        (head[257:262] == b'ustar', 'is a tar archive: unpack it first.'),
    ):
        if found:
            raise CheckpointUnreadable(f'{name} {what}{remedy}')


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with open(path, 'rb') as file:
            return read_open_file(file, str(path))
    except OSError as error:
        raise CheckpointNotFound(f'{path} cannot be read: {error}.') from error


def read_open_file(file: BinaryIO, name: str) -> dict[str, Any]:
    """Check and read a checkpoint from one open file, so that what was checked is what is read.

    Args:
        file: At its beginning.
        name: For messages. Errors are those of :func:`read_checkpoint`.
    """
    head = file.read(4096)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    _refuse_other_content(head, name)
    if name.endswith('.safetensors') or (head[8:9] == b'{' and 2 <= int.from_bytes(head[:8], 'little') <= size - 8):
        return _read_safetensors(file, name)
    if head.startswith(b'PK\x03\x04'):
        content = _check_archive(file, name, size)
    elif head.startswith(b'\x80'):
        content = _check_legacy(file, name, size)
    else:
        raise CheckpointUnreadable(
            f'{name} is not a checkpoint: it is neither in the format of torch.save nor safetensors.'
        )
    if not isinstance(content, dict):
        kind = getattr(content, 'kind', type(content).__name__)
        article = 'an' if kind[0] in 'aeiou' else 'a'
        raise CheckpointUnreadable(
            f'{name} holds {article} {kind}, not a dict with the weights by name: save model.state_dict().'
        )
    file.seek(0)
    return _load(file, name)


def _check_archive(file: BinaryIO, name: str, size: int) -> Any:
    """Follow a file in torch's zip format without loading it; torch checks neither sums nor sizes."""
    import zipfile

    damaged = f'{name} is truncated or damaged: %s. Get it again.'
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [info.filename for info in members]
            if any(n.endswith('/constants.pkl') or '/code/' in n for n in names):
                raise CheckpointUnreadable(
                    f'{name} is a TorchScript archive, which holds a program and not only weights: save '
                    'the state dict of the model instead.'
                )
            root = names[0].split('/')[0] if names else ''
            if f'{root}/data.pkl' not in names:
                raise CheckpointUnreadable(f'{name} is a zip archive without a checkpoint in it: unpack it first.')
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in members):
                raise CheckpointUnreadable(
                    f'{name} was refused: its members are compressed or encrypted, as torch.save never writes them. '
                    'Get the file as it was saved.'
                )
            if len({n.lower() for n in names}) != len(names) or sum(info.file_size for info in members) > size:
                raise CheckpointUnreadable(damaged % 'members of the archive overlap or have the same name')
            broken = archive.testzip()
            if broken is not None:
                raise CheckpointUnreadable(
                    damaged % f'the checksum of {shown(broken)} in it is wrong (or it was saved after '
                    'torch.serialization.set_crc32_options(False), which leaves sums out)'
                )
            prefix = f'{root}/data/'
            storages = {n[len(prefix) :]: info.file_size for n, info in zip(names, members) if n.startswith(prefix)}
            with archive.open(f'{root}/data.pkl') as member:
                return PickleCheck(io.BytesIO(member.read()), name, size, storages).check()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointUnreadable(damaged % 'the index at the end of the file is missing or wrong') from error


def _check_legacy(file: BinaryIO, name: str, size: int) -> Any:
    """Follow a file in torch's older format: five pickles, then each storage behind its length."""
    for expected in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION):
        header = PickleCheck(file, name, size)
        if header.check() != expected:
            header.refuse_format()
    PickleCheck(file, name, size).check()
    pickled = PickleCheck(file, name, size)
    content = pickled.check()
    keys = PickleCheck(file, name, size).check()
    rest = size - file.tell()
    if not isinstance(keys, list) or sorted(keys) != sorted(pickled.needed):
        raise CheckpointUnreadable(f'{name} is truncated or damaged: its list of storages is wrong. Get it again.')
    needed = sum(8 + nbytes for nbytes in pickled.needed.values())
    if rest != needed:
        raise CheckpointUnreadable(
            f'{name} is truncated or damaged: its weights take {needed} bytes, and it has {rest}. Get it again.'
        )
    return content


# torch's list of names, and its switches, are the process's: only one reader at a time may change them.
_READING = threading.Lock()


def _load(file: BinaryIO, name: str) -> dict[str, Any]:
    try:
        if _EXTENSIBLE:
            # As pairs: what others have listed as it is stays listed when these are taken off again.
            pairs: list[Any] = [(item, dotted) for dotted, item in safe_names().items()]
            with _READING, torch.serialization.safe_globals(pairs):
                return torch.load(file, map_location='cpu', weights_only=True)
        from ._old_torch import load

        with _READING:
            return load(file)
    except MemoryError as error:
        raise CheckpointUnreadable(f'There is not enough memory to read {name}, or it is damaged.') from error
    except Exception as error:  # whatever torch, numpy or a damaged value raise
        raise CheckpointUnreadable(
            f'{name} is truncated or damaged and cannot be read ({type(error).__name__}: {shown(str(error))}). '
            'Get it again.'
        ) from error


def _read_safetensors(file: BinaryIO, name: str) -> dict[str, Any]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise CheckpointUnreadable(
            f'{name} is a safetensors file: install that package (pip install safetensors), or '
            'save the weights with torch.save.'
        ) from error
    try:
        # Checked by the package: the table fits the file, without gaps or overlaps. The bytes are our own: tensors
        # that map the file would change with it.
        content = file.read()
        weights: dict[str, Any] = dict(load(content))
    except Exception as error:  # the package's own exception class derives from Exception alone
        raise CheckpointUnreadable(f'{name} is not an intact safetensors file ({shown(str(error))}).') from error
    meta = _read_metadata(content, name)
    return dict(state_dict=weights, meta=meta) if meta else weights


#: Key of the meta among the texts of a safetensors file.
META_KEY = 'slak_mm_meta'
# That of a training checkpoint, with its whole config, has some tens of thousands of characters.
_LARGEST_META = 1 << 23


def _read_metadata(content: bytes, name: str) -> dict[str, Any]:
    """The ``meta`` that :func:`write_checkpoint` has put into a safetensors file as JSON; {} if there is none."""
    header = content[8 : 8 + int.from_bytes(content[:8], 'little')]
    texts = json.loads(header).get('__metadata__') if META_KEY.encode() in header else None
    text = (texts or {}).get(META_KEY)
    if text is None:
        return {}
    try:
        if len(text) > _LARGEST_META:
            raise ValueError(f'it has {len(text)} characters')
        meta = json.loads(text)
        if not isinstance(meta, dict):
            raise ValueError('it is no dict')
    except (ValueError, RecursionError) as error:
        raise CheckpointUnreadable(
            f'The meta of {name} cannot be read as JSON ({shown(str(error))}): write the file again without it.'
        ) from error
    return meta


def log_report(text: str, level: int = logging.INFO) -> None:
    """Log on the first process only, to the current runner's logger."""
    if get_rank() == 0:
        print_log(text, logger='current', level=level)
