"""Set-up: what tools/setup_env.py runs, with a stand-in for the commands."""

import importlib.util
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

SPEC = importlib.util.spec_from_file_location('s', Path(__file__).parents[1] / 'tools' / 'setup_env.py')
TAG = f'cp{sys.version_info.major}{sys.version_info.minor}'
WHEEL = f'onedl_mmcv-2.3.6-{TAG}-{TAG}-linux_x86_64.whl'
NEW = ['--clear', 'torch.txt', 'openmmlab.txt', ' -e ', 'import_module']  # words of the commands of a new environment


def make_wheel(path, extension='mmcv/_ext.cpython.so'):
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr(extension, '')
    return path


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """The script for an empty folder; ``call(*arguments)`` gives its ``steps``, of which ``broken`` fails."""
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)

    def run(command, **kwargs):
        text = ' '.join(map(str, command))
        step = next(step for step in ('--key', 'pip wheel', '.whl', *NEW) if step in text)
        if step != '--key' and not ('pip install -q' in text and step.endswith('.txt')):  # nothing to do for uv
            module.steps.append(step)
        if step == '--clear':
            shutil.rmtree(module.VENV, ignore_errors=True)
            module.VENV.mkdir()
            (module.VENV / 'pyvenv.cfg').write_text('home = /usr/bin\nprompt = slak_mm\n')
        elif step == 'pip wheel':
            shutil.copy(module.wheel, command[-1])
        elif step in (' -e ', '.whl'):
            made = 'bin/slak-mm' if step == ' -e ' else 'lib/python3/site-packages/mmcv/_ext.so'
            (module.VENV / made).mkdir(parents=True)
        return SimpleNamespace(returncode=int(step == module.broken), stdout='key-cpu\n')

    def call(*arguments):
        module.steps = []
        monkeypatch.setattr(sys, 'argv', ['setup_env.py', *arguments])
        module.main()
        return module.steps

    monkeypatch.setattr(module.os, 'environ', {'PATH': os.environ['PATH']})
    monkeypatch.setattr(module.subprocess, 'run', run)
    monkeypatch.setattr(module.signal, 'signal', lambda *_: None)
    vars(module).update(VENV=tmp_path / '.venv', CACHE=tmp_path / 'cache', fetch_uv=lambda: 'uv')
    vars(module).update(wheel=make_wheel(tmp_path / WHEEL), steps=[], broken=None, call=call)
    return module


def test_a_second_call_has_nothing_to_do(setup):
    assert [setup.call(), setup.call(), setup.call('--check')] == [NEW, [], ['import_module']]


@pytest.mark.parametrize('step', NEW)
def test_what_was_interrupted_is_made_anew(setup, step):
    setup.broken = step
    pytest.raises(SystemExit, setup.call).match('Set-up failed: ')
    setup.broken = None
    assert setup.call() == NEW


def test_operators_are_compiled_once_for_all_environments(setup):
    assert setup.call('--ops') == [*NEW, 'pip wheel', '.whl', 'import_module']
    assert [path.name for path in (setup.CACHE / 'wheels' / 'key-cpu').glob('*.whl')] == [WHEEL]
    assert setup.call('--ops') == []
    shutil.rmtree(setup.VENV)
    assert setup.call('--ops') == [*NEW[:-1], '.whl', 'import_module']
    shutil.rmtree(setup.CACHE)
    (setup.VENV / 'complete').unlink()
    make_wheel(setup.wheel, 'mmcv/ops/_ext.py')
    pytest.raises(SystemExit, setup.call, '--ops').match(r'were not compiled, .*MAX_JOBS=1')


def test_the_users_wheel_is_used(setup):
    os.environ['SLAK_MM_MMCV_WHEEL'] = str(setup.wheel)
    assert setup.call('--ops') == [*NEW[:-1], '.whl', 'import_module']
    os.environ.clear()
    assert setup.call('--ops') == []


@pytest.mark.parametrize('change', ['2.3.6 2.3.5', f'{TAG} cp39', 'onedl_mmcv mmcv', 'no operators', 'no wheel'])
def test_a_wheel_of_something_else_is_refused_first(setup, change):
    path = setup.wheel.with_name(WHEEL.replace(*change.split()))
    make_wheel(path, 'mmcv/ops/_ext.py' if change == 'no operators' else 'mmcv/_ext.so')
    if change == 'no wheel':
        path.write_text('not a zip file')
    os.environ['SLAK_MM_MMCV_WHEEL'] = str(path)
    pytest.raises(SystemExit, setup.call).match('no wheel of onedl-mmcv 2.3.6 for cp3.* with compiled operators')
    assert not setup.steps


def test_two_at_once_wait_for_each_other(setup):
    assert [*ThreadPoolExecutor().map(lambda _: setup.update('uv', False, False), range(2))] == [False, False]
    assert setup.steps == NEW


def test_an_environment_of_somebody_else_is_left_alone(setup):
    setup.VENV.mkdir()
    (setup.VENV / 'pyvenv.cfg').write_text('home = /usr/bin\n')
    pytest.raises(SystemExit, setup.call).match('was not made by this set-up')
    assert not setup.steps


@pytest.mark.parametrize(
    'gpus, nvcc, force, target',
    [
        ([], '13.1', '', 'cpu'),
        ([(9, 0), (8, 6)], '13.1', '', 'cuda13.1-8.6_9.0'),
        ([(9, 0)], '13.1', '0', 'cpu'),
        ([(9, 0)], '12.8', '', 'cpu'),
        ([], '13.1', '1', 'cuda13.1-default'),
        ([], '12.8', '1', None),
    ],
)
def test_the_key_names_torch_python_and_target(setup, monkeypatch, capsys, gpus, nvcc, force, target):
    """CUDA operators need a compiler of torch's CUDA version, here 13; an H200 has compute capability 9.0."""
    import torch

    monkeypatch.setattr(setup.subprocess, 'getoutput', lambda command: f'Cuda compilation tools, release {nvcc}, V1')
    monkeypatch.setattr(torch, '__version__', '2.13.0+cu130')
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', gpus.__getitem__)
    os.environ['FORCE_CUDA'] = force
    with nullcontext() if target else pytest.raises(SystemExit, match='need torch with CUDA .* and nvcc'):
        setup.print_key()
        assert capsys.readouterr().out == f'onedl_mmcv-2.3.6-ops-torch_2.13.0_cu130-{TAG}-{setup.PLATFORM}-{target}\n'
