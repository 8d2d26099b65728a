"""Make the environment ``.venv`` of this checkout, then run a command in it; the Makefile calls this.

A call installs what is missing. An interrupted one is repaired by the next; two at once wait for each other.
onedl-mmcv is published as source only, and its ``setup.py`` leaves the compiled operators out where it cannot
import torch, as in an isolated build. So ``.venv`` starts without, which serves segmentation; ``--ops`` compiles.

Environment variables:
    SLAK_MM_CACHE: Folder of compiled wheels (default: ``$XDG_CACHE_HOME/slak_mm`` or ``~/.cache/slak_mm``).
    SLAK_MM_MMCV_WHEEL: Wheel of mmcv with operators to use instead of compiling them.
    MAX_JOBS: Number of compilers to run in parallel (default: the cores).
    FORCE_CUDA: ``1`` compiles CUDA operators, ``0`` does not (default: where there are a GPU and its nvcc).
    UV_DEFAULT_INDEX: Package index instead of PyPI; uv, which installs the packages, has more of these.
"""

import argparse
import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS, VENV = ROOT / 'requirements', ROOT / '.venv'
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'slak_mm')
CACHE = Path(os.environ.get('SLAK_MM_CACHE') or CACHE).expanduser().absolute()
MMCV = re.findall(r'^onedl-mmcv==(\S+)', (PINS / 'openmmlab.txt').read_text(), re.MULTILINE)[0]
TAG = f'cp{sys.version_info.major}{sys.version_info.minor}'
PLATFORM = re.sub(r'\W+', '_', f'{platform.system()}_{platform.machine()}').lower()
COMPONENTS = 'torch torchvision numpy cv2 mmengine.runner mmcv mmseg.apis mmdet timm slak_mm'.split()
CHECK = """
import importlib, logging, sys; logging.disable()
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(f'  {name:<15} {sys.modules[name.split(".")[0]].__version__}', flush=True)
"""


def say(text: str) -> None:
    print(f'[set-up] {text}', file=sys.stderr, flush=True)


def fail(text: str) -> None:
    sys.exit(f'Set-up failed: {text}')


def run(failure: str, *command: str | Path) -> None:
    if subprocess.run(command).returncode != 0:
        fail(failure)


def acquire(path: Path, holder: str):
    """Take a lock, to be released by ``with``."""
    from filelock import FileLock, Timeout

    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        say(f'Waiting for {holder} to finish ...')
        return FileLock(path).acquire()


def fetch_uv() -> Path:
    """Let the base Python's pip fetch uv and filelock into the cache, once; the latter can be imported then."""
    pins = re.findall(r'^\w+==.+', (PINS / 'setup.txt').read_text(), re.MULTILINE)
    folder = CACHE / '-'.join(['setup', TAG, PLATFORM, *pins])
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as part:
            pip = [sys.executable, '-m', 'pip', 'install', '-qq', '--target', f'{part}/tools', *pins]
            run(f'{sys.executable} could not install uv: check its pip and the network.', *pip)
            with contextlib.suppress(OSError):  # another make was faster
                os.rename(f'{part}/tools', folder)
    sys.path.insert(0, str(folder))
    return folder / 'bin' / 'uv'


def print_key() -> None:
    """Print what decides the content of the compiled wheel (run in ``.venv``)."""
    import torch
    from torch.utils import cpp_extension

    force, gpus = os.environ.get('FORCE_CUDA'), range(torch.cuda.device_count())
    capabilities = sorted({'{}.{}'.format(*torch.cuda.get_device_capability(gpu)) for gpu in gpus})
    nvcc = re.findall(r'release (\d+)(\.\d+)', subprocess.getoutput(f'"{cpp_extension.CUDA_HOME}/bin/nvcc" --version'))
    target, cuda = 'cpu', torch.version.cuda
    if force == '1' or (capabilities and force != '0'):
        if nvcc and cuda and nvcc[0][0] == cuda.split('.')[0]:
            architectures = os.environ.get('TORCH_CUDA_ARCH_LIST') or '_'.join(capabilities) or 'default'
            target = f'cuda{"".join(nvcc[0])}-{re.sub(r"[^0-9A-Za-z.]+", "_", architectures)}'
        else:
            text = f"mmcv's CUDA operators need torch with CUDA (it is {cuda}) and nvcc of that version (it is {nvcc})"
            fail(f'{text}.') if force == '1' else say(f'{text}: taking those of the CPU.')
    print(f'onedl_mmcv-{MMCV}-ops-torch_{torch.__version__}-{TAG}-{PLATFORM}-{target}'.replace('+', '_'))


def build_folder() -> Path:
    """Where the cache has the wheel compiled for this environment, or will have it."""
    command = [VENV / 'bin' / 'python', '-I', __file__, '--key']
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return CACHE / 'wheels' / result.stdout.split()[-1] if result.returncode == 0 else sys.exit(1)


def has_operators(wheel: Path) -> bool:
    """Whether a wheel can be read and has mmcv's compiled operators."""
    with contextlib.suppress(OSError, zipfile.BadZipFile):
        return any(name.startswith('mmcv/_ext.') for name in zipfile.ZipFile(wheel).namelist())
    return False


def user_wheel() -> Path | None:
    """The wheel that SLAK_MM_MMCV_WHEEL names."""
    if not os.environ.get('SLAK_MM_MMCV_WHEEL'):
        return None
    path = Path(os.environ['SLAK_MM_MMCV_WHEEL']).expanduser().absolute()
    right_name = re.fullmatch(rf'onedl_mmcv-{re.escape(MMCV)}-(\d\w*-)?{TAG}-[^-]+-[^-]+\.whl', path.name)
    if not (right_name and has_operators(path)):
        fail(f'SLAK_MM_MMCV_WHEEL names {path}, no wheel of onedl-mmcv {MMCV} for {TAG} with compiled operators.')
    return path


def build_wheel(folder: Path) -> None:
    """Compile mmcv's operators into the cache, or wait for another build of them."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / 'build.log'
    with acquire(folder.with_name(f'{folder.name}.lock'), f'another build of mmcv ({log})'):
        if any(map(has_operators, folder.glob('*.whl'))):
            return
        say(f"Compiling mmcv's operators, once: 10 to 30 minutes on two cores; the output goes to {log}")
        # uv and pip store builds with and without operators under one key: past their caches.
        command = [VENV / 'bin' / 'python', '-m', 'pip', 'wheel', '-v', '--no-cache-dir', '--no-deps']
        command += ['--no-build-isolation', '--no-binary', 'onedl-mmcv', f'onedl-mmcv=={MMCV}', '-w']
        path = f'{VENV}/bin{os.pathsep}{os.environ.get("PATH", os.defpath)}'  # for ninja
        environ = {'MAX_JOBS': str(os.cpu_count()), **os.environ, 'PATH': path, 'FORCE_CUDA': '1'}
        if folder.name.endswith('-cpu'):
            # mmcv's setup.py asks for nvcc as soon as it sees a GPU.
            environ.update(FORCE_CUDA='0', CUDA_VISIBLE_DEVICES='')
        with log.open('w') as file:
            subprocess.run([*command, folder], env=environ, stdout=file, stderr=file)
        if not any(map(has_operators, folder.glob('*.whl'))):
            print(*log.read_text(errors='replace').splitlines()[-25:], sep='\n', flush=True)
            fail(f"mmcv's operators were not compiled, see {log}: they need g++, python3-dev and memory (MAX_JOBS=1).")


def update(uv: Path, ops: bool, check: bool) -> bool:
    """Bring ``.venv`` to the pins; return whether mmcv's operators remain to be compiled."""
    stamp, python = VENV / 'complete', VENV / 'bin' / 'python'
    identity = f'{sys.version}\n{sys.base_prefix}\n{VENV}\n'

    def install(*arguments: str | Path) -> None:
        failure = 'the packages could not be installed (see above): check the network and the free disk space.'
        run(failure, uv, 'pip', 'install', *([] if fresh else ['-q']), '-p', python, *arguments)

    with acquire(VENV.with_name('.venv.lock'), 'another make in this checkout'):
        # uv takes a package that was half written for complete: what was interrupted is made anew.
        fresh = not stamp.is_file() or stamp.read_text() != identity
        if fresh:
            config = VENV / 'pyvenv.cfg'
            if config.is_file() and 'prompt = slak_mm\n' not in config.read_text():
                fail(f'{VENV} was not made by this set-up: move it away, or remove it by `make clean`.')
            make = [uv, 'venv', '-q', '--clear', '--prompt=slak_mm', '-p', sys._base_executable, VENV]  # type: ignore
            run('.venv could not be made (see above).', *make)
        stamp.unlink(missing_ok=True)
        pins = [f'-r{PINS}/{name}.txt' for name in ('torch', 'build', 'runtime', 'dev')]
        install('--only-binary=:all:', *pins, f'-c{PINS}/constraints.txt', f'-c{PINS}/setup.txt')
        install('--no-deps', '--build-constraints', PINS / 'build.txt', '-r', PINS / 'openmmlab.txt')
        if not (VENV / 'bin' / 'slak-mm').exists():
            install('--no-deps', '--no-build-isolation', '-e', ROOT)
        wheel = user_wheel()
        operators = any(VENV.glob('lib/python*/site-packages/mmcv/_ext.*'))
        missing = ops and not wheel and not (operators and not os.environ.get('FORCE_CUDA'))
        if missing or (fresh and not wheel):
            wheel = next(filter(has_operators, build_folder().glob('*.whl')), None)
        if wheel:
            install('--no-deps', wheel)
        if fresh or check or wheel:
            failure = f'the component after the last line does not work (see above); mmcv is {wheel or "as published"}.'
            names = [*COMPONENTS, 'mmcv._ext'] if wheel or operators else COMPONENTS
            run(failure, python, '-I', '-W', 'ignore', '-c', CHECK, *names)
        stamp.write_text(identity)
        return missing and not wheel


def main() -> None:
    parser = argparse.ArgumentParser(description='Make the environment .venv of this checkout and run a command in it.')
    parser.add_argument('--ops', action='store_true', help="with mmcv's compiled operators, which detection needs")
    parser.add_argument('--check', action='store_true', help='check the components even if nothing is to be done')
    parser.add_argument('--key', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('command', nargs='*', help='command to run afterwards, after "--"')
    options = parser.parse_args()
    if options.key:
        return print_key()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit('Set-up interrupted; the next call repairs it.'))
    user_wheel()
    uv = fetch_uv()
    if update(uv, options.ops, options.check):
        # Without the lock of the environment: `make demo` may go ahead while this compiles.
        build_wheel(build_folder())
        update(uv, options.ops, options.check)
    if options.command:
        os.execvp(options.command[0], options.command)


if __name__ == '__main__':
    main()
