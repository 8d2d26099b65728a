"""tools/setup_env.py: what it decides without network and without changing an environment."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'tools' / 'setup_env.py'
TAG = f'cp{sys.version_info.major}{sys.version_info.minor}'


def load_script():
    spec = importlib.util.spec_from_file_location('slak_mm_setup_env', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup_env = load_script()


def make_wheel(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w') as wheel:
        for name in ('mmcv/__init__.py', *names):
            wheel.writestr(name, '')
    return path


def make_checkout(root):
    (root / 'requirements').mkdir(parents=True)
    (root / 'requirements' / 'openmmlab.txt').write_text('onedl-mmcv==2.3.6\nimaug==0.4.3\n')
    (root / 'requirements' / 'build.txt').write_text('pip==26.3\n')
    return root


class TestPins:
    def test_names_versions_markers_and_comments(self):
        pins = setup_env.parse_pins(
            "# a comment\nFoo_Bar.baz==1.2.3   # why\n\ntorch===2.13.0\ntomli==2.0 ; python_version < '3.11'\n"
        )
        assert pins == {
            'foo-bar-baz': 'Foo_Bar.baz==1.2.3',
            'torch': 'torch===2.13.0',
            'tomli': "tomli==2.0 ; python_version < '3.11'",
        }
        assert [setup_env.pinned_version(pin) for pin in pins.values()] == ['1.2.3', '2.13.0', '2.0']

    @pytest.mark.parametrize('line', ['numpy', 'numpy>=2', 'numpy==2,<3', '-r other.txt'])
    def test_what_is_not_pinned_is_an_error(self, line):
        with pytest.raises(setup_env.SetupError, match='not a pinned version'):
            setup_env.parse_pins(line)

    def test_files_of_the_project(self):
        """Every file is pinned, nothing is pinned twice, and OpenCV comes in one build."""
        files = sorted((ROOT / 'requirements').glob('*.txt'))
        assert [path.stem for path in files] == ['build', 'constraints', 'dev', 'openmmlab', 'runtime', 'torch']
        names = []
        for path in files:
            names += setup_env.parse_pins(path.read_text())
        assert len(names) == len(set(names))
        assert [name for name in names if name.startswith('opencv')] == ['opencv-python-headless']
        assert {'torch', 'torchvision', 'onedl-mmcv', 'onedl-mmengine', 'numpy'} <= set(names)


class TestCache:
    def test_place(self, tmp_path):
        place = setup_env.cache_dir
        home = {'HOME': str(tmp_path)}
        assert place(home) == tmp_path / '.cache' / 'slak_mm'
        assert place({**home, 'XDG_CACHE_HOME': '/x'}) == Path('/x/slak_mm')
        assert place({**home, 'XDG_CACHE_HOME': '/x', 'SLAK_MM_CACHE': '/y/z'}) == Path('/y/z')
        assert place({**home, 'XDG_CACHE_HOME': '', 'SLAK_MM_CACHE': ''}) == place(home)

    def test_key_names_what_is_inside(self):
        torch = {'version': '2.13.0+cu130', 'target': 'cpu'}
        key = setup_env.mmcv_key('2.3.6', torch)
        system = setup_env.platform_tag()
        assert key == f'onedl_mmcv-2.3.6-ops-torch_2.13.0_cu130-{TAG}-{system}-cpu'
        assert setup_env.mmcv_key('2.3.6', None) == 'onedl_mmcv-2.3.6-noops'

    def test_everything_that_matters_changes_the_key(self, monkeypatch):
        torch = {'version': '2.13.0', 'target': 'cpu'}
        keys = [
            setup_env.mmcv_key('2.3.6', torch),
            setup_env.mmcv_key('2.3.7', torch),
            setup_env.mmcv_key('2.3.6', {**torch, 'version': '2.13.0+cu130'}),
            setup_env.mmcv_key('2.3.6', {**torch, 'target': 'cuda13.0-9.0'}),
            setup_env.mmcv_key('2.3.6', None),
        ]
        monkeypatch.setattr(setup_env, 'python_tag', lambda: 'cp399')
        keys.append(setup_env.mmcv_key('2.3.6', torch))
        assert len(set(keys)) == len(keys)
        assert all(os.sep not in key for key in keys)


class TestWheels:
    def test_operators_are_told_by_the_extension(self, tmp_path):
        with_operators = make_wheel(tmp_path / 'a.whl', 'mmcv/_ext.cpython-311-x86_64-linux-gnu.so')
        without = make_wheel(tmp_path / 'b.whl', 'mmcv/ops/_ext.py', 'mmcv/other.so')
        assert setup_env.wheel_has_operators(with_operators)
        assert not setup_env.wheel_has_operators(without)

    def test_a_folder_gives_the_kind_that_is_asked_for(self, tmp_path):
        assert setup_env.find_wheel(tmp_path / 'missing', True) is None
        (tmp_path / 'a_truncated.whl').write_bytes(b'PK\3\4 and nothing more')
        without = make_wheel(tmp_path / 'b.whl')
        assert setup_env.find_wheel(tmp_path, True) is None
        assert setup_env.find_wheel(tmp_path, False) == without
        with_operators = make_wheel(tmp_path / 'c.whl', 'mmcv/_ext.so', 'mmcv/_ext.abi3.so')
        assert setup_env.find_wheel(tmp_path, True) == with_operators

    def test_the_users_wheel(self, tmp_path):
        def user_wheel(path):
            return setup_env.user_wheel({'SLAK_MM_MMCV_WHEEL': str(path)}, '2.3.6')

        good = f'onedl_mmcv-2.3.6-{TAG}-{TAG}-linux_x86_64.whl'
        extension = 'mmcv/_ext.abi3.so'
        assert setup_env.user_wheel({}, '2.3.6') is None
        assert setup_env.user_wheel({'SLAK_MM_MMCV_WHEEL': ''}, '2.3.6') is None
        wheel = make_wheel(tmp_path / good, extension)
        assert user_wheel(wheel) == wheel
        tagged = make_wheel(tmp_path / good.replace('2.3.6-', '2.3.6-1local-'), extension)
        assert user_wheel(tagged) == tagged

        refused = {
            tmp_path / 'nowhere.whl': 'which is not a file',
            make_wheel(tmp_path / 'mmcv-2.1.0-cp311-cp311-any.whl'): 'not a wheel of onedl-mmcv',
            make_wheel(tmp_path / good.replace('2.3.6', '2.3.5'), extension): 'version 2.3.5',
            make_wheel(tmp_path / good.replace(TAG, 'cp39'), extension): 'built for cp39, while',
            make_wheel(tmp_path / 'noops' / good): 'built without operators',
        }
        broken = tmp_path / 'broken' / good
        broken.parent.mkdir()
        broken.write_bytes(b'not a zip file')
        refused[broken] = 'cannot be read'
        for path, message in refused.items():
            with pytest.raises(setup_env.SetupError, match=message):
                user_wheel(path)

    def test_the_request_follows_the_wheels_content(self, tmp_path):
        name = f'onedl_mmcv-2.3.6-{TAG}-{TAG}-any.whl'
        first = make_wheel(tmp_path / '1' / name, 'mmcv/_ext.so')
        second = make_wheel(tmp_path / '2' / name, 'mmcv/_ext.so', 'mmcv/more.py')

        def request(**environ):
            return setup_env.operators_request(environ, '2.3.6')

        assert request() == ''
        assert request(FORCE_CUDA='1') == 'FORCE_CUDA=1'
        assert request(SLAK_MM_MMCV_WHEEL=str(first)) != request(SLAK_MM_MMCV_WHEEL=str(second))


class TestTarget:
    """For which device the operators are compiled; an H200 has compute capability 9.0."""

    def choose(self, environ=None, torch_cuda='13.0', capabilities=((9, 0),), nvcc='13.1'):
        return setup_env.choose_target(environ or {}, torch_cuda, capabilities, nvcc)

    def test_cpu_without_gpu(self):
        assert self.choose(capabilities=()) == ('cpu', '')
        assert self.choose(torch_cuda=None, capabilities=(), nvcc=None) == ('cpu', '')

    def test_cuda_with_gpu_and_compiler(self):
        assert self.choose() == ('cuda13.1-9.0', '')
        assert self.choose(capabilities=((8, 6), (9, 0))) == ('cuda13.1-8.6_9.0', '')
        listed = self.choose({'TORCH_CUDA_ARCH_LIST': '8.0;9.0+PTX'})
        assert listed == ('cuda13.1-8.0_9.0+PTX', '')

    def test_gpu_without_matching_compiler_falls_back_and_says_so(self):
        for nvcc, reason in ((None, 'not found'), ('12.8', 'version 12.8')):
            target, note = self.choose(nvcc=nvcc)
            assert target == 'cpu'
            assert reason in note

    def test_the_user_decides(self):
        assert self.choose({'FORCE_CUDA': '0'}) == ('cpu', '')
        assert self.choose({'FORCE_CUDA': '1'}, capabilities=()) == ('cuda13.1-default', '')
        for changes in ({'nvcc': None}, {'nvcc': '12.8'}, {'torch_cuda': None}):
            with pytest.raises(setup_env.SetupError, match='FORCE_CUDA=1 asks'):
                self.choose({'FORCE_CUDA': '1'}, **changes)


class TestJobs:
    def test_bounded_by_cores_and_memory(self):
        gib = 1024**3
        count = setup_env.job_count
        assert count({}, 2, 24 * gib) == 2
        assert count({}, 16, 10 * gib) == 4
        assert count({}, 16, 1 * gib) == 1
        assert count({}, 16, float('inf')) == 16
        assert count({'MAX_JOBS': '7'}, 2, 1 * gib) == 7
        for text in ('0', 'many', '-1'):
            with pytest.raises(setup_env.SetupError, match='MAX_JOBS'):
                count({'MAX_JOBS': text}, 2, gib)

    def test_memory_of_system_and_container(self, tmp_path):
        meminfo = tmp_path / 'meminfo'
        meminfo.write_text('MemTotal:  9000 kB\nMemAvailable:    5000 kB\n')
        missing = tmp_path / 'missing'
        assert setup_env.available_memory(meminfo, missing) == 5000 * 1024
        assert setup_env.available_memory(missing, missing) == float('inf')
        for name, text in (('max', '4000000'), ('current', '3000000')):
            (tmp_path / f'memory.{name}').write_text(text)
        (tmp_path / 'memory.stat').write_text('anon 1\ninactive_file 500000\n')
        assert setup_env.available_memory(meminfo, tmp_path) == 1500000
        (tmp_path / 'memory.max').write_text('max\n')
        assert setup_env.available_memory(meminfo, tmp_path) == 5000 * 1024


class TestStamp:
    def test_round_trip_and_damage(self, tmp_path):
        assert setup_env.read_stamp(tmp_path) == {}
        stamp = {'environment': 'e', 'mmcv': 'ops'}
        setup_env.write_stamp(tmp_path, stamp)
        assert setup_env.read_stamp(tmp_path) == stamp
        assert [path.name for path in tmp_path.iterdir()] == [setup_env.STAMP_NAME]
        for text in ('{"environment": "e', '[]'):
            (tmp_path / setup_env.STAMP_NAME).write_text(text)
            assert setup_env.read_stamp(tmp_path) == {}

    def test_operators_serve_every_call_and_their_absence_only_some(self):
        has = setup_env.has_mmcv
        ops = {'mmcv': 'ops', 'request': 'FORCE_CUDA=1'}
        noops = {'mmcv': 'noops', 'request': ''}
        assert has(ops, False, '') and has(noops, False, '') and not has({}, False, '')
        assert has(ops, True, '') and not has(noops, True, '') and not has({}, True, '')
        assert has(ops, True, 'FORCE_CUDA=1') and not has(ops, True, 'wheel 0123')
        assert has(ops, False, 'wheel 0123')

    def test_digests(self, tmp_path):
        """A pin changes the environment, a setting of the packaging only the project."""
        root = make_checkout(tmp_path / 'checkout')
        environment, project = setup_env.environment_digest, setup_env.project_digest
        before = environment(root), project(root), setup_env.interpreter_digest(root)
        assert before == (environment(root), project(root), setup_env.interpreter_digest(root))
        (root / 'setup.py').write_text('# changed')
        assert environment(root) == before[0]
        assert project(root) != before[1]
        (root / 'requirements' / 'new.txt').write_text('numpy==2.2.6\n')
        assert environment(root) != before[0]
        assert setup_env.interpreter_digest(root) == before[2]
        # A virtual environment does not survive a move.
        assert setup_env.interpreter_digest(tmp_path) != before[2]

    def test_contents_do_not_run_into_names(self, tmp_path):
        (tmp_path / 'a').write_text('bc')
        (tmp_path / 'ab').write_text('c')
        assert setup_env.tree_digest(tmp_path, ['a']) != setup_env.tree_digest(tmp_path, ['ab'])
        assert setup_env.tree_digest(tmp_path, ['a'], 'x') != setup_env.tree_digest(tmp_path, ['a'])


HOLDER = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location('setup_env', sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
lock = module.FileLock(Path(sys.argv[2]), 'busy')
lock.acquire(shared=sys.argv[3] == 'shared')
print('held', flush=True)
sys.stdin.read()
"""


class TestLock:
    @pytest.fixture
    def holder(self, tmp_path):
        processes = []

        def start(mode):
            process = subprocess.Popen(
                [sys.executable, '-c', HOLDER, SCRIPT, tmp_path / 'lock', mode],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
            assert process.stdout.readline() == 'held\n'
            return process

        yield start
        for process in processes:
            process.kill()
            process.communicate()

    def test_readers_share(self, tmp_path, holder, capsys):
        holder('shared')
        lock = setup_env.FileLock(tmp_path / 'lock', 'busy')
        lock.acquire(shared=True)
        lock.release()
        assert capsys.readouterr().out == ''

    @pytest.mark.parametrize('theirs, ours', [('shared', False), ('own', False), ('own', True)])
    def test_a_writer_is_alone(self, tmp_path, holder, capsys, theirs, ours):
        """The lock is had when the other process dies, even by SIGKILL, and not before."""
        other = holder(theirs)
        script = f'sleep 0.5; kill -9 {other.pid}'
        start = time.monotonic()
        killer = subprocess.Popen(['sh', '-c', script])
        lock = setup_env.FileLock(tmp_path / 'lock', 'somebody else has it')
        lock.acquire(shared=ours)
        assert time.monotonic() - start > 0.4
        assert 'somebody else has it' in capsys.readouterr().out
        lock.release()
        killer.wait()

    def test_the_command_that_follows_keeps_the_lock(self, tmp_path, capsys):
        lock = setup_env.FileLock(tmp_path / 'lock', 'busy')
        lock.acquire(shared=True)
        lock.keep_across_exec()
        command = subprocess.Popen(['sleep', '0.7'], close_fds=False)
        lock.release()
        start = time.monotonic()
        with setup_env.FileLock(tmp_path / 'lock', 'busy'):
            assert time.monotonic() - start > 0.3
        command.wait()


class TestProgress:
    def test_ninja(self):
        progress = setup_env.NinjaProgress()
        assert progress.text() == 'preparing the sources'
        progress.feed('  [3/78] c++ -MMD -MF x.o.d -c nms.cpp -o nms.o')
        progress.feed('      warning: [5/9] is not a step of the build')
        assert progress.text() == '3/78 objects compiled'

    def test_pip(self):
        progress = setup_env.PipProgress()
        assert progress.text() == 'resolving'
        progress.feed('  Downloading numpy-2.2.6-cp311-cp311-manylinux.whl (16.8 MB)')
        progress.feed('Downloading six-1.17.0-py2.py3-none-any.whl (11 kB)')
        progress.feed('Downloading torch-2.13.0-cp311-cp311-linux.whl (1.1 GB)')
        assert progress.text() == 'downloading (3 files, 1117 MB)'
        progress.feed('Installing collected packages: six, numpy')
        assert progress.text() == 'installing (3 files, 1117 MB)'
        assert progress.installing_since is not None

    def test_output_goes_to_the_log(self, tmp_path):
        log = tmp_path / 'a' / 'log'
        progress = setup_env.NinjaProgress()
        code = 'import sys; print("[1/2] c++ a.cpp"); print("b.cpp: trouble", file=sys.stderr)'
        command = [sys.executable, '-c', code]
        seconds = setup_env.run_logged(command, 'building', log, os.environ, progress, 'It failed.')
        assert seconds > 0
        assert {'[1/2] c++ a.cpp', 'b.cpp: trouble'} <= set(log.read_text().splitlines())
        assert (progress.done, progress.total) == (1, 2)

    def test_failure_shows_the_logs_end_and_a_sentence(self, tmp_path, capfd):
        log = tmp_path / 'log'
        code = 'for i in range(100): print("line", i)\nraise SystemExit(3)'
        with pytest.raises(setup_env.SetupError, match=f'It failed. .* {log}'):
            setup_env.run_logged(
                [sys.executable, '-c', code], 'building', log, os.environ, setup_env.NinjaProgress(), 'It failed.'
            )
        shown = capfd.readouterr().out.splitlines()
        assert shown == [f'line {i}' for i in range(75, 100)]


def test_settings_that_divert_an_installation_are_dropped():
    environ = {'PIP_TARGET': '/x', 'PYTHONPATH': '/y', 'PIP_INDEX_URL': 'z', 'HTTPS_PROXY': 'p'}
    clean = setup_env.clean_environ(environ)
    assert 'PIP_TARGET' not in clean and 'PYTHONPATH' not in clean
    assert clean['PIP_INDEX_URL'] == 'z' and clean['HTTPS_PROXY'] == 'p'


def test_the_compiler_is_checked_before_the_build(tmp_path):
    setup = setup_env.Setup(make_checkout(tmp_path), {'CXX': 'no-such-compiler', 'HOME': '/h'})
    with pytest.raises(setup_env.SetupError, match='"no-such-compiler" was not found'):
        setup.check_compiler()


def test_a_half_written_package_is_removed(tmp_path):
    """Without RECORD pip itself would refuse."""
    setup = setup_env.Setup(make_checkout(tmp_path), {'HOME': '/h'})
    site = setup.venv / 'lib' / 'python3.11' / 'site-packages'
    for name in ('mmcv', 'onedl_mmcv-2.3.6.dist-info', 'mmcv_other', 'onedl_mmengine-1.dist-info'):
        (site / name).mkdir(parents=True)
    (site / '__editable__.slak_mm-0.1.0.pth').touch()
    setup.remove_installed('mmcv', 'onedl_mmcv')
    setup.remove_installed('slak_mm', 'slak_mm')
    assert sorted(path.name for path in site.iterdir()) == ['mmcv_other', 'onedl_mmengine-1.dist-info']


class TestEnsure:
    """The order of the steps, with the steps themselves replaced by a record of their calls."""

    @pytest.fixture
    def setup(self, tmp_path, monkeypatch):
        setup = setup_env.Setup(make_checkout(tmp_path), {'HOME': str(tmp_path)})
        setup.calls = []

        def make_venv():
            setup.calls.append('venv')
            setup.venv.mkdir(exist_ok=True)

        def find_mmcv(with_operators):
            setup.calls.append('build ops' if with_operators else 'build noops')
            return tmp_path / 'a.whl', 'ops' if with_operators else 'noops'

        def record(name):
            return lambda *args: setup.calls.append(name)

        monkeypatch.setattr(setup, 'make_venv', make_venv)
        monkeypatch.setattr(setup, 'find_mmcv', find_mmcv)
        monkeypatch.setattr(setup, 'runs', lambda: True)
        monkeypatch.setattr(setup, 'install_packages', record('packages'))
        monkeypatch.setattr(setup, 'install_mmcv', record('mmcv'))
        monkeypatch.setattr(setup, 'install_project', record('project'))
        monkeypatch.setattr(setup, 'check', lambda ops: setup.calls.append(f'check {ops}'))
        yield setup
        setup.lock.release()

    def ensure(self, setup, with_operators, recheck=False):
        setup.calls.clear()
        setup.ensure(with_operators, recheck)
        setup.lock.release()
        return setup.calls

    def test_each_step_once(self, setup):
        complete = ['venv', 'packages', 'build noops', 'mmcv', 'project', 'check False']
        assert self.ensure(setup, False) == complete
        assert self.ensure(setup, False) == []
        assert self.ensure(setup, False, recheck=True) == ['check False']
        assert self.ensure(setup, True) == ['build ops', 'mmcv', 'project', 'check True']
        assert self.ensure(setup, True) == []
        # The demo after the tests keeps the operators.
        assert self.ensure(setup, False) == []
        assert json.loads((setup.venv / setup_env.STAMP_NAME).read_text())['mmcv'] == 'ops'

    def test_changed_pins_and_changed_packaging(self, setup):
        self.ensure(setup, True)
        (setup.root / 'setup.py').write_text('# changed')
        assert self.ensure(setup, True) == ['project', 'check True']
        (setup.root / 'requirements' / 'dev.txt').write_text('ruff==0.17.6\n')
        steps = ['packages', 'build ops', 'mmcv', 'project', 'check True']
        assert self.ensure(setup, True) == steps

    def test_an_interrupted_installation_of_packages_starts_over(self, setup, monkeypatch, capsys):
        def interrupted():
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(setup, 'install_packages', interrupted)
            with pytest.raises(KeyboardInterrupt):
                self.ensure(setup, False)
        setup.lock.release()
        assert self.ensure(setup, False)[:2] == ['venv', 'packages']
        assert 'did not end' in capsys.readouterr().out
        assert self.ensure(setup, False) == []

    @pytest.mark.parametrize('step', ['install_mmcv', 'install_project', 'check'])
    def test_an_interruption_later_keeps_the_packages(self, setup, monkeypatch, step):
        def interrupted(*args):
            raise KeyboardInterrupt

        self.ensure(setup, False)
        with monkeypatch.context() as patch:
            patch.setattr(setup, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                self.ensure(setup, True)
        setup.lock.release()
        calls = self.ensure(setup, True)
        assert 'packages' not in calls
        assert calls[-2:] == ['project', 'check True']
        assert self.ensure(setup, True) == []

    def test_a_failed_check_is_not_recorded_as_done(self, setup, monkeypatch):
        def fail(with_operators):
            raise setup_env.SetupError('torch does not work')

        with monkeypatch.context() as patch:
            patch.setattr(setup, 'check', fail)
            with pytest.raises(setup_env.SetupError):
                self.ensure(setup, False)
        setup.lock.release()
        assert self.ensure(setup, False) == ['project', 'check False']

    def test_an_environment_of_somebody_else_is_left_alone(self, setup):
        setup.venv.mkdir()
        with pytest.raises(setup_env.SetupError, match='was not made by this script'):
            self.ensure(setup, False)

    def test_another_call_may_complete_it_during_the_build(self, setup, monkeypatch):
        """While one call builds the operators, a demo of the same checkout does its set-up."""
        builder = setup.find_mmcv

        def build_while_another_call_comes(with_operators):
            other = setup_env.FileLock(setup.root / '.venv.lock', 'busy')
            other.acquire()
            digests = setup_env.environment_digest, setup_env.project_digest
            environment, project = (digest(setup.root) for digest in digests)
            done = {'mmcv': 'noops', 'request': '', 'project': project}
            setup_env.write_stamp(setup.venv, {**setup_env.read_stamp(setup.venv), 'environment': environment, **done})
            other.release()
            return builder(with_operators)

        monkeypatch.setattr(setup, 'find_mmcv', build_while_another_call_comes)
        assert self.ensure(setup, False) == ['venv', 'packages', 'build noops']
        steps = ['build ops', 'mmcv', 'project', 'check True']
        assert self.ensure(setup, True) == steps


class TestCommandLine:
    def test_another_python_is_refused_in_a_sentence(self, monkeypatch, capsys):
        monkeypatch.setattr(setup_env, 'PYTHON_VERSIONS', ((2, 7),))
        assert setup_env.main([]) == 2
        assert 'Python 3.10, 3.11 or 3.12 (CPython) is needed' in capsys.readouterr().err

    def test_report_of_this_environment(self):
        """Each component has its line, those that the tests themselves need work, and the exit code
        tells whether all do."""
        command = [sys.executable, '-I', SCRIPT, '--report', 'noops']
        result = subprocess.run(command, capture_output=True, text=True)
        lines = result.stdout.splitlines()
        assert lines[0] == 'Checking the environment:'
        names = [line.split()[0] for line in lines[1:]]
        assert names[:4] == ['torch', 'torchvision', 'numpy', 'opencv']
        assert names[4:] == ['mmengine', 'mmcv', 'mmseg', 'mmdet', 'timm', 'slak_mm']
        for name, line in zip(names, lines[1:]):
            if name in ('torch', 'torchvision', 'mmengine', 'mmcv'):
                assert 'FAILED' not in line
        assert result.returncode == (1 if 'FAILED' in result.stdout else 0)
        assert result.stderr == ''


class TestMakeAndCi:
    def make_says(self, tmp_path, text, code):
        """Run .ci/run with a `make` that prints a text and ends with a code."""
        (tmp_path / 'text').write_text(text)
        fake = tmp_path / 'make'
        fake.write_text(f'#!/bin/sh\n[ "$*" = test ] || exit 99\ncat {tmp_path}/text\nexit {code}\n')
        fake.chmod(0o755)
        environ = {**os.environ, 'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'}
        command = [ROOT / '.ci' / 'run']
        return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path)

    @pytest.mark.parametrize('color', ['', '\033[32m'])
    def test_ci_passes_and_ends_with_the_closing_line(self, tmp_path, color):
        closing = f'{color}===== {color}5 passed, 2 skipped in 7.25s (0:00:07) ====='
        result = self.make_says(tmp_path, f'All checks passed!\n{closing}\n', 0)
        assert result.returncode == 0, result.stdout + result.stderr
        last = result.stdout.splitlines()[-1]
        assert last == 'pytest: ===== 5 passed, 2 skipped in 7.25s (0:00:07) ====='

    @pytest.mark.parametrize(
        'text, code',
        [
            ('===== 1 failed, 5 passed in 7.25s =====\n', 2),
            ('Set-up failed: no network.\n', 2),
            ('===== no tests ran in 0.01s =====\n', 2),
            ('===== no tests ran in 0.01s =====\n', 0),
            ('===== 3 skipped in 0.01s =====\n', 0),
            ('', 0),
        ],
    )
    def test_ci_fails(self, tmp_path, text, code):
        assert self.make_says(tmp_path, text, code).returncode == (code or 1)

    def test_make_says_which_python_it_needs(self):
        make = shutil.which('make')
        if make is None:
            pytest.skip('make is not installed')
        environ = {name: value for name, value in os.environ.items() if name != 'MAKEFLAGS'}
        command = [make, '-C', str(ROOT), 'PYTHON=false', 'env']
        result = subprocess.run(command, capture_output=True, text=True, env=environ)
        assert result.returncode == 2
        assert 'Python 3.10, 3.11 or 3.12 is needed, and false is none' in result.stderr
