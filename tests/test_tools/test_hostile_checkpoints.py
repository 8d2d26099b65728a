"""A checkpoint that runs code when Python's pickle reads it, at every door of every tool."""

import os

import pytest
import torch
from mmengine.runner import CheckpointLoader, load_checkpoint

from slak_mm.checkpoints import CheckpointError
from slak_mm.engine.loader import safe_reader


class Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def evil(tmp_path):
    """The checkpoint, complete for every purpose but for one call; it makes the folder ``victim``."""
    run = dict(optimizer={}, message_hub={}, meta=dict(iter=1, epoch=0, seed=0))
    content = dict(run, state_dict={'backbone.x': torch.ones(1)}, extra=Touch(tmp_path / 'victim'))
    torch.save(content, tmp_path / 'evil.pth')
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'iter_1.pth').write_bytes((tmp_path / 'evil.pth').read_bytes())
    return tmp_path / 'evil.pth'


NO_WEIGHTS = ['--cfg-options', 'model.backbone.init_cfg=None']


def pretrained(place):
    return [*NO_WEIGHTS, f'{place}.type=Pretrained', f'{place}.checkpoint=EVIL']


DOORS = {
    'load_from': ['train', *NO_WEIGHTS, 'load_from=EVIL'],
    'resume': ['train', '--resume', 'EVIL'],
    'newest': ['train', '--resume'],
    'resume in the config': ['train', '--from-scratch', '--cfg-options', 'resume=True'],
    'resume and load_from': ['train', '--from-scratch', '--cfg-options', 'resume=True', 'load_from=EVIL'],
    'model': ['train', *pretrained('model.init_cfg')],
    'backbone': ['train', '--cfg-options', 'model.backbone.init_cfg.checkpoint=EVIL'],
    'head': ['train', *pretrained('model.decode_head.init_cfg')],
    'auxiliary head': ['train', *pretrained('model.auxiliary_head.init_cfg')],
    'address': ['train', *NO_WEIGHTS, 'load_from=file://EVIL'],
    'test': ['test', 'EVIL'],
    'infer': ['infer', 'EVIL', 'IMAGES'],
    'export': ['export', 'EVIL'],
    'export of the backbone': ['export', 'EVIL', '--part', 'backbone'],
    'cost': ['cost', '--checkpoint', 'EVIL'],
}


@pytest.mark.parametrize('door', DOORS)
def test_no_tool_runs_its_code(door, evil, call_tool, config_path, demo_data, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'cache'))
    tool, *arguments = DOORS[door]
    for name, path in dict(EVIL=evil, IMAGES=f'{demo_data}/images/validation').items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    if tool in ('train', 'test'):
        arguments += ['--data-root', demo_data, '--num-workers', '0', '--work-dir', str(tmp_path / 'work')]
    if tool == 'train':
        arguments += ['--crop-size', '64', '--batch-size', '2', '--max-iters', '2']
    if tool != 'cost':
        arguments = [a for a in arguments if a != '--cfg-options' and '=' not in a] + [
            '--cfg-options', *tiny, *(a for a in arguments if '=' in a)
        ]  # fmt: skip
    result = call_tool(tool, config_path, *arguments, code=1)
    assert not (tmp_path / 'victim').exists()
    error = result.err[result.err.index('error: ') :]
    assert 'was refused: reading it would run code' in error and f'{os.mkdir.__module__}.mkdir' in error


@pytest.mark.parametrize('command', ['inspect', 'convert', 'finalize'])
def test_neither_does_the_checkpoint_tool(command, evil, tmp_path, call_tool):
    out = [] if command == 'inspect' else [tmp_path / 'out.pth']
    assert 'reading it would run code' in call_tool('checkpoint', command, evil, *out, code=1).err
    assert not (tmp_path / 'victim').exists() and not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize('scheme', list(CheckpointLoader._schemes), ids=str)
def test_no_loader_of_the_framework_is_left(scheme):
    with safe_reader():
        assert CheckpointLoader._schemes[scheme].__name__ == 'load_from_safe_reader'
    # Of addresses that mmengine does not know there is no other loader.
    ours = scheme in ('hf://', 'slak_mm://')
    assert CheckpointLoader._schemes[scheme].__module__.startswith('slak_mm' if ours else 'mmengine')


def test_libraries_that_read_files_themselves(evil, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with safe_reader():
        with pytest.raises(CheckpointError):
            load_checkpoint(torch.nn.Linear(1, 1), str(evil))
        for arguments in ({}, dict(weights_only=False)):
            with pytest.raises(Exception, match='mkdir'):
                torch.load(evil, **arguments)
    assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1' and 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ
    assert not (tmp_path / 'victim').exists()


@pytest.mark.parametrize('name', ['torchvision://resnet18', 'open-mmlab://detectron/resnet50_gn', 'mmcls://vgg11'])
def test_names_of_the_framework(name, evil, tmp_path, monkeypatch):
    """Their addresses are mmengine's; the file behind them is read by our reader."""
    from slak_mm.engine import loader

    monkeypatch.setitem(loader._TABLES, name.partition(':')[0], lambda: {name.partition('://')[2]: str(evil)})
    with safe_reader(), pytest.raises(CheckpointError, match='would run code'):
        CheckpointLoader.load_checkpoint(name)
    good = tmp_path / 'good.pth'
    torch.save({'state_dict': {'backbone.w': torch.ones(2)}}, good)
    monkeypatch.setitem(loader._TABLES, name.partition(':')[0], lambda: {name.partition('://')[2]: str(good)})
    with safe_reader():
        read = CheckpointLoader.load_checkpoint(name)['state_dict']
    assert list(read) == ['w' if name.startswith('mmcls') else 'backbone.w']


def test_the_file_that_was_checked_is_the_one_that_is_read(tmp_path, evil, monkeypatch):
    good = tmp_path / 'good.pth'
    torch.save({'w': torch.ones(2)}, good)
    load = torch.load

    def swap_and_load(file, **kwargs):
        os.replace(evil, good)
        return load(file, **kwargs)

    monkeypatch.setattr(torch, 'load', swap_and_load)
    with safe_reader():
        assert CheckpointLoader.load_checkpoint(str(good))['w'].tolist() == [1, 1]
    assert not (tmp_path / 'victim').exists()
