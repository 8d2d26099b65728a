"""The wheel that ``pip install .`` makes: what it contains, and that it leaves others alone."""

import json
import os
import re
import shutil
import subprocess
import sys
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
    for name in ('configs', 'requirements', 'slak_mm', 'tools'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))
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
    assert set(by_extra) == set(metadata.get_all('Provides-Extra')) == {'onedl', 'openmmlab', 'dev', 'export', 'hub'}
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
    paths += source.glob('tools/**/*.py')
    expected = {f'slak_mm/.mim/{path.relative_to(source)}' for path in paths}
    expected -= {'slak_mm/.mim/tools/setup_env.py', 'slak_mm/.mim/tools/benchmark.py'}
    assert {name for name in contents if '/.mim/' in name} == expected
    for name in ('configs/upernet_slak_t_ade20k.py', *index['Import']):
        assert contents[f'slak_mm/.mim/{name}'] == (ROOT / name).read_text()


def test_an_editable_install_finds_the_files_of_the_checkout(source, tmp_path):
    """Here and where mim looks; the links are removed, as the other tests' wheels are built from the same folder."""
    pip('install --no-deps --no-build-isolation --no-index --target', tmp_path / 'site', '--editable', source)
    mim = source / 'slak_mm' / '.mim'
    try:
        for name in ('configs', 'tools', 'model-index.yml'):
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


def test_the_installed_package_is_complete(wheel_path, tmp_path):
    """Imports, version and a config's inheritance, from a folder without the checkout."""
    target = tmp_path / 'site'
    pip('install --no-deps --no-index --target', target, wheel_path)
    code = """
from pathlib import Path
import slak_mm
from slak_mm.bases import own_folder
from mmengine.config import Config
from mmengine.registry import MODELS
assert own_folder() == Path(slak_mm.__path__[0]) / '.mim'
config = Config.fromfile(own_folder() / 'configs' / 'upernet_slak_t_ade20k.py')
print(MODELS.get(config.model.backbone.type).__module__, slak_mm.__path__[0], slak_mm.__version__)
"""
    output = run('-W', 'ignore', '-c', code, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(target)})
    assert output.splitlines()[-1] == f'slak_mm.models.slak {target / "slak_mm"} {__version__}'
