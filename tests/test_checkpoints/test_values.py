"""Values that mean nothing to a model are refused at every door, before anything is overwritten."""

from collections import OrderedDict

import pytest
import torch
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from slak_mm import load_pretrained
from slak_mm.checkpoints import CheckpointError, CheckpointMismatch, prepare_checkpoint
from slak_mm.engine import StrictCheckpointHook
from slak_mm.engine.hooks import load_whole_model

KEY = 'stages.3.0.pwconv2.weight'  # of the last block
BAD = {
    'integers': lambda t: (100 * t).to(torch.int8),
    'long integers': lambda t: t.long(),
    'booleans': lambda t: t > 0,
    'complex': lambda t: t + 0j,
    'overflow': lambda t: t.double() * 1e300,
    'NaN': lambda t: t * float('nan'),
    'infinite': lambda t: t / 0,
    'quantized': lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    '8-bit floats': lambda t: t.to(torch.float8_e4m3fn),
    'sparse': lambda t: t.to_sparse(),
    'compressed': lambda t: t.to_sparse_csr(),
    'nested': lambda t: torch.nested.nested_tensor([t]),
    'meta': lambda t: t.to('meta'),
}


def inside(model):
    """The backbone as part of a framework's model, its weights with that prefix."""
    return nn.ModuleDict(dict(backbone=model))


def prefixed(weights, prefix):
    return OrderedDict((prefix + key, value) for key, value in weights.items())


def load_average(model, weights):
    average = prefixed(weights, 'module.')
    prepare_checkpoint(model, dict(state_dict=model.state_dict(), ema_state_dict=average))


DOORS = {
    'load_pretrained': load_pretrained,
    'not strict': lambda model, weights: load_pretrained(model, weights, strict=False),
    'load_state_dict': lambda model, weights: model.load_state_dict(weights),
    'of a whole model': lambda model, weights: inside(model).load_state_dict(prefixed(weights, 'backbone.')),
    'load_from': lambda model, weights: prepare_checkpoint(model, dict(state_dict=weights)),
    'load_whole_model': lambda model, weights: load_whole_model(
        inside(model), dict(state_dict=prefixed(weights, 'backbone.')), 'a file'
    ),
    'moving average': load_average,
}
doors = pytest.mark.parametrize('door', DOORS.values(), ids=DOORS)
strict_doors = pytest.mark.parametrize('door', [door for name, door in DOORS.items() if name != 'not strict'])


def refused(toy, door, model, weights, error=CheckpointError):
    before = toy.snapshot(model)
    with pytest.raises(error):
        door(model, weights)
    toy.assert_untouched(model, before)


@doors
@pytest.mark.parametrize('spoil', BAD.values(), ids=BAD)
def test_one_bad_tensor_and_nothing_is_loaded(toy, door, spoil):
    weights = toy.official(classifier=False)
    weights[KEY] = spoil(weights[KEY])
    refused(toy, door, toy.backbone(), weights)


@pytest.mark.parametrize('value', [[1.0], None])
@strict_doors
def test_one_entry_that_is_no_tensor(toy, door, value):
    """It is left out of the weights of a file, which then lack one."""
    refused(toy, door, toy.backbone(), {**toy.official(classifier=False), KEY: value})


@doors
@pytest.mark.parametrize('dtype, value', [(torch.float16, 7e4), (torch.bfloat16, 3.4028e38)])
def test_overflow_is_that_of_the_models_dtype(toy, door, dtype, value):
    weights = toy.official(classifier=False)
    weights[KEY][0, 0] = value
    refused(toy, door, toy.backbone().to(dtype), weights)
    door(toy.backbone(), weights)


@strict_doors
def test_one_shape_and_nothing_is_loaded(toy, door):
    weights = toy.official(classifier=False)
    weights[KEY] = weights[KEY][:, :-1]
    refused(toy, door, toy.backbone(), weights, CheckpointMismatch)


def test_load_state_dict_says_the_cause(toy):
    model = toy.backbone()
    with pytest.raises(CheckpointMismatch, match='decomposed=False'):
        model.load_state_dict(toy.official(decomposed=False, classifier=False))
    weights = toy.official(classifier=False)
    del weights[KEY]
    refused(toy, DOORS['load_state_dict'], model, weights, CheckpointMismatch)
    assert model.load_state_dict(weights, strict=False).missing_keys == [KEY]


def test_counters_may_be_in_half_precision(toy):
    weights = {key: value.half() for key, value in toy.official().items()}
    load_pretrained(toy.backbone(), weights)
    counter = 'stages.0.0.large_kernel.LoRA1.bn.num_batches_tracked'
    refused(toy, load_pretrained, toy.backbone(), {**weights, counter: torch.tensor(0.5)})


@pytest.mark.parametrize('spoil', [lambda t: t[1:], *BAD.values()], ids=['shape', *BAD])
@pytest.mark.parametrize('through_runner', [False, True])
def test_a_frameworks_own_model(toy, spoil, through_runner):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weights = {key: value + 1 for key, value in model.state_dict().items()}
    weights['1.weight'] = spoil(weights['1.weight'])
    hook = StrictCheckpointHook()
    runner = type('Runner', (), dict(model=model))
    door = hook.after_load_checkpoint if through_runner else load_whole_model

    def load(model, weights):
        return door(runner, dict(state_dict=weights)) if through_runner else door(model, dict(state_dict=weights), 'x')

    refused(toy, load, model, weights)


# One conversion, once


@pytest.mark.parametrize('door', [d for name, d in DOORS.items() if name != 'moving average'])
def test_names_are_converted_once(toy, door, monkeypatch):
    from slak_mm.checkpoints import load

    calls = []
    convert = load.convert_state_dict
    monkeypatch.setattr(load, 'convert_state_dict', lambda *args: calls.append(1) or convert(*args))
    door(toy.backbone(), toy.official(classifier=False))
    assert len(calls) == 1


def test_the_framework_does_not_convert_what_was_prepared(toy, monkeypatch):
    from mmengine.runner.checkpoint import _load_checkpoint_to_model

    from slak_mm.checkpoints import load

    model = inside(toy.backbone())
    checkpoint = dict(state_dict=prefixed(toy.official(classifier=False), 'backbone.'))
    prepare_checkpoint(model, checkpoint)
    monkeypatch.setattr(load, 'convert_state_dict', None)
    _load_checkpoint_to_model(model, checkpoint)
    assert torch.equal(model.backbone.state_dict()[KEY], toy.official(classifier=False)[KEY])


# Options that do not exist


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', WEIGHT_INITIALIZERS.get('Pretrained')])
@pytest.mark.parametrize('key', ['strict', 'prefx', 'use_ema'])
def test_unknown_keys_of_init_cfg(toy, kind, key):
    with pytest.raises(ValueError, match=rf"unknown keys \['{key}'\]; it takes type, checkpoint, prefix"):
        toy.backbone(init_cfg=dict(type=kind, checkpoint='x.pth', **{key: False}))
    toy.backbone(init_cfg=dict(type=kind, checkpoint='x.pth', prefix='backbone.', map_location='cpu'))
    with pytest.raises(ValueError, match='needs checkpoint='):
        toy.backbone(init_cfg=dict(type=kind))


# Other images


@pytest.mark.parametrize('channels', [1, 2, 4, 6, 12])
@pytest.mark.parametrize('whole', [False, True])
def test_other_images_get_a_stem_as_in_timm(toy, channels, whole):
    adapt = pytest.importorskip('timm.models').adapt_input_conv
    stem = 'downsample_layers.0.0.weight'
    weights = toy.official(classifier=False)
    model = toy.backbone(in_channels=channels)
    report = load_pretrained(inside(model) if whole else model, weights)
    assert torch.allclose(model.state_dict()[stem], adapt(channels, weights[stem]), rtol=1e-6)
    assert any('the 3 channels of the first convolution were' in remark for remark in report.remarks)
    assert report.remarks[0] in str(report)
    assert torch.equal(model.state_dict()[KEY], weights[KEY])


@pytest.mark.parametrize('channels', [1, 6])
def test_gray_images_give_what_their_rgb_gives(toy, channels):
    rgb, other = toy.backbone().eval(), toy.backbone(in_channels=channels).eval()
    for model in (rgb, other):
        load_pretrained(model, toy.official(classifier=False))
    gray = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        for one, two in zip(rgb(gray.expand(-1, 3, -1, -1)), other(gray.expand(-1, channels, -1, -1)), strict=True):
            torch.testing.assert_close(one, two)


def test_only_rgb_is_adapted_and_only_to_start_from(toy):
    four = toy.backbone(in_channels=4).state_dict()
    refused(toy, load_pretrained, toy.backbone(), four, CheckpointMismatch)
    with pytest.raises(CheckpointMismatch, match='takes images of 3 channels, the model of 4; set in_channels'):
        load_whole_model(toy.backbone(in_channels=4), dict(state_dict=toy.backbone().state_dict()), 'x')
