"""``tools/test.py``: what it refuses, and test-time augmentation."""

import re

import pytest
import torch


@pytest.fixture(scope='module')
def checkpoint(build_tiny, tmp_path_factory):
    """Random weights of the tiny model, as a file."""
    torch.manual_seed(0)
    model = build_tiny()
    model.init_weights()
    # Logits apart from each other, so that every pixel has a clear winner.
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    path = tmp_path_factory.mktemp('weights') / 'tiny.pth'
    torch.save(dict(meta={}, state_dict=model.state_dict()), path)
    return path


@pytest.fixture
def run(call_tool, config_path, demo_data, tmp_path):
    common = ['--data-root', demo_data, '--crop-size 64 --num-workers 0', '--work-dir', tmp_path / 'w']

    def run(*arguments, config=config_path, code=0):
        return call_tool('test', config, *common, *arguments, code=code)

    return run


def miou(result):
    return re.search(r'Iter\(test\) .*mIoU: ([\d.]+)', result.text)[1]


def test_multi_scale_by_option_and_by_config_agree(run, tta_config_path, checkpoint, tiny, tmp_path):
    by_option = run(checkpoint, '--tta', '--out', tmp_path / 'a', '--cfg-options', *tiny)
    inside = [option.replace('model.', 'model.module.', 1) for option in tiny]
    by_config = run(checkpoint, '--out', tmp_path / 'b', '--cfg-options', *inside, config=tta_config_path)
    assert miou(by_option) == miou(by_config)
    files = sorted(path.name for path in (tmp_path / 'a').glob('*.png'))
    assert len(files) == 2
    for name in files:
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    run(checkpoint, '--out', tmp_path / 'c', '--cfg-options', *tiny)
    assert any((tmp_path / 'a' / name).read_bytes() != (tmp_path / 'c' / name).read_bytes() for name in files)


def test_refuses_a_backbone_without_heads(run, checkpoint, tiny, tmp_path):
    weights = torch.load(checkpoint)['state_dict']
    backbone = {key[9:]: value for key, value in weights.items() if key.startswith('backbone.')}
    torch.save(backbone, tmp_path / 'backbone.pth')
    result = run(tmp_path / 'backbone.pth', '--cfg-options', *tiny, code=1)
    assert 'head' in result.err[result.err.index('error: ') :]


def test_refuses_other_weights_and_other_files(run, checkpoint, tmp_path):
    # The real SLaK-T does not take the tiny one's weights.
    assert 'does not fit' in run(checkpoint, code=1).err
    (tmp_path / 'page.pth').write_text('<!DOCTYPE html><html>Google Drive</html>')
    assert 'HTML page' in run(tmp_path / 'page.pth', code=1).err
    assert 'nothing.pth' in run(tmp_path / 'nothing.pth', code=1).err


def test_tta_needs_its_pipeline(run, checkpoint):
    assert '--tta needs' in run(checkpoint, '--tta', '--cfg-options', 'tta_pipeline=None', code=1).err
