import argparse
import logging
import re
from collections import OrderedDict

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from slak_mm import load_pretrained, switch_to_deploy
from slak_mm.checkpoints import CheckpointError, CheckpointMismatch, CheckpointNotFound, prepare_checkpoint, to_official

OUT_NORMS = [f'norm{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias')]
HEAD = {'norm.weight', 'norm.bias', 'head.weight', 'head.bias'}


class Head(nn.Module):
    """A head that still takes the name its weight had in version 1."""

    _version = 2

    def __init__(self, classes=5):
        super().__init__()
        self.conv_seg = nn.Conv2d(32, classes, 1)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get('version') in (None, 1) and prefix + 'old.weight' in state_dict:
            state_dict[prefix + 'conv_seg.weight'] = state_dict.pop(prefix + 'old.weight')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Segmentor(BaseModule):
    """What a framework's model looks like from here."""

    def __init__(self, backbone, classes=5):
        super().__init__()
        self.backbone = backbone
        self.decode_head = Head(classes)
        self.auxiliary_head = Head(classes)


@pytest.fixture
def segmentor(toy):
    torch.manual_seed(0)
    return Segmentor(toy.backbone())


def whole_official(toy, segmentor, seed=1):
    """A checkpoint of the whole model, as the official downstream code writes it."""
    generator = torch.Generator().manual_seed(seed)
    weights = OrderedDict(('backbone.' + k, v) for k, v in toy.official(seed, classifier=False).items())
    for key, value in segmentor.state_dict().items():
        if not key.startswith('backbone.'):
            weights[key] = torch.randn(value.shape, generator=generator)
    return {'state_dict': weights, 'meta': {'CLASSES': ('a', 'b')}}


def refused(toy, model, source, match, **kwargs):
    """Loading fails with the message, and leaves the model as it was."""
    before = toy.snapshot(model)
    with pytest.raises(CheckpointError, match=match) as error:
        load_pretrained(model, source, **kwargs)
    toy.assert_untouched(model, before)
    return error.value


# What fits


def test_imagenet_checkpoint_into_a_backbone(toy, tmp_path):
    official = toy.official()
    torch.save({'model': official, 'args': argparse.Namespace(epochs=300), 'epoch': 299}, tmp_path / 'slak.pth')
    model = toy.backbone()
    before = toy.snapshot(model)
    report = load_pretrained(model, tmp_path / 'slak.pth')
    assert to_official(model.state_dict()).keys() == {*official, *OUT_NORMS} - HEAD
    loaded = to_official({k: v for k, v in model.state_dict().items() if k not in OUT_NORMS})
    assert all(torch.equal(value, official[key]) for key, value in loaded.items())
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in OUT_NORMS)

    assert report.source == str(tmp_path / 'slak.pth') and report.wrapper == 'model'
    assert report.format == 'official-LoRA'
    assert set(report.loaded) == model.state_dict().keys() - set(OUT_NORMS)
    assert sorted(report.newly_initialized) == sorted(OUT_NORMS)
    assert set(report.dropped) == HEAD
    # 5 blocks, 3 branches, a weight and 5 entries of the norm
    assert len(report.converted) == 5 * 3 * 6
    assert report.converted['stages.2.1.large_kernel.LoRA2.bn.bias'] == 'stages.2.1.large_kernel.wide.bn.bias'
    text = str(report)
    assert 'classification head' in text and 'norm3' in text and 'official-LoRA' in text


def test_both_forms_compute_the_same(toy):
    torch.manual_seed(1)
    one, other = toy.backbone().eval(), toy.backbone().eval()
    load_pretrained(one, {'model': toy.official(names=('Decom1', 'Decom2'))})
    load_pretrained(other, {'state_dict': OrderedDict(('module.backbone.' + k, v) for k, v in toy.official().items())})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(one(x), other(x)))


def test_values_are_copied_into_the_models_own_tensors(toy):
    model = toy.backbone().to(torch.bfloat16)
    tensors = dict(model.named_parameters())
    pointers = {key: value.data_ptr() for key, value in tensors.items()}
    official = toy.official(classifier=False)
    load_pretrained(model, official)
    assert {key: value.data_ptr() for key, value in model.named_parameters()} == pointers
    weight = tensors['stages.0.0.large_kernel.tall.conv.weight']
    assert weight.dtype == torch.bfloat16 and weight.requires_grad
    assert torch.equal(weight.detach(), official['stages.0.0.large_kernel.LoRA1.conv.weight'].bfloat16())


def test_sparsity_report(toy):
    official = toy.official()
    key = 'stages.0.0.large_kernel.LoRA1.conv.weight'
    official[key].view(-1)[:100] = 0
    official['stages.3.0.pwconv1.weight'][:] = 0
    official['stages.3.0.norm.weight'][:] = 0  # one dimension: not a weight that is pruned
    official['head.weight'][:] = 0  # dropped: not counted
    report = load_pretrained(toy.backbone(), official)
    zeros = {k: count for k, count in report.zeros.items() if count[0]}
    assert zeros == {
        'stages.0.0.large_kernel.tall.conv.weight': (100, 8 * 13 * 5),
        'stages.3.0.pwconv1.weight': (128 * 32, 128 * 32),
    }
    assert report.sparsity['stages.3.0.pwconv1.weight'] == 1.0
    total = sum(v.numel() for k, v in official.items() if v.dim() > 1 and k != 'head.weight')
    assert f'{(100 + 128 * 32) / total:.2%} of ' in str(report) and '2 of 29 layers sparse' in str(report)


def test_moving_average(toy):
    live, average = toy.official(1), toy.official(2)
    checkpoint = {'model': live, 'model_ema': average}
    key = 'stages.0.0.pwconv1.weight'
    model = toy.backbone()
    report = load_pretrained(model, checkpoint)
    assert torch.equal(model.state_dict()[key], live[key]) and not report.is_ema
    assert 'model_ema' in report.other_copy and 'model_ema' in str(report)
    report = load_pretrained(model, checkpoint, use_ema=True)
    assert torch.equal(model.state_dict()[key], average[key]) and report.is_ema
    refused(toy, model, {'model': live}, 'no moving average', use_ema=True)


def test_imagenet_checkpoint_into_a_whole_model(toy, segmentor):
    official = toy.official()
    before = toy.snapshot(segmentor)
    report = load_pretrained(segmentor, {'model': official})
    after = segmentor.state_dict()
    key = 'stages.1.0.pwconv1.weight'
    assert torch.equal(after['backbone.' + key], official[key])
    heads = [k for k in before if not k.startswith('backbone.')]
    assert all(torch.equal(after[k], before[k]) for k in heads)
    assert set(report.newly_initialized) == {*heads, *('backbone.' + k for k in OUT_NORMS)}


def test_whole_checkpoint_into_a_whole_model(toy, segmentor):
    checkpoint = whole_official(toy, segmentor)
    checkpoint['state_dict']['data_preprocessor.mean'] = torch.zeros(3, 1, 1)
    checkpoint['state_dict']['ema_backbone_stages_0_0_gamma'] = torch.zeros(8)
    report = load_pretrained(segmentor, checkpoint)
    after = to_official(segmentor.state_dict(), prefix='backbone.')
    assert all(torch.equal(after[k], checkpoint['state_dict'][k]) for k in after)
    assert set(report.dropped) == {'data_preprocessor.mean', 'ema_backbone_stages_0_0_gamma'}
    assert not report.newly_initialized


def test_whole_checkpoint_into_a_backbone(toy, segmentor):
    checkpoint = whole_official(toy, segmentor)
    model = toy.backbone()
    report = load_pretrained(model, checkpoint)
    assert not report.newly_initialized
    assert torch.equal(model.norm2.weight, checkpoint['state_dict']['backbone.norm2.weight'])
    assert set(report.dropped) == {k for k in checkpoint['state_dict'] if 'head' in k}


def test_prefix(toy, segmentor):
    checkpoint = whole_official(toy, segmentor)
    model = toy.backbone()
    report = load_pretrained(model, checkpoint, prefix='backbone')
    assert torch.equal(model.norm2.weight, checkpoint['state_dict']['backbone.norm2.weight'])
    assert len(report.loaded) == len(model.state_dict())
    refused(toy, model, checkpoint, r"no tensors below the prefix 'student\.'", prefix='student.')
    # Heads of another model do not matter when only the backbone is asked for.
    other = Segmentor(toy.backbone(), classes=7)
    load_pretrained(other, checkpoint, prefix='backbone.')
    assert torch.equal(other.backbone.norm2.weight, model.norm2.weight)


def test_wrapped_models(toy, segmentor):
    checkpoint = whole_official(toy, segmentor)
    load_pretrained(nn.DataParallel(segmentor), checkpoint)
    assert torch.equal(segmentor.backbone.norm0.bias, checkpoint['state_dict']['backbone.norm0.bias'])


def test_own_checkpoints_round_trip(toy, segmentor, tmp_path):
    torch.save({'state_dict': segmentor.state_dict()}, tmp_path / 'x.pth')
    other = Segmentor(toy.backbone())
    report = load_pretrained(other, tmp_path / 'x.pth')
    toy.assert_untouched(other, toy.snapshot(segmentor))
    assert report.format == 'ours' and not report.converted and not report.dropped
    # folded into folded
    switch_to_deploy(segmentor)
    folded = Segmentor(toy.backbone(deploy=True))
    report = load_pretrained(folded, segmentor.state_dict())
    toy.assert_untouched(folded, toy.snapshot(segmentor))
    assert report.format == 'ours-deployed'


def test_heads_may_convert_older_versions(toy, segmentor):
    weights = segmentor.state_dict()
    weights['decode_head.old.weight'] = weights.pop('decode_head.conv_seg.weight') + 1
    weights._metadata['decode_head']['version'] = 1
    before = toy.snapshot(segmentor)
    load_pretrained(segmentor, {'state_dict': weights})
    assert torch.equal(segmentor.decode_head.conv_seg.weight, before['decode_head.conv_seg.weight'] + 1)
    load_pretrained(segmentor, weights)  # the same as a bare state dict
    # A head that says it is of version 2 has no such name.
    weights._metadata['decode_head']['version'] = 2
    refused(toy, segmentor, {'state_dict': weights}, 'other heads')


def test_counters_of_old_batch_norms(toy):
    official = {key: value for key, value in toy.official().items() if not key.endswith('num_batches_tracked')}
    assert not load_pretrained(toy.backbone(), official).missing


def test_fewer_stages_than_the_checkpoint(toy):
    model = toy.backbone(out_indices=(1, 3))
    report = load_pretrained(model, toy.official(classifier=False))
    assert set(report.dropped) == {f'norm{i}.{leaf}' for i in (0, 2) for leaf in ('weight', 'bias')}
    assert not report.newly_initialized


def test_stages_that_are_not_built(toy, segmentor):
    """They are dropped with the reason, by the names that they have in the checkpoint."""
    whole = whole_official(toy, segmentor)
    for model, source in (
        (toy.backbone(out_indices=(0, 1)), {'model': toy.official(classifier=False)}),
        (toy.backbone(out_indices=(0, 1)), whole),
        (Segmentor(toy.backbone(out_indices=(0, 1))), {'model': toy.official(classifier=False)}),
    ):
        report = load_pretrained(model, source)
        prefix = 'backbone.' if source is whole else ''
        behind = {key for key, why in report.dropped.items() if why.startswith('behind stage 1, the last one that')}
        weights = next(iter(source.values()))
        assert behind == {key for key in weights if re.match(prefix + r'(stages|downsample_layers)\.[23]', key)}
        assert prefix + 'stages.3.0.large_kernel.LoRA1.conv.weight' in behind and not report.remarks
        assert not behind & report.converted.keys() and f'dropped       {len(behind)}: ' in str(report)


def test_convnext_weights(toy):
    ours = toy.backbone(**toy.CONVNEXT, out_norm=False).state_dict()
    for spelling in ('facebook', 'timm', 'mmpretrain'):
        model, theirs = toy.backbone(**toy.CONVNEXT), to_official(ours, spelling)
        report = load_pretrained(model, {'model': theirs})
        assert report.format == f'convnext-{spelling}' and theirs.keys() != ours.keys() and not report.dropped
        assert all(torch.equal(model.state_dict()[key], ours[key]) for key in ours)
    # A classifier of mmpretrain, whose head is outside the backbone
    weights = {f'backbone.{k}': v for k, v in to_official(ours, 'mmpretrain').items()}
    head = {'backbone.norm3.weight': torch.ones(32), 'backbone.norm3.bias': torch.ones(32)}
    head |= {'head.fc.weight': torch.ones(10, 32), 'head.fc.bias': torch.ones(10)}
    whole = Segmentor(toy.backbone(**toy.CONVNEXT))
    report = load_pretrained(whole, {'state_dict': weights | head})
    assert set(report.dropped) == set(head)
    assert {f'backbone.{k}' for k in OUT_NORMS} < set(report.newly_initialized)


def test_init_cfg_route(toy, tmp_path):
    torch.save({'model': toy.official()}, tmp_path / 'slak.pth')
    model = toy.backbone(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'slak.pth')))
    model.init_weights()
    assert torch.equal(model.state_dict()['stages.0.0.gamma'], toy.official()['stages.0.0.gamma'])
    model = toy.backbone(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'no.pth')))
    with pytest.raises(CheckpointNotFound):
        model.init_weights()


# What does not fit

MODES = {
    'square': (dict(decomposed=False), r'square kernels \(lkb_origin\).*decomposed=False'),
    'depths': (dict(depths=(1, 1, 3, 1)), r'1/1/3/1 blocks.*the model 1/1/2/1'),
    'dims': (dict(dims=(12, 24, 36, 48)), 'another width: the checkpoint has 12/24/36/48'),
    'width factor': (dict(width_factor=1.3), 'another width: the checkpoint has 10/20/31/41'),
    'kernels': (dict(kernels=(11, 11, 9, 7)), 'has 11/11/9/7, the model 13/11/9/7'),
    'small kernel': (dict(small=3), 'has 3, the model 5; set small_kernel'),
    'branch norms': (dict(bn=False), 'no batch norms.*branch_norm=False'),
}


@pytest.mark.parametrize('mode', list(MODES))
@pytest.mark.parametrize('whole', [False, True], ids=['backbone', 'whole'])
def test_other_variants(toy, segmentor, mode, whole):
    options, message = MODES[mode]
    error = refused(toy, segmentor if whole else segmentor.backbone, {'model': toy.official(**options)}, message)
    assert isinstance(error, CheckpointMismatch)
    assert error.causes and 'Nothing was loaded' in str(error)
    assert error.missing or error.unexpected or error.shape_mismatches


def test_message_names_keys_shapes_and_counts(toy):
    error = refused(toy, toy.backbone(), toy.official(kernels=(11, 11, 9, 7)), 'kernel')
    key = 'stages.0.0.large_kernel.tall.conv.weight'
    assert (key, (8, 1, 11, 5), (8, 1, 13, 5)) in error.shape_mismatches
    assert '2 of another shape' in str(error) and f'{key} [8, 1, 11, 5]' in str(error)
    error = refused(toy, toy.backbone(decomposed=False), toy.official(), 'decomposed=True')
    assert len(error.missing) == 25 and len(error.unexpected) == 50  # without the counters
    assert '50 unexpected' in str(error) and 'and 46 more' in str(error)
    assert 'stages.0.0.large_kernel.LoRA1.conv.weight' in error.unexpected


def test_other_projects_weights(toy, segmentor):
    model = toy.backbone()
    resnet = {'conv1.weight': torch.ones(1), 'layer1.0.conv1.weight': torch.ones(1)}
    refused(toy, model, resnet, 'no SLaK, ConvNeXt, RepLKNet, ShiftWise or UniRepLKNet backbone')
    convnext = to_official(toy.backbone(**toy.CONVNEXT).state_dict(), 'facebook')
    refused(toy, model, convnext, r'ConvNeXt weights.*small_kernel=None, decomposed=False')
    refused(toy, toy.backbone(**toy.CONVNEXT), toy.official(), 'the model is in ConvNeXt mode')
    shiftwise = {key: value for key, value in toy.official().items() if 'large_kernel' not in key}
    shiftwise |= {f'stages.{i}.0.large_kernel.LoRAs.0.weight': torch.ones(4, 1, 3, 3) for i in range(4)}
    refused(toy, model, shiftwise, 'holds ShiftWise weights and the model is SLaK')
    refused(toy, segmentor, {'optimizer': {}, 'epoch': 1}, 'holds no weights')
    refused(toy, nn.Conv2d(1, 1, 1), toy.official(), 'no backbone of slak_mm')


def test_folded_and_training_form(toy):
    training = toy.backbone()
    folded = switch_to_deploy(toy.backbone())
    refused(toy, folded, toy.official(), 'load the weights first and call switch_to_deploy')
    refused(toy, training, folded.state_dict(), 'build the model with deploy=True')
    # ... also where partial loading is allowed
    refused(toy, folded, toy.official(), 'load the weights first', strict=False)


def test_incomplete_file(toy):
    official = toy.official()
    del official['stages.1.0.pwconv2.bias']
    error = refused(toy, toy.backbone(), official, 'incomplete')
    assert error.missing == ['stages.1.0.pwconv2.bias']
    official = toy.official(classifier=False)
    del official['norm1.weight']
    refused(toy, toy.backbone(), official, 'out_indices and out_norm')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_values_that_are_not_finite(toy, value):
    official = toy.official()
    official['stages.0.0.large_kernel.LoRA1.bn.running_var'][3] = value
    refused(toy, toy.backbone(), official, r'infinite values or NaN in 1 tensors: stages\.0\.0\.large_kernel\.tall\.bn')
    official = toy.official()
    official['head.weight'][0] = value  # not loaded, does not matter
    load_pretrained(toy.backbone(), official)


def test_other_heads(toy, segmentor):
    checkpoint = whole_official(toy, Segmentor(toy.backbone(), classes=7))
    refused(toy, segmentor, checkpoint, r'another number of classes \(7.*, 5 in the model.*strict=False')
    checkpoint = whole_official(toy, segmentor)
    checkpoint['state_dict']['neck.conv.weight'] = torch.ones(3)
    error = refused(toy, segmentor, checkpoint, 'model with other heads')
    assert error.unexpected == ['neck.conv.weight']


def test_backbone_under_another_name(toy, segmentor):
    weights = {k.replace('backbone.', 'encoder.'): v for k, v in whole_official(toy, segmentor)['state_dict'].items()}
    refused(toy, segmentor, weights, 'called backbone in the model and encoder in the checkpoint')
    load_pretrained(segmentor, weights, prefix='encoder.')


def test_several_backbones(toy):
    pair = nn.ModuleDict(dict(student=toy.backbone(), teacher=toy.backbone()))
    refused(toy, pair, toy.official(), 'contains 2 backbones')
    both = {f'{name}.{k}': v for name in pair for k, v in toy.official(classifier=False).items()}
    refused(toy, toy.backbone(), both, 'holds 2 backbones')
    load_pretrained(toy.backbone(), both, prefix='teacher.')


def test_meta_device(toy):
    with torch.device('meta'):
        model = toy.backbone()
    with pytest.raises(CheckpointError, match='to_empty'):
        load_pretrained(model, toy.official())


# What fits in part


def test_not_strict(toy, segmentor, monkeypatch):
    logged = []
    monkeypatch.setattr('slak_mm.checkpoints.load.log_report', lambda text, level: logged.append((level, text)))
    checkpoint = whole_official(toy, Segmentor(toy.backbone(), classes=7))
    del checkpoint['state_dict']['backbone.stages.0.0.gamma']
    checkpoint['state_dict']['neck.weight'] = torch.ones(1)
    before = toy.snapshot(segmentor)
    report = load_pretrained(segmentor, checkpoint, strict=False)
    assert report.missing == ['backbone.stages.0.0.gamma']
    assert len(report.mismatched) == 4 and report.dropped['neck.weight'] == 'not in the model'
    assert torch.equal(
        segmentor.state_dict()['backbone.stages.1.0.gamma'], checkpoint['state_dict']['backbone.stages.1.0.gamma']
    )
    for key in (*report.missing, *report.mismatched):
        assert torch.equal(segmentor.state_dict()[key], before[key])
    [(level, text)] = logged
    assert level == logging.WARNING and 'MISSING' in text and 'OTHER SHAPE' in text
    assert 'backbone.stages.0.0.gamma' in text


def test_not_strict_still_needs_something_to_match(toy):
    official = {k: v for k, v in toy.official(dims=(12, 24, 36, 48)).items() if v.dim()}
    refused(toy, toy.backbone(), official, 'another width', strict=False)


# The framework's own loading


def test_prepare_for_the_runner(toy, segmentor):
    checkpoint = whole_official(toy, segmentor)
    official = dict(checkpoint['state_dict'])
    before = toy.snapshot(segmentor)
    report = prepare_checkpoint(segmentor, checkpoint, source='x.pth')
    toy.assert_untouched(segmentor, before)
    assert report.source == 'x.pth' and checkpoint['meta'] == {'CLASSES': ('a', 'b')}
    segmentor.load_state_dict(checkpoint['state_dict'], strict=True)
    key = 'backbone.stages.3.0.large_kernel.'
    assert torch.equal(segmentor.state_dict()[key + 'wide.conv.weight'], official[key + 'LoRA2.conv.weight'])


@pytest.mark.parametrize('wrapped', [True, False])
def test_prepare_imagenet_weights(toy, segmentor, wrapped):
    checkpoint = {'model': toy.official()} if wrapped else dict(toy.official())
    with pytest.raises(CheckpointMismatch, match='holds only a backbone'):
        prepare_checkpoint(segmentor, checkpoint, require_heads=True)
    assert 'state_dict' not in checkpoint
    prepare_checkpoint(segmentor, checkpoint)
    assert list(checkpoint) == ['state_dict']
    assert all(key.startswith('backbone.') for key in checkpoint['state_dict'])
    # A bare backbone has no heads that could be missing.
    prepare_checkpoint(segmentor.backbone, {'model': toy.official()}, require_heads=True)


def test_prepare_leaves_the_checkpoint_on_failure(toy, segmentor):
    checkpoint = whole_official(toy, segmentor)
    del checkpoint['state_dict']['backbone.stages.0.0.gamma']
    keys = list(checkpoint['state_dict'])
    with pytest.raises(CheckpointMismatch, match='incomplete'):
        prepare_checkpoint(segmentor, checkpoint)
    assert list(checkpoint['state_dict']) == keys


def test_prepare_converts_the_hooks_second_copy(toy, segmentor):
    checkpoint = whole_official(toy, segmentor)
    live = {f'module.{k}': v + 1 for k, v in checkpoint['state_dict'].items()}
    checkpoint['ema_state_dict'] = {'steps': torch.tensor(7), **live}
    report = prepare_checkpoint(segmentor, checkpoint)
    assert report.is_ema and 'ema_state_dict' in report.other_copy
    assert {k.removeprefix('module.') for k in checkpoint['ema_state_dict']} == {'steps', *segmentor.state_dict()}
    key = 'module.backbone.stages.0.0.large_kernel.'
    assert torch.equal(checkpoint['ema_state_dict'][key + 'tall.conv.weight'], live[key + 'LoRA1.conv.weight'])
    checkpoint = whole_official(toy, segmentor)
    checkpoint['ema_state_dict'] = {'steps': torch.tensor(7), 'module.x': torch.ones(1)}
    with pytest.raises(CheckpointMismatch, match='not of one model'):
        prepare_checkpoint(segmentor, checkpoint)
