#!/usr/bin/env python3
"""Make the project's environment, ``.venv`` inside the checkout, and run a command in it.

``make demo``, ``make test`` and the other targets call this script with the interpreter that the
Makefile found; it needs the standard library only. A call does what is missing and nothing else:

1. ``.venv`` itself and the pinned packages of ``requirements/``;
2. mmcv, with or without its compiled operators. Semantic segmentation needs none of them; detection
   does. onedl-mmcv is published as source only, and its ``setup.py`` leaves the operators out
   silently where it cannot import torch, which is the case in pip's isolated builds. pip would
   store either result in its wheel cache under one and the same key and hand it out later whatever
   was asked for, so the wheel is built here, past that cache, and kept in a cache of our own whose
   key says what is inside;
3. slak_mm in editable mode;
4. a check of every component, one line each.

The result is recorded in ``.venv/slak_mm.json``. An interrupted call is repaired by the next one,
and calls at the same time wait for each other.

Environment variables:
    SLAK_MM_CACHE: Folder of cached wheels (default: ``$XDG_CACHE_HOME/slak_mm`` or
        ``~/.cache/slak_mm``).
    SLAK_MM_MMCV_WHEEL: Path of a prebuilt wheel of mmcv with operators, used instead of a build.
    MAX_JOBS: Number of compilers to run in parallel (default: what the cores and the memory allow).
    FORCE_CUDA: ``1`` builds the CUDA operators on a machine without a GPU, ``0`` builds the CPU's
        on one with a GPU. By default CUDA operators are built where there are a GPU and a matching
        nvcc.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[1]
PYTHON_VERSIONS = ((3, 10), (3, 11), (3, 12))
MMCV = 'onedl-mmcv'
STAMP_NAME = 'slak_mm.json'
IN_PROGRESS_NAME = 'slak_mm.in-progress'
STAMP_FORMAT = 1
GIB = 1024**3
# The worst translation unit of mmcv's operators takes about this much memory to compile.
COMPILER_MEMORY = 2.5 * GIB
# Seconds between two progress lines where the output is not a terminal.
PROGRESS_INTERVAL = 15.0

# The user's settings that would send packages elsewhere or change how they are built. The index,
# proxy and certificate settings are left alone.
UNWANTED_VARIABLES = (
    'PIP_CONSTRAINT',
    'PIP_NO_BUILD_ISOLATION',
    'PIP_NO_DEPS',
    'PIP_PREFIX',
    'PIP_REQUIREMENT',
    'PIP_ROOT',
    'PIP_TARGET',
    'PIP_USER',
    'PYTHONHOME',
    'PYTHONPATH',
    'VIRTUAL_ENV',
)


class SetupError(Exception):
    """A problem told to the user as one sentence."""


def say(text: str) -> None:
    """Print a line of the set-up at once, also into a pipe."""
    print(f'[set-up] {text}', flush=True)


# ---- pins, paths and keys ------------------------------------------------------------------------


def parse_pins(text: str) -> dict[str, str]:
    """Read the pinned requirements of a file.

    Args:
        text: Content of a requirements file whose entries read ``name==version`` or
            ``name===version``, with comments and environment markers.

    Returns:
        Full requirement (without comment) by normalized distribution name.

    Raises:
        SetupError: If an entry is not pinned.
    """
    pins = {}
    for raw in text.splitlines():
        line = re.sub(r'(^|\s)#.*', '', raw).strip()
        if not line:
            continue
        match = re.match(r'([A-Za-z0-9][A-Za-z0-9._-]*)\s*={2,3}\s*[^\s;=,<>!~*]+\s*(;.*)?$', line)
        if match is None:
            raise SetupError(f'"{line}" in requirements/ is not a pinned version (name==version).')
        pins[re.sub(r'[-_.]+', '-', match[1]).lower()] = line
    return pins


def pinned_version(requirement: str) -> str:
    """Version of ``name==version[; marker]``."""
    return re.split(r'={2,3}', requirement.split(';')[0], maxsplit=1)[1].strip()


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Folder of the project's cache; see the environment variables above."""
    if environ.get('SLAK_MM_CACHE'):
        return Path(environ['SLAK_MM_CACHE']).expanduser().absolute()
    base = environ.get('XDG_CACHE_HOME') or Path(environ.get('HOME') or Path.home()) / '.cache'
    return Path(base) / 'slak_mm'


def python_tag() -> str:
    """Tag of the running interpreter as wheels name it, such as ``cp311``."""
    return f'cp{sys.version_info.major}{sys.version_info.minor}'


def platform_tag() -> str:
    """System and machine, such as ``linux_x86_64``."""
    return re.sub(r'\W+', '_', f'{platform.system()}_{platform.machine()}').lower()


def mmcv_key(version: str, torch: Mapping[str, Any] | None) -> str:
    """Name of a cached build of mmcv: everything that decides what is inside the wheel.

    Args:
        version: mmcv's version.
        torch: Result of :func:`probe_torch` with ``target``, or ``None`` for the build without
            operators, which is pure Python and the same everywhere.

    Returns:
        Folder name, such as ``onedl_mmcv-2.3.6-ops-torch_2.13.0_cu130-cp311-linux_x86_64-cpu``.
    """
    if torch is None:
        return f'onedl_mmcv-{version}-noops'
    torch_version = torch['version'].replace('+', '_')
    return f'onedl_mmcv-{version}-ops-torch_{torch_version}-{python_tag()}-{platform_tag()}-{torch["target"]}'


def wheel_has_operators(path: Path) -> bool:
    """Whether a wheel of mmcv contains the compiled extension ``mmcv._ext``."""
    with zipfile.ZipFile(path) as wheel:
        return any(re.fullmatch(r'mmcv/_ext\..*(so|pyd)', name) for name in wheel.namelist())


def find_wheel(folder: Path, with_operators: bool) -> Path | None:
    """The wheel of a cache folder if it is sound and has what its key promises.

    Args:
        folder: Cache folder of one key.
        with_operators: What the wheel must be.

    Returns:
        Path of the wheel, or ``None`` where there is none to use.
    """
    for path in sorted(folder.glob('*.whl')):
        try:
            if wheel_has_operators(path) == with_operators:
                return path
        except (OSError, zipfile.BadZipFile):
            continue
    return None


def user_wheel(environ: Mapping[str, str], version: str) -> Path | None:
    """The prebuilt wheel that the user names by ``SLAK_MM_MMCV_WHEEL``.

    Args:
        environ: Environment variables.
        version: The pinned version of mmcv.

    Returns:
        The wheel, or ``None`` if the variable is not set.

    Raises:
        SetupError: If the file does not exist, is no wheel of this mmcv for this Python, or has no
            operators.
    """
    name = environ.get('SLAK_MM_MMCV_WHEEL')
    if not name:
        return None
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise SetupError(f'SLAK_MM_MMCV_WHEEL names {path}, which is not a file.')
    pattern = r'onedl_mmcv-([^-]+)(?:-\d[^-]*)?-([^-]+)-[^-]+-[^-]+\.whl'
    match = re.fullmatch(pattern, path.name)
    if match is None:
        raise SetupError(f'SLAK_MM_MMCV_WHEEL names {path}, which is not a wheel of {MMCV}.')
    if match[1] != version:
        raise SetupError(
            f'SLAK_MM_MMCV_WHEEL names {path}, which is version {match[1]}, while '
            f'requirements/openmmlab.txt pins {version}.'
        )
    try:
        with_operators = wheel_has_operators(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise SetupError(f'SLAK_MM_MMCV_WHEEL names {path}, which cannot be read: {error}.') from error
    if not with_operators:
        raise SetupError(
            f'SLAK_MM_MMCV_WHEEL names {path}, which was built without operators (it has no '
            'mmcv/_ext): unset the variable, or build a wheel where torch is importable '
            '(pip wheel --no-cache-dir --no-build-isolation).'
        )
    if python_tag() not in match[2].split('.'):
        raise SetupError(
            f'SLAK_MM_MMCV_WHEEL names {path}, which was built for {match[2]}, while this is '
            f'Python {platform.python_version()} ({python_tag()}).'
        )
    return path


def file_digest(path: Path) -> str:
    """Short hash of a file's content."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()[:16]


def tree_digest(root: Path, names: Sequence[str], *facts: str) -> str:
    """Short hash of some files' names and contents and of some facts.

    Args:
        root: Folder that ``names`` are relative to; a missing file counts as such.
        names: Files.
        facts: Further strings that the result depends on.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        path = root / name
        content = path.read_bytes() if path.is_file() else b'(missing)'
        digest.update(f'{name}\0{len(content)}\0'.encode() + content)
    for fact in facts:
        digest.update(f'{fact}\0'.encode())
    return digest.hexdigest()[:16]


def interpreter_digest(root: Path) -> str:
    """Hash of what a virtual environment depends on: the interpreter, and its place, for the
    scripts in it hold absolute paths.
    """
    facts = (str(STAMP_FORMAT), sys.version, sys.base_prefix, platform.machine(), str(root))
    return tree_digest(root, (), *facts)


def environment_digest(root: Path) -> str:
    """Hash of what decides the packages: the interpreter and the pins."""
    names = [str(path.relative_to(root)) for path in (root / 'requirements').glob('*.txt')]
    return tree_digest(root, names, interpreter_digest(root))


def project_digest(root: Path) -> str:
    """Hash of what decides how slak_mm itself is installed, and of this script."""
    return tree_digest(root, ['setup.py', 'pyproject.toml', 'slak_mm/version.py', 'tools/setup_env.py'])


def operators_request(environ: Mapping[str, str], version: str) -> str:
    """What the user asks of mmcv's operators in particular.

    Args:
        environ: Environment variables.
        version: The pinned version of mmcv.

    Returns:
        A string that changes with the request; empty where any operators will do.
    """
    wheel = user_wheel(environ, version)
    if wheel is not None:
        return f'wheel {file_digest(wheel)}'
    force = environ.get('FORCE_CUDA')
    return f'FORCE_CUDA={force}' if force else ''


# ---- stamp ---------------------------------------------------------------------------------------


def read_stamp(venv: Path) -> dict[str, Any]:
    """The record of the last complete set-up; empty where there is none that can be read."""
    try:
        stamp = json.loads((venv / STAMP_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv: Path, stamp: Mapping[str, Any]) -> None:
    """Replace the record in one step, so that a reader never sees half of it."""
    part = venv / (STAMP_NAME + '.part')
    part.write_text(json.dumps(stamp, indent=2) + '\n')
    os.replace(part, venv / STAMP_NAME)


def has_mmcv(stamp: Mapping[str, Any], with_operators: bool, request: str) -> bool:
    """Whether the recorded mmcv serves a call.

    Args:
        stamp: Result of :func:`read_stamp`.
        with_operators: Whether operators are needed; where they are not, a build that has them
            serves as well.
        request: Result of :func:`operators_request`.
    """
    if not with_operators:
        return stamp.get('mmcv') in ('ops', 'noops')
    return stamp.get('mmcv') == 'ops' and request in ('', stamp.get('request'))


# ---- locks ---------------------------------------------------------------------------------------


class FileLock:
    """An advisory lock on a file: one writer or many readers, released when the process ends.

    Args:
        path: Lock file; it is created and stays.
        busy_text: Line to print when the lock is held by somebody else.
    """

    def __init__(self, path: Path, busy_text: str) -> None:
        self.path = path
        self.busy_text = busy_text
        self.fd: int | None = None

    def acquire(self, shared: bool = False) -> None:
        """Take the lock or convert the one that is held, waiting as long as it takes."""
        if fcntl is None:
            raise SetupError(
                'The set-up supports Linux and macOS; on Windows, run it in the Windows Subsystem for Linux.'
            )
        if self.fd is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self.fd, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            say(self.busy_text)
            fcntl.flock(self.fd, mode)

    def release(self) -> None:
        """Give the lock back."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def keep_across_exec(self) -> None:
        """Let the command that replaces this process hold the lock until it ends."""
        assert self.fd is not None
        os.set_inheritable(self.fd, True)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


# ---- running things ------------------------------------------------------------------------------


class PipProgress:
    """Follows the output of ``pip install``: what is downloaded, then installed."""

    def __init__(self) -> None:
        self.files = 0
        self.mebibytes = 0.0
        self.phase = 'resolving'
        self.installing_since: float | None = None

    def feed(self, line: str) -> None:
        """Take one line of output into account."""
        match = re.search(r'Downloading .*\(([\d.]+) (kB|MB|GB)\)', line)
        if match is not None:
            self.files += 1
            self.mebibytes += float(match[1]) * {'kB': 1e-3, 'MB': 1.0, 'GB': 1e3}[match[2]]
            self.phase = 'downloading'
        elif 'Installing collected packages' in line:
            self.installing_since = time.monotonic()
            self.phase = 'installing'

    def text(self) -> str:
        """State of the work in a few words."""
        if self.files == 0:
            return self.phase
        return f'{self.phase} ({self.files} files, {self.mebibytes:.0f} MB)'


class NinjaProgress:
    """Follows the output of a ninja build: objects compiled so far and in total."""

    def __init__(self) -> None:
        self.done = 0
        self.total = 0

    def feed(self, line: str) -> None:
        """Take one line of output into account."""
        match = re.match(r'\s*\[(\d+)/(\d+)\] ', line)
        if match is not None:
            self.done, self.total = int(match[1]), int(match[2])

    def text(self) -> str:
        """State of the work in a few words."""
        if self.total == 0:
            return 'preparing the sources'
        return f'{self.done}/{self.total} objects compiled'


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file."""
    with contextlib.suppress(OSError):
        return '\n'.join(path.read_text(errors='replace').splitlines()[-lines:])
    return ''


def run_logged(
    command: Sequence[str | Path],
    title: str,
    log: Path,
    environ: Mapping[str, str],
    progress: PipProgress | NinjaProgress,
    failure: str,
) -> float:
    """Run a command whose output goes to a log file, with a progress line.

    On a terminal the line is renewed every second, elsewhere one is printed every 15 seconds.

    Args:
        command: Program and arguments.
        title: What is being done, for the progress line.
        log: File that the output is appended to.
        environ: Environment of the command.
        progress: Reads the output and says how far it is.
        failure: Sentence for the user if the command fails; the log's end is printed before it.

    Returns:
        Seconds that it took.

    Raises:
        SetupError: If the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tty = sys.stdout.isatty()
    with log.open('a', buffering=1, errors='replace') as file:
        file.write(f'$ {shlex.join(map(str, command))}\n')
        # A session of its own: the compilers can then be stopped together with their driver.
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environ),
            text=True,
            errors='replace',
            start_new_session=True,
        )
        assert process.stdout is not None
        stdout = process.stdout

        def read() -> None:
            for line in stdout:
                file.write(line)
                progress.feed(line)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        next_line = start + PROGRESS_INTERVAL
        try:
            while True:
                reader.join(1.0 if tty else 0.2)
                now = time.monotonic()
                minutes = (now - start) / 60
                if tty:
                    columns = shutil.get_terminal_size().columns
                    text = f'[set-up] {title}: {progress.text()}, {minutes:.1f} min'
                    print(f'\r\x1b[K{text[: columns - 1]}', end='', flush=True)
                elif now >= next_line:
                    say(f'{title}: {progress.text()}, {minutes:.1f} min')
                    next_line = now + PROGRESS_INTERVAL
                if not reader.is_alive():
                    break
            code = process.wait()
        except BaseException:
            stop_group(process)
            reader.join(5.0)
            raise
        finally:
            if tty:
                print('\r\x1b[K', end='', flush=True)
        reader.join()
    if code != 0:
        print(tail(log, 25), flush=True)
        raise SetupError(f'{failure} The whole output is in {log}.')
    return time.monotonic() - start


def stop_group(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The user's environment without the settings that would divert an installation."""
    result = {name: value for name, value in environ.items() if name not in UNWANTED_VARIABLES}
    result.update(PIP_DISABLE_PIP_VERSION_CHECK='1', PYTHONNOUSERSITE='1', PYTHONUNBUFFERED='1')
    return result


# ---- the steps -----------------------------------------------------------------------------------


def available_memory(proc: Path = Path('/proc/meminfo'), cgroup: Path = Path('/sys/fs/cgroup')) -> float:
    """Bytes of memory that may be used, by the system and by the container; infinite if unknown."""
    amounts = [float('inf')]
    with contextlib.suppress(OSError, ValueError, TypeError):
        match = re.search(r'^MemAvailable:\s+(\d+) kB', proc.read_text(), re.MULTILINE)
        if match is not None:
            amounts.append(int(match[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limit = int((cgroup / 'memory.max').read_text())
        used = int((cgroup / 'memory.current').read_text())
        # The page cache counts as used, but gives way.
        match = re.search(r'^inactive_file (\d+)', (cgroup / 'memory.stat').read_text(), re.MULTILINE)
        amounts.append(limit - used + (int(match[1]) if match is not None else 0))
    return max(0.0, min(amounts))


def job_count(environ: Mapping[str, str], cores: int, memory: float) -> int:
    """Number of compilers to run in parallel.

    Args:
        environ: Its ``MAX_JOBS`` decides if set.
        cores: Cores of this process.
        memory: Bytes of memory that may be used.

    Raises:
        SetupError: If ``MAX_JOBS`` is not a positive number.
    """
    text = environ.get('MAX_JOBS')
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise SetupError(f'MAX_JOBS is "{text}", which is not a positive whole number.')
        return int(text)
    return max(1, int(min(cores, memory / COMPILER_MEMORY)))


def core_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Setup:
    """One set-up of one checkout.

    Args:
        root: The checkout.
        environ: The user's environment variables.
    """

    def __init__(self, root: Path, environ: Mapping[str, str]) -> None:
        self.root = root
        self.user_environ = dict(environ)
        self.venv = root / '.venv'
        self.python = self.venv / 'bin' / 'python'
        self.environ = clean_environ(environ)
        self.environ['PATH'] = f'{self.venv / "bin"}{os.pathsep}{environ.get("PATH", os.defpath)}'
        self.cache = cache_dir(environ)
        self.log = self.venv / 'setup.log'
        self.lock = FileLock(root / '.venv.lock', 'Waiting for another make in this checkout to finish ...')
        self.requirements = root / 'requirements'
        openmmlab = parse_pins((self.requirements / 'openmmlab.txt').read_text())
        self.mmcv_pin = openmmlab.pop(MMCV)
        self.mmcv_version = pinned_version(self.mmcv_pin)
        self.without_dependencies = list(openmmlab.values())
        self.times: dict[str, float] = {}

    # -- small helpers

    def pip(self, *arguments: str | Path) -> list[str | Path]:
        """Command line of the environment's pip."""
        options = ['--no-input', '--progress-bar', 'off']
        return [self.python, '-m', 'pip', *arguments[:1], *options, *arguments[1:]]

    def run_pip(self, title: str, failure: str, *arguments: str | Path) -> PipProgress:
        """Run pip with progress and add its time to the account, split where pip says so."""
        progress = PipProgress()
        start = time.monotonic()
        run_logged(self.pip(*arguments), title, self.log, self.environ, progress, failure)
        end = time.monotonic()
        middle = progress.installing_since or end
        self.count('downloads', middle - start)
        self.count('installation', end - middle)
        return progress

    def count(self, name: str, seconds: float) -> None:
        """Add to the account of times."""
        self.times[name] = self.times.get(name, 0.0) + seconds

    @property
    def marker(self) -> Path:
        """File that exists while ``.venv`` is made and filled."""
        return self.venv / IN_PROGRESS_NAME

    def record_packages(self, environment: str) -> None:
        """Record that the packages are complete, and nothing beyond them."""
        interpreter = interpreter_digest(self.root)
        write_stamp(self.venv, {'environment': environment, 'interpreter': interpreter})

    def remove_installed(self, module: str, distribution: str) -> None:
        """Remove an installed package, also one that was half written, which pip refuses to do."""
        for site in self.venv.glob('lib/python3*/site-packages'):
            patterns = (module, f'{distribution}-*.dist-info', f'__editable__*{module}*')
            for path in (path for pattern in patterns for path in site.glob(pattern)):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    # -- step 1: packages

    def make_venv(self) -> None:
        """Create ``.venv``, with pip also where Python came without ``ensurepip`` (Debian)."""
        if self.venv.exists():
            shutil.rmtree(self.venv)
        self.venv.mkdir()
        self.marker.touch()
        base = Path(getattr(sys, '_base_executable', None) or sys.executable)
        say(f'Making {self.venv} with Python {platform.python_version()} ({base})')
        start = time.monotonic()
        has_ensurepip = subprocess.run([base, '-c', 'import ensurepip'], env=self.environ, capture_output=True)
        command: list[str | Path] = [base, '-m', 'venv', self.venv]
        if has_ensurepip.returncode != 0:
            command.insert(3, '--without-pip')
        result = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        if result.returncode != 0:
            print((result.stdout + result.stderr).strip(), flush=True)
            raise SetupError(
                f'{base} cannot make a virtual environment; on Debian and Ubuntu, install the package python3-venv.'
            )
        if has_ensurepip.returncode != 0:
            self.fetch_pip()
        self.count('installation', time.monotonic() - start)

    def fetch_pip(self) -> None:
        """Install pip into the environment from its wheel, which can run itself."""
        pin = parse_pins((self.requirements / 'build.txt').read_text())['pip']
        version = pinned_version(pin)
        name = f'pip-{version}-py3-none-any.whl'
        index = self.environ.get('PIP_INDEX_URL', 'https://pypi.org/simple').rstrip('/')
        try:
            with urllib.request.urlopen(f'{index}/pip/', timeout=60) as page:
                base = page.geturl()
                links = re.findall(r'href="([^"#]+)', page.read().decode())
            link = next(link for link in links if link.endswith(name))
            with tempfile.TemporaryDirectory() as folder:
                wheel = Path(folder) / name
                url = urllib.parse.urljoin(base, link)
                with urllib.request.urlopen(url, timeout=60) as source, wheel.open('wb') as target:
                    shutil.copyfileobj(source, target)
                subprocess.run(
                    [self.python, wheel / 'pip', 'install', '--quiet', '--no-deps', wheel], env=self.environ, check=True
                )
        except (OSError, StopIteration, subprocess.CalledProcessError) as error:
            raise SetupError(
                f'This Python has no ensurepip, and pip {version} could not be fetched from '
                f'{index} ({error!r}); on Debian and Ubuntu, install the package python3-venv.'
            ) from error

    def install_packages(self) -> None:
        """Bring ``.venv`` to the pinned packages; mmcv and slak_mm are separate steps."""
        failure = 'The packages could not be installed: check the network and the free disk space.'
        files = self.requirements
        self.run_pip('pip', failure, 'install', '-r', files / 'build.txt')
        arguments: list[str | Path] = ['install', '--only-binary', ':all:']
        arguments += ['-c', files / 'constraints.txt']
        for name in ('build', 'torch', 'runtime', 'dev'):
            arguments += ['-r', files / f'{name}.txt']
        say('Installing the pinned packages (about 3 GB to download)')
        progress = self.run_pip('packages', failure, *arguments)
        # Two of these come as source. Building them in isolation keeps torch out of their sight.
        constraint: list[str | Path] = ['--build-constraint', files / 'build.txt']
        title = 'OpenMMLab packages'
        self.run_pip(title, failure, 'install', '--no-deps', *constraint, *self.without_dependencies)
        say(f'{progress.files} files, {progress.mebibytes:.0f} MB downloaded')

    def ensure_packages(self, environment: str) -> None:
        """Step 1; the caller holds the lock.

        Args:
            environment: Result of :func:`environment_digest`, recorded when the step is complete.
        """
        stamp = read_stamp(self.venv)
        usable = True
        if self.marker.exists():
            # A package that was half written looks complete to pip.
            say('The last set-up did not end: starting over with a new .venv')
            usable = False
        elif not stamp and self.venv.exists():
            raise SetupError(f'{self.venv} was not made by this script: move it away, or remove it by `make clean`.')
        elif stamp and stamp.get('interpreter') != interpreter_digest(self.root):
            say('.venv was made by another Python or at another place: making a new one')
            usable = False
        elif stamp and not self.runs():
            say('The Python of .venv does not run any more: making a new one')
            usable = False
        elif stamp.get('environment') == environment:
            return
        if not usable or not stamp:
            self.make_venv()
        self.marker.touch()
        self.install_packages()
        self.record_packages(environment)
        self.marker.unlink()

    def runs(self) -> bool:
        """Whether ``.venv`` has a working Python with pip."""
        command = [str(self.python), '-c', 'import pip']
        try:
            return subprocess.run(command, env=self.environ, capture_output=True).returncode == 0
        except OSError:
            return False

    # -- step 2: mmcv

    def probe_torch(self) -> dict[str, Any]:
        """What decides how mmcv's operators are built.

        Returns:
            ``version`` (of torch), ``target`` (``cpu`` or ``cuda<version>-<architectures>``) and
            ``note`` (why it is the CPU on a machine with a GPU, or empty).

        Raises:
            SetupError: If torch does not import, or ``FORCE_CUDA=1`` cannot be met.
        """
        code = (
            'import json, torch\n'
            'from torch.utils import cpp_extension as c\n'
            'n = torch.cuda.device_count() if torch.cuda.is_available() else 0\n'
            'caps = sorted({torch.cuda.get_device_capability(i) for i in range(n)})\n'
            'print(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda,'
            ' caps=caps, home=c.CUDA_HOME)))'
        )
        result = subprocess.run([self.python, '-c', code], env=self.environ, capture_output=True, text=True)
        if result.returncode != 0:
            print(result.stderr.strip()[-2000:], flush=True)
            raise SetupError(
                'torch does not import in .venv: run `make clean` and try again; if it stays so, '
                'this machine is not one that the index build of torch supports.'
            )
        facts = json.loads(result.stdout.splitlines()[-1])
        nvcc = self.nvcc_version(facts['home'])
        target, note = choose_target(self.user_environ, facts['cuda'], [tuple(cap) for cap in facts['caps']], nvcc)
        return {'version': facts['version'], 'target': target, 'note': note}

    def nvcc_version(self, cuda_home: str | None) -> str | None:
        """Version of the CUDA compiler, or ``None`` where there is none."""
        if not cuda_home:
            return None
        try:
            command = [str(Path(cuda_home) / 'bin' / 'nvcc'), '--version']
            result = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        except OSError:
            return None
        match = re.search(r'release (\d+\.\d+)', result.stdout)
        return match[1] if match else None

    def check_compiler(self) -> None:
        """Raise a readable error if C++ extensions cannot be compiled here."""
        compiler = shlex.split(self.environ.get('CXX', '') or 'c++')[0]
        if shutil.which(compiler, path=self.environ['PATH']) is None:
            raise SetupError(
                f'The operators of mmcv need a C++ compiler, and "{compiler}" was not found: '
                'install one (g++ on Debian and Ubuntu, the command line tools on macOS), name it '
                'by CXX, or name a prebuilt wheel by SLAK_MM_MMCV_WHEEL.'
            )
        if not (Path(sysconfig.get_path('include')) / 'Python.h').is_file():
            raise SetupError(
                f"mmcv's operators need the headers of Python {platform.python_version()} "
                f'({sysconfig.get_path("include")}/Python.h), which are not there: install them '
                f'(python{sys.version_info.major}.{sys.version_info.minor}-dev on Debian and '
                'Ubuntu), or name a prebuilt wheel by SLAK_MM_MMCV_WHEEL.'
            )

    def wheel_imports(self, wheel: Path) -> str:
        """Try a wheel with operators beside this environment's torch without installing it.

        Returns:
            Why it does not import; empty if it does.
        """
        with tempfile.TemporaryDirectory(prefix='slak_mm_') as folder:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            code = 'import sys; sys.path.insert(0, sys.argv[1]); import torch, mmcv._ext'
            result = subprocess.run([self.python, '-c', code, folder], env=self.environ, capture_output=True, text=True)
        if result.returncode == 0:
            return ''
        lines = result.stderr.strip().splitlines()
        return lines[-1] if lines else f'Python ended with code {result.returncode}'

    def build_wheel(self, key: str, torch: Mapping[str, Any] | None) -> Path:
        """Build mmcv into the cache, or wait for somebody who does.

        Args:
            key: Result of :func:`mmcv_key`.
            torch: Result of :meth:`probe_torch`, or ``None`` for the build without operators.

        Returns:
            The cached wheel.
        """
        folder = self.cache / 'wheels' / key
        busy = f'Waiting for another build of mmcv ({folder}) to finish ...'
        with FileLock(folder.with_name(key + '.lock'), busy):
            wheel = find_wheel(folder, torch is not None)
            if wheel is not None:
                return wheel
            build = self.cache / 'build' / key
            # What a killed build left; nobody else can be at work here.
            shutil.rmtree(build, ignore_errors=True)
            (build / 'tmp').mkdir(parents=True)
            log = folder / 'build.log'
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text('')
            environ = {**self.environ, 'TMPDIR': str(build / 'tmp')}
            # Past pip's own wheel cache, which does not tell the two kinds of build apart.
            arguments: list[str | Path] = ['wheel', '--no-cache-dir', '--no-deps', '-w', build]
            if torch is None:
                title = 'mmcv without operators'
                failure = 'mmcv could not be built.'
                arguments += ['--build-constraint', self.requirements / 'build.txt']
            else:
                title = "mmcv's operators"
                failure = (
                    "mmcv's operators could not be compiled: the lines above are the end of the "
                    'output. With less memory than the compilers need, set MAX_JOBS=1.'
                )
                self.check_compiler()
                jobs = job_count(self.user_environ, core_count(), available_memory())
                environ['MAX_JOBS'] = str(jobs)
                if torch['target'] == 'cpu':
                    # mmcv's setup.py asks for nvcc as soon as it sees a GPU.
                    environ.update(FORCE_CUDA='0', CUDA_VISIBLE_DEVICES='')
                else:
                    environ['FORCE_CUDA'] = '1'
                if torch['note']:
                    say(torch['note'])
                say(
                    f"Compiling mmcv's operators for torch {torch['version']} ({torch['target']}), "
                    f'{jobs} at a time: once, 10 to 30 minutes on two cores; output in {log}'
                )
                arguments += ['--no-build-isolation', '--no-binary', MMCV, '-v']
            command = self.pip(*arguments, self.mmcv_pin)
            try:
                seconds = run_logged(command, title, log, environ, NinjaProgress(), failure)
                built = find_wheel(build, torch is not None)
                if built is None:
                    raise SetupError(
                        f'The build of mmcv gave no wheel {"with" if torch else "without"} '
                        f'operators; the output is in {log}.'
                    )
                for old in folder.glob('*.whl'):
                    old.unlink()
                os.replace(built, folder / built.name)
            finally:
                shutil.rmtree(build, ignore_errors=True)
            self.count('building mmcv', seconds)
            say(f'Built {folder / built.name} in {seconds / 60:.1f} min')
            return folder / built.name

    def find_mmcv(self, with_operators: bool) -> tuple[Path, str]:
        """The wheel of mmcv to install and the stamp's name for its kind; builds it if need be."""
        wheel = user_wheel(self.user_environ, self.mmcv_version)
        if wheel is not None:
            reason = self.wheel_imports(wheel)
            if reason:
                raise SetupError(
                    f'SLAK_MM_MMCV_WHEEL names {wheel}, whose operators do not import beside this '
                    f"environment's torch: {reason}"
                )
            return wheel, 'ops'
        torch = self.probe_torch()
        key = mmcv_key(self.mmcv_version, torch)
        folder = self.cache / 'wheels' / key
        wheel = find_wheel(folder, True)
        if wheel is not None:
            reason = self.wheel_imports(wheel)
            if not reason:
                return wheel, 'ops'
            say(f'The cached {wheel} does not import ({reason}); leaving it aside')
            if with_operators:
                wheel.unlink(missing_ok=True)
        if with_operators:
            wheel = self.build_wheel(key, torch)
            reason = self.wheel_imports(wheel)
            if reason:
                raise SetupError(
                    f"mmcv's operators were compiled but do not import: {reason}; the output is in "
                    f'{folder / "build.log"}.'
                )
            return wheel, 'ops'
        return self.build_wheel(mmcv_key(self.mmcv_version, None), None), 'noops'

    def install_mmcv(self, wheel: Path) -> None:
        """Install a wheel of mmcv over whichever kind is there."""
        say(f'Installing {wheel}')
        failure = f'{wheel} could not be installed.'
        self.remove_installed('mmcv', 'onedl_mmcv')
        self.run_pip('mmcv', failure, 'install', '--no-deps', wheel)

    # -- steps 3 and 4

    def install_project(self) -> None:
        """Install slak_mm in editable mode with the environment's own setuptools, offline."""
        self.remove_installed('slak_mm', 'slak_mm')
        self.run_pip(
            'slak_mm',
            'slak_mm could not be installed.',
            'install',
            '--no-deps',
            '--no-build-isolation',
            '--no-index',
            '-e',
            self.root,
        )

    def check(self, with_operators: bool) -> None:
        """Try every component and print one line for each.

        Raises:
            SetupError: If one does not work.
        """
        start = time.monotonic()
        command = [str(self.python), '-I', str(Path(__file__).resolve()), '--report']
        command += ['ops' if with_operators else 'noops']
        # Isolated: the folder of this script must not shadow what is installed.
        result = subprocess.run(command, env=self.environ)
        self.count('check', time.monotonic() - start)
        if result.returncode < 0:
            raise SetupError(
                f'The component after the last line above crashed with signal '
                f'{-result.returncode}: run `make clean` and try again.'
            )
        if result.returncode > 0:
            raise SetupError(
                'A component of the environment does not work (see the line that says FAILED): run '
                '`make clean` and try again.'
            )

    # -- all together

    def ensure(self, with_operators: bool, recheck: bool) -> None:
        """Do what is missing and leave holding a shared lock on the environment.

        Args:
            with_operators: Whether mmcv's operators are needed.
            recheck: Whether to check the components also if nothing had to be done.
        """
        start = time.monotonic()
        environment, project = environment_digest(self.root), project_digest(self.root)
        request = operators_request(self.user_environ, self.mmcv_version)

        def complete() -> bool:
            stamp = read_stamp(self.venv)
            return (
                stamp.get('environment') == environment
                and stamp.get('project') == project
                and has_mmcv(stamp, with_operators, request)
                and not self.marker.exists()
            )

        found: tuple[Path, str] | None = None
        while True:
            # A reader first and last: calls that need nothing do not wait for each other, and
            # nobody changes the environment under the command that follows.
            self.lock.acquire(shared=True)
            if complete():
                break
            self.lock.release()
            self.lock.acquire()
            if complete():
                continue
            self.ensure_packages(environment)
            if found is None and not has_mmcv(read_stamp(self.venv), with_operators, request):
                # Compiling takes minutes and only reads the environment; `make demo` may go ahead
                # in the meantime, or another call may complete what is missing.
                self.lock.release()
                found = self.find_mmcv(with_operators)
                continue
            self.finish(found, with_operators, request, project)
        kind = read_stamp(self.venv)['mmcv']
        if self.times:
            self.account(time.monotonic() - start)
            return
        text = 'with' if kind == 'ops' else 'without'
        say(f'.venv is up to date (Python {platform.python_version()}, mmcv {text} operators)')
        if recheck:
            self.check(kind == 'ops')

    def finish(self, found: tuple[Path, str] | None, with_operators: bool, request: str, project: str) -> None:
        """Steps 2 to 4, when the wheel of mmcv is there; the caller holds the lock.

        Args:
            found: Result of :meth:`find_mmcv`, or ``None`` if the installed one serves.
            with_operators: Whether operators are needed.
            request: Result of :func:`operators_request`.
            project: Result of :func:`project_digest`, recorded when all is done.
        """
        stamp = read_stamp(self.venv)
        if found is not None and not has_mmcv(stamp, with_operators, request):
            wheel, kind = found
            self.record_packages(stamp['environment'])
            self.install_mmcv(wheel)
            stamp = {**read_stamp(self.venv), 'mmcv': kind, 'request': request}
            write_stamp(self.venv, stamp)
        self.install_project()
        self.check(stamp['mmcv'] == 'ops')
        write_stamp(self.venv, {**stamp, 'project': project})

    def account(self, seconds: float) -> None:
        """Print where the time went."""
        names = ('downloads', 'installation', 'building mmcv', 'check')
        parts = [f'{name} {self.times[name]:.0f} s' for name in names if name in self.times]
        say(f'Done in {seconds:.0f} s: {", ".join(parts)}')


def choose_target(
    environ: Mapping[str, str], torch_cuda: str | None, capabilities: Sequence[tuple[int, int]], nvcc: str | None
) -> tuple[str, str]:
    """Decide for which device mmcv's operators are compiled.

    Args:
        environ: Its ``FORCE_CUDA`` and ``TORCH_CUDA_ARCH_LIST`` are honoured.
        torch_cuda: CUDA version of torch, or ``None`` for a build without CUDA.
        capabilities: Compute capabilities of the GPUs that are present.
        nvcc: Version of the CUDA compiler, or ``None``.

    Returns:
        ``cpu`` or ``cuda<version>-<architectures>``; and a sentence to print, or an empty string.

    Raises:
        SetupError: If ``FORCE_CUDA=1`` and CUDA operators cannot be compiled here.
    """
    force = environ.get('FORCE_CUDA', '')
    if force == '0' or (force != '1' and not capabilities):
        return 'cpu', ''
    problem = ''
    if torch_cuda is None:
        problem = 'torch was built without CUDA'
    elif nvcc is None:
        problem = f'the CUDA compiler (nvcc {torch_cuda}) was not found'
    elif nvcc.split('.')[0] != torch_cuda.split('.')[0]:
        problem = f'nvcc is of version {nvcc} while torch was built for CUDA {torch_cuda}'
    if problem and force == '1':
        raise SetupError(f"FORCE_CUDA=1 asks for mmcv's CUDA operators, but {problem}.")
    if problem:
        return 'cpu', f"mmcv's operators are compiled for the CPU only, because {problem}."
    architectures = environ.get('TORCH_CUDA_ARCH_LIST') or '_'.join(f'{major}.{minor}' for major, minor in capabilities)
    return f'cuda{nvcc}-{re.sub(r"[^0-9A-Za-z.+]+", "_", architectures) or "default"}', ''


# ---- the check, run by the environment's own Python ----------------------------------------------


def report_components(with_operators: bool) -> int:
    """Print one line per component of the running interpreter's environment.

    Args:
        with_operators: Whether mmcv must have its compiled operators.

    Returns:
        0 if everything works, else 1.
    """
    # Here and not above: this script's other half runs before any of these exists.
    import importlib
    import io
    from importlib import metadata

    def version(*names: str) -> str:
        for name in names:
            with contextlib.suppress(metadata.PackageNotFoundError):
                return metadata.version(name)
        return '?'

    def check_torch() -> tuple[str, str]:
        import torch

        image, kernel = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
        value = float(torch.nn.functional.conv2d(image, kernel)[0, 0, 1, 1])
        if value != 9.0:
            raise RuntimeError(f'a 3x3 convolution of ones gives {value} instead of 9')
        device = 'CPU'
        if torch.cuda.is_available():
            value = float(torch.nn.functional.conv2d(image.cuda(), kernel.cuda())[0, 0, 1, 1])
            if value != 9.0:
                raise RuntimeError(f'a 3x3 convolution of ones gives {value} on the GPU')
            device = f'CPU and {torch.cuda.get_device_name()}'
        return torch.__version__, f'a convolution runs ({device})'

    def boxes() -> tuple[Any, Any]:
        import torch

        corners = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 20.0, 30.0, 30.0]]
        return torch.tensor(corners), torch.tensor([0.9, 0.8, 0.7])

    def check_torchvision() -> tuple[str, str]:
        import torchvision

        kept = torchvision.ops.nms(*boxes(), 0.5).tolist()
        if kept != [0, 2]:
            raise RuntimeError(f'nms keeps boxes {kept} instead of [0, 2]')
        return torchvision.__version__, 'nms runs'

    def check_opencv() -> tuple[str, str]:
        import cv2
        import numpy as np

        names = ['opencv-python', 'opencv-python-headless', 'opencv-contrib-python']
        found = [name for name in names if version(name) != '?']
        if len(found) > 1:
            raise RuntimeError(f'{" and ".join(found)} overwrite each other; uninstall all but one')
        image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        decoded: Any = cv2.imdecode(cv2.imencode('.png', image)[1], 1)
        if not np.array_equal(decoded, image):
            raise RuntimeError('a PNG does not survive writing and reading')
        return cv2.__version__, f'a PNG is written and read ({", ".join(found) or "system"})'

    def check_mmcv() -> tuple[str, str]:
        import mmcv

        if importlib.util.find_spec('mmcv._ext') is None:
            if with_operators:
                raise RuntimeError('it was installed without its compiled operators')
            return mmcv.__version__, 'without operators (segmentation needs none)'
        from mmcv.ops import get_compiling_cuda_version, nms

        kept = nms(*boxes(), 0.5)[1].tolist()
        if kept != [0, 2]:
            raise RuntimeError(f'nms keeps boxes {kept} instead of [0, 2]')
        cuda = get_compiling_cuda_version()
        device = 'CPU' if cuda == 'not available' else f'CPU and CUDA {cuda}'
        return mmcv.__version__, f'operators compiled ({device}), nms runs'

    def check_import(*names: str) -> Callable[[], tuple[str, str]]:
        def check() -> tuple[str, str]:
            for name in names:
                importlib.import_module(name)
            module = importlib.import_module(names[0].split('.')[0])
            return module.__version__, f'{", ".join(names)} import{"s" * (len(names) == 1)}'

        return check

    checks: dict[str, Callable[[], tuple[str, str]]] = {
        'torch': check_torch,
        'torchvision': check_torchvision,
        'numpy': check_import('numpy'),
        'opencv': check_opencv,
        'mmengine': check_import('mmengine.runner'),
        'mmcv': check_mmcv,
        'mmseg': check_import('mmseg.apis', 'mmseg.models'),
        'mmdet': check_import('mmdet.apis', 'mmdet.models'),
        'timm': check_import('timm'),
        'slak_mm': check_import('slak_mm'),
    }
    if not with_operators:
        # Most of mmdet's models import the operators that are not there.
        checks['mmdet'] = check_import('mmdet')
    print('Checking the environment:', flush=True)
    failed = False
    for name, check in checks.items():
        noise = io.StringIO()
        try:
            # Some packages talk while they are imported.
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                found, text = check()
        except Exception as error:
            failed = True
            reason = ' '.join(str(error).split()) or type(error).__name__
            print(f'  {name:<12} FAILED: {type(error).__name__}: {reason}', flush=True)
        else:
            print(f'  {name:<12} {found:<14} {text}', flush=True)
    return int(failed)


# ---- command line --------------------------------------------------------------------------------


def interrupt(number: int, frame: object) -> None:
    """Turn a signal into an exception, so that what was started is stopped."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    """Command line; see the module's text.

    Returns:
        Exit code; does not return where a command was given and the set-up succeeded.
    """
    parser = argparse.ArgumentParser(description='Make the environment .venv of this checkout and run a command in it.')
    parser.add_argument('--ops', action='store_true', help="with mmcv's compiled operators, which detection needs")
    parser.add_argument('--check', action='store_true', help='check the components even if nothing is to be done')
    parser.add_argument('--report', choices=['ops', 'noops'], help=argparse.SUPPRESS)
    parser.add_argument('command', nargs='*', help='command to run afterwards, after "--"')
    options = parser.parse_args(arguments)
    if options.report:
        return report_components(options.report == 'ops')
    if sys.version_info[:2] not in PYTHON_VERSIONS or sys.implementation.name != 'cpython':
        print(
            f'Python 3.10, 3.11 or 3.12 (CPython) is needed, and {sys.executable} is '
            f'{sys.implementation.name} {platform.python_version()}: name another by '
            'make PYTHON=/path/to/python3.12.',
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, interrupt)
    try:
        setup = Setup(ROOT, os.environ)
        setup.ensure(options.ops, options.check)
    except SetupError as error:
        print(f'Set-up failed: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('Set-up interrupted; the next call repairs it.', file=sys.stderr)
        return 130
    if options.command:
        sys.stdout.flush()
        setup.lock.keep_across_exec()
        os.execvp(options.command[0], options.command)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
