"""Our networks as models of timm: what timm's own tests of models check, official files, both orders of import."""

import argparse
import copy
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from backbone_helpers import SMALL, images, random_
from mmengine.registry import MODELS
from reference import SHIFTWISE_GOLDENS, SLAK_GOLDENS, Goldens, input_for, weight_for
from torch.nn import functional as F

timm = pytest.importorskip('timm')

from slak_mm import _with_timm, checkpoints, load_pretrained, timm_models  # noqa: E402
from slak_mm.checkpoints import ZOO, CheckpointMismatch, CheckpointNotFound, to_official  # noqa: E402
from slak_mm.cost import count  # noqa: E402

BACKBONES = {'slak_tiny': 'SLaK', 'shiftwise_tiny': 'ShiftWise'}
NAMES = list(BACKBONES)
ARCH = dict(arch=SMALL['arch'], kernel_sizes=(13, 11, 9, 7), small_kernel=3, width_factor=1.0)
DIMS = list(ARCH['arch']['dims'])


def create(name, **options):
    """A small network under the name of a large one, with weights that leave no part without effect."""
    model = timm.create_model(name, **{**ARCH, **options})
    return random_(model).eval()


@pytest.mark.parametrize('first', ['timm', 'slak_mm'])
def test_both_orders_of_import(first):
    then = {'timm': 'slak_mm', 'slak_mm': 'timm'}[first]
    code = f"""if True:
        import sys, {first}
        assert '{first}' == 'timm' or not any(name.partition('.')[0] == 'timm' for name in sys.modules)
        import {then}, timm
        assert timm.list_models('slak_tiny', module='timm_models') == ['slak_tiny']
        print(type(timm.create_model('resnet18')).__name__)"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'ResNet\n'


def test_timm_that_is_too_old(monkeypatch):
    monkeypatch.delitem(sys.modules, 'slak_mm.timm_models')
    monkeypatch.setitem(sys.modules, 'timm.layers', None)
    with pytest.warns(UserWarning, match='They need timm 1.0 or later'):
        _with_timm.register_when_imported()


def test_names():
    assert {'slak_tiny', 'slak_small', 'slak_base', 'slak_t_k31', 'slak_t_k61'} <= set(timm.list_models('slak*'))
    assert {f'shiftwise_{arch}' for arch in ('tiny', 'small', 'base', 'large')} <= set(timm.list_models('shiftwise*'))
    tags = timm.list_models('slak*', pretrained=True)
    assert {'slak_tiny.in1k_300e', 'slak_tiny.in1k_120e', 'slak_t_k31.in1k_120e'} <= set(tags)
    assert 'shiftwise_small' not in timm.list_pretrained('shiftwise*')
    assert timm.get_pretrained_cfg('slak_tiny').tag == 'in1k_300e'


@pytest.mark.parametrize('name', sorted(timm_models.default_cfgs))
def test_every_name(name):
    """The layers that the default cfg names exist, and channels and reductions are those of the maps."""
    with torch.device('meta'):
        model = timm.create_model(name)
        _, side, _ = model.default_cfg['input_size']
        features = model.forward_intermediates(torch.empty(1, 3, side, side), intermediates_only=True)
    cfg, weights = model.default_cfg, model.state_dict()
    assert f'{cfg["first_conv"]}.weight' in weights and weights[f'{cfg["classifier"]}.weight'].shape[0] == 1000
    assert [info['num_chs'] for info in model.feature_info] == [x.shape[1] for x in features] == list(model.dims)
    assert [side // info['reduction'] for info in model.feature_info] == [x.shape[2] for x in features]
    assert features[-1].shape[2:] == cfg['pool_size'] == (side // 32, side // 32)


@pytest.mark.parametrize('name', NAMES)
def test_parameters_are_those_of_the_cost(name):
    zoo = {'slak_tiny': 'slak_t_in1k_300e', 'shiftwise_tiny': 'shiftwise_t_in1k_300e'}[name]
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count(zoo, (32, 32), sparsity=0).parameters


@pytest.mark.parametrize('name', NAMES)
def test_forward_and_backward(name):
    model = create(name, num_classes=42, drop_path_rate=0.1, drop_rate=0.1)
    assert model(images()).shape == (2, 42)
    model.train()(images()).mean().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
    torch.testing.assert_close(rates, [0.1 * i / 4 for i in range(1, 5)])


@pytest.mark.parametrize('name', NAMES)
def test_is_an_average_a_norm_and_a_linear_layer(name):
    model = create(name, num_classes=5)
    plain = MODELS.build(dict(type=BACKBONES[name], **ARCH, out_norm=False)).eval()
    load_pretrained(plain, model.state_dict())
    x = images(h=70)
    with torch.no_grad():
        pooled = F.layer_norm(plain(x)[-1].mean((2, 3)), DIMS[-1:], model.norm.weight, model.norm.bias, 1e-6)
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
        torch.testing.assert_close(model(x), F.linear(pooled, model.head.weight, model.head.bias))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('global_pool', ['avg', 'max', 'avgmax', ''])
def test_without_classifier(name, global_pool):
    pooled = (2, DIMS[-1]) if global_pool else (2, DIMS[-1], 2, 2)
    model = create(name, num_classes=0, global_pool=global_pool)
    with torch.no_grad():
        expected = model(images())
        assert expected.shape == pooled and model.forward_features(images()).shape == (2, DIMS[-1], 2, 2)
        other = create(name)
        other.reset_classifier(0, global_pool)
        torch.testing.assert_close(other(images()), expected)
        other.reset_classifier(7, 'avg')
        assert other(images()).shape == (2, 7) and other.get_classifier() is other.head


def test_two_poolings_side_by_side_are_refused():
    with pytest.raises(ValueError, match='joins two poolings; choose from avg'):
        create('slak_tiny', global_pool='catavgmax')


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('how', ['getter', 'fx', 'hook'])
def test_features_only(name, how):
    feature_cls = {} if how == 'getter' else dict(feature_cls=how)
    model = create(name, features_only=True, out_indices=(0, 2, 3), **feature_cls)
    assert model.feature_info.channels() == [DIMS[0], *DIMS[2:]] and model.feature_info.reduction() == [4, 16, 32]
    whole = create(name)
    with torch.no_grad():
        expected = whole.forward_intermediates(images(), [0, 2, 3], intermediates_only=True)
        if how == 'getter':
            model.load_state_dict(whole.state_dict())
        for got, want in zip(model(images()), expected, strict=True):
            assert got.shape == want.shape and (how != 'getter' or torch.equal(got, want))


@pytest.mark.parametrize('name', NAMES)
def test_fewer_stages(name):
    model = create(name, features_only=True, out_indices=(0, -3))
    assert model.feature_info.channels() == DIMS[:2] and len(model.model.stages) == 2
    assert [x.shape[1] for x in model(images(h=16, w=16))] == DIMS[:2]
    weights = create(name).state_dict()
    model.load_state_dict({'model': to_official(weights)})
    assert torch.equal(model.model.stages[1][0].gamma, weights['stages.1.0.gamma'])


@pytest.mark.parametrize('name', NAMES)
def test_other_channels(name):
    assert create(name, in_chans=5)(torch.randn(1, 5, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize('name', NAMES)
def test_reparameterized(name):
    model = create(name)
    with torch.no_grad():
        expected = model(images())
        folded = timm.utils.reparameterize_model(model)
        torch.testing.assert_close(folded(images()), expected, rtol=1e-3, atol=1e-3)
    assert any(key.endswith('large_kernel.bias') for key in folded.state_dict())
    again = timm.utils.reparameterize_model(create(name, num_classes=1000))
    load_pretrained(again, folded.state_dict())
    assert torch.equal(again(images()), folded(images()))


@pytest.mark.parametrize('name', NAMES)
def test_checkpointing_changes_nothing(name):
    gradients = []
    for enable in (False, True):
        model = create(name, num_classes=3).train()
        model.set_grad_checkpointing(enable)
        model(images()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_layer_groups():
    """Stem, then the blocks one after the other, each stage's first with the downsampling before it; then the rest."""
    from timm.models import group_parameters

    model = create('slak_tiny')
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    numbers = [groups[f'stages.{stage}.{block}.gamma'] for stage, block in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))]
    assert groups['downsample_layers.0.0.weight'] == 0 and numbers == [1, 2, 3, 4, 5]
    assert groups['downsample_layers.2.1.weight'] == 3 and groups['norm.weight'] == groups['head.weight'] == 6
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse['stages.2.1.gamma'] == coarse['downsample_layers.2.0.weight'] == 3


@pytest.mark.skipif(not hasattr(torch.library, 'register_autograd'), reason='graphs need torch 2.4')
@pytest.mark.parametrize('name', NAMES)
def test_compiled_in_one_graph(name):
    torch._dynamo.reset()
    model = create(name)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()))


def test_copies_and_pickles():
    model = create('slak_tiny')
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images()), model(images()))


# Weights


@pytest.mark.parametrize(
    ('kind', 'goldens'), [('SLaKClassifier', SLAK_GOLDENS), ('ShiftWiseClassifier', SHIFTWISE_GOLDENS)]
)
def test_logits_of_the_official_code(kind, goldens):
    """Official names go in, the official logits come out."""
    kind = getattr(timm_models, kind)
    goldens = Goldens(goldens)
    decomposed = dict(decomposed=False, width_factor=1.0)
    options = {
        'slak_tiny_k31_w1.3': dict(kernel_sizes=(31, 29, 27, 13)),
        'slak_tiny_k51_w1.3': dict(),
        'slak_tiny_k61_w1.3': dict(kernel_sizes=(61, 59, 57, 13)),
        'slak_tiny_k31_lkb_w1.0': dict(kernel_sizes=(31, 29, 27, 13), **decomposed),
        'slak_tiny_convnext_w1.0': dict(kernel_sizes=(7, 7, 7, 7), small_kernel=None, **decomposed),
        'shiftwise_v1_tiny': dict(version=1),
        'shiftwise_v2_tiny': dict(),
    }
    for case in goldens.cases('logits_'):
        variant = case.removeprefix('logits_').split('__')[0]
        model = kind(**options[variant]).eval()
        names = to_official(model.state_dict())
        official = {key: weight_for(key, value.shape) for key, value in names.items()}
        load_pretrained(model, {'model': official})
        model.double()
        with torch.no_grad():
            features = model.forward_features(input_for((1, 3, 224, 224), 3).double())
            goldens.assert_close(case, 'pre_head', model.forward_head(features, pre_logits=True), 1e-6)
            goldens.assert_close(case, 'logits', model.forward_head(features), 1e-6)


@pytest.fixture
def zoo_file(tmp_path, monkeypatch):
    """A small checkpoint as that of SLaK-T is: official names, a head, a moving average, other entries."""
    weights = to_official(create('slak_tiny').state_dict())
    average = {key: value * 0.5 if value.is_floating_point() else value for key, value in weights.items()}
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path))
    path = checkpoints.cached_path('slak_t_in1k_300e')
    path.parent.mkdir(parents=True)
    torch.save({'model': weights, 'model_ema': average, 'epoch': 1, 'args': argparse.Namespace(lr=1)}, path)
    return path


def test_pretrained_comes_from_the_zoo(zoo_file):
    weights = create('slak_tiny').state_dict()
    for options in ({}, dict(num_classes=0), dict(in_chans=1), dict(features_only=True)):
        model = timm.create_model('slak_tiny', pretrained=True, **ARCH, **options)
        model = getattr(model, 'model', model)
        assert torch.equal(model.stages[2][1].pwconv1.weight, weights['stages.2.1.pwconv1.weight'])
        if not options:
            assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    other = timm.create_model('slak_tiny', pretrained=True, num_classes=7, **ARCH)
    assert other.head.weight.shape[0] == 7 and torch.equal(other.norm.weight, weights['norm.weight'])
    with pytest.raises(CheckpointMismatch, match='set kernel_sizes'):
        timm.create_model('slak_tiny', pretrained=True, **{**ARCH, 'kernel_sizes': (9, 9, 9, 9)})
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model('shiftwise_small', pretrained=True, **ARCH)


def test_pretrained_that_has_to_be_fetched_by_hand(tmp_path, monkeypatch):
    """The error says where to put the file."""
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path))
    monkeypatch.setitem(ZOO, 'slak_t_in1k_300e', replace(ZOO['slak_t_in1k_300e'], url=None))
    with pytest.raises(CheckpointNotFound, match=f'If you have the file, put it at {tmp_path}'):
        timm.create_model('slak_tiny', pretrained=True, **ARCH)


@pytest.mark.parametrize('features_only', [False, True])
def test_files_of_official_names(zoo_file, features_only):
    """``checkpoint_path`` and a file in ``pretrained_cfg``, of which timm takes the moving average."""
    weights = create('slak_tiny').state_dict()
    average = checkpoints.read_checkpoint(zoo_file)['model_ema']
    for options in (
        dict(checkpoint_path=str(zoo_file)),
        dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(zoo_file))),
        dict(pretrained=True, pretrained_cfg=dict(state_dict=dict(model_ema=average))),
    ):
        model = timm.create_model('slak_tiny', features_only=features_only, **ARCH, **options)
        model = getattr(model, 'model', model)
        assert torch.equal(model.stages[2][1].pwconv1.weight, weights['stages.2.1.pwconv1.weight'] * 0.5)


def test_wrong_heads_have_a_cause():
    weights = create('slak_tiny').state_dict()
    for source, options, cause in (
        (weights, dict(num_classes=7), 'for 1000 classes, that of the model for 7; set num_classes=1000'),
        ({k: v for k, v in weights.items() if not k.startswith(('head', 'norm'))}, {}, 'set num_classes=0'),
    ):
        model = create('slak_tiny', **options)
        for load in (load_pretrained, type(model).load_state_dict):
            with pytest.raises(CheckpointMismatch, match=cause):
                load(model, source)


def test_classifiers_of_mmpretrain():
    """Their head stands beside the backbone, and the norm before it is that of the last stage."""
    convnext = dict(ARCH, small_kernel=None, decomposed=False, branch_norm=False, conv_bias=True)
    source = random_(timm_models.SLaKClassifier(**convnext)).eval()
    theirs = {
        key if key.startswith('head.') else f'backbone.{key}'.replace('backbone.norm.', 'backbone.norm3.'): value
        for key, value in to_official(source.state_dict(), 'mmpretrain').items()
    }
    assert {'backbone.norm3.weight', 'head.fc.weight', 'backbone.stages.0.0.depthwise_conv.bias'} <= theirs.keys()
    model = timm_models.SLaKClassifier(**convnext).eval()
    load_pretrained(model, {'state_dict': theirs})
    assert torch.equal(model(images()), source(images()))


def test_in_a_segmentor(zoo_file):
    """mmseg's backbone of any timm model trains with ours, from official weights."""
    pytest.importorskip('mmseg')
    import mmseg.models  # noqa: F401 - registers it

    backbone = dict(type='mmseg.TIMMBackbone', model_name='slak_tiny', pretrained=False, checkpoint_path=str(zoo_file))
    model = MODELS.build(dict(backbone, out_indices=(1, 3), **ARCH))
    maps = model(images())
    assert [x.shape for x in maps] == [(2, DIMS[1], 8, 8), (2, DIMS[3], 2, 2)]
    sum(x.mean() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
