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
def arguments(demo_data, tmp_path):
    return ['--data-root', demo_data, '--crop-size', '64', '--num-workers', '0', '--work-dir', tmp_path / 'w']


def miou(result):
    assert result.code == 0, result.text
    return re.search(r'Iter\(test\) .*mIoU: ([\d.]+)', result.text)[1]


def test_multi_scale_by_option_and_by_config_agree(
    call_tool, config_path, tta_config_path, checkpoint, arguments, tiny, tmp_path
):
    by_option = call_tool(
        'test', config_path, checkpoint, *arguments, '--tta', '--out', tmp_path / 'a', '--cfg-options', *tiny
    )
    inside = [option.replace('model.', 'model.module.', 1) for option in tiny]
    by_config = call_tool(
        'test', tta_config_path, checkpoint, *arguments, '--out', tmp_path / 'b', '--cfg-options', *inside
    )
    assert miou(by_option) == miou(by_config)
    files = sorted(path.name for path in (tmp_path / 'a').glob('*.png'))
    assert len(files) == 2
    for name in files:
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    plain = call_tool('test', config_path, checkpoint, *arguments, '--out', tmp_path / 'c', '--cfg-options', *tiny)
    assert plain.code == 0
    assert any((tmp_path / 'a' / name).read_bytes() != (tmp_path / 'c' / name).read_bytes() for name in files)


def test_refuses_a_backbone_without_heads(call_tool, config_path, checkpoint, arguments, tiny, tmp_path):
    weights = torch.load(checkpoint)['state_dict']
    torch.save(
        {key[9:]: value for key, value in weights.items() if key.startswith('backbone.')}, tmp_path / 'backbone.pth'
    )
    result = call_tool('test', config_path, tmp_path / 'backbone.pth', *arguments, '--cfg-options', *tiny)
    assert result.code == 1 and 'error: ' in result.err
    assert 'head' in result.err[result.err.index('error: ') :]


def test_refuses_other_weights_and_other_files(call_tool, config_path, checkpoint, arguments, tiny, tmp_path):
    # The real SLaK-T does not take the tiny one's weights.
    result = call_tool('test', config_path, checkpoint, *arguments)
    assert result.code == 1 and 'does not fit' in result.err
    (tmp_path / 'page.pth').write_text('<!DOCTYPE html><html>Google Drive</html>')
    result = call_tool('test', config_path, tmp_path / 'page.pth', *arguments)
    assert result.code == 1 and 'HTML page' in result.err
    result = call_tool('test', config_path, tmp_path / 'nothing.pth', *arguments)
    assert result.code == 1 and 'nothing.pth' in result.err
    assert 'Traceback' not in result.err


def test_tta_needs_its_pipeline(call_tool, config_path, checkpoint, arguments):
    result = call_tool('test', config_path, checkpoint, *arguments, '--tta', '--cfg-options', 'tta_pipeline=None')
    assert result.code == 1 and '--tta needs' in result.err
