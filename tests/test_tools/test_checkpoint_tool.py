import hashlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_ARCH, python_path
from PIL import Image

from slak_mm.models import SLaK


@pytest.fixture
def run(tmp_path, monkeypatch, call_tool):
    """Call the tool in the temporary folder; gives stdout, or stderr if it should fail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'cache'))

    def call(*args, code=0):
        result = call_tool('checkpoint', *args, code=code)
        return result.err if code else result.out

    return call


def cells(text):
    """The other cells of each row of the tables in a text, by the first."""
    lines = (line for line in text.splitlines() if line.startswith('| '))
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def weights(tmp_path):
    model = SLaK(arch=TINY_ARCH, kernel_sizes=(13, 11, 9, 7), width_factor=1.0, norm_cfg=dict(type='BN'))
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
    assert cells(text)['stages.0.0.pwconv1.weight'] == ['32x8', '25.00%']
    assert 'model_ema' in run('inspect', 'x.pth')
    # Existing files are not replaced unasked.
    message = run('convert', 'x.pth', 'official.pth', code=1)
    assert message.startswith('error: official.pth exists already; --force')
    run('convert', 'official.pth', 'official.pth', '--force')
    assert torch.load(tmp_path / 'official.pth', weights_only=True)['state_dict'].keys() == weights.keys()


def test_zoo_shows_the_cache(tmp_path, run):
    folder = tmp_path / 'cache' / 'checkpoints'
    folder.mkdir(parents=True)
    (folder / 'slak_t_in1k_300e.pth').write_bytes(b'x')
    rows = cells(run('zoo'))
    assert rows['slak_t_in1k_300e'][0] == 'yes' and rows['slak_s_in1k_300e'][0] == 'no'


def test_convert_to_safetensors_and_back(tmp_path, run, weights):
    pytest.importorskip('safetensors')
    run('convert', 'x.pth', 'x.safetensors', '--to', 'official')
    run('convert', 'x.safetensors', 'back.pth')
    back = torch.load(tmp_path / 'back.pth', weights_only=True)['state_dict']
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)


def test_zoo_verify(tmp_path, run, weights):
    """The files of the cache are hashed; one that has changed ends in code 1."""
    assert 'The cache is empty' in run('zoo', '--verify')
    source = (tmp_path / 'x.pth').as_uri()
    run('inspect', source)
    (kept,) = (tmp_path / 'cache' / 'checkpoints').glob('x-*.pth')
    sha256 = hashlib.sha256((tmp_path / 'x.pth').read_bytes()).hexdigest()
    megabytes = f'{kept.stat().st_size / 1e6:.1f}'
    assert cells(run('zoo', '--verify'))[kept.name] == [megabytes, sha256, 'as at its first use']
    with open(kept, 'r+b') as file:
        file.seek(1000)
        file.write(b'?')
    assert '1 of 1 files are not what they were' in run('zoo', '--verify', code=1)
    assert 'it has changed on this disk' in run('inspect', source, code=1)


@pytest.mark.parametrize(
    ('content', 'message'), [(None, 'There is no file bad.pth'), (b'<html>', 'HTML page'), (b'PK\x03\x04', 'truncated')]
)
def test_errors_are_one_sentence(tmp_path, run, content, message):
    if content is not None:
        (tmp_path / 'bad.pth').write_bytes(content)
    text = run('inspect', 'bad.pth', code=1)
    assert text.startswith('error: ') and message in text and len(text.splitlines()) == 1


def test_as_a_command(tmp_path):
    env = dict(os.environ, SLAK_MM_CACHE=str(tmp_path / 'cache'), PYTHONPATH=python_path())
    command = [sys.executable, str(ROOT / 'tools' / 'checkpoint.py'), 'inspect', 'slak_t']
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == ''
    assert 'error: There is no file slak_t' in done.stderr and 'Traceback' not in done.stderr


@pytest.fixture
def trained(tmp_path):
    """A checkpoint as a sparse run saves it, of a model of its own with a head."""
    from slak_mm.sparsity import SparseTraining, select_parameters

    torch.manual_seed(0)
    model = SLaK(arch=TINY_ARCH, kernel_sizes=(13, 11, 9, 7), width_factor=1.0, norm_cfg=dict(type='BN'))
    settings = dict(mode='set', distribution='uniform', sparsity=0.25, total_steps=10)
    training = SparseTraining(select_parameters(model), **settings)
    training.initialize()
    state = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    state['head.weight'] = torch.ones(4, 32)
    sparsity = training.state_dict()
    for key in ('masks', 'explored', 'replaced'):
        sparsity[key] = {f'backbone.{name}': value for name, value in sparsity[key].items()}
    run = dict(meta=dict(iter=3), optimizer=dict(state={}), message_hub=dict(), sparsity=sparsity)
    torch.save(dict(run, state_dict=state), tmp_path / 'iter_3.pth')
    return state


def test_inspect_shows_masks_and_draws(tmp_path, run, trained):
    name = 'stages.0.0.pwconv1.weight'
    trained[f'backbone.{name}'].view(-1)[:32] = 0
    checkpoint = torch.load(tmp_path / 'iter_3.pth', weights_only=True)
    checkpoint['state_dict'] = trained
    torch.save(checkpoint, tmp_path / 'iter_3.pth')
    text = run('inspect', 'iter_3.pth', '--picture', 'sparsity.png')
    assert 'mode set, changed 0 times in 0 steps' in text
    zeros = 1 - int(trained[f'backbone.{name}'].count_nonzero()) / 256
    assert cells(text)[name] == ['32x8', f'{zeros:.2%}', '25.00%'] and zeros > 0.25
    with Image.open(tmp_path / 'sparsity.png') as picture:
        assert picture.width > 800 and picture.height > 500
    assert run('inspect', 'iter_3.pth', '--picture', 'sparsity', code=1) == (
        'error: sparsity has no suffix of a picture format; use one such as .png.\n'
    )


def test_texts_of_a_file_are_escaped_and_cut(tmp_path, run):
    torch.save({'state_dict': {'w': torch.ones(2, 2)}, '\x1b[2J\n': 0, 'a' * 10_000: 0, 7: 0}, tmp_path / 'x.pth')
    text = run('inspect', 'x.pth')
    assert rf'state_dict, \x1b[2J\n, {"a" * 100}... (10000 characters), 7' in text
    assert text.replace('\n', '').isprintable()


ODD = {
    'fp8': (torch.eye(4).to(torch.float8_e4m3fn), '75.00%'),
    'requires gradients': (torch.eye(4).requires_grad_(), '75.00%'),
    'complex': (torch.eye(4) * 1j, None),
    'empty': (torch.empty(0, 4), None),
    'scalar': (torch.ones(()), None),
}


@pytest.mark.parametrize(('weights', 'zeros'), ODD.values(), ids=ODD)
def test_odd_weights(tmp_path, run, weights, zeros):
    torch.save({'w': weights}, tmp_path / 'x.pth')
    assert (cells(run('inspect', 'x.pth')).get('w') or [None])[-1] == zeros
    if zeros is None:
        assert 'no weights with two or more dimensions' in run('inspect', 'x.pth', '--picture', 'x.png', code=1)


@pytest.mark.parametrize('state', ['text', {'masks': {'w': 3}}, {'masks': [1]}, [1]])
@pytest.mark.parametrize('command', ['inspect', 'finalize'])
def test_damaged_masks(tmp_path, run, command, state):
    torch.save({'state_dict': {'w': torch.ones(2, 2)}, 'sparsity': state}, tmp_path / 'x.pth')
    arguments = ['x.pth'] if command == 'inspect' else ['x.pth', 'out.pth']
    assert 'the sparsity state has no masks' in run(command, *arguments, code=1)
    assert not (tmp_path / 'out.pth').exists()


def test_inspect_of_another_network(tmp_path, run):
    weight = torch.ones(4, 4)
    weight[0] = 0
    torch.save({'state_dict': {'fc.weight': weight}}, tmp_path / 'fc.pth')
    text = run('inspect', 'fc.pth')
    assert 'none of SLaK' in text
    assert cells(text)['fc.weight'] == ['4x4', '25.00%']


def test_finalize(tmp_path, run, trained):
    text = run('finalize', 'iter_3.pth', 'final.pth')
    written = torch.load(tmp_path / 'final.pth', weights_only=True)
    assert set(written) == {'state_dict', 'meta'}
    assert written['state_dict'].keys() == trained.keys()
    zeros = sum(int((value == 0).sum()) for value in trained.values() if value.dim() >= 2)
    total = sum(value.numel() for value in trained.values() if value.dim() >= 2)
    assert f'{zeros / total:.2%} of {total} weights are zero' in text
    assert 'exists already; --force' in run('finalize', 'iter_3.pth', 'final.pth', code=1)
    # Someone filled the zeros.
    checkpoint = torch.load(tmp_path / 'iter_3.pth', weights_only=True)
    checkpoint['state_dict']['backbone.stages.0.0.pwconv1.weight'] += 1
    torch.save(checkpoint, tmp_path / 'iter_3.pth')
    message = '64 pruned weights of backbone.stages.0.0.pwconv1.weight are not zero'
    assert message in run('finalize', 'iter_3.pth', 'other.pth', code=1)
    assert not (tmp_path / 'other.pth').exists()
