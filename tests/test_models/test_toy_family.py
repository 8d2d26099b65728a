"""A family in one file gets everything that the package has, from what that file says."""

import copy
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from backbone_helpers import random_
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

from slak_mm import checkpoints, load_pretrained, sparsity, switch_to_deploy
from slak_mm.checkpoints import CheckpointMismatch, convert_checkpoint, describe, find_model, find_roots, to_official
from slak_mm.cost import count
from slak_mm.models import registered_backbones

ROOT = Path(__file__).parents[2]
REGISTRIES = (
    checkpoints.FAMILIES,
    checkpoints.ZOO,
    checkpoints.PUBLISHED,
    checkpoints.CONVENTIONS,
    sparsity.PRESETS,
    sparsity.SELECTIONS,
    MODELS.module_dict,
)


@pytest.fixture(scope='module', autouse=True)
def toy():
    """The family, until this module's tests are done."""
    before = [dict(registry) for registry in REGISTRIES]
    yield importlib.import_module('toy_family')
    del sys.modules['toy_family']
    for registry, content in zip(REGISTRIES, before):
        registry.clear()
        registry.update(content)


def build(**arguments):
    return random_(MODELS.build(dict(type='Toy', **arguments))).eval()


def test_is_registered():
    assert 'Toy' in registered_backbones() and find_model('toy_t_in1k').backbone == dict(type='Toy')
    assert find_model('https://example.org/toy_t.pth').name == 'toy_t_in1k'
    assert any(row[0] == 'toy_t_in1k' and '12% top-1' in row[2] for row in checkpoints.zoo_table())
    with pytest.raises(ValueError, match='of the name .* already'):
        checkpoints.register_family(checkpoints.FAMILIES['slak'])


def test_loads_by_other_names():
    source = build()
    official = {**to_official(source.state_dict()), 'classifier.weight': torch.ones(5, 32)}
    assert 'patch_embed.0.weight' in official and 'levels.2.blocks.1.dw.weight' in official
    assert find_roots({f'backbone.{key}': 0 for key in official}) == ['backbone.']
    for load in (load_pretrained, lambda model, weights: model.load_state_dict(weights, strict=False)):
        model = build(norm_cfg=dict(type='BN'))
        load(model, official)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    report = load_pretrained(build(), {'model': official})
    assert report.format == 'toy-paper' and report.variant.startswith('tiny (depths 1/1/2/1)')
    assert 'kernels 9/7/7/5' in report.variant and list(report.dropped) == ['classifier.weight']
    assert (
        'backbone.stages.2.1.mix.bias'
        in convert_checkpoint({'state_dict': {f'backbone.{key}': value for key, value in official.items()}})[
            'state_dict'
        ]
    )


@pytest.mark.parametrize(
    ('arguments', 'cause'),
    [
        (dict(gated=False), 'set gated=True'),
        (dict(kernel_sizes=(9, 7, 7, 7)), 'has 9/7/7/5, the model 9/7/7/7; set kernel_sizes'),
        (dict(arch=dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))), r'1/1/2/1 blocks \(tiny\), the model 1/1/1/1'),
        (dict(arch=dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 40))), 'set arch or width_factor'),
    ],
)
def test_errors_have_a_cause(arguments, cause):
    model, weights = build(**arguments), to_official(build().state_dict())
    before = copy.deepcopy(model.state_dict())
    for load in (load_pretrained, type(model).load_state_dict):
        with pytest.raises(CheckpointMismatch, match=cause):
            load(model, weights)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_families_are_told_apart():
    slak = MODELS.build(dict(type='SLaK', arch='tiny', width_factor=0.1, norm_cfg=dict(type='BN')))
    with pytest.raises(CheckpointMismatch, match='holds SLaK weights and the model is Toy'):
        load_pretrained(build(), slak.state_dict())
    with pytest.raises(CheckpointMismatch, match='holds Toy weights and the model is SLaK'):
        load_pretrained(slak, to_official(build().state_dict()))


def test_layer_decay():
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type='LargeKernelLayerDecayConstructor',
            optim_wrapper_cfg=dict(optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05)),
            paramwise_cfg=dict(decay_rate=0.5),
        )
    )
    model = build()
    rates = {id(p): group['lr'] for group in constructor(model).optimizer.param_groups for p in group['params']}
    # 3 + ceil(2 / 3) layers: the stem has number 0, the output norms 5.
    assert rates[id(model.downsample_layers[0][0].weight)] == 0.5**5
    assert rates[id(model.norm3.weight)] == 1


def test_masks():
    model = build()
    selected = sparsity.select_parameters(model, 'backbone')
    assert set(selected) == {name for name, p in model.named_parameters() if p.dim() == 4}


def test_deploys_and_exports(tmp_path):
    from slak_mm.export import export

    model = build()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        deployed = switch_to_deploy(copy.deepcopy(model))
        for one, two in zip(deployed(images), before, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    assert deployed.deploy and describe(deployed.state_dict()).deploy
    with pytest.raises(CheckpointMismatch, match='switch_to_deploy'):
        load_pretrained(build(), deployed.state_dict())
    assert export(deployed, tmp_path / 'toy.pt', 'torchscript', size=(64, 64)) < 1e-4


def test_costs():
    dense, sparse = count('toy_t_in1k', (32, 32), sparsity=0), count('toy_t_in1k', (32, 32))
    # Kernels of 9, 7, 7 and 5 on maps of 8, 4, 2 and 1 pixels
    assert dense.large_flops == 8 * 81 * 64 + 16 * 49 * 16 + 2 * 24 * 49 * 4 + 32 * 25
    assert sparse.masks == 'sparsity 0.5, uniform' and sparse.published is None
    assert count('toy_t_in1k').published.parameters_m == 0.01


def test_no_other_room_knows_a_family():
    names = re.compile(r'slak|shiftwise|convnext|\b(uni)?replknet', re.IGNORECASE)
    found = [
        f'{path}: {line}'
        for path in (ROOT / 'slak_mm').rglob('*.py')
        if 'models' not in path.relative_to(ROOT).parts
        for line in path.read_text().splitlines()
        if names.search(re.sub('slak_mm', '', line, flags=re.IGNORECASE))
    ]
    assert not found
