import argparse

import pytest
import torch

from slak_mm.checkpoints import CheckpointError, convert_checkpoint, load_pretrained, read_checkpoint, write_checkpoint


def test_there_and_back(toy, tmp_path):
    official = toy.official()
    checkpoint = {'model': official, 'args': argparse.Namespace(), 'optimizer': {'state': {}}}
    ours = convert_checkpoint(checkpoint)
    assert list(ours) == ['state_dict']
    path = write_checkpoint(ours, tmp_path / 'ours.pth')
    back = convert_checkpoint(read_checkpoint(path), 'official')
    assert list(back) == ['model'] and list(back['model']) == list(official)
    assert all(torch.equal(back['model'][key], official[key]) for key in official)
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_need_no_list_of_safe_names(toy, tmp_path):
    model = toy.backbone()
    path = write_checkpoint(convert_checkpoint(model.state_dict(), 'official'), tmp_path / 'x.pth')
    assert list(torch.load(path, weights_only=True)) == ['model']


def test_whole_model_keeps_heads_and_meta(toy):
    weights = {f'backbone.{k}': v for k, v in toy.official(classifier=False).items()}
    weights['decode_head.x'] = torch.ones(1)
    converted = convert_checkpoint({'state_dict': weights, 'meta': {'CLASSES': ('a',)}})
    assert converted['meta'] == {'CLASSES': ('a',)}
    assert 'backbone.stages.0.0.large_kernel.wide.conv.weight' in converted['state_dict']
    assert 'decode_head.x' in converted['state_dict']
    back = convert_checkpoint(converted, 'official')
    assert back['state_dict'].keys() == weights.keys()


def test_moving_average(toy):
    checkpoint = {'model': toy.official(1), 'model_ema': toy.official(2)}
    key = 'stages.0.0.gamma'
    assert torch.equal(convert_checkpoint(checkpoint, use_ema=True)['state_dict'][key], checkpoint['model_ema'][key])


def test_safetensors(toy, tmp_path):
    pytest.importorskip('safetensors')
    official = toy.official()
    path = write_checkpoint(convert_checkpoint({'model': official}), tmp_path / 'x.safetensors')
    model = toy.backbone()
    load_pretrained(model, path)
    assert torch.equal(model.state_dict()['stages.0.0.gamma'], official['stages.0.0.gamma'])


def test_safetensors_and_back_keep_weights_and_meta(toy, tmp_path):
    """All of the meta that JSON has; of a whole model, under the official names and back."""
    pytest.importorskip('safetensors')
    weights = {f'backbone.{key}': value for key, value in toy.official(classifier=False).items()}
    weights['decode_head.x'] = torch.ones(2, 3, dtype=torch.float16)
    meta = dict(dataset_meta=dict(classes=['wall', 'sky'], palette=[[0, 1, 2]]), epoch=3, seed=None)
    odd = dict(args=argparse.Namespace(), nan=float('nan'))
    first = convert_checkpoint(dict(state_dict=weights, meta=dict(meta, **odd)))
    path = write_checkpoint(first, tmp_path / 'x.safetensors')
    read = read_checkpoint(path)
    assert read['meta'] == meta
    back = read_checkpoint(write_checkpoint(convert_checkpoint(read, 'official'), tmp_path / 'back.pth'))
    assert back['meta'] == meta and back['state_dict'].keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(back['state_dict'][key], value) and back['state_dict'][key].dtype == value.dtype


def test_nothing_is_replaced_unasked(toy, tmp_path):
    path = tmp_path / 'x.pth'
    path.write_text('precious')
    with pytest.raises(CheckpointError, match='exists already'):
        write_checkpoint({'state_dict': {}}, path)
    assert path.read_text() == 'precious'
    assert read_checkpoint(write_checkpoint({'state_dict': {}}, path, overwrite=True)) == {'state_dict': {}}
    with pytest.raises(CheckpointError, match='no folder'):
        write_checkpoint({}, tmp_path / 'nowhere' / 'x.pth')


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / 'x.pth').write_text('precious')
    with pytest.raises(CheckpointError, match='x.pth could not be written'):
        write_checkpoint({'state_dict': lambda: None}, tmp_path / 'x.pth', overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']
    assert (tmp_path / 'x.pth').read_text() == 'precious'


@pytest.mark.parametrize('name', ['x.pth', 'x.safetensors'])
def test_a_full_disk(tmp_path, name):
    resource = pytest.importorskip('resource')
    (tmp_path / name).write_text('precious')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # the system refuses larger files
    try:
        with pytest.raises(CheckpointError, match=f'{name} could not be written .*room on the disk'):
            write_checkpoint({'state_dict': {'w': torch.ones(100_000)}}, tmp_path / name, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == 'precious'


def test_unknown_content(toy):
    with pytest.raises(CheckpointError, match='no SLaK, ConvNeXt, RepLKNet, ShiftWise or UniRepLKNet backbone'):
        convert_checkpoint({'layer1.weight': torch.ones(1)})
    with pytest.raises(CheckpointError, match=r'stages\.0\.0\.grn'):
        convert_checkpoint({**toy.official(), 'stages.0.0.grn': torch.ones(1)})
