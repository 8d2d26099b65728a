import argparse
import http.server
import io
import json
import os
import pickle
import socket
import threading
import time
import zipfile
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.logging import HistoryBuffer
from torch import multiprocessing

from slak_mm import _files
from slak_mm.checkpoints import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    UnsafeCheckpoint,
    cache_dir,
    cached_path,
    load_pretrained,
    read_checkpoint,
    reader,
)

WEIGHTS = {'a.weight': torch.arange(6.0).reshape(2, 3), 'a.bias': torch.ones(2)}


@pytest.fixture(params=['weights_only', 'old_torch'])
def route(request, monkeypatch):
    """Both ways of reading: torch's list, extended, and the reader for torch before 2.6."""
    if request.param == 'weights_only' and not reader._EXTENSIBLE:
        pytest.skip('torch before 2.6 cannot extend its list')
    monkeypatch.setattr(reader, '_EXTENSIBLE', request.param == 'weights_only')
    return request.param


formats = pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'x.pth'


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(read, written=WEIGHTS):
    assert read.keys() == written.keys()
    assert all(torch.equal(read[key], written[key]) for key in written)


# What is read


@formats
def test_official_file(path, route, zipped):
    content = {
        'model': OrderedDict(WEIGHTS),
        'epoch': 299,
        'optimizer': {'state': {}},
        'scaler': {'scale': 1.0},
        'args': argparse.Namespace(Decom=True, kernel_size=[51, 5], device='cuda'),
    }
    read = read_checkpoint(save(content, path, zipped))
    assert_same(read['model'])
    assert read['args'] == content['args'] and read['epoch'] == 299


@formats
def test_mmengine_file(path, route, zipped):
    content = {
        'state_dict': OrderedDict(WEIGHTS),
        'meta': {'dataset_meta': {'palette': np.arange(6, dtype=np.uint8).reshape(2, 3)}},
        'message_hub': {
            'log_scalars': OrderedDict({'train/loss': HistoryBuffer([1.0, 2.0], [1, 1])}),
            'runtime_info': {'lr': np.float64(0.1), 'iter': np.int64(3), 'name': np.array(['a', 'bc'])},
        },
        'param_schedulers': [{'milestones': Counter({27: 1, 33: 1})}],
    }
    read = read_checkpoint(save(content, path, zipped))
    assert_same(read['state_dict'])
    assert read['message_hub']['log_scalars']['train/loss'].mean() == 1.5
    assert read['param_schedulers'] == content['param_schedulers']
    info = read['message_hub']['runtime_info']
    assert info['lr'] == 0.1 and info['iter'] == 3 and list(info['name']) == ['a', 'bc']
    assert np.array_equal(read['meta']['dataset_meta']['palette'], content['meta']['dataset_meta']['palette'])


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_file_written_under_the_other_numpy(path, route, module):
    here = np.array(1).__reduce__()[0].__module__
    buffer = io.BytesIO()
    torch.save({'x': np.arange(3.0), 'w': WEIGHTS['a.bias']}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, 'w') as new:
        for item in old.infolist():
            new.writestr(item, old.read(item).replace(here.encode(), module.encode()))
    assert list(read_checkpoint(path)['x']) == [0, 1, 2]


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file(WEIGHTS, tmp_path / 'x.safetensors')
    assert_same(read_checkpoint(tmp_path / 'x.safetensors'))
    (tmp_path / 'renamed.pth').write_bytes((tmp_path / 'x.safetensors').read_bytes())
    assert_same(read_checkpoint(tmp_path / 'renamed.pth'))


@pytest.mark.parametrize(
    'meta', ['[' * 10**5, '[1]', 'words', '"' + 'x' * (1 << 23) + '"'], ids='deep list no large'.split()
)
def test_damaged_meta_of_safetensors(tmp_path, meta):
    pytest.importorskip('safetensors')
    table = {'__metadata__': {'slak_mm_meta': '{"epoch": 3}'}, 'w': entry(0, 8)}
    (tmp_path / 'x.safetensors').write_bytes(named_bytes(table))
    assert read_checkpoint(tmp_path / 'x.safetensors')['meta'] == {'epoch': 3}
    for none in ({'slak_mm_meta': entry(0, 8), '__metadata__': None}, {'slak_mm_meta': entry(0, 8)}):
        (tmp_path / 'x.safetensors').write_bytes(named_bytes(none))
        assert list(read_checkpoint(tmp_path / 'x.safetensors')) == ['slak_mm_meta']
    table['__metadata__']['slak_mm_meta'] = meta
    (tmp_path / 'x.safetensors').write_bytes(named_bytes(table))
    with pytest.raises(CheckpointUnreadable, match='The meta of .* cannot be read as JSON') as error:
        read_checkpoint(tmp_path / 'x.safetensors')
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    'spoilt',
    [{'stem\x1b[31m': torch.ones(8)}, {'x' * 501: torch.ones(8)}, {'stages.0.0.gamma': torch.ones(8).long()}],
    ids=['control character', 'long name', 'integers'],
)
def test_names_and_dtypes_in_safetensors_are_refused_as_in_other_files(tmp_path, toy, spoilt):
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file({**toy.official(), **spoilt}, tmp_path / 'x.safetensors')
    torch.save({**toy.official(), **spoilt}, tmp_path / 'x.pth')
    messages = set()
    for name in ('x.safetensors', 'x.pth'):
        with pytest.raises(CheckpointError) as error:
            load_pretrained(toy.backbone(), tmp_path / name)
        messages.add(str(error.value).replace(str(tmp_path / name), 'the file'))
    assert len(messages) == 1 and '\x1b' not in messages.pop()


def named_bytes(table, data=bytes(8)):
    header = table.encode() if isinstance(table, str) else json.dumps(table).encode()
    return len(header).to_bytes(8, 'little') + header + data


def entry(begin, end, shape=(2,), dtype='F32'):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[begin, end])


@pytest.mark.parametrize(
    'content',
    [
        named_bytes({'w': entry(0, 8)})[:-3],
        named_bytes({'w': entry(0, 8)}, bytes(9)),
        named_bytes({'w': entry(4, 8, (1,))}),
        named_bytes({'a': entry(0, 8), 'b': entry(4, 8, (1,))}),
        named_bytes({'w': entry(0, 8, (10**9,))}),
        named_bytes({'w': entry(0, 8 << 40)}),
        named_bytes({'w': entry(0, 8, dtype='\x1b[31m' * 1000)}),
        named_bytes('{' * 10**5),
        (1 << 62).to_bytes(8, 'little') + b'{}',
    ],
    ids='cut long gap overlap shape beyond dtype nested header'.split(),
)
def test_damaged_safetensors(tmp_path, content):
    pytest.importorskip('safetensors')
    (tmp_path / 'x.safetensors').write_bytes(named_bytes({'w': entry(0, 8)}))
    assert read_checkpoint(tmp_path / 'x.safetensors')['w'].tolist() == [0, 0]
    (tmp_path / 'x.safetensors').write_bytes(content)
    with pytest.raises(CheckpointUnreadable, match='not an intact safetensors') as error:
        read_checkpoint(tmp_path / 'x.safetensors')
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_mapping_is_passed_through():
    assert read_checkpoint(WEIGHTS) == WEIGHTS and read_checkpoint(WEIGHTS) is not WEIGHTS


def test_lists_of_others_are_left_as_they_were(path):
    if not reader._EXTENSIBLE:
        pytest.skip('torch before 2.5 has no such list')
    save({'w': torch.ones(1), 'args': argparse.Namespace()}, path)
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(path)
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


#: What is asked for, by the name that the error has. Each would make the file 'victim'.
ATTACKS = [
    (f'{os.system.__module__}.system', Call(os.system, 'touch victim')),
    ('eval', Call(eval, '__import__("os").system("touch victim")')),
    ('exec', Call(exec, 'open("victim", "w")')),
    ('getattr', Call(getattr, Call(getattr, HistoryBuffer, '__init__'), '__globals__')),
    ('getattr', Call(getattr, torch.ones(1), 'numpy')),
    ('open', Call(open, 'victim', 'w')),
    ('save', Call(np.save, 'victim', 0)),
    ('test_reader.Settable', Settable()),
]


@formats
@pytest.mark.parametrize(('wanted', 'attack'), ATTACKS)
def test_pickles_that_run_code(path, route, wanted, attack, zipped, monkeypatch):
    monkeypatch.chdir(path.parent)
    save({'model': WEIGHTS, 'args': attack}, path, zipped)
    with pytest.raises(UnsafeCheckpoint, match='was refused: reading it would run code') as error:
        read_checkpoint(path)
    assert not list(path.parent.glob('victim*'))
    assert 'weights_only=False' in str(error.value)  # how to convert it
    assert error.value.global_name.endswith(wanted) and wanted in str(error.value)


def raw_pickle(tmp_path, data, storage=b'\0' * 4, compression=zipfile.ZIP_STORED):
    """A file in torch's zip format around a hand-written pickle and one storage."""
    with zipfile.ZipFile(tmp_path / 'bad.pth', 'w', compression) as archive:
        for name, content in {'data.pkl': data, 'byteorder': b'little', 'version': b'3\n', 'data/0': storage}.items():
            archive.writestr(f'bad/{name}', content)
    return tmp_path / 'bad.pth'


def raw_legacy(tmp_path, data, storage=b'\0' * 4):
    """The same in torch's older format: five pickles, then the storage behind its count of numbers."""
    header = b''.join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    count = (len(storage) // 4).to_bytes(8, 'little')
    keys = pickle.dumps(['0'], 2)
    (tmp_path / 'bad.pth').write_bytes(header + data.replace(b'tQ', b'NtQ') + keys + count + storage)
    return tmp_path / 'bad.pth'


@pytest.mark.parametrize(
    'data',
    [
        pytest.param(b'(S"touch victim"\nios\nsystem\n.', id='INST'),
        pytest.param(b'(cos\nsystem\nS"touch victim"\no.', id='OBJ'),
        pytest.param(b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch victim\x85R.', id='STACK_GLOBAL'),
        pytest.param(b'\x80\x02ccollections\nOrderedDict\n)R}(X\x01\x00\x00\x00aK\x01u\x86b.', id='state of a dict'),
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


# Small files that ask for much. The functions below write pickles of protocol 2.


def text(value):
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


def number(value):
    return b'\x8a\x09' + value.to_bytes(9, 'little', signed=True)


def many(*items):
    return b'(' + b''.join(items) + b't'


def dict_of(keys, value=b'N'):
    return b'}(' + b''.join(key + value for key in keys) + b'u'


def call(name, *arguments):
    module, _, function = name.rpartition('.')
    return f'c{module}\n{function}\n'.encode() + many(*arguments) + b'R'


def tensor(size, stride, offset=0, count=1, function='_rebuild_tensor_v2'):
    storage = many(text('storage'), b'ctorch\nFloatStorage\n', text('0'), text('cpu'), number(count)) + b'Q'
    shape = [many(*map(number, values)) for values in (size, stride)]
    return call(f'torch._utils.{function}', storage, number(offset), *shape, b'\x89', call('collections.OrderedDict'))


def under_a_name(value):
    return b'\x80\x02}' + text('w') + value + b's.'


def over_and_over(large, item):
    """A list that handles the same large thing 20,000 times, at ten to twenty bytes each."""
    return b'\x80\x02' + large + b'q\x00](' + 20_000 * item + b'e.'


def array(shape, code, state=b''):
    return under_a_name(
        call('numpy.core.multiarray._reconstruct', b'cnumpy\nndarray\n', many(shape), text(code)) + state
    )


HUGE, LARGE_LIST = 2 * 10**9, b'](' + b'K\x01' * 50_000 + b'e'
BOMBS = {
    'stride 0': under_a_name(tensor((10**5, 10**5), (0, 0))),
    'overlapping rows': under_a_name(tensor((10**5, 1), (0, 1))),
    'strides beyond': under_a_name(tensor((1, 2), (1, 10**9))),
    'offset beyond': under_a_name(tensor((1,), (1,), offset=10**9)),
    'negative': under_a_name(tensor((-1,), (1,))),
    'storage beyond its member': under_a_name(tensor((10**6,), (1,), count=10**6)),
    'bytearray': under_a_name(call('builtins.bytearray', number(HUGE))),
    'range': under_a_name(call('builtins.range', number(HUGE))),
    'tensor class': under_a_name(call('torch.FloatTensor', number(HUGE))),
    'storage class': under_a_name(call('torch.storage.UntypedStorage', number(HUGE))),
    'ndarray': under_a_name(call('numpy.ndarray', many(number(HUGE)))),
    'reconstruct': array(number(HUGE), 'b'),
    'empty texts': array(
        b'K\x00', 'b', many(b'K\x01', many(number(HUGE)), call('numpy.dtype', text('S0')), b'\x89', text('')) + b'b'
    ),
    'scalar': under_a_name(call('numpy.core.multiarray.scalar', call('numpy.dtype', text(f'S{HUGE}')))),
    'codec': under_a_name(call('_codecs.encode', text('a'), text('zlib'))),
    'text': under_a_name(b'X\xff\xff\xff\xffabc'),
    'bytes': under_a_name(b'\x8e\xff\xff\xff\xff\x00\x00\x00\x00abc'),
    'integer': under_a_name(b'\x8b\xff\xff\xff\x7fabc'),
    'text encoded often': over_and_over(text('a' * 500_000), call('_codecs.encode', b'h\x00', text('latin1'))),
    'list copied often': over_and_over(LARGE_LIST, call('builtins.set', b'h\x00')),
    'dict copied often': over_and_over(dict_of(map(number, range(50_000))), call('collections.OrderedDict', b'h\x00')),
    'state set often': over_and_over(
        dict_of(text(str(key)) for key in range(50_000)), call('collections.OrderedDict') + b'h\x00b'
    ),
    'lists of lists': under_a_name(
        b']' + b''.join(b'q%c0](' % level + 10 * (b'h%c' % level) + b'e' for level in range(97, 122))
    ),
    'nested lists': under_a_name(b']' * 10**5 + b'a' * (10**5 - 1)),
    'itself': b'\x80\x02}q\x00' + text('w') + b'h\x00s.',
    'one tensor under many names': (
        b'\x80\x02'
        + tensor((250_000,), (1,), count=250_000)
        + b'q\x000'
        + dict_of(map(number, range(10_000)), b'h\x00')
    )
    + b'.',
}


@pytest.fixture
def little_memory():
    """Refuse what takes more than 1.5 GB over what the process has."""
    resource = pytest.importorskip('resource')
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path('/proc/self/statm').read_text().split()[0]) if Path('/proc/self/statm').exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1_500_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('kind', BOMBS)
def test_small_files_that_ask_for_much(tmp_path, route, kind, legacy, little_memory):
    storage = bytes(10**6 if 'many names' in kind else 4)
    path = (raw_legacy if legacy else raw_pickle)(tmp_path, BOMBS[kind], storage)
    start = time.monotonic()
    with pytest.raises((UnsafeCheckpoint, CheckpointUnreadable), match=str(path)) as error:
        read_checkpoint(path)
    assert time.monotonic() - start < 10 and 'not enough memory' not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize('write', [raw_pickle, raw_legacy])
def test_a_hand_written_tensor_is_read(tmp_path, route, write):
    """What the refused files above are variations of."""
    path = write(tmp_path, under_a_name(tensor((2, 1), (1, 1), count=2)), np.float32([3, 4]).tobytes())
    assert read_checkpoint(path)['w'].tolist() == [[3], [4]]


def test_compressed_and_doubled_members(tmp_path):
    path = raw_pickle(tmp_path, under_a_name(text('a' * 10**6)), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointUnreadable, match='compressed or encrypted'):
        read_checkpoint(path)
    path = raw_pickle(tmp_path, under_a_name(b'N'))
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('bad/DATA.pkl', b'other')
    with pytest.raises(CheckpointUnreadable, match='same name'):
        read_checkpoint(path)


def test_any_flipped_bit_is_refused_or_harmless(path, route):
    """Of torch's zip format: the sums cover what is read, the index is compared with the members."""
    good = save(WEIGHTS, path).read_bytes()
    refused = 0
    for position in range(0, len(good), 5):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        try:
            assert_same(read_checkpoint(path))
        except CheckpointUnreadable:
            refused += 1
    assert refused > 100
    start = good.index(WEIGHTS['a.weight'].numpy().tobytes())
    path.write_bytes(good[: start + 5] + bytes([good[start + 5] ^ 1]) + good[start + 6 :])
    with pytest.raises(CheckpointUnreadable, match=r'checksum of x/data/0 in it is wrong'):
        read_checkpoint(path)


@pytest.mark.parametrize('change', [lambda data: data[:-4], lambda data: data + b'1234'], ids=['less', 'more'])
def test_sizes_of_the_older_format(path, change):
    path.write_bytes(change(save(WEIGHTS, path, zipped=False).read_bytes()))
    with pytest.raises(CheckpointUnreadable, match='its weights take 48 bytes, and it has'):
        read_checkpoint(path)


ONES = torch.ones(2, 2)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        (ONES.to_sparse(), 'a sparse tensor.*to_dense'),
        (ONES.to_sparse_csr(), 'a sparse tensor'),
        (torch.empty(2, device='meta'), 'a meta tensor.*no data'),
        (torch.quantize_per_tensor(ONES, 0.1, 0, torch.qint8), 'a quantized tensor.*dequantize'),
        (torch.nested.nested_tensor([ONES, ONES[:1]]), 'a nested tensor.*unbind'),
        (ONES[:1].expand(1000, 2), r'larger than its storage of 16 bytes.*clone'),
        (torch.nn.Linear(1, 1), 'would run code.*Linear'),
        (np.array([None]), 'dtype O8'),
    ],
)
def test_odd_content(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(save({'w': value}, path))


def test_a_list_is_no_checkpoint(path):
    with pytest.raises(CheckpointUnreadable, match='a list'):
        read_checkpoint(save([ONES], path))


@pytest.mark.parametrize(
    'value',
    [
        *(torch.nn.Parameter(ONES), ONES.clone().requires_grad_(), ONES * 1j, (ONES * 1j).conj()),
        *(ONES.to(torch.float8_e4m3fn), torch.arange(10, dtype=torch.bfloat16)[2:5], torch.empty(0, 3)),
    ],
    ids='parameter gradients complex conjugate fp8 view empty'.split(),
)
def test_unusual_tensors_are_read(path, route, value):
    read = read_checkpoint(save({'w': value, 3: value[:1], 'n': torch.tensor(3)}, path))
    assert read['n'] == 3
    assert read['w'].dtype == value.dtype and read['w'].tolist() == value.tolist() and len(read[3]) <= 1


def test_names_in_messages_are_escaped_and_cut(tmp_path):
    data = under_a_name(b'cevil\n' + b'\x1b[31m' * 1000 + b'\n')
    with pytest.raises(UnsafeCheckpoint, match=r'evil\.\\x1b\[31m') as error:
        read_checkpoint(raw_pickle(tmp_path, data))
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_threads_read_at_once_and_leave_no_names(path, route):
    save({'w': ONES, 'args': argparse.Namespace(a=1), 'hub': {'loss': HistoryBuffer([1.0], [1])}}, path)
    before = torch.serialization.get_safe_globals() if reader._EXTENSIBLE else []
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(read_checkpoint, [path] * 100))
    assert all(torch.equal(one['w'], ONES) and one['args'].a == 1 for one in read)
    assert not reader._EXTENSIBLE or torch.serialization.get_safe_globals() == before


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
def test_other_files(path, data, message):
    path.write_bytes(data)
    with pytest.raises(CheckpointUnreadable, match=f'{path} .*({message})'):
        read_checkpoint(path)


@formats
@pytest.mark.parametrize('share', [0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncated(path, route, zipped, share):
    data = save({'model': {f'{i}': torch.randn(40, 10) for i in range(20)}}, path, zipped).read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointUnreadable, match='truncated or damaged'):
        read_checkpoint(path)


def test_damaged_bytes_end_in_our_errors(path, route):
    good = save({'model': WEIGHTS, 'args': argparse.Namespace(a=[1, (2, 3)])}, path, zipped=False).read_bytes()
    random = np.random.RandomState(0)
    refused = 0
    for _ in range(300):
        bad = bytearray(good)
        for position in random.randint(len(bad), size=3):
            bad[position] = random.randint(256)
        path.write_bytes(bad)
        try:
            read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ('names', 'message'),
    [('readme.txt', 'zip archive without a checkpoint'), ('script/data.pkl script/constants.pkl', 'TorchScript')],
)
def test_other_archives(path, names, message):
    with zipfile.ZipFile(path, 'w') as archive:
        for name in names.split():
            archive.writestr(name, b'')
    with pytest.raises(CheckpointUnreadable, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ('missing', 'message'),
    [
        *((name, 'There is no file') for name in ('a' * 300, 'a/' * 3000, 'a\0b', '~nobody_of_that_name/x.pth')),
        ('nowhere/x.pth', 'no file nowhere/x.pth'),
        ('slak-t-in1k', 'zoo name slak_t_in1k_300e'),
    ],
)
def test_missing_files(missing, message):
    with pytest.raises(CheckpointNotFound, match=message):
        read_checkpoint(missing)


def test_a_folder(path):
    with pytest.raises(CheckpointUnreadable, match=r'is a folder.*x\.pth'):
        read_checkpoint(save(WEIGHTS, path).parent)


# Downloads


def files_in(cache):
    """The cached files; the hash of each lies beside it."""
    files = sorted(cache.iterdir())
    hashes = {path for path in files if path.suffix == '.sha256'}
    kept = [path for path in files if path not in hashes]
    assert hashes == {path.with_name(f'{path.name}.sha256') for path in kept}
    return kept


def test_file_url_is_fetched_once(path, own_cache):
    url = save(WEIGHTS, path).as_uri()
    assert_same(read_checkpoint(url))
    assert files_in(own_cache) == [cached_path(url)]
    path.unlink()
    assert_same(read_checkpoint(url))


def test_addresses_that_end_alike_do_not_collide(own_cache):
    paths = {cached_path(f'https://example.org/s/{i}/download') for i in range(3)}
    assert len(paths) == 3 and all(path.parent == own_cache == cache_dir() for path in paths) and not own_cache.exists()


def test_page_instead_of_file_is_not_kept(path, own_cache):
    path.write_bytes(HTML)
    with pytest.raises(CheckpointUnreadable, match=f'HTML page.*{cached_path(path.as_uri())}'):
        read_checkpoint(path.as_uri())
    assert not list(own_cache.iterdir())


def test_missing_address(own_cache):
    url = 'file:///nowhere/at/all.pth'
    with pytest.raises(CheckpointNotFound, match=f'{url}.*{cached_path(url)}'):
        read_checkpoint(url)
    assert not list(own_cache.iterdir())


def test_offline_says_where_from_and_where_to(own_cache, monkeypatch):
    def no_network(*args, **kwargs):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    for variable in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.delenv(variable, raising=False)
    kept = own_cache / 'slak_t_in1k_300e.pth'
    with pytest.raises(CheckpointNotFound, match=f'1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4.*{kept}'):
        read_checkpoint('slak_t_in1k_300e')
    assert not list(own_cache.iterdir())
    save(WEIGHTS, kept)
    assert_same(read_checkpoint('slak_t_in1k_300e'))


def test_unpublished_address(own_cache):
    name = 'cascade_mask_rcnn_slak_t_coco_3x'
    with pytest.raises(CheckpointNotFound, match=f'No address was published.*{own_cache}/{name}.pth'):
        read_checkpoint(name)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'file'))
    with pytest.raises(CheckpointNotFound, match='SLAK_MM_CACHE'):
        read_checkpoint('slak_t_in1k_300e')


class Server(http.server.BaseHTTPRequestHandler):
    content = b''
    asked: ClassVar = []

    def do_GET(self):
        self.asked.append(self.path)
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


def test_http(path, own_cache, monkeypatch):
    monkeypatch.setattr(_files.time, 'sleep', lambda seconds: None)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    Server.content = save(WEIGHTS, path).read_bytes()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        with pytest.raises(CheckpointNotFound, match='answered 404'):
            read_checkpoint(f'{address}/missing')
        with pytest.raises((CheckpointUnreadable, CheckpointNotFound), match='ended after|could not be downloaded'):
            read_checkpoint(f'{address}/cut')
        assert not list(own_cache.iterdir())
        with ThreadPoolExecutor(4) as pool:
            for read in pool.map(read_checkpoint, [f'{address}/x.pth'] * 4):
                assert_same(read)
        assert Server.asked.count('/x.pth') == 1  # the others waited for the one
        server.shutdown()
    assert files_in(own_cache) == [cached_path(f'{address}/x.pth')]


def read_in_a_process(rank, folder, url):
    os.environ['LOCAL_RANK'] = str(rank)
    meeting_point = f'file://{folder}/meeting_point'
    dist.init_process_group('gloo', init_method=meeting_point, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    assert_same(read_checkpoint(url))
    with pytest.raises(CheckpointNotFound, match='file:///nowhere/at/all.pth could not be downloaded'):
        read_checkpoint('file:///nowhere/at/all.pth')
    dist.barrier()
    dist.destroy_process_group()


def test_every_process_hears_of_a_failure(path, own_cache):
    multiprocessing.spawn(read_in_a_process, (path.parent, save(WEIGHTS, path).as_uri()), nprocs=2)
    assert len(files_in(own_cache)) == 1
