from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS

from slak_mm.checkpoints import CheckpointMismatch, to_official, unwrap_model
from slak_mm.engine.hooks import StrictCheckpointHook, load_whole_model


@pytest.fixture(scope='module')
def build(build_tiny):
    """Builds the tiny segmentor with random weights."""

    def build(seed, **changes):
        torch.manual_seed(seed)
        model = build_tiny(**changes)
        model.init_weights()
        return model

    return build


def same(model, weights):
    return all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def official_checkpoint(model):
    """As mmseg 0.x wrote it, with the official class inside."""
    state_dict = {f'backbone.{key}': value for key, value in to_official(model.backbone.state_dict()).items()}
    state_dict.update({key: value for key, value in model.state_dict().items() if not key.startswith('backbone.')})
    assert any('LoRA1' in key for key in state_dict)
    return dict(meta=dict(iter=1), state_dict=state_dict)


def test_official_checkpoint_is_converted_for_the_runner(build):
    source, target = build(0), build(1)
    checkpoint = official_checkpoint(source)
    StrictCheckpointHook().after_load_checkpoint(SimpleNamespace(model=target), checkpoint)
    assert not same(target, source.state_dict())
    # What the runner does next.
    target.load_state_dict(checkpoint['state_dict'], strict=True)
    assert same(target, source.state_dict())


def test_mismatch_is_an_error_before_a_weight_is_overwritten(build):
    source, target = build(0), build(1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    checkpoint = official_checkpoint(source)
    key = next(key for key in checkpoint['state_dict'] if 'pwconv1.weight' in key)
    del checkpoint['state_dict'][key]
    with pytest.raises(CheckpointMismatch, match='pwconv1'):
        StrictCheckpointHook().after_load_checkpoint(SimpleNamespace(model=target), checkpoint)
    assert same(target, before)


def test_backbone_alone_is_for_starting_and_not_for_resuming(build):
    source, target = build(0), build(1)
    weights = dict(state_dict=source.backbone.state_dict())
    runner = SimpleNamespace(model=target)
    StrictCheckpointHook().after_load_checkpoint(runner, dict(weights))
    with pytest.raises(CheckpointMismatch):
        StrictCheckpointHook(require_heads=True).after_load_checkpoint(runner, dict(weights))
    with pytest.raises(CheckpointMismatch):
        load_whole_model(target, dict(weights), 'a file')


def test_load_whole_model_inside_a_test_time_augmentation(build):
    source, target = build(0), build(1)
    wrapped = MODELS.build(dict(type='SegTTAModel', module=target))
    assert unwrap_model(wrapped) is target
    report = load_whole_model(wrapped, official_checkpoint(source), 'a file')
    assert same(target, source.state_dict())
    assert report.converted


def test_other_backbones_are_loaded_strictly_too(build):
    mobile = dict(type='MobileNetV2', out_indices=(0, 1, 2, 4), widen_factor=0.1, norm_cfg=dict(type='BN'))
    changes = {
        'model.backbone': dict(mobile, _delete_=True),
        'model.decode_head.in_channels': [8, 8, 8, 16],
        'model.auxiliary_head.in_channels': 8,
    }
    source, target = build(0, **changes), build(1, **changes)
    weights = {f'module.{key}': value for key, value in source.state_dict().items()}
    assert load_whole_model(target, dict(state_dict=dict(weights)), 'a file') is None
    assert same(target, source.state_dict())
    del weights['module.decode_head.conv_seg.bias']
    runner = SimpleNamespace(model=target)
    with pytest.raises(CheckpointMismatch, match='Missing key'):
        StrictCheckpointHook().after_load_checkpoint(runner, dict(state_dict=weights))
    StrictCheckpointHook(strict=False).after_load_checkpoint(runner, dict(state_dict=weights))
