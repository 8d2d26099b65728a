"""C++ sources of the operators, compiled on first use with the compiler of the system.

The library has a plain C interface and is loaded with :mod:`ctypes`: it needs no headers of PyTorch or Python, works
with any version of them and compiles within seconds. It is kept in the project's cache (``$SLAK_MM_CACHE``, else
``$XDG_CACHE_HOME/slak_mm``, else ``~/.cache/slak_mm``), in a file whose name is a hash of the source, the compiler and
the processor, so that a home directory may be shared by different machines. Beside it lies its SHA-256 digest, which is
compared before the library is opened: a damaged one would end the process.

A library runs with all rights of its user. One that somebody else owns (other than root) or can write to is not used.
In a folder of which this holds the library is compiled for each process anew, out of the others' reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from slak_mm._files import CACHE_VARIABLE, cache_folder, replacing

COMPILER_VARIABLE = 'CXX'

_SOURCES = Path(__file__).parent
_COMPILERS = ('g++', 'clang++', 'c++')
_FLAGS = ('-std=c++17', '-O3', '-fPIC', '-shared', '-pthread')
# Compilers disagree, by architecture, on how to ask for the instructions of this machine.
_NATIVE_FLAGS = ('-march=native', '-mcpu=native')
_TIMEOUT_SECONDS = 600.0
_ROOT = 0  # user number


class CompileError(RuntimeError):
    """The library cannot be had; the message says why."""


def load_library(name: str) -> ctypes.CDLL:
    """Load the library of one source file, compiling it if that was not done before.

    Args:
        name: Name of the source file, without its suffix.

    Returns:
        The library.

    Raises:
        CompileError: There is no compiler, it fails, or the library cannot be stored or loaded.
    """
    compiler = _find_compiler()
    source = _SOURCES / f'{name}.cpp'
    text = source.read_bytes()
    try:
        version = subprocess.run([*compiler, '--version'], capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f'the C++ compiler {shlex.join(compiler)} does not run: {error}') from None
    identity = repr((text, compiler, version, _FLAGS, _NATIVE_FLAGS, _processor()))
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = _cache_folder()
    library = folder / f'{name}-{key}.so'
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder):
            return _load(library) or _compile_once(compiler, source, library)
        with tempfile.TemporaryDirectory() as private:
            return ctypes.CDLL(str(_compile(compiler, source, Path(private))))
    except (OSError, NotImplementedError) as error:  # filelock raises the latter where there are no locks
        raise CompileError(
            f'the compiled operator cannot be stored in or loaded from {folder}: {error}; '
            f'{CACHE_VARIABLE} names another folder'
        ) from None


def _find_compiler() -> list[str]:
    chosen = os.environ.get(COMPILER_VARIABLE)
    if chosen:
        command = shlex.split(chosen)
        if not command or shutil.which(command[0]) is None:
            raise CompileError(f'the C++ compiler {chosen!r} that {COMPILER_VARIABLE} names was not found')
        return command
    for name in _COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise CompileError(
        f'no C++ compiler was found ({", ".join(_COMPILERS)}); install one or name it in {COMPILER_VARIABLE}'
    )


def _cache_folder() -> Path:
    try:
        return cache_folder()
    except RuntimeError as error:
        raise CompileError(
            f'there is no folder for the compiled operator: {error} Name one in {CACHE_VARIABLE}'
        ) from None


@functools.lru_cache(maxsize=1)
def _processor() -> tuple[str, ...]:
    """What the meaning of ``-march=native`` depends on."""
    described = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        wanted = ('model name', 'flags', 'Features', 'CPU part', 'cpu')
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        described += sorted({s for s in lines if s.split(':')[0].strip() in wanted})
    return tuple(described)


def _is_private(path: Path) -> bool:
    """Whether nobody but this user and root owns or can write to a file or folder; says so if not."""
    if not hasattr(os, 'getuid'):  # Windows
        return True
    status = path.stat()
    if status.st_uid in (os.getuid(), _ROOT) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return True
    _warn_of(path)
    return False


@functools.cache  # once for each path
def _warn_of(path: Path) -> None:
    logging.getLogger('slak_mm').warning(
        '%s belongs to somebody else or others can write to it: no compiled operator is taken from there. '
        'Own it and take their right away (chmod go-w), or name another folder in %s',
        path,
        CACHE_VARIABLE,
    )


def _load(library: Path) -> ctypes.CDLL | None:
    """The library, if there is one that is whole."""
    with contextlib.suppress(OSError):
        digest = _digest_file(library).read_text(errors='replace')
        if _is_private(library) and digest == hashlib.sha256(library.read_bytes()).hexdigest():
            return ctypes.CDLL(str(library))
    return None


def _digest_file(library: Path) -> Path:
    return library.with_suffix('.sha256')


def _compile_once(compiler: list[str], source: Path, library: Path) -> ctypes.CDLL:
    """Compile and store the library; one process does while the others wait for it."""
    from filelock import FileLock  # a tenth of a second, and few processes compile

    with FileLock(library.parent / f'{source.stem}.lock'):
        found = _load(library)
        if found is not None:
            return found
        for leftover in library.parent.glob(f'.{source.stem}-*'):  # of processes that were killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=f'.{source.stem}-') as folder:
            result = _compile(compiler, source, Path(folder))
            with replacing(_digest_file(library)) as part:
                part.write_text(hashlib.sha256(result.read_bytes()).hexdigest())
            with replacing(library) as part:
                os.replace(result, part)
        return ctypes.CDLL(str(library))


def _compile(compiler: list[str], source: Path, folder: Path) -> Path:
    """Compile a source file, all files being written to ``folder``."""
    logging.getLogger('slak_mm').info('Compiling %s with %s; this is done once', source.name, shlex.join(compiler))
    result = folder / f'{source.stem}.so'
    environment = {**os.environ, 'TMPDIR': str(folder)}
    message = ''
    for native in (*_NATIVE_FLAGS, None):
        flags = _FLAGS if native is None else (*_FLAGS, native)
        command = [*compiler, *flags, str(source), '-o', str(result)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, errors='replace', env=environment
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise CompileError(f'the C++ compiler failed: {error}') from None
        if done.returncode == 0:
            result.chmod(0o755)  # whatever the umask is
            return result
        # The first error of the first attempt says most.
        message = message or next(
            (line for line in done.stderr.splitlines() if 'error' in line.lower()),
            done.stderr.strip()[-200:] or f'exit code {done.returncode}',
        )
    raise CompileError(f'the C++ compiler {shlex.join(compiler)} failed: {message}')
