import hashlib

import pytest
import torch

from slak_mm.checkpoints import (
    FAMILIES,
    CheckpointError,
    CheckpointMismatch,
    convert_state_dict,
    detect_format,
    to_official,
)
from slak_mm.models import SLaK

DEPTHS = {'tiny': (3, 3, 9, 3), 'small': (3, 3, 27, 3), 'base': (3, 3, 27, 3)}
DIMS = {'tiny': (96, 192, 384, 768), 'small': (96, 192, 384, 768), 'base': (128, 256, 512, 1024)}
K = {7: (7, 7, 7, 7), 31: (31, 29, 27, 13), 51: (51, 49, 47, 13), 61: (61, 59, 57, 13)}
SQUARE = dict(width_factor=1.0, decomposed=False)

# Number of keys of the official classes, and the start of the sha256 of their sorted
# 'key (shape)' lines, both recorded from the official code.
OFFICIAL = [
    ('slak_base_k51_w1.3', 'base', 51, {}, 920, '509f2ce9f1961b4c'),
    ('slak_base_k51_w1.3__seg', 'base', 51, {}, 924, 'fe314338c7dc4598'),
    ('slak_small_k51_w1.3', 'small', 51, {}, 920, 'd151f928daa092ff'),
    ('slak_small_k51_w1.3__seg', 'small', 51, {}, 924, '9d286d7a85d0c746'),
    ('slak_tiny_convnext_w1.0', 'tiny', 7, dict(SQUARE, small=100), 254, 'd6165b86495c7ef3'),
    ('slak_tiny_convnext_w1.0__seg', 'tiny', 7, dict(SQUARE, small=100), 258, 'd43dea42077a1e19'),
    ('slak_tiny_k31_lkb_w1.0', 'tiny', 31, SQUARE, 362, 'b09fe24362ef1676'),
    ('slak_tiny_k31_lkb_w1.0__seg', 'tiny', 31, SQUARE, 366, '75332b259a9d4553'),
    ('slak_tiny_k31_w1.3', 'tiny', 31, {}, 470, '97e86d5dae19609c'),
    ('slak_tiny_k31_w1.3__seg', 'tiny', 31, {}, 474, '8bf077d677621147'),
    ('slak_tiny_k51_w1.3', 'tiny', 51, {}, 470, '247722a35906296a'),
    ('slak_tiny_k51_w1.3__seg', 'tiny', 51, {}, 474, 'a5b8ef8ba3b66b8a'),
    ('slak_tiny_k51_w1.3_nobn', 'tiny', 51, dict(bn=False), 200, 'e0cecd1ef1cf37a7'),
    ('slak_tiny_k61_w1.3', 'tiny', 61, {}, 470, 'ad03beb1a8bf99d6'),
    ('slak_tiny_k61_w1.3__seg', 'tiny', 61, {}, 474, '6fe1bd20d223981b'),
]
variants = pytest.mark.parametrize('case', OFFICIAL, ids=[case[0] for case in OFFICIAL])


def layout_of(toy, case):
    name, arch, kernel, options, _, _ = case
    return toy.layout(
        DEPTHS[arch], DIMS[arch], K[kernel], classifier=not name.endswith('__seg'), **{'width_factor': 1.3, **options}
    )


def meta(layout):
    return {key: torch.empty(shape, device='meta') for key, shape in layout}


@variants
def test_layout_is_the_official_one(toy, case):
    layout = layout_of(toy, case)
    lines = '\n'.join(sorted(f'{key} {list(shape)}' for key, shape in layout))
    assert len(layout) == case[4]
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == case[5]


@variants
def test_official_keys_map_onto_our_class_and_back(toy, case):
    name, arch, kernel, options, _, _ = case
    official = meta(layout_of(toy, case))
    ours, notes = convert_state_dict(official)
    assert not notes.unrecognized and len(ours) == len(official)
    # Values are passed on, never copied or exchanged.
    for old, new in notes.renamed.items():
        assert ours[new] is official[old]
    with torch.device('meta'):
        model = SLaK(
            arch=arch,
            kernel_sizes=K[kernel],
            width_factor=options.get('width_factor', 1.3),
            small_kernel=None if kernel == 7 else 5,
            decomposed=options.get('decomposed', True),
            branch_norm=options.get('bn', True),
            out_norm=name.endswith('__seg'),
        )
    expected = {key: value.shape for key, value in model.state_dict().items()}
    ours = {key: value.shape for key, value in ours.items() if not key.startswith(('norm.', 'head.'))}
    assert ours == expected

    back = to_official(convert_state_dict(official)[0])
    assert list(back) == list(official)
    assert all(back[key] is official[key] for key in official)


def test_spelling_of_july_2022(toy):
    decom = toy.official(names=('Decom1', 'Decom2'))
    lora = toy.official()
    ours, notes = convert_state_dict(decom)
    assert notes.format == 'official-Decom'
    assert ours.keys() == convert_state_dict(lora)[0].keys()
    assert to_official(ours, 'Decom').keys() == decom.keys()
    assert to_official(decom, 'LoRA').keys() == lora.keys()


def test_merged_square_kernel():
    official = {
        'stages.0.0.large_kernel.lkb_reparam.weight': torch.ones(4, 1, 7, 7),
        'stages.0.0.large_kernel.lkb_reparam.bias': torch.ones(4),
        'stages.0.0.norm.weight': torch.ones(4),
    }
    ours, notes = convert_state_dict(official)
    assert notes.format == 'official-merged'
    assert list(ours) == [
        'stages.0.0.large_kernel.square.conv.weight',
        'stages.0.0.large_kernel.bias',
        'stages.0.0.norm.weight',
    ]
    assert detect_format(ours) == 'ours-deployed'
    assert list(to_official(ours)) == list(official)


def test_folded_strips_have_no_official_form():
    ours = {
        'stages.0.0.large_kernel.tall.conv.weight': torch.ones(4, 1, 7, 5),
        'stages.0.0.large_kernel.wide.conv.weight': torch.ones(4, 1, 5, 7),
        'stages.0.0.large_kernel.bias': torch.ones(4),
    }
    with pytest.raises(CheckpointError, match='convert the training form'):
        to_official(ours)


def test_prefix_limits_the_conversion(toy):
    official = {f'backbone.{k}': v for k, v in toy.official(classifier=False).items()}
    head = 'decode_head.LoRA1.weight'
    ours, notes = convert_state_dict({**official, head: torch.ones(1)}, prefix='backbone.')
    assert head in ours and len(ours) == len(official) + 1 and not notes.unrecognized
    assert 'backbone.stages.0.0.large_kernel.tall.conv.weight' in ours
    assert to_official(ours, prefix='backbone.').keys() == {*official, head}


def test_our_own_names_are_left_alone(toy):
    ours = toy.backbone().state_dict()
    converted, notes = convert_state_dict(ours)
    assert list(converted) == list(ours) and not notes.renamed and not notes.unrecognized
    assert notes.format == 'ours'
    assert converted._metadata is ours._metadata


def test_two_names_for_one_tensor(toy):
    official = toy.official()
    key = 'stages.0.0.large_kernel.LoRA1.conv.weight'
    official[key.replace('LoRA1', 'tall')] = official[key]
    with pytest.raises(CheckpointMismatch, match='mixes the names of two versions'):
        convert_state_dict(official)


def test_unknown_names_are_reported_not_dropped(toy):
    ours, notes = convert_state_dict({**toy.official(), 'stages.0.0.grn.gamma': torch.ones(1)})
    assert notes.unrecognized == ['stages.0.0.grn.gamma'] and 'stages.0.0.grn.gamma' in ours


def test_shiftwise_is_told_from_slak():
    for name in ('LoRAs.0.weight', 'LoRA.weight'):
        assert detect_format({f'backbone.stages.0.0.large_kernel.{name}': 0}) == 'shiftwise'
    assert detect_format({'layer1.0.conv1.weight': 0}) == 'unknown'


def test_table_is_one_to_one():
    for family in FAMILIES.values():
        for spelling in family.spellings:
            rows = family.rows(spelling)
            assert len({ours for ours, _ in rows}) == len({theirs for _, theirs in rows}) == len(rows)


def test_every_tensor_of_timms_convnext(toy):
    timm = pytest.importorskip('timm')
    theirs = timm.create_model('convnext_tiny', pretrained=False).state_dict()
    ours, notes = convert_state_dict(theirs)
    assert notes.format == 'convnext-timm' and not notes.unrecognized
    with torch.device('meta'):
        model = SLaK(arch='tiny', width_factor=1.0, out_norm=False, **toy.CONVNEXT)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    extra = {'norm.weight': (768,), 'norm.bias': (768,), 'head.weight': (1000, 768), 'head.bias': (1000,)}
    assert {key: value.shape for key, value in ours.items()} == {**expected, **extra}
    assert sorted(map(id, ours.values())) == sorted(map(id, theirs.values()))
    pairs = {
        'stem.0.weight': 'downsample_layers.0.0.weight',
        'stages.1.downsample.0.bias': 'downsample_layers.1.0.bias',
        'stages.2.blocks.8.conv_dw.weight': 'stages.2.8.large_kernel.square.conv.weight',
        'stages.3.blocks.1.mlp.fc2.weight': 'stages.3.1.pwconv2.weight',
        'stages.0.blocks.0.gamma': 'stages.0.0.gamma',
        'head.norm.weight': 'norm.weight',
        'head.fc.bias': 'head.bias',
    }
    for old, new in pairs.items():
        assert ours[new] is theirs[old]
    assert to_official(ours, 'timm').keys() == theirs.keys()


def test_pointwise_convolutions_become_linear_weights():
    weight = torch.randn(16, 4, 1, 1)
    ours, notes = convert_state_dict(
        {'stages.0.0.depthwise_conv.weight': torch.ones(4, 1, 7, 7), 'stages.0.0.pointwise_conv1.weight': weight}
    )
    assert torch.equal(ours['stages.0.0.pwconv1.weight'], weight[:, :, 0, 0])


def test_final_norm_of_mmpretrain_classifiers():
    stem = {'stages.3.0.depthwise_conv.weight': torch.ones(4, 1, 7, 7)}
    norm = {'norm3.weight': torch.ones(4), 'norm3.bias': torch.ones(4)}
    assert {'norm.weight', 'norm.bias'} <= convert_state_dict({**stem, **norm})[0].keys()
    downstream = {**stem, 'norm0.weight': torch.ones(4), **norm}
    assert {'norm0.weight', 'norm3.weight'} <= convert_state_dict(downstream)[0].keys()
