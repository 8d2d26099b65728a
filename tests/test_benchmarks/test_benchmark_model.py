"""`tools/benchmark.py model`, with networks of one block per stage."""

import json

import pytest
import torch
from conftest import TINY_ARCH
from mmengine.registry import MODELS

from benchmarks import model
from benchmarks.peak import measure_peak
from slak_mm.models.shiftwise import ShiftWiseConv

OURS = [name for name in model.NETWORKS if name.startswith(('SLaK', 'ShiftWise'))]


@pytest.fixture
def small(monkeypatch):
    """Small networks; the kernels have their size."""
    for family, config in model.CONFIGS.items():
        monkeypatch.setitem(model.CONFIGS, family, dict(config, arch=TINY_ARCH))


@pytest.fixture
def run(call_tool):
    def run(options, networks, *arguments, code=0):
        options = f'--repeats 1 --no-memory {options} --networks'
        return call_tool('benchmark', 'model', options, *networks, *arguments, code=code)

    return run


@pytest.mark.parametrize('family', model.CONFIGS)
@pytest.mark.parametrize('train', [False, True])
def test_all_forms_compute_the_same(small, family, train):
    """The official formulations and the deployed form, in float64, gradients included."""
    names = [name for name in OURS if name.startswith(family) and not (train and name.endswith('deploy'))]
    options = dict(size=(64, 96), batch=2, dtype='float64', device='cpu', train=train)
    results = {name: model.Case(name, **options).step() for name in names}
    assert len(results[family]) == 4 + train
    for name in names[1:]:
        for got, want in zip(results[name], results[family]):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * float(want.abs().max()))


def test_official_networks_are_built_otherwise(small):
    """They contain none of the operators that they are compared with."""
    backbone = MODELS.build(model.CONFIGS['ShiftWise-T'])
    official = model.official_shiftwise(backbone)
    large_kernels = [block.large_kernel for block in official.modules() if hasattr(block, 'large_kernel')]
    assert large_kernels and not any(isinstance(layer, ShiftWiseConv) for layer in large_kernels)
    assert isinstance(backbone.stages[0][0].large_kernel, ShiftWiseConv)


@pytest.mark.parametrize('train', [False, True])
def test_table_json_and_plot(small, run, tmp_path, train):
    out, plot = tmp_path / 'out.json', tmp_path / 'out.png'
    done = run(f'--size 64x64 --batch 1 2{" --train" * train}', OURS, '--json', out, '--plot', plot)
    names = [name for name in OURS if not (train and name.endswith('deploy'))]
    data = json.loads(out.read_text())
    assert [(row['batch'], row['network']) for row in data['rows']] == [
        (batch, name) for batch in (1, 2) for name in names
    ]
    for row in data['rows']:
        assert row['images_per_second'] == pytest.approx(row['batch'] / row['seconds'])
    assert data['machine']['train'] is train and data['machine']['dtype'] == 'float32'
    assert done.out.count('| 64x64, ') == 2 * len(names)
    assert plot.read_bytes().startswith(b'\x89PNG')


def test_low_precision(small, run):
    assert 'dtype bfloat16' in run('--size 64x64 --batch 1 --dtype bfloat16', ['SLaK-T', 'SLaK-T deploy']).out


def test_beside_convnext_and_swin(small, run):
    """An image size that is no multiple of Swin's windows."""
    pytest.importorskip('timm')
    done = run('--size 64x96 --batch 1', ['SLaK-T', 'ConvNeXt-T', 'Swin-T'])
    (convnext,) = (line for line in done.out.splitlines() if '| ConvNeXt-T ' in line)
    assert convnext.split('|')[4].strip() == '1.0x'


def test_no_figure_for_a_wrong_result(small, run, monkeypatch, tmp_path):
    original = model.switch_to_deploy

    def wrong(network):
        original(network)
        with torch.no_grad():
            network.stages[0][0].pwconv2.bias[0] += 10
        return network

    monkeypatch.setattr(model, 'switch_to_deploy', wrong)
    out = tmp_path / 'out.json'
    done = run('--size 64x64 --batch 1', ['SLaK-T', 'SLaK-T deploy'], '--json', out, code=1)
    assert 'disagrees with the reference' in done.err
    right, bad = json.loads(out.read_text())['rows']
    assert right['seconds'] and bad['disagrees'] and bad['seconds'] is None
    assert 'disagrees' in done.out.splitlines()[-1]


def test_peak_memory():
    """The four maps of ConvNeXt-T are there at the end; a pass cannot take less."""
    pytest.importorskip('timm')
    case = dict(contender='ConvNeXt-T', size=[256, 256], batch=2, dtype='float32', device='cpu', train=False)
    peak = measure_peak(model.__name__, case)
    if peak is None:
        pytest.skip('this system does not tell the peak of a process')
    maps = 2 * sum(c * (256 // s) ** 2 * 4 for c, s in zip((96, 192, 384, 768), (4, 8, 16, 32)))
    assert maps / 2**20 < peak < 30 * maps / 2**20


def test_errors(run, monkeypatch):
    assert 'deployed forms do not train' in run('--train', ['SLaK-T deploy'], code=1).err
    find_spec = model.importlib.util.find_spec
    monkeypatch.setattr(model.importlib.util, 'find_spec', lambda name: None if name == 'timm' else find_spec(name))
    assert 'timm, which is not installed' in run('', ['Swin-T'], code=1).err
