"""Every download is compared with what it was: by the hash of its first use, and the one that the zoo pins."""

import hashlib
import io
import sys

import pytest
import torch

from slak_mm.checkpoints import (
    ZOO,
    CheckpointNotFound,
    CheckpointUnreadable,
    ModelInfo,
    cached_files,
    cached_path,
    hashes_of,
    read_checkpoint,
)


def content(value):
    """A checkpoint as bytes."""
    buffer = io.BytesIO()
    torch.save({'w': torch.full((5000,), float(value))}, buffer)
    return buffer.getvalue()


ONE, TWO = content(1), content(2)
SHA_ONE, SHA_TWO = (hashlib.sha256(data).hexdigest() for data in (ONE, TWO))


def value_of(source):
    return float(read_checkpoint(source)['w'][0])


@pytest.fixture
def url(server):
    server.files['/x.pth'] = ONE
    return f'{server.url}/x.pth'


@pytest.fixture
def publish(monkeypatch, url):
    """Put the address into the zoo, with this hash."""

    def as_entry(sha256=None, address=url):
        info = ModelInfo('toy_in1k', address, 'classification', {}, sha256=sha256)
        monkeypatch.setitem(ZOO, info.name, info)
        return cached_path('toy_in1k')

    return as_entry


def flip(path):
    """Change one bit of a weight."""
    data = bytearray(path.read_bytes())
    place = data.index(torch.ones(2).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)


def record(path):
    return path.with_name(f'{path.name}.sha256')


def test_the_record_is_what_sha256sum_writes(url):
    assert value_of(url) == 1
    path = cached_path(url)
    assert record(path).read_text() == f'{SHA_ONE}  {path.name}\n'


def test_a_flipped_bit_in_the_cache(url, server):
    value_of(url)
    path = cached_path(url)
    flip(path)
    changed = hashlib.sha256(path.read_bytes()).hexdigest()
    message = (
        f'The cached file {path} has sha256 {changed}, and {SHA_ONE} was recorded at its first use: it has changed on '
        f'this disk. Delete it to get it again, or delete {record(path)} if you have replaced it on purpose.'
    )
    for _ in range(2):  # refusing it does not make it the known one
        with pytest.raises(CheckpointUnreadable) as error:
            read_checkpoint(url)
        assert str(error.value) == message
    assert len(server.log) == 1
    # The remedy works: both do.
    path.unlink()
    assert value_of(url) == 1
    path.write_bytes(TWO)
    record(path).unlink()
    assert value_of(url) == 2 and record(path).read_text().startswith(SHA_TWO)


def test_the_server_has_another_file(url, server):
    value_of(url)
    path = cached_path(url)
    path.unlink()
    server.files['/x.pth'] = TWO
    with pytest.raises(CheckpointUnreadable) as error:
        read_checkpoint(url)
    assert str(error.value) == (
        f'What {url} sent has sha256 {SHA_TWO}, and {SHA_ONE} was recorded at its first use: the server has another '
        f'file now. Put the earlier file at {path}, or delete {record(path)} to take the new one.'
    )
    assert list(path.parent.iterdir()) == [record(path)]  # it is not kept
    record(path).unlink()
    assert value_of(url) == 2


def test_the_zoo_pins_another_file_than_the_server_has(publish, url, server):
    path = publish(SHA_TWO)
    with pytest.raises(CheckpointUnreadable) as error:
        read_checkpoint('toy_in1k')
    assert str(error.value) == (
        f'What {url} sent has sha256 {SHA_ONE}, and the zoo pins {SHA_TWO}: the server has another file now. Put the '
        f'published file at {path}.'
    )
    assert not list(path.parent.iterdir())
    path.write_bytes(TWO)  # got elsewhere
    assert value_of('toy_in1k') == 2 and len(server.log) == 1


def test_the_zoo_pins_another_file_than_the_cache_has(publish):
    path = publish()
    assert value_of('toy_in1k') == 1
    publish(SHA_TWO)  # a later version of this package knows the hash
    with pytest.raises(CheckpointUnreadable, match=f'the zoo pins {SHA_TWO}: it is not the published file. Delete it'):
        read_checkpoint('toy_in1k')
    publish(SHA_ONE)
    flip(path)
    with pytest.raises(CheckpointUnreadable, match=f'the zoo pins {SHA_ONE}: it has changed on this disk. Delete it'):
        read_checkpoint('toy_in1k')


def test_a_file_put_there_by_hand_is_recorded_at_its_first_use(publish):
    path = publish(address=None)
    path.parent.mkdir(parents=True)
    path.write_bytes(TWO)
    assert value_of('toy_in1k') == 2
    path.write_bytes(ONE)
    with pytest.raises(CheckpointUnreadable, match='it has changed on this disk'):
        read_checkpoint('toy_in1k')


def test_a_cache_without_write_permission_is_read(url, monkeypatch):
    path = cached_path(url)
    path.parent.mkdir(parents=True)
    path.write_bytes(ONE)
    monkeypatch.setattr('slak_mm.checkpoints.hashes.replacing', lambda path: (_ for _ in ()).throw(PermissionError()))
    assert value_of(url) == 1 and not record(path).exists()


class Once(dict):
    """Files that are gone when they have been sent."""

    def get(self, key):
        return self.pop(key, None)


@pytest.mark.parametrize(('etag', 'data', 'value'), [('"1"', ONE, 1), ('"2"', TWO, 2)], ids=['same', 'another'])
def test_an_interrupted_download(url, server, etag, data, value):
    """It goes on where it was if the server has the same file still, and begins again if it has another."""
    server.files, server.break_after = Once(server.files), 3000
    with pytest.raises(CheckpointNotFound, match='what was downloaded is kept'):
        read_checkpoint(url)
    path = cached_path(url)
    assert not record(path).exists() and not path.exists()
    server.files, server.etag = {'/x.pth': data}, etag
    assert value_of(url) == value
    assert server.log[-1] == ('/x.pth', 'bytes=3000-')
    assert record(path).read_text().startswith(hashlib.sha256(data).hexdigest())


def test_states_of_files_in_the_cache(url, publish):
    path = cached_path(url)
    assert cached_files(path.parent) == []
    value_of(url)
    assert cached_files(path.parent) == [path]
    assert hashes_of(path, path, None).verdict == 'as at its first use'
    flip(path)
    assert hashes_of(path, path, None).verdict == 'CHANGED SINCE ITS FIRST USE'
    path.unlink()
    assert cached_files(path.parent) == [path] and hashes_of(path, path, None).verdict == 'not here any more'
    path.write_bytes(ONE)
    record(path).unlink()
    assert hashes_of(path, path, None).verdict == 'not used yet'
    publish(SHA_ONE)
    assert hashes_of(path, path, ZOO['toy_in1k']).verdict == 'as the zoo pins'
    publish(SHA_TWO)
    assert hashes_of(path, path, ZOO['toy_in1k']).verdict == 'NOT THE FILE THAT THE ZOO PINS'


# The Hugging Face hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, as its package has it: what is downloaded is a link in a folder of its own."""
    package = pytest.importorskip('huggingface_hub')
    files, asked = {('o/r', 'a/x.pth', None): ONE, ('o/r', 'a/x.pth', 'v1.0'): TWO}, []

    def hf_hub_download(repo_id, filename, *, revision=None, **options):
        assert not options
        asked.append((repo_id, filename, revision))
        if (repo_id, filename, revision) not in files:
            raise package.errors.EntryNotFoundError('404 Client Error.\n\nEntry Not Found for url')
        blob, link = tmp_path / 'hub' / 'blobs' / str(len(asked)), tmp_path / 'hub' / f'{len(asked)}-x.pth'
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(files[asked[-1]])
        link.symlink_to(blob)
        return str(link)

    monkeypatch.setattr(package, 'hf_hub_download', hf_hub_download)
    hf_hub_download.files, hf_hub_download.asked = files, asked
    return hf_hub_download


def test_a_file_of_the_hub(hub, own_cache, publish):
    assert value_of('hf://o/r/a/x.pth') == value_of('hf://o/r/a/x.pth') == 1
    assert value_of('hf://o/r@v1.0/a/x.pth') == 2
    assert hub.asked == [('o/r', 'a/x.pth', None), ('o/r', 'a/x.pth', 'v1.0')]
    kept = cached_path('hf://o/r/a/x.pth')
    assert not kept.is_symlink() and kept.read_bytes() == ONE and record(kept).read_text().startswith(SHA_ONE)
    publish(SHA_ONE, 'hf://o/r/a/x.pth')
    assert value_of('toy_in1k') == 1  # an entry of the zoo may be there, too


def test_the_hub_has_another_file(hub):
    source = 'hf://o/r/a/x.pth'
    value_of(source)
    cached_path(source).unlink()
    hub.files['o/r', 'a/x.pth', None] = TWO
    with pytest.raises(CheckpointUnreadable, match=f'What {source} sent has .*: the server has another file now'):
        read_checkpoint(source)
    assert not cached_path(source).exists()


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (
            'hf://o/r/b.pth',
            r'hf://o/r/b.pth could not be downloaded \(EntryNotFoundError: 404 Client Error\.\)\. Check owner',
        ),
        ('hf://o/x.pth', 'hf://o/x.pth is no address of a file: write hf://owner/repo/file'),
        ('hf://o/r@/x.pth', 'is no address of a file'),
    ],
)
def test_what_the_hub_has_not(hub, source, message):
    with pytest.raises(CheckpointNotFound, match=message) as error:
        read_checkpoint(source)
    assert len(str(error.value).splitlines()) == 1


def test_without_the_package_of_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(CheckpointNotFound, match='pip install huggingface_hub') as error:
        read_checkpoint('hf://o/r/x.pth')
    assert len(str(error.value).splitlines()) == 1


def test_mmengine_loads_both_schemes(hub, publish):
    from mmengine.runner import load_checkpoint

    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(5000))
    load_checkpoint(model, 'hf://o/r@v1.0/a/x.pth')
    assert model.w[0] == 2
    publish()
    load_checkpoint(model, 'slak_mm://toy_in1k')
    assert model.w[0] == 1
    assert value_of('slak_mm://toy_in1k') == 1
    with pytest.raises(CheckpointNotFound, match='no published checkpoint of that name'):
        read_checkpoint('slak_mm://nothing')
