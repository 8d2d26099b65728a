"""Download, unpack and verify the data sets that the configs are written for.

Nothing half-finished ever has the name of something complete: downloads go on where they were
interrupted, archives are unpacked beside their destination, and only what was verified is moved
there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from filelock import FileLock, Timeout
from mmengine.utils import mkdir_or_exist

from slak_mm._config import type_name
from slak_mm._files import DownloadError, Report, download, need_space
from slak_mm.checkpoints.errors import shown

from .errors import ConfigOverrideError

_CHUNK = 1 << 20
_DOWNLOADS = '.downloads'


class DataError(ConfigOverrideError):
    """A data set cannot be had or is not complete; says what, and what to do."""


@dataclass(frozen=True)
class Archive:
    """A file to download."""

    urls: tuple[str, ...]  # addresses of the same file, the preferred one first
    checksum: str = ''  # ``md5:...`` or ``sha1:...`` as published

    @property
    def filename(self) -> str:
        """Name of the file."""
        return self.urls[0].rpartition('/')[2]


@dataclass(frozen=True)
class Files:
    """Files that a complete data set has."""

    folder: str  # below the folder of the data set
    pattern: str  # of the names; ``{}`` stands for a name of the list, ``{:08d}`` or the like for numbers from 1
    count: int
    # A file below the folder of the data set: a text with a name on each line, or COCO's JSON. '' for numbers.
    listed_in: str = ''


@dataclass(frozen=True)
class Part:
    """What is unpacked together."""

    target: str  # place below the folder of the data set, '' for that folder itself
    inside: str  # folder within the archives that becomes it
    archives: tuple[Archive, ...]  # all are unpacked into one folder


@dataclass(frozen=True)
class DataSet:
    """A data set."""

    folder: str  # below the root
    kind: str  # data set class of the configs that read it
    parts: tuple[Part, ...]  # what is downloaded
    files: tuple[Files, ...]  # what has to be there


def _voc(year: str, lists: Mapping[str, int], *archives: tuple[str, str]) -> DataSet:
    hosts = ('https://thor.robots.ox.ac.uk', 'http://host.robots.ox.ac.uk')
    folder = f'VOCdevkit/VOC{year}'
    addresses = (([f'{host}/pascal/VOC/voc{year}/{name}' for host in hosts], checksum) for name, checksum in archives)
    part = Part('', folder, tuple(Archive(tuple(urls), checksum) for urls, checksum in addresses))
    files = tuple(
        Files(folder, pattern, count, f'ImageSets/Main/{name}.txt')
        for name, count in lists.items()
        for folder, pattern in (('JPEGImages', '{}.jpg'), ('Annotations', '{}.xml'))
    )
    return DataSet(folder, 'VOCDataset', (part,), files)


def _coco(folder: str, name: str, md5: str) -> Part:
    place = 'annotations' if folder == 'annotations' else 'zips'
    return Part(folder, folder, (Archive((f'http://images.cocodataset.org/{place}/{name}',), f'md5:{md5}'),))


_ADE = Archive(
    ('http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip',),
    'sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7',
)

#: The data sets by name. The checksums are those of torchvision (VOC), GluonCV (ADE20K) and, for
#: COCO, which publishes none, those that many projects give alike (PaddleDetection, for one).
DATA_SETS: dict[str, DataSet] = {
    'ade20k': DataSet(
        'ade/ADEChallengeData2016',
        'ADE20KDataset',
        (Part('', 'ADEChallengeData2016', (_ADE,)),),
        tuple(
            Files(f'{kind}/{split}', f'ADE_{short}_{{:08d}}.{suffix}', count)
            for split, short, count in (('training', 'train', 20210), ('validation', 'val', 2000))
            for kind, suffix in (('images', 'jpg'), ('annotations', 'png'))
        ),
    ),
    'voc2007': _voc(
        '2007',
        dict(trainval=5011, test=4952),
        ('VOCtrainval_06-Nov-2007.tar', 'md5:c52e279531787c972589f7e41ab4ae64'),
        ('VOCtest_06-Nov-2007.tar', 'md5:b6e924de25625d8de591ea690078ad9f'),
    ),
    'voc2012': _voc(
        '2012', dict(trainval=11540), ('VOCtrainval_11-May-2012.tar', 'md5:6cd6e144f989b92b3379bac3b3de84fd')
    ),
    'coco': DataSet(
        'coco',
        'CocoDataset',
        (
            _coco('annotations', 'annotations_trainval2017.zip', 'f4bbac642086de4f52a3fdda2de5fa2c'),
            _coco('val2017', 'val2017.zip', '442b8da7639aecaf257c1dceb8ba8c80'),
            _coco('train2017', 'train2017.zip', 'cced6f7f71b7629ddf16f17bbcfab6b2'),
        ),
        (
            Files('annotations', 'instances_train2017.json', 1),
            Files('annotations', 'instances_val2017.json', 1),
            Files('val2017', '{}', 5000, 'annotations/instances_val2017.json'),
            Files('train2017', '{}', 118287, 'annotations/instances_train2017.json'),
        ),
    ),
}


def hint(data_set: Mapping[str, Any]) -> str:
    """The command that gets a data set, as a sentence after a space; '' for one that is not in :data:`DATA_SETS`."""
    root = str(data_set.get('data_root') or '').rstrip('/')
    paths = [root, data_set.get('ann_file') or '', *(data_set.get('data_prefix') or {}).values()]
    for name, known in DATA_SETS.items():
        is_year = not name.startswith('voc') or f'VOC{name[3:]}' in ' '.join(map(str, paths))
        if known.kind != type_name(data_set) or not is_year:
            continue
        # The configs' roots are the folder of the data set, or VOCdevkit above it.
        ends = (f for f in (known.folder, known.folder.partition('/')[0]) if f'/{root}'.endswith(f'/{f}'))
        above = next((root.removesuffix(folder).rstrip('/') or '.' for folder in ends), 'data')
        return f' To download it: slak-mm data {name} --root {above}'
    return ''


def check(name: str, root: str | os.PathLike, data_sets: Mapping[str, DataSet] = DATA_SETS) -> str | None:
    """The first thing that a data set below a root lacks, as a sentence without its end; None if it is complete."""
    data_set = data_sets[name]
    folder = Path(root, data_set.folder)
    if not folder.is_dir():
        return f'there is no folder {folder}'
    return _first_missing(data_set.files, lambda path: folder / path)


def _first_missing(files: tuple[Files, ...], locate: Callable[[str], Path]) -> str | None:
    for group in files:
        folder = locate(group.folder)
        if not folder.is_dir():
            return f'there is no folder {folder}'
        with os.scandir(folder) as entries:
            present = {entry.name for entry in entries if entry.is_file() and entry.stat().st_size}
        if group.listed_in.endswith('.json') and len(present) == group.count:
            continue  # to parse the list of COCO takes many seconds
        names = _names(group, locate)
        if isinstance(names, str):
            return names
        for name in names:
            if name not in present:
                state = 'empty' if (folder / name).exists() else 'missing'
                return f'{folder / name} is {state}'
            if name.endswith('.json') and not _is_whole_json(folder / name):
                return f'{folder / name} ends in the middle'
    return None


def _names(group: Files, locate: Callable[[str], Path]) -> list[str] | str:
    """Names of the files of a group, or what is wrong with the list of them."""
    if not group.listed_in:
        return [group.pattern.format(number) for number in range(1, group.count + 1)]
    listing = locate(group.listed_in)
    if not listing.is_file():
        return f'{listing} is missing'
    try:
        text = listing.read_text()
        is_coco = listing.suffix == '.json'
        listed = [image['file_name'] for image in json.loads(text)['images']] if is_coco else text.split()
    except (ValueError, KeyError, TypeError):
        return f'{listing} cannot be read'
    if len(listed) != group.count:
        return f'{listing} lists {len(listed)} images instead of {group.count}'
    return [group.pattern.format(name) for name in listed]


def _is_whole_json(path: Path) -> bool:
    with path.open('rb') as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip().endswith((b'}', b']'))


def prepare(
    name: str,
    root: str | os.PathLike,
    *,
    keep_archives: bool = False,
    report: Report = lambda what, done, total: None,
    data_sets: Mapping[str, DataSet] = DATA_SETS,
) -> Path:
    """Download, unpack and verify a data set; go on where an earlier call was interrupted.

    Args:
        name: A key of ``data_sets``.
        root: Folder that data sets are kept in; created if need be.
        keep_archives: Keep the downloaded archives, in ``.downloads`` below the root. Defaults to False.
        report: Called with what is done, how much of it and how much in all (bytes or files; 0 if not known).
        data_sets: The known data sets. Defaults to :data:`DATA_SETS`.

    Returns:
        Folder of the complete data set.

    Raises:
        DataError: It cannot be downloaded, an archive is damaged or wants to write outside its folder, there is too
            little space, another process is at it, or a folder with other content is in the way.
    """
    data_set = data_sets[name]
    folder = Path(root, data_set.folder)
    if check(name, root, data_sets) is None:
        return folder
    downloads = Path(root, _DOWNLOADS)
    try:
        mkdir_or_exist(downloads)
    except OSError as error:
        raise DataError(f'{downloads} cannot be created ({error.strerror}): choose another --root.') from error
    lock = downloads / f'{name}.lock'
    try:
        with FileLock(lock, timeout=0):
            for part in data_set.parts:
                _prepare_part(data_set, part, folder, downloads, report)
            missing = check(name, root, data_sets)
            if missing is not None:
                raise DataError(f'{name} is not complete: {missing}.')
            if not keep_archives:
                for archive in (archive for part in data_set.parts for archive in part.archives):
                    (downloads / archive.filename).unlink(missing_ok=True)
    except Timeout as error:
        raise DataError(f'Another process is preparing this data set (it holds {lock}).') from error
    lock.unlink(missing_ok=True)  # whoever opened it meanwhile finds the data set complete
    with contextlib.suppress(OSError):
        downloads.rmdir()  # unless it still has something
    return folder


def _prepare_part(data_set: DataSet, part: Part, folder: Path, downloads: Path, report: Report) -> None:
    target = folder / part.target
    staging = target.parent / f'.{target.name}.unpacking'
    inner = staging / part.inside
    start = f'{part.target}/' if part.target else ''
    files = tuple(group for group in data_set.files if f'{group.folder}/'.startswith(start))

    def missing(place: Path) -> str | None:
        """What of this part is missing at a place; its lists may be in another part."""

        def locate(path: str) -> Path:
            own = not part.target or f'{path}/'.startswith(f'{part.target}/')
            return place / path[len(part.target) :].lstrip('/') if own else folder / path

        return _first_missing(files, locate)

    if target.is_dir() and any(target.iterdir()):
        lacking = missing(target)
        if lacking is None:
            return
        raise DataError(f'{target} exists, but is not complete: {lacking}. Move it away and call this again.')
    archives = [_download(archive, downloads, report) for archive in part.archives]
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of an interrupted call
        mkdir_or_exist(staging)
        for path in archives:
            _unpack(path, staging, report)
        lacking = missing(inner)
        if lacking is not None:
            raise DataError(
                f'{" and ".join(map(str, archives))}: unpacked, {lacking}; the '
                'archive is not the one that was published. Delete it and try again.'
            )
        if target.is_dir():
            target.rmdir()  # it is empty
        os.replace(inner, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(archive: Archive, folder: Path, report: Report) -> Path:
    """Get an archive into a folder, unless it is there."""
    path = folder / archive.filename
    try:
        # Unpacked, images take as much space again.
        download(archive.urls, path, verify=lambda part: _verify(part, archive, report), report=report, room=2)
    except DownloadError as error:
        raise DataError(str(error)) from error
    return path


def _verify(part: Path, archive: Archive, report: Report) -> None:
    if not archive.checksum:
        return
    kind, _, expected = archive.checksum.partition(':')
    digest = hashlib.new(kind)
    total, done = part.stat().st_size, 0
    with part.open('rb') as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report(f'{kind} of {archive.filename}', done, total)
    if digest.hexdigest() != expected:
        raise DataError(
            f'The download of {archive.urls[0]} has the {kind} {digest.hexdigest()}, the '
            f'published file has {expected}: it was damaged on the way or is another file. It '
            'was deleted; try again.'
        )


@dataclass(frozen=True)
class _Member:
    """A file or folder in an archive."""

    name: str
    size: int
    is_file: bool
    is_folder: bool
    open: Callable[[], IO[bytes] | None]


@contextlib.contextmanager
def _members(path: Path) -> Iterator[list[_Member]]:
    """What is in an archive, zip or tar."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if any(info.flag_bits & 1 for info in infos):
                raise DataError(f'{path} is encrypted, the published archive is not. Delete it and try again.')
            kinds = [stat.S_IFMT(info.external_attr >> 16) for info in infos]
            yield [
                _Member(
                    info.filename,
                    info.file_size,
                    is_file=kind in (0, stat.S_IFREG) and not info.is_dir(),
                    is_folder=kind in (0, stat.S_IFDIR) and info.is_dir(),
                    open=functools.partial(archive.open, info),
                )
                for info, kind in zip(infos, kinds)
            ]
    else:
        with tarfile.open(path) as tar:
            yield [_Member(m.name, m.size, m.isfile(), m.isdir(), functools.partial(tar.extractfile, m)) for m in tar]


def _unpack(path: Path, folder: Path, report: Report) -> None:
    """Unpack an archive of plain files and folders, all of which stay in the folder."""
    name = ''
    try:
        with _members(path) as members:
            # An archive is refused as a whole, before anything of it is written.
            for member in members:
                _refuse_escape(path, member)
            need_space(folder, sum(member.size for member in members), f'The files of {path}')
            for number, member in enumerate(members, 1):
                name = member.name
                target = folder / name
                mkdir_or_exist(target if member.is_folder else target.parent)
                if member.is_file:
                    with member.open() as source, target.open('wb') as out:  # type: ignore[union-attr]
                        shutil.copyfileobj(source, out, _CHUNK)
                report(f'unpacking {path.name}', number, len(members))
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError) as error:
        path.unlink()
        raise DataError(f'{path} is damaged or no archive ({shown(str(error))}). It was deleted; try again.') from error
    except DownloadError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            remedy = 'Make room, or choose another --root.'
        else:
            remedy = 'The archive is not the one that was published: delete it and try again.'
        text = f'{shown(name)} in {path} cannot be unpacked to {folder}: {error.strerror}. {remedy}'
        raise DataError(text) from error


def _refuse_escape(path: Path, member: _Member) -> None:
    name = member.name
    if not (member.is_file or member.is_folder):
        raise DataError(f'{path} was refused: {shown(name)} in it is neither a file nor a folder.')
    parts = PurePosixPath(name.replace('\\', '/'))
    if parts.is_absolute() or '..' in parts.parts or ':' in name or '\0' in name:
        raise DataError(f'{path} was refused: {shown(name)} in it would be written outside of its folder.')
