import argparse
import hashlib
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import threading
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import slak_mm
from slak_mm.checkpoints import (
    ZOO,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    ModelInfo,
    UnsafeCheckpoint,
    cache_dir,
    cached_path,
    read_checkpoint,
    reader,
)

WEIGHTS = {'a.weight': torch.arange(6.0).reshape(2, 3), 'a.bias': torch.ones(2)}


@pytest.fixture(params=['weights_only', 'restricted'])
def route(request, monkeypatch):
    """Both ways of reading: torch's list, extended, and the reader for torch before 2.5."""
    if request.param == 'weights_only' and not reader._EXTENSIBLE:
        pytest.skip('torch before 2.5 cannot extend its list')
    monkeypatch.setattr(reader, '_EXTENSIBLE', request.param == 'weights_only')
    return request.param


def assert_same(read, written=WEIGHTS):
    assert read.keys() == written.keys()
    assert all(torch.equal(read[key], written[key]) for key in written)


# What is read


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_official_file(tmp_path, route, zipped):
    content = {
        'model': OrderedDict(WEIGHTS),
        'epoch': 299,
        'optimizer': {'state': {}},
        'scaler': {'scale': 1.0},
        'args': argparse.Namespace(Decom=True, kernel_size=[51, 5], device='cuda'),
    }
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / 'x.pth')
    assert_same(read['model'])
    assert read['args'] == content['args'] and read['epoch'] == 299


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_mmengine_file(tmp_path, route, zipped):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = {
        'state_dict': OrderedDict(WEIGHTS),
        'meta': {'dataset_meta': {'palette': np.arange(6, dtype=np.uint8).reshape(2, 3)}},
        'message_hub': {
            'log_scalars': OrderedDict({'train/loss': history}),
            'runtime_info': {'lr': np.float64(0.1), 'iter': np.int64(3), 'name': np.array(['a', 'bc'])},
        },
        'param_schedulers': [{'milestones': Counter({27: 1, 33: 1})}],
    }
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / 'x.pth')
    assert_same(read['state_dict'])
    assert read['message_hub']['log_scalars']['train/loss'].mean() == 1.5
    assert read['param_schedulers'] == content['param_schedulers']
    info = read['message_hub']['runtime_info']
    assert info['lr'] == 0.1 and info['iter'] == 3 and list(info['name']) == ['a', 'bc']
    assert np.array_equal(read['meta']['dataset_meta']['palette'], content['meta']['dataset_meta']['palette'])


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_file_written_under_the_other_numpy(tmp_path, route, module):
    here = np.array(1).__reduce__()[0].__module__
    buffer = io.BytesIO()
    torch.save({'x': np.arange(3.0), 'w': WEIGHTS['a.bias']}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / 'x.pth', 'w') as new:
        for item in old.infolist():
            new.writestr(item, old.read(item).replace(here.encode(), module.encode()))
    assert list(read_checkpoint(tmp_path / 'x.pth')['x']) == [0, 1, 2]


def test_parameters_half_precision_and_views(tmp_path, route):
    base = torch.arange(10, dtype=torch.bfloat16)
    content = {'p': torch.nn.Parameter(torch.ones(2)), 'view': base[2:5], 'n': torch.tensor(3)}
    torch.save(content, tmp_path / 'x.pth')
    read = read_checkpoint(tmp_path / 'x.pth')
    assert read['view'].dtype == torch.bfloat16 and read['view'].tolist() == [2, 3, 4]
    assert read['p'].tolist() == [1, 1] and read['n'] == 3


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file(WEIGHTS, tmp_path / 'x.safetensors')
    assert_same(read_checkpoint(tmp_path / 'x.safetensors'))
    (tmp_path / 'renamed.pth').write_bytes((tmp_path / 'x.safetensors').read_bytes())
    assert_same(read_checkpoint(tmp_path / 'renamed.pth'))
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'x.safetensors').read_bytes()[:-5])
    with pytest.raises(CheckpointUnreadable, match='not an intact safetensors'):
        read_checkpoint(tmp_path / 'cut.safetensors')


def test_mapping_is_passed_through():
    assert read_checkpoint(WEIGHTS) == WEIGHTS and read_checkpoint(WEIGHTS) is not WEIGHTS


def test_lists_of_others_are_left_as_they_were(tmp_path):
    if not reader._EXTENSIBLE:
        pytest.skip('torch before 2.5 has no such list')
    torch.save({'w': torch.ones(1), 'args': argparse.Namespace()}, tmp_path / 'x.pth')
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(tmp_path / 'x.pth')
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == before


# What is refused


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Settable:
    pass


def attacks(victim):
    touch = f'touch {victim}'
    return {
        'os.system': Call(os.system, touch),
        'eval': Call(eval, f'__import__("os").system({touch!r})'),
        'exec': Call(exec, f'open({str(victim)!r}, "w")'),
        'getattr': Call(getattr, Call(getattr, HistoryBuffer, '__init__'), '__globals__'),
        'getattr of a tensor': Call(getattr, torch.ones(1), 'numpy'),
        'open': Call(open, str(victim), 'w'),
        'write': Call(np.save, str(victim), 0),
        'own class': Settable(),
    }


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('kind', list(attacks('')))
def test_pickles_that_run_code(tmp_path, route, kind, zipped):
    victim = tmp_path / 'victim'
    torch.save(
        {'model': WEIGHTS, 'args': attacks(victim)[kind]}, tmp_path / 'bad.pth', _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(UnsafeCheckpoint, match='was refused: reading it would run code') as error:
        read_checkpoint(tmp_path / 'bad.pth')
    assert not list(tmp_path.glob('victim*'))
    assert 'weights_only=False' in str(error.value)  # how to convert it
    wanted = {
        'os.system': f'{os.system.__module__}.system',
        'own class': 'test_reader.Settable',
        'write': 'save',
        'open': 'open',
        'eval': 'eval',
        'exec': 'exec',
    }.get(kind, 'getattr')
    assert error.value.global_name.endswith(wanted) and wanted in str(error.value)


def raw_pickle(tmp_path, data):
    """A file in torch's zip format around a hand-written pickle."""
    torch.save(WEIGHTS, tmp_path / 'good.pth')
    with zipfile.ZipFile(tmp_path / 'good.pth') as old, zipfile.ZipFile(tmp_path / 'bad.pth', 'w') as new:
        for item in old.infolist():
            is_pickle = item.filename.endswith('data.pkl')
            new.writestr(item.filename, data if is_pickle else old.read(item))
    return tmp_path / 'bad.pth'


@pytest.mark.parametrize(
    'data',
    [
        pytest.param(b'(S"touch victim"\nios\nsystem\n.', id='INST'),
        pytest.param(b'(cos\nsystem\nS"touch victim"\no.', id='OBJ'),
        pytest.param(b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch victim\x85R.', id='STACK_GLOBAL'),
        pytest.param(
            b'\x80\x02ccollections\nOrderedDict\n)R}(X\x01\x00\x00\x00aK\x01u\x86b.', id='state of the wrong kind'
        ),
        pytest.param(b'\x80\x02cargparse\nNamespace\nN}X\x03\x00\x00\x00fooK\x01s\x86b.', id='attribute of a class'),
        pytest.param(b'\x80\x02cargparse\nNamespace\n)\x81K\x01a.', id='append to an object'),
        pytest.param(b'\x80\x02cargparse\nNamespace\n)\x81K\x01K\x02s.', id='item of an object'),
        pytest.param(b'\x80\x02X\x01\x00\x00\x00xQ.', id='foreign persistent id'),
        pytest.param(b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\nU\x01x\x85R.', id='bad arguments'),
    ],
)
def test_hand_written_pickles(tmp_path, route, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UnsafeCheckpoint, CheckpointUnreadable)):
        read_checkpoint(raw_pickle(tmp_path, data))
    assert not (tmp_path / 'victim').exists()
    assert not hasattr(argparse.Namespace, 'foo')


HTML = b'<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>'


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'', 'is empty'),
        (HTML, 'HTML page, not a checkpoint .Google Drive'),
        (b'\n\n  <html><body>Please log in</body></html>', 'HTML page.*log-in'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n', 'git-lfs pointer'),
        (b'\x1f\x8b\x08\x00rest', 'compressed archive'),
        (b'\x00' * 257 + b'ustar' + b'\x00' * 300, 'tar archive'),
        (b'just some text, for instance a log', 'not a checkpoint'),
        (pickle.dumps([1, 2]), 'truncated or damaged|damaged or in a pickle format'),
        (b'PK\x03\x04 but no more', 'truncated or damaged'),
    ],
)
def test_other_files(tmp_path, data, message):
    (tmp_path / 'x.pth').write_bytes(data)
    with pytest.raises(CheckpointUnreadable, match=message) as error:
        read_checkpoint(tmp_path / 'x.pth')
    assert str(tmp_path / 'x.pth') in str(error.value)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('share', [0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncated(tmp_path, route, zipped, share):
    torch.save(
        {'model': {f'{i}': torch.randn(40, 10) for i in range(20)}},
        tmp_path / 'x.pth',
        _use_new_zipfile_serialization=zipped,
    )
    data = (tmp_path / 'x.pth').read_bytes()
    (tmp_path / 'x.pth').write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointUnreadable, match='truncated or damaged'):
        read_checkpoint(tmp_path / 'x.pth')


def test_damaged_bytes_end_in_our_errors(tmp_path, route):
    torch.save(
        {'model': WEIGHTS, 'args': argparse.Namespace(a=[1, (2, 3)])},
        tmp_path / 'x.pth',
        _use_new_zipfile_serialization=False,
    )
    good = (tmp_path / 'x.pth').read_bytes()
    random = np.random.RandomState(0)
    refused = 0
    for _ in range(300):
        bad = bytearray(good)
        for position in random.randint(len(bad), size=3):
            bad[position] = random.randint(256)
        (tmp_path / 'x.pth').write_bytes(bad)
        try:
            read_checkpoint(tmp_path / 'x.pth')
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_wrong_content(tmp_path, route):
    torch.save([torch.ones(1)], tmp_path / 'list.pth')
    with pytest.raises(CheckpointUnreadable, match='holds a list'):
        read_checkpoint(tmp_path / 'list.pth')
    with zipfile.ZipFile(tmp_path / 'other.zip', 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    with pytest.raises(CheckpointUnreadable, match='zip archive without a checkpoint'):
        read_checkpoint(tmp_path / 'other.zip')
    with zipfile.ZipFile(tmp_path / 'script.pt', 'w') as archive:
        archive.writestr('script/data.pkl', b'')
        archive.writestr('script/constants.pkl', b'')
    with pytest.raises(CheckpointUnreadable, match='TorchScript'):
        read_checkpoint(tmp_path / 'script.pt')


def test_missing_and_folder(tmp_path):
    with pytest.raises(CheckpointNotFound, match='no file nowhere/x.pth'):
        read_checkpoint('nowhere/x.pth')
    with pytest.raises(CheckpointNotFound, match='zoo name slak_t_in1k_300e'):
        read_checkpoint('slak-t-in1k')
    torch.save(WEIGHTS, tmp_path / 'x.pth')
    with pytest.raises(CheckpointUnreadable, match=r'is a folder.*x\.pth'):
        read_checkpoint(tmp_path)


# Downloads


def test_file_url_is_fetched_once(tmp_path, own_cache):
    torch.save(WEIGHTS, tmp_path / 'x.pth')
    url = (tmp_path / 'x.pth').as_uri()
    assert_same(read_checkpoint(url))
    assert list(own_cache.iterdir()) == [cached_path(url)]
    (tmp_path / 'x.pth').unlink()
    assert_same(read_checkpoint(url))


def test_addresses_that_end_alike_do_not_collide():
    paths = {cached_path(f'https://example.org/s/{i}/download') for i in range(3)}
    assert len(paths) == 3 and all(path.parent == cache_dir() for path in paths)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'a'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'b'))
    assert cache_dir() == tmp_path / 'a' / 'checkpoints'
    monkeypatch.delenv('SLAK_MM_CACHE')
    assert cache_dir() == tmp_path / 'b' / 'slak_mm' / 'checkpoints'
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert cache_dir() == Path('~/.cache/slak_mm/checkpoints').expanduser()
    assert not (tmp_path / 'a').exists()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Put an entry for a local file into the zoo."""

    def publish(path, **kwargs):
        info = ModelInfo('toy_in1k', path.as_uri(), 'classification', {}, **kwargs)
        monkeypatch.setitem(ZOO, info.name, info)
        return info

    return publish


def test_the_hash_is_checked(tmp_path, own_cache, published):
    torch.save(WEIGHTS, tmp_path / 'x.pth')
    data = (tmp_path / 'x.pth').read_bytes()
    good = hashlib.sha256(data).hexdigest()
    published(tmp_path / 'x.pth', sha256='0' * 64)
    with pytest.raises(CheckpointUnreadable, match=f'sha256 {good}, toy_in1k has 0000'):
        read_checkpoint('toy_in1k')
    assert not list(own_cache.iterdir())
    published(tmp_path / 'x.pth', sha256=good)
    assert_same(read_checkpoint('toy_in1k'))
    assert list(own_cache.iterdir()) == [own_cache / 'toy_in1k.pth']
    # A file put there by hand is checked as well.
    (own_cache / 'toy_in1k.pth').write_bytes(data[:-1])
    with pytest.raises(CheckpointUnreadable, match='sha256'):
        read_checkpoint('toy_in1k')


def test_page_instead_of_file_is_not_kept(tmp_path, own_cache):
    (tmp_path / 'page').write_bytes(HTML)
    with pytest.raises(CheckpointUnreadable, match='HTML page') as error:
        read_checkpoint((tmp_path / 'page').as_uri())
    assert str(cached_path((tmp_path / 'page').as_uri())) in str(error.value)
    assert not list(own_cache.iterdir())


def test_missing_address(own_cache):
    url = 'file:///nowhere/at/all.pth'
    with pytest.raises(CheckpointNotFound) as error:
        read_checkpoint(url)
    assert url in str(error.value) and str(cached_path(url)) in str(error.value)
    assert not list(own_cache.iterdir())


def test_offline_says_where_from_and_where_to(own_cache, monkeypatch):
    def no_network(*args, **kwargs):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    for variable in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(CheckpointNotFound) as error:
        read_checkpoint('slak_t_in1k_300e')
    assert '1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4' in str(error.value)
    assert str(own_cache / 'slak_t_in1k_300e.pth') in str(error.value)
    assert not list(own_cache.iterdir())
    torch.save(WEIGHTS, own_cache / 'slak_t_in1k_300e.pth')
    assert_same(read_checkpoint('slak_t_in1k_300e'))


def test_unpublished_address(own_cache):
    with pytest.raises(CheckpointNotFound, match='No address was published') as error:
        read_checkpoint('cascade_mask_rcnn_slak_t_coco_3x')
    assert str(own_cache / 'cascade_mask_rcnn_slak_t_coco_3x.pth') in str(error.value)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'file'))
    with pytest.raises(CheckpointNotFound, match='SLAK_MM_CACHE'):
        read_checkpoint('slak_t_in1k_300e')


class Server(http.server.BaseHTTPRequestHandler):
    content = b''

    def do_GET(self):
        if self.path == '/missing':
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(self.content)))
        self.end_headers()
        cut = len(self.content) // 2 if self.path == '/cut' else None
        self.wfile.write(self.content[:cut])

    def log_message(self, *args):
        pass


def test_http(tmp_path, own_cache, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    torch.save(WEIGHTS, tmp_path / 'x.pth')
    Server.content = (tmp_path / 'x.pth').read_bytes()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        with pytest.raises(CheckpointNotFound, match='answered 404'):
            read_checkpoint(f'{address}/missing')
        with pytest.raises((CheckpointUnreadable, CheckpointNotFound), match='ended after|could not be downloaded'):
            read_checkpoint(f'{address}/cut')
        assert not list(own_cache.iterdir())
        assert_same(read_checkpoint(f'{address}/x.pth'))
        server.shutdown()
    assert list(own_cache.iterdir()) == [cached_path(f'{address}/x.pth')]


RANK = """
import datetime, os, sys, torch
from slak_mm.checkpoints import CheckpointNotFound, read_checkpoint
folder, rank, url = sys.argv[1:]
os.environ['LOCAL_RANK'] = rank
torch.distributed.init_process_group(
    'gloo', init_method=f'file://{folder}/rendezvous', rank=int(rank), world_size=2,
    timeout=datetime.timedelta(seconds=60))
for source in (url, 'file:///nowhere/at/all.pth'):
    try:
        print(sorted(read_checkpoint(source)), file=sys.stderr)
    except CheckpointNotFound as error:
        print(error, file=sys.stderr)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_every_process_hears_of_a_failure(tmp_path, own_cache):
    torch.save(WEIGHTS, tmp_path / 'x.pth')
    root = str(Path(slak_mm.__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, '-c', RANK, str(tmp_path), rank, (tmp_path / 'x.pth').as_uri()],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, 'PYTHONPATH': root},
        )
        for rank in '01'
    ]
    for process in ranks:
        text = process.communicate(timeout=120)[1]
        assert process.returncode == 0, text
        assert "['a.bias', 'a.weight']" in text
        assert 'file:///nowhere/at/all.pth could not be downloaded' in text
    assert len(list(own_cache.iterdir())) == 1
