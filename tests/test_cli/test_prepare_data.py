"""Data sets are downloaded from a server in this process, with archives of a few kilobytes."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from slak_mm import _files, cli
from slak_mm.cli import prepare_data
from slak_mm.cli.prepare_data import DATA_SETS, Archive, DataError, DataSet, Files, Part, check, hint, prepare


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def md5(content):
    return f'md5:{hashlib.md5(content).hexdigest()}'


ADE = {
    f'ADE/{kind}/training/ADE_train_{number:08d}.{suffix}': os.urandom(3000)
    for number in (1, 2, 3)
    for kind, suffix in (('images', 'jpg'), ('annotations', 'png'))
}


def ade(url, content, checksum=None, name='ade.zip'):
    """A data set like ADE20K, of three images."""
    archive = Archive((f'{url}/{name}',), md5(content) if checksum is None else checksum)
    kinds = (('images', 'jpg'), ('annotations', 'png'))
    files = tuple(Files(f'{kind}/training', f'ADE_train_{{:08d}}.{suffix}', 3) for kind, suffix in kinds)
    return {'ade': DataSet('ade/ADE', 'ADE20KDataset', (Part('', 'ADE', (archive,)),), files)}


def refused(server, tmp_path, message, content=None):
    """Prepare the data set from an archive without a checksum."""
    if content is not None:
        server.files['/ade.zip'] = content
    with pytest.raises(DataError, match=message):
        prepare('ade', tmp_path, data_sets=ade(server.url, b'', checksum=''))


@pytest.fixture
def served(server):
    """The small ADE20K on the server."""
    content = zipped(ADE)
    server.files['/ade.zip'] = content
    return ade(server.url, content)


def contents(folder):
    files = [path for path in Path(folder).rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def whole(root):
    """The data set is there, byte for byte, and nothing else."""
    return contents(root) == {f'ade/{name}': content for name, content in ADE.items()}


def test_download_unpack_verify(served, server, tmp_path):
    seen = {}
    assert check('ade', tmp_path, served) == f'there is no folder {tmp_path / "ade" / "ADE"}'
    report = lambda what, done, total: seen.update({what: (done, total)})  # noqa: E731
    folder = prepare('ade', tmp_path, data_sets=served, report=report)
    assert folder == tmp_path / 'ade' / 'ADE' and whole(tmp_path)
    size = len(server.files['/ade.zip'])
    assert seen == {'ade.zip': (size, size), 'md5 of ade.zip': (size, size), 'unpacking ade.zip': (6, 6)}
    assert check('ade', tmp_path, served) is None
    # What is complete is not asked for again.
    prepare('ade', tmp_path, data_sets=served)
    assert server.log == [('/ade.zip', None)]


def test_archives_can_be_kept(served, server, tmp_path):
    prepare('ade', tmp_path, data_sets=served, keep_archives=True)
    archive = tmp_path / '.downloads' / 'ade.zip'
    assert archive.read_bytes() == server.files['/ade.zip']
    # What is there already, or was fetched by hand, is not downloaded.
    for path in sorted((tmp_path / 'ade').rglob('*'), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    prepare('ade', tmp_path, data_sets=served)
    assert whole(tmp_path) and len(server.log) == 1


def test_a_broken_connection_is_taken_up_again(served, server, tmp_path):
    server.break_after = 5000
    prepare('ade', tmp_path, data_sets=served)
    assert whole(tmp_path)
    assert server.log == [('/ade.zip', None), ('/ade.zip', 'bytes=5000-')]


class Killed(BaseException):
    """Stands for the end of the process at any place."""


@pytest.mark.parametrize('moment', ['ade.zip', 'md5 of ade.zip', 'unpacking ade.zip'])
def test_an_interrupted_call_is_taken_up_again(served, server, tmp_path, monkeypatch, moment):
    monkeypatch.setattr(prepare_data, '_CHUNK', 4096)
    monkeypatch.setattr(_files, '_CHUNK', 4096)

    def kill(what, done, total):
        if what == moment and done >= total / 2:
            raise Killed

    with pytest.raises(Killed):
        prepare('ade', tmp_path, data_sets=served, report=kill)
    assert not (tmp_path / 'ade' / 'ADE').exists()
    assert check('ade', tmp_path, served) is not None
    prepare('ade', tmp_path, data_sets=served)
    assert whole(tmp_path)
    if moment == 'ade.zip':
        assert server.log[1][1].startswith('bytes=')
    else:
        assert [wanted for _, wanted in server.log[1:]] in ([], [f'bytes={self_size(server)}-'])


def self_size(server):
    return len(server.files['/ade.zip'])


def test_another_file_on_the_server_is_not_appended(served, server, tmp_path):
    """The beginning of the old file must not get the end of the new one."""
    downloads = tmp_path / '.downloads'
    downloads.mkdir()
    (downloads / 'ade.zip.part').write_bytes(b'x' * 1000)
    (downloads / 'ade.zip.json').write_text(json.dumps(dict(validator='"0"')))
    prepare('ade', tmp_path, data_sets=served)
    assert whole(tmp_path)


def test_a_beginning_of_unknown_origin_is_not_used(served, server, tmp_path):
    (tmp_path / '.downloads').mkdir()
    (tmp_path / '.downloads' / 'ade.zip.part').write_bytes(b'x' * 1000)
    prepare('ade', tmp_path, data_sets=served)
    assert whole(tmp_path) and server.log == [('/ade.zip', None)]


def test_a_server_without_ranges(served, server, tmp_path):
    server.ranges, server.break_after = False, 5000
    prepare('ade', tmp_path, data_sets=served)
    assert whole(tmp_path) and len(server.log) == 2


def test_the_second_address(server, tmp_path):
    content = zipped(ADE)
    server.files['/mirror/ade.zip'] = content
    data_sets = ade(server.url, content)
    part = data_sets['ade'].parts[0]
    urls = (f'{server.url}/ade.zip', f'{server.url}/mirror/ade.zip')
    part = dataclasses.replace(part, archives=(dataclasses.replace(part.archives[0], urls=urls),))
    data_sets['ade'] = dataclasses.replace(data_sets['ade'], parts=(part,))
    prepare('ade', tmp_path, data_sets=data_sets)
    assert whole(tmp_path)


def test_what_cannot_be_downloaded(server, tmp_path):
    data_sets = ade(server.url, b'')
    with pytest.raises(DataError, match='could not be downloaded.*Not Found.*put it at .*ade.zip'):
        prepare('ade', tmp_path, data_sets=data_sets)
    server.files['/page.html'] = b'<html>log in</html>'
    with pytest.raises(DataError, match='an HTML page was sent'):
        prepare('ade', tmp_path, data_sets=ade(server.url, b'', name='page.html'))
    closed = ade('http://127.0.0.1:9', b'')
    with pytest.raises(DataError, match='http://127.0.0.1:9/ade.zip could not be downloaded'):
        prepare('ade', tmp_path, data_sets=closed)


def test_a_wrong_checksum(served, server, tmp_path):
    damaged = bytearray(server.files['/ade.zip'])
    damaged[1000] ^= 1
    right, server.files['/ade.zip'] = server.files['/ade.zip'], bytes(damaged)
    with pytest.raises(DataError, match=f'has the md5 .* has {md5(right)[4:]}'):
        prepare('ade', tmp_path, data_sets=served)
    server.files['/ade.zip'] = right
    prepare('ade', tmp_path, data_sets=served)
    assert whole(tmp_path)


@pytest.mark.parametrize(
    'damage', [lambda old: old[:-500], lambda old: b'no archive', lambda old: old[:1000] + b'?' + old[1001:]]
)
def test_a_damaged_archive_without_checksum(server, tmp_path, damage):
    refused(server, tmp_path, 'is damaged or no archive', damage(zipped(ADE)))
    assert contents(tmp_path).keys() <= {'.downloads/ade.lock'}


def test_an_archive_of_something_else(server, tmp_path):
    """An image too few: nothing of it gets the name of the data set."""
    refused(server, tmp_path, 'ADE_train_00000003.png is missing', zipped(dict(list(ADE.items())[:-1])))
    assert not (tmp_path / 'ade' / 'ADE').exists()


@pytest.mark.parametrize(
    'name', ['../evil.txt', '/tmp/evil.txt', 'ADE/../../../evil.txt', 'ADE\\..\\..\\evil.txt', 'C:/evil.txt']
)
@pytest.mark.parametrize('pack', [zipped, tarred])
def test_paths_outside_are_refused(server, tmp_path, name, pack):
    refused(server, tmp_path / 'root', 'outside', pack({**ADE, name: b'evil'}))
    assert not list(tmp_path.rglob('*evil*')) and not (tmp_path / 'root' / 'ade' / 'ADE').exists()


def special(kind, pack):
    """An archive of one special member."""
    buffer = io.BytesIO()
    if pack is tarred:
        with tarfile.open(fileobj=buffer, mode='w') as archive:
            member = tarfile.TarInfo('ADE/images')
            types = dict(link=tarfile.SYMTYPE, hard=tarfile.LNKTYPE, device=tarfile.CHRTYPE, pipe=tarfile.FIFOTYPE)
            member.type = types[kind]
            member.linkname = '/etc'
            archive.addfile(member)
    else:
        with zipfile.ZipFile(buffer, 'w') as archive:
            member = zipfile.ZipInfo('ADE/images')
            mode = dict(link=stat.S_IFLNK, hard=stat.S_IFLNK, device=stat.S_IFCHR, pipe=stat.S_IFIFO)[kind]
            member.create_system, member.external_attr = 3, mode << 16
            archive.writestr(member, '/etc')
    return buffer.getvalue()


@pytest.mark.parametrize('kind', ['link', 'hard', 'device', 'pipe'])
@pytest.mark.parametrize('pack', [zipped, tarred])
def test_links_and_devices_are_refused(server, tmp_path, kind, pack):
    refused(server, tmp_path, 'ADE/images in it is neither a file nor a folder', special(kind, pack))
    assert not (tmp_path / 'ade' / 'ADE').exists()


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({'ADE/images': b'file', **ADE}, 'cannot be unpacked.*delete it and try again'),
        ({**ADE, 'ADE/images': b'file'}, 'ADE/images in .*cannot be unpacked'),
        ({**ADE, 'ADE/' + 'a' * 300: b''}, r'a{90,}\.\.\. \(304 characters\) in .*cannot be unpacked.*too long'),
        ({**ADE, 'ADE/\x1b[2J\n/../x': b''}, r'ADE/\\x1b\[2J\\n/\.\./x in it would be written outside'),
    ],
)
@pytest.mark.parametrize('pack', [zipped, tarred])
def test_names_that_do_not_fit(server, tmp_path, files, message, pack):
    refused(server, tmp_path, message, pack(files))
    assert contents(tmp_path).keys() <= {'.downloads/ade.lock', '.downloads/ade.zip'}


def test_an_encrypted_archive(server, tmp_path):
    content = bytearray(zipped(ADE))
    content[content.index(b'PK\x01\x02') + 8] |= 1
    refused(server, tmp_path, 'is encrypted', bytes(content))


def test_a_full_disk_while_unpacking(served, tmp_path, monkeypatch):
    def fail(source, out, size):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patched, pytest.raises(DataError, match='No space left.*Make room.*--root'):
        patched.setattr(prepare_data.shutil, 'copyfileobj', fail)
        prepare('ade', tmp_path, data_sets=served)
    assert contents(tmp_path).keys() == {'.downloads/ade.lock', '.downloads/ade.zip'}
    prepare('ade', tmp_path, data_sets=served)
    assert whole(tmp_path)


def test_too_little_space(served, server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data.shutil, 'disk_usage', lambda path: SimpleNamespace(free=9999))
    with pytest.raises(DataError, match='need 0.0 GB'):
        prepare('ade', tmp_path, data_sets=served)
    assert not (tmp_path / '.downloads' / 'ade.zip.part').exists()


def test_an_incomplete_folder_is_left_alone(served, server, tmp_path):
    own = tmp_path / 'ade' / 'ADE' / 'images' / 'training' / 'mine.jpg'
    own.parent.mkdir(parents=True)
    own.write_bytes(b'mine')
    with pytest.raises(DataError, match='exists, but is not complete.*Move it away'):
        prepare('ade', tmp_path, data_sets=served)
    assert own.read_bytes() == b'mine' and not server.log


def test_two_at_a_time(served, tmp_path):
    fcntl = pytest.importorskip('fcntl')
    (tmp_path / '.downloads').mkdir()
    with (tmp_path / '.downloads' / 'ade.lock').open('w') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match='Another process'):
            prepare('ade', tmp_path, data_sets=served)
    prepare('ade', tmp_path, data_sets=served)
    assert whole(tmp_path)


def fill(root, name):
    """Write a complete data set with files of one byte, for the counts and names alone."""
    data_set = DATA_SETS[name]
    folder = Path(root, data_set.folder)
    lists = {}
    for group in data_set.files:
        (folder / group.folder).mkdir(parents=True, exist_ok=True)
        numbers = range(1, group.count + 1)
        names = [group.pattern.format(f'{number:06d}' if group.listed_in else number) for number in numbers]
        for file in names:
            (folder / group.folder / file).write_bytes(b'}')
        if group.listed_in.endswith('.txt'):
            lists[group.listed_in] = '\n'.join(file.rpartition('.')[0] for file in names) + '\n'
    for path, text in lists.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def test_voc_as_published(tmp_path):
    folder = fill(tmp_path, 'voc2007')
    assert check('voc2007', tmp_path) is None
    (folder / 'Annotations' / '000017.xml').unlink()
    assert check('voc2007', tmp_path) == f'{folder / "Annotations" / "000017.xml"} is missing'
    listing = folder / 'ImageSets' / 'Main' / 'trainval.txt'
    listing.write_text(listing.read_text()[:70])
    assert check('voc2007', tmp_path) == f'{listing} lists 10 images instead of 5011'
    listing.unlink()
    assert check('voc2007', tmp_path) == f'{listing} is missing'


def test_the_table():
    """Published sizes: Zhou et al. 2017, Everingham et al. 2007 and 2012, cocodataset.org."""
    counts = {name: {(g.folder, g.listed_in): g.count for g in data.files} for name, data in DATA_SETS.items()}
    for kind in ('images', 'annotations'):
        assert counts['ade20k'][f'{kind}/training', ''] == 20210
        assert counts['ade20k'][f'{kind}/validation', ''] == 2000
    for kind in ('JPEGImages', 'Annotations'):
        assert counts['voc2007'][kind, 'ImageSets/Main/trainval.txt'] == 5011
        assert counts['voc2007'][kind, 'ImageSets/Main/test.txt'] == 4952
        assert counts['voc2012'][kind, 'ImageSets/Main/trainval.txt'] == 11540
    assert counts['coco']['train2017', 'annotations/instances_train2017.json'] == 118287
    assert counts['coco']['val2017', 'annotations/instances_val2017.json'] == 5000
    torchvision = pytest.importorskip('torchvision.datasets.voc').DATASET_YEAR_DICT
    for name, key in (('voc2007', '2007'), ('voc2007', '2007-test'), ('voc2012', '2012')):
        known = {a.urls[0]: a.checksum for a in DATA_SETS[name].parts[0].archives}
        theirs = torchvision[key]
        path = theirs['url'].partition('/pascal/')[2]
        assert [checksum for url, checksum in known.items() if url.endswith(path)] == [f'md5:{theirs["md5"]}']


def small_coco(url, server):
    """A data set like COCO: annotations and images in parts of their own."""
    names = [f'{number:012d}.jpg' for number in range(4)]
    listing = json.dumps(dict(images=[dict(file_name=name) for name in names])).encode()
    archives = dict(
        annotations=zipped({'annotations/instances_val2017.json': listing}),
        val2017=zipped({f'val2017/{name}': b'image' for name in names}),
    )
    for name, content in archives.items():
        server.files[f'/{name}.zip'] = content
    parts = tuple(Part(name, name, (Archive((f'{url}/{name}.zip',)),)) for name in archives)
    listing = 'instances_val2017.json'
    files = Files('annotations', listing, 1), Files('val2017', '{}', 4, f'annotations/{listing}')
    return {'coco': DataSet('coco', 'CocoDataset', parts, files)}


def test_parts(server, tmp_path):
    data_sets = small_coco(server.url, server)
    content = server.files.pop('/val2017.zip')
    with pytest.raises(DataError):
        prepare('coco', tmp_path, data_sets=data_sets)
    assert (tmp_path / 'coco' / 'annotations' / 'instances_val2017.json').is_file()
    assert check('coco', tmp_path, data_sets) == f'there is no folder {tmp_path}/coco/val2017'
    server.files['/val2017.zip'] = content
    prepare('coco', tmp_path, data_sets=data_sets)
    assert check('coco', tmp_path, data_sets) is None
    assert sum(path == '/annotations.zip' for path, _ in server.log) == 1
    image = tmp_path / 'coco' / 'val2017' / '000000000002.jpg'
    image.write_bytes(b'')
    assert check('coco', tmp_path, data_sets) == f'{image} is empty'
    listing = tmp_path / 'coco' / 'annotations' / 'instances_val2017.json'
    listing.write_bytes(listing.read_bytes()[:-3])
    assert check('coco', tmp_path, data_sets) == f'{listing} ends in the middle'


@pytest.mark.parametrize(
    ('data_set', 'command'),
    [
        (dict(type='ADE20KDataset', data_root='data/ade/ADEChallengeData2016'), 'ade20k --root data'),
        (dict(type='ADE20KDataset', data_root='/my/ade/ADEChallengeData2016/'), 'ade20k --root /my'),
        (dict(type='ADE20KDataset', data_root='ade/ADEChallengeData2016'), 'ade20k --root .'),
        (dict(type='ADE20KDataset', data_root='elsewhere'), 'ade20k --root data'),
        (dict(type='VOCDataset', data_root='data/VOCdevkit/', ann_file='VOC2007/x.txt'), 'voc2007 --root data'),
        (dict(type='VOCDataset', data_root='d/VOCdevkit', data_prefix=dict(sub='VOC2012/')), 'voc2012 --root d'),
        (dict(type='CocoDataset', data_root='data/coco/'), 'coco --root data'),
        (dict(type='CityscapesDataset', data_root='data/cityscapes'), None),
        (dict(type='CocoDataset'), 'coco --root data'),
    ],
)
def test_hint(data_set, command):
    expected = f' To download it: python tools/prepare_data.py {command}' if command else ''
    assert hint(data_set) == expected


WANTED = dict(upernet_slak_t_ade20k='ade20k', faster_rcnn_slak_t_voc07='voc2007', cascade_mask_rcnn_slak_t_coco='coco')


@pytest.mark.parametrize('config', WANTED)
def test_a_config_without_data_says_the_command(config, tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    path = Path(__file__).parents[2] / 'configs' / f'{config}.py'
    cfg = Config.fromfile(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.ConfigOverrideError, match=f'prepare_data.py {WANTED[config]} --root data$'):
        cli.check_data(cfg)


def test_tool(call_tool, served, server, tmp_path, monkeypatch):
    for name, data_set in served.items():
        monkeypatch.setitem(DATA_SETS, name, data_set)
    missing = call_tool('prepare_data', 'ade', '--root', tmp_path, '--check', code=1)
    assert missing.out == f'ade: NOT complete: there is no folder {tmp_path}/ade/ADE\n'
    done = call_tool('prepare_data', 'ade', '--root', tmp_path, code=0)
    assert done.out == f'ade is complete: {tmp_path}/ade/ADE\n'
    assert whole(tmp_path)
    call_tool('prepare_data', 'ade', '--root', tmp_path, '--check', code=0)
    (tmp_path / 'ade/ADE/images/training/ADE_train_00000002.jpg').unlink()
    failed = call_tool('prepare_data', 'ade', '--root', tmp_path, code=1)
    assert 'error: ' in failed.err and 'ADE_train_00000002.jpg is missing' in failed.err
