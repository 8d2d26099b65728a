"""C++ sources of the operators, compiled on first use with the compiler of the system.

The library has a plain C interface and is loaded with :mod:`ctypes`: it needs no headers of PyTorch
or Python, works with any version of them and compiles within seconds. It is kept in
the project's cache (``$SLAK_MM_CACHE``, else ``$XDG_CACHE_HOME/slak_mm``, else
``~/.cache/slak_mm``), in a file whose name is a hash of the source, the compiler and the processor,
so that a home directory may be shared by different machines.
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
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slak_mm._files import CACHE_VARIABLE, cache_folder

COMPILER_VARIABLE = 'CXX'

_SOURCES = Path(__file__).parent
_COMPILERS = ('g++', 'clang++', 'c++')
_FLAGS = ('-std=c++17', '-O3', '-fPIC', '-shared', '-pthread')
# Compilers disagree, by architecture, on how to ask for the instructions of this machine.
_NATIVE_FLAGS = ('-march=native', '-mcpu=native')
_TIMEOUT_SECONDS = 600.0


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
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f'{name}-{key}.lock'):
            if library.exists():
                with contextlib.suppress(OSError):  # damaged: compile it anew
                    return ctypes.CDLL(str(library))
            _compile(compiler, source, library)
            return ctypes.CDLL(str(library))
    except OSError as error:
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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process compile while the others wait for it."""
    try:
        import fcntl
    except ImportError:  # the rename alone keeps the library whole
        yield
        return
    with open(path, 'w') as file:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    logging.getLogger('slak_mm').info('Compiling %s with %s; this is done once', source.name, shlex.join(compiler))
    message = ''
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        result = Path(folder) / library.name
        for native in (*_NATIVE_FLAGS, None):
            flags = _FLAGS if native is None else (*_FLAGS, native)
            command = [*compiler, *flags, str(source), '-o', str(result)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, errors='replace'
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise CompileError(f'the C++ compiler failed: {error}') from None
            if done.returncode == 0:
                os.replace(result, library)
                return
            # The first error of the first attempt says most.
            message = message or next(
                (line for line in done.stderr.splitlines() if 'error' in line.lower()),
                done.stderr.strip()[-200:] or f'exit code {done.returncode}',
            )
    raise CompileError(f'the C++ compiler {shlex.join(compiler)} failed: {message}')
