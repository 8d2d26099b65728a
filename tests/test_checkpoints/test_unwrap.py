from collections import OrderedDict

import pytest
import torch

from slak_mm.checkpoints import CheckpointMismatch, CheckpointUnreadable, find_roots, unwrap

A = {'x.weight': torch.ones(1)}
B = {'x.weight': torch.zeros(1)}


@pytest.mark.parametrize(
    ('checkpoint', 'wrapper'),
    [
        ({'state_dict': A, 'meta': {}}, 'state_dict'),
        ({'model': A, 'epoch': 3}, 'model'),
        ({'module': A}, 'module'),
        ({'model': B, 'state_dict': A}, 'state_dict'),
        (A, ''),
        ({'model': {'state_dict': A}}, 'model'),
    ],
)
def test_wrappers(checkpoint, wrapper):
    taken = unwrap(checkpoint)
    assert taken.wrapper == wrapper and not taken.is_ema and not taken.other_copy
    assert taken.state_dict['x.weight'] is A['x.weight']


@pytest.mark.parametrize('name', ['model_ema', 'state_dict_ema'])
def test_moving_average(name):
    checkpoint = {'model': A, name: B}
    assert unwrap(checkpoint).state_dict['x.weight'] == 1
    assert name in unwrap(checkpoint).other_copy
    taken = unwrap(checkpoint, 'ema')
    assert taken.state_dict['x.weight'] == 0 and taken.is_ema and taken.wrapper == name
    assert unwrap({name: B}).is_ema  # the only copy there is
    with pytest.raises(CheckpointMismatch, match='no moving average'):
        unwrap({'model': A}, 'ema')


def test_mmengines_ema_hook_stores_the_average_as_state_dict():
    checkpoint = {'state_dict': A, 'ema_state_dict': {'steps': torch.tensor(3), 'module.x.weight': B['x.weight']}}
    taken = unwrap(checkpoint)
    assert taken.is_ema and taken.wrapper == 'state_dict' and 'ema_state_dict' in taken.other_copy
    assert unwrap(checkpoint, 'ema').wrapper == 'state_dict'
    live = unwrap(checkpoint, 'ema_state_dict')
    assert list(live.state_dict) == ['x.weight'] and live.state_dict['x.weight'] == 0
    assert not live.is_ema
    with pytest.raises(CheckpointMismatch, match="no weights under 'other'; it has state_dict"):
        unwrap(checkpoint, 'other')


@pytest.mark.parametrize(
    'prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.', 'module.module.']
)
def test_outer_prefixes(prefix):
    weights = OrderedDict({f'{prefix}backbone.x': torch.ones(1), f'{prefix}y': torch.ones(1)})
    weights._metadata = {'': {}, f'{prefix}y'.rstrip('.'): {'version': 2}}
    taken = unwrap({'state_dict': weights}).state_dict
    assert list(taken) == ['backbone.x', 'y']
    assert taken._metadata['y'] == {'version': 2}
    # Only a prefix of every name is one of a wrapper.
    assert list(unwrap({f'{prefix}x': torch.ones(1), 'y': torch.ones(1)}).state_dict) == [f'{prefix}x', 'y']


@pytest.mark.parametrize('checkpoint', [{}, {'epoch': 3}, {'model': {}}, {'state_dict': {'a': 1}}])
def test_nothing_in_it(checkpoint):
    with pytest.raises(CheckpointUnreadable, match='holds no weights'):
        unwrap(checkpoint)


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        (0, torch.ones(1), r'tensor under 0 \(int\).*save model\.state_dict'),
        (('a', 'b'), torch.ones(1), r'tensor under <tuple>'),
        ('a' * 10**6, torch.ones(1), r'a{100}\.\.\. \(1000000 characters\) \(str\)'),
        ('a\x1b[2J\nb', torch.ones(1), r'tensor under a\\x1b\[2J\\nb '),
        ('w', torch.ones(2, 2).to_sparse(), r'w is a sparse tensor.*to_dense'),
        ('w', torch.empty(2, device='meta'), r'w is a meta tensor.*no data'),
        ('w', torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), r'w is a quantized tensor.*dequantize'),
        ('w', torch.nested.nested_tensor([torch.ones(2)]), r'w is a nested tensor.*unbind'),
        ('w', torch.ones(2).as_subclass(type('Own', (torch.Tensor,), {})), 'w is a tensor of a class of its own'),
    ],
)
@pytest.mark.parametrize('others', [{}, A], ids=['alone', 'beside weights'])
def test_what_is_no_weight(name, value, message, others):
    with pytest.raises(CheckpointUnreadable, match=message) as error:
        unwrap({'state_dict': {**others, name: value}} if others else {name: value})
    assert len(str(error.value)) < 400


def test_a_dict_inside_itself():
    loop = {}
    loop['state_dict'] = loop
    with pytest.raises(CheckpointUnreadable):
        unwrap(loop)


def test_counters_beside_tensors():
    taken = unwrap({'model': {**A, 'epoch': 3}})
    assert list(taken.state_dict) == ['x.weight']


def test_roots():
    def names(prefix, stem='downsample_layers.0.0'):
        return {f'{prefix}{stem}.weight': 0, f'{prefix}stages.0.0.gamma': 0}

    assert find_roots(names('')) == ['']
    assert find_roots(names('backbone.')) == ['backbone.']
    assert find_roots(names('backbone.module.')) == ['backbone.module.']
    assert find_roots(names('a.') | names('b.', 'stem.0')) == ['a.', 'b.']
    assert find_roots({'stem.0.weight': 0, 'layer1.0.weight': 0}) == []
