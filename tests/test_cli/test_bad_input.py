"""What users get wrong ends in one sentence and an exit code, before anything is computed or written."""

import os
import resource
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, python_path

CHECKPOINT = 'nothing.pth'  # never read: the error comes first


def refused(result, message):
    assert result.code in (1, 2), result.text
    assert message in ' '.join(result.err.split()), result.err


@pytest.mark.parametrize(
    'option, message',
    [
        ('optim_wrapper.optimizer.type=AdamWW', 'no optimizer "AdamWW"; did you mean AdamW'),
        ('default_hooks.logger.type=LogerHook', 'no hook "LogerHook"; did you mean LoggerHook'),
        ('model.decode_head.loss_decode.type=CrossEntropyLos', 'no model "CrossEntropyLos"; did you mean Cross'),
        ('model.backbone.type=SLaKK', 'no model "SLaKK"; did you mean SLaK'),
        ('val_evaluator.type=IoUMetrik', 'no metric "IoUMetrik"; did you mean IoUMetric'),
        ('val_evaluator.iou_metrics=[mIuO]', 'mIuO'),
        ('param_scheduler.0.type=LinearLRR', 'no parameter scheduler "LinearLRR"; did you mean LinearLR'),
        ('train_dataloader.sampler.type=InfinitSampler', 'no data sampler "InfinitSampler"; did you mean Inf'),
        ('train_dataloader.dataset.pipeline.1.type=Flipp', 'no transform "Flipp"'),
        ('train_cfg.val_interval=0', 'val_interval must be a number from 1, got 0; to train without validation'),
        ('train_cfg.max_iters=0', 'train_cfg.max_iters must be a number from 1, got 0'),
        ('model.pretrained=open-mmlab://resnet50_v1c', 'model.pretrained names weights of another backbone'),
        ('model.decode_head.in_channels=[96,192,384,768]', 'set model.decode_head.in_channels=[8,16,24,32]'),
        ('model.test_cfg.crop_size=(16,16)', 'A crop of 16x16 pixels is too small'),
        ('work_dir=/dev/null/work', '"/dev/null" is no folder'),
    ],
)
def test_settings(train, option, message):
    arguments = ['--from-scratch'] if 'pretrained' not in option else []
    refused(train('--max-iters 1', *arguments, options=[option]), message)


@pytest.mark.parametrize('side', [1, 16, 31])
def test_crops_that_vanish_on_the_way(train, side):
    refused(train(f'--from-scratch --crop-size {side}'), f'{side}x{side} pixels is too small for the backbone SLaK')


def test_the_smallest_crop_trains(train):
    train('--from-scratch --max-iters 1 --crop-size 32', code=0)


@pytest.mark.parametrize(
    'variables, message',
    [
        (dict(WORLD_SIZE='abc'), 'WORLD_SIZE="abc" is no number'),
        (dict(RANK='-1'), 'RANK="-1" is no number'),
        (dict(SLURM_NTASKS='2(x3)', launcher='slurm'), 'SLURM_NTASKS="2(x3)" is no number'),
        (dict(RANK='2', WORLD_SIZE='2'), 'RANK=2 and WORLD_SIZE=2 do not go together'),
        (dict(MASTER_PORT='99999', launcher='pytorch'), 'MASTER_PORT=99999 is no port'),
        (dict(SLAK_MM_BACKEND='foo'), "unknown backend 'foo'; choose from"),
    ],
)
def test_variables(train, monkeypatch, variables, message):
    variables = dict(variables)
    launcher = variables.pop('launcher', 'none')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(train(f'--from-scratch --launcher {launcher}'), message)


def test_a_port_that_is_taken(train, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = str(other.getsockname()[1])
        for name, value in dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port).items():
            monkeypatch.setenv(name, value)
        refused(train('--from-scratch --launcher pytorch'), f'do not find each other at 127.0.0.1:{port}')


OUTPUTS = {  # arguments up to the path, and whether it is a folder
    'train work-dir': (['CONFIG', '--work-dir'], True),
    'test work-dir': (['CONFIG', CHECKPOINT, '--work-dir'], True),
    'test show-dir': (['CONFIG', CHECKPOINT, '--show-dir'], True),
    'test out': (['CONFIG', CHECKPOINT, '--out'], True),
    'demo work-dir': (['--work-dir'], True),
    'prepare_data root': (['voc2007', '--root'], True),
    'export out': (['CONFIG', CHECKPOINT, '--out'], False),
    'cost json': (['--json'], False),
    'curves out': (['.', '--out'], False),
    'checkpoint picture': (['inspect', CHECKPOINT, '--picture'], False),
    'checkpoint convert': (['convert', CHECKPOINT], False),
    'checkpoint finalize': (['finalize', CHECKPOINT], False),
    'benchmark json': (['op', '--json'], False),
    'benchmark plot': (['op', '--plot'], False),
}


@pytest.mark.parametrize('output', OUTPUTS)
def test_outputs(call_tool, config_path, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    arguments, is_folder = OUTPUTS[output]
    (tmp_path / 'file').touch()
    paths = {'file/below.png': 'is no folder', '/proc/below.png': 'cannot be written'}
    paths.update({'file': 'is no folder'} if is_folder else {'.': 'is a folder: name a file', 'new/': 'is a folder'})
    for path, message in paths.items():
        given = [config_path if word == 'CONFIG' else word for word in arguments]
        refused(call_tool(output.split()[0], *given, path), message)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('last', ['exit()', 'raise SystemExit(0)', 'class Odd(BaseException): pass\nraise Odd'])
def test_a_config_that_leaves(call_tool, tmp_path, last):
    path = tmp_path / 'leaves.py'
    path.write_text(f"model = dict(type='X')\n{last}\n")
    refused(call_tool('train', path), 'leaves.py cannot be read')


@pytest.mark.parametrize('arguments', ['checkpoint zoo', 'cost slak_t_in1k_300e'])
def test_a_reader_that_went_away(arguments):
    """As with ``| head -1``: no complaint, and the exit code of a program that SIGPIPE ended."""
    tool, *words = arguments.split()
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / 'tools' / f'{tool}.py'), *words]
    env = dict(os.environ, PYTHONPATH=python_path())
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, '')


def test_a_full_disk(call_tool, tmp_path, build_tiny):
    torch.save(build_tiny().state_dict(), tmp_path / 'x.pth')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        result = call_tool('checkpoint', 'convert', tmp_path / 'x.pth', tmp_path / 'y.pth', '--to', 'official')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(result, os.strerror(27))  # EFBIG: File too large
    assert [path.name for path in tmp_path.iterdir()] == ['x.pth']


def test_debug_shows_the_traceback(call_tool):
    for arguments in (['--debug', 'inspect', CHECKPOINT], ['inspect', CHECKPOINT, '--debug']):
        err = call_tool('checkpoint', *arguments, code=1).err
        assert 'Traceback' in err and f'error: There is no file {CHECKPOINT}' in err


def test_weights_for_other_classes(train, config_path, build_tiny, tmp_path):
    torch.save(dict(state_dict=build_tiny().state_dict()), tmp_path / 'ade.pth')
    options = ['model.decode_head.num_classes=7', 'model.auxiliary_head.num_classes=7', 'model.backbone.init_cfg=None']
    options += [f'load_from={tmp_path / "ade.pth"}']
    names = 'wall,building,sky,floor,tree,ceiling,road'
    options += [f'{loader}_dataloader.dataset.metainfo.classes=[{names}]' for loader in ('train', 'val')]
    refused(train('--sparse off', options=options), "dict(type='StrictCheckpointHook', strict=False) to custom_")
    config = tmp_path / 'mine.py'
    config.write_text(
        f"_base_ = '{config_path}'\ncustom_hooks = [dict(type='StrictCheckpointHook', strict=False)]\n"
        'train_pipeline = None\n'
    )
    options += ['optim_wrapper.optimizer.lr=0.']
    train('--sparse off --max-iters 1', options=options, config=config, code=0)
    trained = torch.load(tmp_path / 'work' / 'iter_1.pth', weights_only=False)['state_dict']
    loaded = torch.load(tmp_path / 'ade.pth')['state_dict']
    same = {key for key in loaded if trained[key].shape == loaded[key].shape and 'running' not in key}
    assert all(torch.equal(trained[key], loaded[key]) for key in same if 'num_batches' not in key)
    assert {key for key in loaded if trained[key].shape != loaded[key].shape} == {
        f'{head}.conv_seg.{name}' for head in ('decode_head', 'auxiliary_head') for name in ('weight', 'bias')
    }
