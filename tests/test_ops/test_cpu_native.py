"""The C++ kernel of the operator against float64 convolutions, and how it is compiled."""

import ctypes
import errno
import hashlib
import logging
import mmap
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_helpers import convolution, lay_out, relative_error

from slak_mm.ops import _operator, choose_backend, cross_dwconv2d, csrc, use_backend
from slak_mm.ops.backends import cpu_native

# Largest error relative to the largest value of the exact result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}

REASON = cpu_native.unavailable_reason(torch.ones(1, 1, 1, 1), [])
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make(n, c, h, w, sizes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return (randn(n, c, h, w), [randn(c, *size) for size in sizes], [randn(n, c, h, w) for _ in sizes])


def poisoned(*args, empty_like=torch.empty_like, **kwargs):
    return empty_like(*args, **kwargs).fill_(float('nan'))


def compute(x, kernels, grads, bias=None, reduce=False):
    """Results and all gradients, in memory that held NaN before."""
    with mock.patch.object(torch, 'empty_like', poisoned):
        results = cpu_native.forward(x, kernels, bias, reduce)
        grad_x, grad_kernels = cpu_native.backward(x, kernels, grads, True, True)
    return [*results, grad_x, *grad_kernels]


def exact(x, kernels, grads, bias=None, reduce=False):
    inputs = [t.double().requires_grad_() for t in (x, *kernels)]
    outs = [convolution(inputs[0], k) for k in inputs[1:]]
    if len(grads) == 1:
        grads = list(grads) * len(outs)
    found = torch.autograd.grad(outs, inputs, [g.double() for g in grads])
    results = [y.detach() for y in outs]
    if reduce:
        results = [sum(results)]
        if bias is not None:
            results[0] = results[0] + bias.double().view(-1, 1, 1)
    return [*results, *found]


long, short = st.sampled_from([1, 3, 7, 13, 15, 31, 51]), st.sampled_from([1, 3, 5, 7, 9])
layouts = st.sampled_from(['nchw', 'channels_last', 'transposed', 'strided'])


@st.composite
def problems(draw):
    """Kernels of a cross and others, some padded with zero taps, on maps of all sizes."""
    m, n = draw(long), draw(short)
    sizes = draw(st.sampled_from([[(m, n), (n, m), (n, n)], [(m, n), (n, m)], [(n, m)], [(m, n)], [(n, n), (m, n)]]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    shape = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 2, 3, 15, 16, 17, 35])),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 60)),
    )
    x, kernels, grads = make(*shape, sizes, dtype, draw(st.integers(0, 9)))
    for kernel in kernels:
        for dim in (1, 2):
            length = kernel.shape[dim]
            kernel.narrow(dim, 0, draw(st.integers(0, length // 2))).zero_()
            behind = draw(st.integers(0, length // 2))
            kernel.narrow(dim, length - behind, behind).zero_()
    reduce = draw(st.booleans())
    if reduce:
        grads = grads[:1]
    bias = torch.linspace(-2, 2, shape[1]).to(dtype) if reduce and draw(st.booleans()) else None
    return x, kernels, grads, bias, reduce, draw(layouts), draw(layouts)


@needs_library
@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_results_and_gradients(problem):
    x, kernels, grads, bias, reduce, layout, grad_layout = problem
    want = exact(x, kernels, grads, bias, reduce)
    got = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got[threads] = compute(lay_out(x, layout), kernels, [lay_out(g, grad_layout) for g in grads], bias, reduce)
    assert len(got[1]) == len(want)
    for one, two, exactly in zip(got[1], got[2], want):
        assert torch.equal(one, two)
        assert one.shape == exactly.shape and one.dtype == x.dtype
        assert relative_error(one, exactly) <= TOLERANCE[x.dtype]


@needs_library
@pytest.mark.parametrize('shape', [(1, 24, 150, 70), (40, 3, 9, 9), (3, 70, 33, 18)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape):
    """Also where the work is divided by rows, or many images share one sum."""
    x, kernels, grads = make(*shape, [(31, 5), (5, 31), (5, 5)], torch.float32)
    want = exact(x, kernels, grads)
    torch.set_num_threads(1)
    alone = compute(x, kernels, grads)
    for got, exactly in zip(alone, want):
        assert relative_error(got, exactly) <= TOLERANCE[torch.float32]
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        for a, b in zip(compute(x, kernels, grads), alone):
            assert torch.equal(a, b)


@needs_library
def test_bfloat16_is_rounded_to_nearest_even():
    """Infinities and NaN are kept."""
    values = [1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float('inf'), float('nan'), -2.5] * 3
    x = torch.ones(1, 18, 1, 1, dtype=torch.bfloat16)
    kernel = torch.ones(18, 1, 1, dtype=torch.bfloat16)
    x[0, :, 0, 0] = torch.tensor(values)
    (got,) = cpu_native.forward(x, [kernel], None, True)
    assert torch.equal(got.nan_to_num(nan=7.0), x.nan_to_num(nan=7.0))
    third = torch.full((18,), 2**-9, dtype=torch.bfloat16)  # 1 + 2^-9 is a tie down to 1
    (got,) = cpu_native.forward(torch.ones_like(x), [kernel], third, True)
    assert torch.equal(got, torch.ones_like(x))


GUARDED = '''
import ctypes, itertools, mmap, torch
from slak_mm.ops.backends import cpu_native

libc = ctypes.CDLL(None, use_errno=True)
keep = []

def guarded(shape, dtype, at_end, channels_last=False):
    """A tensor of NaN beside a page that must not be touched."""
    size = torch.tensor([], dtype=dtype).element_size() * torch.Size(shape).numel()
    pages = -(-size // mmap.PAGESIZE) + 1
    block = mmap.mmap(-1, pages * mmap.PAGESIZE)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    first = whole.data_ptr() + ((pages - 1) * mmap.PAGESIZE if at_end else 0)
    assert libc.mprotect(ctypes.c_void_p(first), mmap.PAGESIZE, 0) == 0
    keep.append(block)
    start = (pages - 1) * mmap.PAGESIZE - size if at_end else mmap.PAGESIZE
    flat = whole[start:start + size].view(dtype)
    flat.fill_(float('nan'))
    if channels_last:
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(shape)

def filled(*args):
    tensor = guarded(*args)
    tensor.copy_(torch.randn(tensor.shape))
    return tensor

for at_end, channels_last, dtype, (c, h, w) in itertools.product(
        (True, False), (True, False), (torch.float32, torch.bfloat16, torch.float64),
        ((1, 1, 1), (16, 9, 21), (19, 26, 7))):
    x = filled((2, c, h, w), dtype, at_end, channels_last)
    kernels = [filled((c, *k), dtype, at_end) for k in ((13, 5), (5, 13), (3, 3))]
    grads = [filled((2, c, h, w), dtype, at_end, channels_last) for _ in kernels]
    def empty_like(t, memory_format):
        return guarded(tuple(t.shape), t.dtype, at_end,
                       memory_format is torch.channels_last)
    cpu_native.torch.empty_like, original = empty_like, torch.empty_like
    try:
        results = cpu_native.forward(x, kernels, None, False)
        grad_x, grad_kernels = cpu_native.backward(x, kernels, grads, True, True)
    finally:
        cpu_native.torch.empty_like = original
    for t in (*results, grad_x, *grad_kernels):
        assert t.isfinite().all()
print('whole')
'''


@needs_library
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs mprotect')
def test_nothing_is_touched_outside_the_tensors():
    """Every tensor lies at the edge of a page that ends the process when it is touched."""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', GUARDED], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == 'whole', (done.returncode, done.stderr[-2000:])
    assert mmap.PAGESIZE > 64  # a vector would not jump over the page


@needs_library
@pytest.mark.parametrize(
    'change',
    [
        dict(kernels=[torch.ones(2, 3, 3)]),
        dict(kernels=[torch.ones(4, 3, 3).double()]),
        dict(bias=torch.ones(3)),
        dict(bias=torch.ones(4).half()),
    ],
    ids=['channels', 'dtype', 'length of bias', 'dtype of bias'],
)
def test_tensors_that_do_not_fit_are_not_read(change):
    """The library would read beyond them. Also where the registered operator is called directly."""
    operands = {**dict(x=torch.ones(1, 4, 5, 6), kernels=[torch.ones(4, 3, 3)], bias=None, reduce=True), **change}
    with pytest.raises(ValueError, match='must be torch.float32 of 4 channels'):
        cpu_native.forward(**operands)
    with pytest.raises(ValueError, match='maps must be like x'):
        cpu_native.backward(torch.ones(1, 4, 5, 6), [torch.ones(4, 3, 3)], [torch.ones(1, 4, 5, 5)], True, True)


def in_child(queue):
    torch.set_num_threads(1)  # as PyTorch's data loader does in its workers
    x, kernels, grads = make(1, 20, 30, 30, [(13, 5)], torch.float32)
    queue.put([t.tolist() for t in compute(x, kernels, grads)])


@needs_library
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_forked_child_after_use_with_threads():
    torch.set_num_threads(2)
    x, kernels, grads = make(1, 20, 30, 30, [(13, 5)], torch.float32)
    want = compute(x, kernels, grads)
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    got = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert all(torch.equal(torch.tensor(a), b) for a, b in zip(got, want))


class TestCompilation:
    """How the library comes to be; with a source that compiles in no time."""

    @pytest.fixture
    def source(self, tmp_path, monkeypatch):
        folder = tmp_path / 'sources'
        folder.mkdir()
        (folder / 'answer.cpp').write_text('extern "C" int answer() { return 42; }\n')
        monkeypatch.setattr(csrc, '_SOURCES', folder)
        monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'cache'))
        return folder / 'answer.cpp'

    @pytest.fixture
    def compiler(self, tmp_path, monkeypatch):
        """A compiler that notes when it compiles."""
        try:
            command = csrc._find_compiler()
        except csrc.CompileError as error:
            pytest.skip(str(error))
        script, log = tmp_path / 'compiler', tmp_path / 'log'
        script.write_text(
            f'#!/bin/sh\ncase "$*" in *answer.cpp*) echo compiled >> {log};; esac\nexec {" ".join(command)} "$@"\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv('CXX', str(script))
        return lambda: log.read_text().count('compiled') if log.exists() else 0

    def test_once_for_all_threads_and_processes(self, source, compiler, caplog):
        with caplog.at_level(logging.INFO, logger='slak_mm'), ThreadPoolExecutor(4) as pool:
            libraries = list(pool.map(csrc.load_library, ['answer'] * 4))
        assert [library.answer() for library in libraries] == [42] * 4
        assert compiler() == 1
        assert [r.getMessage().split(' with ')[0] for r in caplog.records] == ['Compiling answer.cpp']
        command = (
            'import runpy, pathlib;'
            f'run = runpy.run_path({csrc.__file__!r})["load_library"];'
            f'run.__globals__["_SOURCES"] = pathlib.Path({str(source.parent)!r});'
            'print(run("answer").answer())'
        )
        done = subprocess.run([sys.executable, '-c', command], capture_output=True, text=True)
        assert done.stdout.strip() == '42', done.stderr
        assert compiler() == 1
        folder = source.parents[1] / 'cache'
        assert sorted(p.suffix for p in folder.iterdir()) == ['.lock', '.sha256', '.so']

    def test_anew_for_another_source_or_processor(self, source, compiler, monkeypatch):
        csrc.load_library('answer')
        monkeypatch.setattr(csrc, '_processor', lambda: ('another',))
        csrc.load_library('answer')
        source.write_text('extern "C" int answer() { return 43; }\n')
        assert csrc.load_library('answer').answer() == 43
        assert compiler() == 3

    @pytest.fixture
    def library(self, source, compiler, tmp_path):
        """The compiled library, not yet loaded: one that was stays so."""
        with mock.patch.object(csrc.ctypes, 'CDLL'):
            csrc.load_library('answer')
        (library,) = (tmp_path / 'cache').glob('*.so')
        return library

    @pytest.mark.parametrize('suffix', ['.so', '.sha256'])
    @pytest.mark.parametrize('size', [0, 1, 5000, -1], ids='{0}_bytes'.format)
    def test_a_truncated_file_is_never_opened(self, library, compiler, suffix, size):
        """The loader of the system would die of it (SIGBUS), and this process with it."""
        file = library.with_suffix(suffix)
        file.write_bytes(file.read_bytes()[:size])
        assert csrc.load_library('answer').answer() == 42
        assert compiler() == (1 if suffix == '.sha256' and size == 5000 else 2)

    def test_a_changed_byte_is_noticed(self, library, compiler):
        content = bytearray(library.read_bytes())
        content[len(content) // 2] ^= 1
        library.write_bytes(content)
        assert csrc.load_library('answer').answer() == 42
        assert compiler() == 2

    def test_a_cache_that_cannot_be_written_is_used(self, library, compiler, monkeypatch):
        error = OSError(errno.EROFS, 'read-only file system')
        monkeypatch.setattr('filelock.FileLock', mock.Mock(side_effect=error))
        monkeypatch.setattr(csrc, 'replacing', mock.Mock(side_effect=error))
        assert csrc.load_library('answer').answer() == 42
        assert compiler() == 1

    @pytest.mark.parametrize('mode', [0o775, 0o757])
    @pytest.mark.parametrize('place', ['library', 'folder'])
    def test_what_others_can_write_to_is_not_opened(self, library, compiler, caplog, place, mode):
        """Planted code would run with the rights of the user."""
        subprocess.run(['cp', '/bin/true', library], check=True)
        library.with_suffix('.sha256').write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        (library if place == 'library' else library.parent).chmod(mode)
        before = library.read_bytes()
        assert csrc.load_library('answer').answer() == 42
        (line,) = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
        assert str(library if place == 'library' else library.parent) in line and 'chmod go-w' in line
        # A library is replaced; a folder is left as it is.
        assert (library.read_bytes() == before) == (place == 'folder')
        assert not list(library.parent.glob('.*'))

    def test_what_somebody_else_owns_is_not_opened(self, library, compiler, monkeypatch, caplog):
        monkeypatch.setattr(csrc.os, 'getuid', lambda: library.stat().st_uid + 1)
        monkeypatch.setattr(csrc, '_ROOT', -1)
        assert csrc.load_library('answer').answer() == 42
        assert compiler() == 2 and 'belongs to somebody else' in caplog.text

    @pytest.mark.parametrize('umask', [0o002, 0o000])
    def test_any_umask_leaves_a_cache_that_is_used(self, source, compiler, umask):
        before = os.umask(umask)
        try:
            csrc.load_library('answer')
        finally:
            os.umask(before)
        csrc.load_library('answer')
        assert compiler() == 1

    def test_a_killed_compilation_leaves_nothing_for_good(self, source, tmp_path, monkeypatch):
        script = tmp_path / 'slow'
        started = tmp_path / 'started'
        script.write_text(
            f'#!/bin/sh\ncase "$*" in *answer.cpp*) touch "$TMPDIR/half.o" {started}; sleep 60;; *) echo 1;; esac\n'
        )
        script.chmod(0o755)
        command = (
            f'import os; os.environ["CXX"] = {str(script)!r}; from pathlib import Path; from slak_mm.ops import csrc;'
            f'csrc._SOURCES = Path({str(source.parent)!r}); csrc.load_library("answer")'
        )
        child = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', command], start_new_session=True)
        while not started.exists():
            assert child.poll() is None
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        folder = tmp_path / 'cache'
        assert list(folder.glob('.answer-*/half.o'))
        monkeypatch.delenv('CXX', raising=False)
        assert csrc.load_library('answer').answer() == 42
        assert sorted(p.suffix for p in folder.iterdir()) == ['.lock', '.sha256', '.so']

    def test_a_lock_that_is_a_link_is_not_followed(self, source, compiler, tmp_path):
        precious = tmp_path / 'precious'
        precious.write_text('text')
        (tmp_path / 'cache').mkdir(mode=0o700)
        (tmp_path / 'cache' / 'answer.lock').symlink_to(precious)
        with pytest.raises(csrc.CompileError, match='cannot be stored'):
            csrc.load_library('answer')
        assert precious.read_text() == 'text'

    def test_an_error_is_reported(self, source, compiler, tmp_path):
        source.write_text('int answer( { return 42; }\n')
        with pytest.raises(csrc.CompileError, match='failed: .*answer.cpp:1.*error'):
            csrc.load_library('answer')
        assert not list((tmp_path / 'cache').glob('*.so'))
        assert {p.suffix for p in (tmp_path / 'cache').iterdir()} == {'.lock'}

    def test_a_folder_that_cannot_be_written(self, source, compiler, tmp_path, monkeypatch):
        (tmp_path / 'file').touch()
        monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'file'))
        with pytest.raises(csrc.CompileError, match='SLAK_MM_CACHE names another folder'):
            csrc.load_library('answer')

    def test_a_command_that_is_no_compiler(self, source, monkeypatch):
        monkeypatch.setenv('CXX', 'false')
        with pytest.raises(csrc.CompileError, match='the C.. compiler false does not run'):
            csrc.load_library('answer')

    def test_no_compiler_at_all(self, source, monkeypatch):
        monkeypatch.delenv('CXX', raising=False)
        monkeypatch.setenv('PATH', '')
        with pytest.raises(csrc.CompileError, match='no C.. compiler was found .*name it in CXX'):
            csrc.load_library('answer')


class TestWithoutCompiler:
    @pytest.fixture(autouse=True)
    def hide_compiler(self, monkeypatch):
        monkeypatch.setenv('CXX', '/nowhere/g++')
        cpu_native._library.cache_clear()
        yield
        cpu_native._library.cache_clear()

    def test_another_backend_runs(self):
        x, kernels, _ = make(1, 4, 9, 10, [(7, 3), (3, 7), (3, 3)], torch.float32)
        assert choose_backend(x, kernels) in ('gemm', 'cpu')
        for got, kernel in zip(cross_dwconv2d(x, *kernels), kernels):
            assert relative_error(got, convolution(x.double(), kernel.double())) < 1e-5

    def test_the_reason_is_given(self):
        x, kernels, _ = make(1, 4, 9, 10, [(7, 3)], torch.float32)
        with (
            use_backend('cpu_native'),
            pytest.raises(RuntimeError, match="compiler '/nowhere/g..' that CXX names was not found"),
        ):
            cross_dwconv2d(x, *kernels)

    def test_it_is_said_once(self, monkeypatch, caplog):
        monkeypatch.setattr(_operator, '_named', set())
        with caplog.at_level(logging.INFO, logger='slak_mm'):
            for size in (5, 6):
                cross_dwconv2d(torch.ones(1, 2, size, size), torch.ones(2, 7, 3))
        (line,) = (r.getMessage() for r in caplog.records)
        assert "not cpu_native: the C++ compiler '/nowhere/g++'" in line


@needs_library
def test_threads_are_pytorchs():
    """A second OpenMP runtime would compete with the first."""
    address = cpu_native._parallel()
    if address is None:
        pytest.skip('this PyTorch uses no OpenMP')
    assert ctypes.cast(address, ctypes.c_void_p).value
    if sys.platform.startswith('linux'):
        with open('/proc/self/maps') as maps:
            owners = {
                line.split()[-1]
                for line in maps
                if int(line.split('-')[0], 16) <= address < int(line.split()[0].split('-')[1], 16)
            }
        assert len(owners) == 1 and 'omp' in owners.pop()
