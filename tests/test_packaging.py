"""The wheel that ``pip install .`` makes: what it contains, and that it leaves others alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from slak_mm.version import __version__

ROOT = Path(__file__).resolve().parents[1]


def run(*command, **kwargs):
    result = subprocess.run(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def pip(command, *arguments):
    run('-m', 'pip', '--disable-pip-version-check', *command.split(), *arguments)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy, so that no build leaves anything in the checkout."""
    folder = tmp_path_factory.mktemp('packaging') / 'source'
    for name in ('benchmarks', 'configs', 'requirements', 'slak_mm', 'tools'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '*.pyc', '.mim'))
    for name in ('LICENSE', 'MANIFEST.in', 'README.md', 'model-index.yml', 'pyproject.toml', 'setup.py'):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope='module')
def wheel_path(source):
    # What an earlier build of other sources left must not travel along.
    stale = source / 'build' / 'lib' / 'slak_mm' / 'removed_since.py'
    stale.parent.mkdir(parents=True)
    stale.touch()
    target = source.parent / 'wheels'
    pip('wheel --no-deps --no-build-isolation --no-index --no-cache-dir', '-w', target, source)
    (path,) = target.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def contents(wheel_path):
    with zipfile.ZipFile(wheel_path) as wheel:
        return {name: wheel.read(name).decode() for name in wheel.namelist()}


@pytest.fixture(scope='module')
def metadata(contents):
    (name,) = (name for name in contents if name.endswith('.dist-info/METADATA'))
    return Parser().parsestr(contents[name])


def test_name_version_and_python(wheel_path, metadata):
    assert wheel_path.name == f'slak_mm-{__version__}-py3-none-any.whl'
    assert (metadata['Name'], metadata['Version']) == ('slak-mm', __version__)
    assert metadata['Requires-Python'] == '>=3.10'


def test_license(contents, metadata):
    assert metadata['License'] == 'Apache-2.0' or metadata['License-Expression'] == 'Apache-2.0'
    (name,) = (name for name in contents if re.search(r'\.dist-info/(licenses/)?LICENSE$', name))
    assert contents[name] == (ROOT / 'LICENSE').read_text()
    assert re.search('(?s)Version 2.0, January 2004.*END OF TERMS AND CONDITIONS', contents[name])


def test_nothing_is_required(metadata):
    """mmengine and onedl-mmengine share one import name: requiring one replaces the other."""
    assert all('extra ==' in requirement for requirement in metadata.get_all('Requires-Dist'))


def test_extras(metadata):
    by_extra = {}
    for requirement in metadata.get_all('Requires-Dist'):
        name = re.match(r'[\w-]+', requirement)[0]
        extra = re.search(r'extra == .(\w+).', requirement)[1]
        by_extra.setdefault(extra, set()).add(name)
    assert (
        set(by_extra)
        == set(metadata.get_all('Provides-Extra'))
        == {'onedl', 'openmmlab', 'dev', 'export', 'hub', 'timm'}
    )
    onedl = {'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'}
    original = {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation'}
    torch = {'torch', 'torchvision'}
    assert by_extra['onedl'] == onedl | torch
    assert original | torch <= by_extra['openmmlab']
    assert not onedl & by_extra['openmmlab']
    assert {'pytest', 'ruff', 'mypy'} <= by_extra['dev']
    assert by_extra['hub'] == {'huggingface-hub', 'safetensors'}
    assert not (onedl | original | torch) & by_extra['dev']


def test_the_pins_lie_in_the_extras_ranges(metadata):
    packaging = pytest.importorskip('packaging.requirements')
    text = ''.join(path.read_text() for path in (ROOT / 'requirements').glob('*.txt'))
    lines = re.findall(r'^[^#\n]+', text, re.MULTILINE)
    pairs = [re.fullmatch(r'([\w.-]+)={2,3}([\w.]+) *', line).groups() for line in lines]  # none without a version
    pins = {name.lower().replace('_', '-'): pin for name, pin in pairs}
    assert len(pins) == len(pairs), 'something is pinned twice'
    requirements = [packaging.Requirement(text) for text in metadata.get_all('Requires-Dist')]
    pinned = [requirement for requirement in requirements if 'openmmlab' not in str(requirement.marker)]
    assert len(pinned) >= 11
    assert [str(r) for r in pinned if not r.specifier.contains(pins[r.name])] == []


def test_modules_and_type_marker(source, contents):
    modules = {str(path.relative_to(source)) for path in source.glob('slak_mm/**/*.py')}
    inside = {name for name in contents if name.endswith('.py') and '/.mim/' not in name}
    assert inside == modules
    assert 'slak_mm/py.typed' in contents


def test_configs_and_tools_are_where_mim_looks(source, contents):
    index = yaml.safe_load(contents['slak_mm/.mim/model-index.yml'])
    paths = [source / 'model-index.yml', *source.glob('configs/*.yml'), *source.glob('configs/**/*.py')]
    paths += [*source.glob('tools/**/*.py'), *source.glob('benchmarks/*.py')]
    expected = {f'slak_mm/.mim/{path.relative_to(source)}' for path in paths}
    expected -= {'slak_mm/.mim/tools/setup_env.py'}
    assert {name for name in contents if '/.mim/' in name} == expected
    for name in ('configs/upernet_slak_t_ade20k.py', *index['Import']):
        assert contents[f'slak_mm/.mim/{name}'] == (ROOT / name).read_text()


def test_an_editable_install_finds_the_files_of_the_checkout(source, tmp_path):
    """Here and where mim looks; the links are removed, as the other tests' wheels are built from the same folder."""
    pip('install --no-deps --no-build-isolation --no-index --target', tmp_path / 'site', '--editable', source)
    mim = source / 'slak_mm' / '.mim'
    try:
        for name in ('benchmarks', 'configs', 'tools', 'model-index.yml'):
            assert (mim / name).is_symlink() and (mim / name).resolve() == source / name
        code = 'from slak_mm.bases import own_folder; print(own_folder())'
        output = run('-W', 'ignore', '-c', code, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(source)})
        assert output.splitlines()[-1] == str(source)
    finally:
        shutil.rmtree(mim)


def test_nothing_else(contents, source):
    top = {name.split('/')[0] for name in contents}
    assert top == {'slak_mm', f'slak_mm-{__version__}.dist-info'}
    assert not [name for name in contents if '__pycache__' in name or 'test_' in name]
    assert not (source / 'slak_mm' / '.mim').exists()  # nor is anything left in the sources


def test_installing_replaces_nothing(source, tmp_path):
    """Beside this environment's OpenMMLab packages, pip would install slak_mm and nothing else."""
    report = tmp_path / 'report.json'
    pip('install --no-build-isolation --no-index --ignore-installed --dry-run --report', report, source)
    installed = [item['metadata']['name'] for item in json.loads(report.read_text())['install']]
    assert installed == ['slak-mm']


@pytest.fixture(scope='module')
def installed(wheel_path, tmp_path_factory):
    """Runs what the wheel installs in a new environment, outside of the checkout: ``installed('slak-mm', *words)``.

    The environment has this one's packages, without what this one has of slak_mm, which comes behind.
    """
    folder = tmp_path_factory.mktemp('environment')
    run('-m', 'venv', '--without-pip', folder / 'venv')
    (site,) = folder.glob('venv/lib/python*/site-packages')
    pip(f'--python {folder / "venv" / "bin" / "python"} install --no-deps --no-index', wheel_path)
    (site / 'others.pth').write_text('\n'.join(sysconfig.get_paths()[name] for name in ('purelib', 'platlib')))
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'}

    def call(name, *words):
        command = [folder / 'venv' / 'bin' / name, *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    call.folder, call.site = folder, site
    return call


def test_imports_and_version_of_the_installed_package(installed):
    code = 'import slak_mm; print(slak_mm.__file__, slak_mm.config_path("upernet_slak_t_ade20k"))'
    package = installed.site / 'slak_mm'
    paths = f'{package}/__init__.py {package}/.mim/configs/upernet_slak_t_ade20k.py\n'
    assert installed('python', '-W', 'ignore', '-c', code) == paths
    assert installed('slak-mm', '--version') == f'{__version__}\n'


def test_installed_commands_train_and_test_a_config_of_the_user(installed, tiny, small, demo_data):
    config = installed.folder / 'mine.py'
    config.write_text("_base_ = 'slak_mm::upernet_slak_t_ade20k.py'\ndefault_hooks = dict(logger=dict(interval=1))\n")
    options = ['--cfg-options', *tiny]
    log = installed('slak-mm', 'train', 'mine.py', *small, '--from-scratch', '--max-iters', 2, *options)
    assert 'Iter(train) [2/2]' in log
    checkpoint = installed.folder / 'work_dirs' / 'mine' / 'iter_2.pth'
    data = ['--data-root', demo_data, '--num-workers', 0, '--crop-size', 64]
    assert 'mIoU' in installed('slak-mm', 'test', 'upernet_slak_t_ade20k', checkpoint, *data, *options)
    assert (installed.folder / 'work_dirs' / 'upernet_slak_t_ade20k').is_dir()
    image = next(Path(demo_data).glob('images/validation/*.jpg'))
    installed('slak-mm', 'infer', 'mine.py', checkpoint, image, '--crop-size', 64, *options)
    assert (installed.folder / 'infer_results' / f'{image.stem}.png').is_file()


def test_installed_commands_that_need_no_data(installed):
    assert '| upernet_slak_t_ade20k |' in installed('slak-mm', 'cost', 'upernet_slak_t_ade20k')
    words = 'model --size 64x64 --networks SLaK-T --repeats 1 --no-memory'.split()
    assert 'SLaK-T' in installed('slak-mm', 'benchmark', *words)
    # The frameworks' commands find the tools, too.
    tool = installed.site / 'slak_mm' / '.mim' / 'tools' / 'checkpoint.py'
    assert installed('python', '-W', 'ignore', tool, 'zoo') == installed('slak-mm', 'checkpoint', 'zoo')
