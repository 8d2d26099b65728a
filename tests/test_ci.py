"""The checks of a change fail if anything fails, and also if no test ran."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    'text, code, expected',
    [
        ('\033[32m===== \033[32m5 passed, 2 skipped in 7.25s (0:00:07) =====', 0, 0),
        ('===== 1 failed, 5 passed in 7.25s =====', 2, 2),
        ('===== 3 skipped in 0.01s =====', 0, 1),
        ('Set-up failed: no network.', 2, 2),
    ],
)
def test_ci(tmp_path, text, code, expected):
    make = tmp_path / 'make'
    make.write_text(f'#!/bin/sh\n[ "$*" = test ] || exit 99\necho "{text}"\nexit {code}\n')
    make.chmod(0o755)
    environ = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    result = subprocess.run([ROOT / '.ci' / 'run'], capture_output=True, text=True, env=environ)
    assert result.returncode == expected, result.stdout + result.stderr
    assert expected or result.stdout.splitlines()[-1] == 'pytest: ===== 5 passed, 2 skipped in 7.25s (0:00:07) ====='
