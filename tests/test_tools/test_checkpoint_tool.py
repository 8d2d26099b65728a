import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slak_mm.models import SLaK

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'checkpoint.py'
ARCH = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call the tool in the temporary folder; gives stdout, or stderr if it should fail."""
    spec = importlib.util.spec_from_file_location('checkpoint_tool', TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'cache'))

    def call(*args, code=0):
        assert tool.main(args) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return call


@pytest.fixture
def weights(tmp_path):
    model = SLaK(arch=ARCH, kernel_sizes=(13, 11, 9, 7), width_factor=1.0,
                 norm_cfg=dict(type='BN'))
    state = model.state_dict()
    state['stages.0.0.pwconv1.weight'].view(-1)[:64] = 0  # a quarter of 32 x 8
    torch.save({'state_dict': state, 'model_ema': state}, tmp_path / 'x.pth')
    return state


def test_convert_and_inspect(tmp_path, run, weights):
    run('convert', 'x.pth', 'official.pth', '--to', 'official')
    written = torch.load(tmp_path / 'official.pth', weights_only=True)['model']
    assert 'stages.3.0.large_kernel.LoRA2.conv.weight' in written
    assert len(written) == len(weights)
    text = run('inspect', 'official.pth')
    assert 'official-LoRA' in text and 'kernels 13/11/9/7 decomposed with small 5' in text
    [line] = [t for t in text.splitlines() if t.startswith('stages.0.0.pwconv1.weight')]
    assert line.split()[1:] == ['32x8', '25.00%']
    assert 'model_ema' in run('inspect', 'x.pth')
    # Existing files are not replaced unasked.
    message = run('convert', 'x.pth', 'official.pth', code=1)
    assert message.startswith('error: official.pth exists already; --force')
    run('convert', 'official.pth', 'official.pth', '--force')
    assert torch.load(tmp_path / 'official.pth', weights_only=True)['state_dict'].keys() \
        == weights.keys()


def test_zoo_shows_the_cache(tmp_path, run):
    folder = tmp_path / 'cache' / 'checkpoints'
    folder.mkdir(parents=True)
    (folder / 'slak_t_in1k_300e.pth').write_bytes(b'x')
    rows = {line.split()[0]: line.split()[1] for line in
            run('zoo').splitlines() if line.startswith(('slak', 'upernet'))}
    assert rows['slak_t_in1k_300e'] == 'yes' and rows['slak_s_in1k_300e'] == 'no'


@pytest.mark.parametrize(('content', 'message'), [
    (None, 'There is no file bad.pth'), (b'<html>', 'HTML page'), (b'PK\x03\x04', 'truncated')])
def test_errors_are_one_sentence(tmp_path, run, content, message):
    if content is not None:
        (tmp_path / 'bad.pth').write_bytes(content)
    text = run('inspect', 'bad.pth', code=1)
    assert text.startswith('error: ') and message in text and len(text.splitlines()) == 1


def test_as_a_command(tmp_path):
    env = {**os.environ, 'SLAK_MM_CACHE': str(tmp_path / 'cache'),
           'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run([sys.executable, str(TOOL), 'inspect', 'slak_t'], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and done.stdout == ''
    assert 'error: There is no file slak_t' in done.stderr and 'Traceback' not in done.stderr
