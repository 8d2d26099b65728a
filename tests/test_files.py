import os
import subprocess
import sys
from pathlib import Path

import pytest

from slak_mm._files import cache_folder, replacing


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(RuntimeError), replacing(path) as part:
        part.write_text('half')
        raise RuntimeError
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']


def test_the_new_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    steps = []
    for name in ('fsync', 'replace'):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=function: (steps.append(n), f(*a)))
    with replacing(tmp_path / 'file') as part:
        part.write_text('new')
    assert (tmp_path / 'file').read_text() == 'new' and steps == ['fsync', 'replace', 'fsync']


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv('SLAK_MM_CACHE', '/a')
    assert str(cache_folder()) == '/a'
    monkeypatch.delenv('SLAK_MM_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', '/b')
    assert str(cache_folder()) == '/b/slak_mm'
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert cache_folder() == Path('~/.cache/slak_mm').expanduser()


def test_the_package_itself_imports_what_every_user_needs():
    code = (
        'import sys, slak_mm\n'
        'ours = [name for name in sys.modules if name.split(".")[0] == "slak_mm"]\n'
        'slow = {"FileLock", "argparse", "http", "matplotlib", "tarfile", "urllib", "zipfile"}\n'
        'print([name for name in ours if slow & vars(sys.modules[name]).keys()])'
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
