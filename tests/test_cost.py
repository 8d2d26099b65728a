"""Costs, against published figures, another way to count, and counts by hand."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from torch.utils.flop_counter import FlopCounterMode

from slak_mm import cost as module
from slak_mm.checkpoints import CONVENTIONS, PUBLISHED, ZOO
from slak_mm.cli import ConfigOverrideError
from slak_mm.cost import Cost, count
from slak_mm.models.base import num_masked
from slak_mm.models.shiftwise import ShiftWiseConv
from slak_mm.ops import cross_dwconv2d

CONFIGS = Path(__file__).parents[1] / 'configs'
ARCH = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
TINY = dict(
    slak=dict(type='SLaK', arch=ARCH, width_factor=1.0, norm_cfg=dict(type='BN')),
    shiftwise=dict(type='ShiftWise', arch=ARCH, norm_cfg=dict(type='BN')),
    convnext=dict(
        **dict(type='SLaK', arch=ARCH, width_factor=1.0, norm_cfg=dict(type='BN')),
        **dict(kernel_sizes=(7,) * 4, small_kernel=None, decomposed=False),
    ),
)


def classifier(kind, **options):
    """A small network on the meta device, as :func:`count` builds it."""
    with torch.device('meta'):
        return module._Classifier(dict(TINY[kind], **options), num_classes=5).eval()


def measure(model, masked=(), size=(96, 128)):
    return module._measure(Cost('tiny', size), model, dict(masked))


# ------------------------------------------------------------------------------ published figures

TOLERANCES = {  # of parameters and FLOPs; above 1 % is what the table explains
    'slak_t_in1k_300e': (0.03, 0.05),
    'slak_s_in1k_300e': (0.01, 0.02),
    'slak_b_in1k_300e': (0.01, 0.01),
    'convnext_t_in1k_300e': (0.03, 0.01),
    'cascade_mask_rcnn_shiftwise_t_coco': (0.02, 0.01),
    'upernet_replknet_31b_ade20k': (0.02, 0.01),
    'upernet_unireplknet_t_ade20k': (0.02, 0.01),
    'upernet_unireplknet_b_ade20k': (0.02, 0.01),
    'unireplknet_a_in1k_224': (0.01, 0.08),  # a figure of one digit
    'unireplknet_n_in1k_224': (0.01, 0.02),
}


CLASSIFIERS = 'slak_t slak_s slak_b convnext_t'.split()
SEGMENTORS = 'slak_t slak_b convnext_t shiftwise_t unireplknet_t unireplknet_b'.split()
PUBLISHED_NETWORKS = [
    *(f'{name}_in1k_300e' for name in CLASSIFIERS),
    *(f'replknet_{name}' for name in ('31b_in1k', '31b_in1k_384', '31l_in22k_in1k_384', 'xl_meg73m_in1k_320')),
    *(f'upernet_{name}_ade20k' for name in (*SEGMENTORS, 'replknet_31b')),
    *(f'cascade_mask_rcnn_{name}_coco' for name in ('convnext_t', 'shiftwise_t', 'replknet_31b', 'unireplknet_s')),
    *(f'unireplknet_{name}' for name in ('a_in1k_224', 'n_in1k_224', 's_in1k_224', 'xl_in22k_to_in1k_384')),
]


@pytest.mark.parametrize('name', PUBLISHED_NETWORKS)
def test_published_figures(name):
    if 'upernet' in name:
        pytest.importorskip('mmseg')
    if 'cascade' in name:
        pytest.importorskip('mmdet')
    result = count(name if name in ZOO else str(CONFIGS / f'{name}.py'))
    parameters, flops = result.as_published()
    tolerance = TOLERANCES.get(name, (0.01, 0.01))
    published = result.published
    assert parameters / 1e6 == pytest.approx(published.parameters_m, rel=tolerance[0])
    assert flops / 1e9 == pytest.approx(published.flops_g, rel=tolerance[1])


@pytest.mark.parametrize(
    ('config', 'parameters_m', 'flops_g'),
    [
        ('retinanet/retinanet_r50_fpn_1x_coco', 37.7, 239),
        ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco', 41.5, 207),
        ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco', 44.2, 260),
    ],
)
def test_detectors_of_the_framework(config, parameters_m, flops_g):
    """Figures of mmdetection 2 for ResNet-50, at 1280 x 800."""
    pytest.importorskip('mmdet')
    from slak_mm.bases import framework_configs

    result = count(framework_configs('mmdet', f'../{config}.py')[0])
    assert result.published is None and result.masks == 'none'
    # The framework leaves out the frozen first stage.
    assert result.parameters / 1e6 == pytest.approx(parameters_m, rel=0.01)
    assert result.flops / 1e9 == pytest.approx(flops_g, rel=0.005)


def test_dense_and_sparse_slak_t():
    """SLaK, table of ImageNet: 8.7 G dense. PeLK, table 2: 64 M and 957 G with UperNet."""
    dense = count('slak_t_in1k_300e', sparsity=0)
    assert round(dense.flops / 1e9, 1) == 8.7 and dense.masked_flops == 0
    pytest.importorskip('mmseg')
    sparse = count(str(CONFIGS / 'upernet_slak_t_ade20k.py'))
    assert round((sparse.parameters - sparse.masked_parameters) / 1e6) == 64
    assert round((sparse.flops - sparse.masked_flops) / 1e9) == 957


def test_variants_have_the_figures_of_their_config():
    pytest.importorskip('mmseg')
    assert count(str(CONFIGS / 'upernet_slak_t_ade20k_80k.py')).published is PUBLISHED['upernet_slak_t_ade20k']
    other = count(str(CONFIGS / 'upernet_slak_t_ade20k.py'), (512, 512))
    assert other.published is None and other.size == (512, 512)


def test_a_fourth_channel_costs_its_share_of_the_stem(tmp_path):
    pytest.importorskip('mmseg')
    base = CONFIGS / 'upernet_slak_t_ade20k.py'
    (tmp_path / 'four.py').write_text(f'_base_ = {str(base)!r}\nmodel = dict(backbone=dict(in_channels=4))\n')
    three, four = (count(str(path), (64, 64)) for path in (base, tmp_path / 'four.py'))
    # 4x4 pixels of one channel for each of the 124 filters at a quarter of the resolution.
    assert four.flops - three.flops == 124 * 4 * 4 * 16 * 16


# --------------------------------------------------------------------------------- other countings


@pytest.mark.parametrize('kind', TINY)
@pytest.mark.parametrize('deploy', [False, True])
def test_flops_are_weights_times_their_uses(kind, deploy):
    """A second way: every weight is used once for each pixel of its layer's result."""
    model = classifier(kind, deploy=deploy)
    result = measure(model)
    weights = dict(model.backbone.named_parameters())
    uses = module._uses(model.backbone, torch.empty(1, 3, 96, 128, device='meta'))
    expected = 32 * 5  # the head
    for name, pixels in uses.items():
        expected += 0 if '.filters.' in name else weights[name].numel() * pixels
    for name, layer in model.backbone.named_modules():
        if isinstance(layer, ShiftWiseConv) and not deploy:
            # Kernels are a product with a (2 nk + 1) x nk matrix per channel, once.
            pixels = uses[f'{name}.filters.0.weight']
            channels, filters = len(layer.picks), len(layer.shifts) // len(layer.picks)
            reach = max(layer.kernel_size // 2, 3 * filters - 1 - layer.kernel_size // 2)
            expected += pixels * channels * (2 * (2 * reach + 1) * 3 + 9)
            expected += channels * (2 * filters + 1) * filters * 9
    assert result.flops == expected
    assert result.parameters == sum(p.numel() for p in model.parameters())


def test_a_plain_convolution_is_counted_alike():
    """ConvNeXt of timm, on a counter that knows no operator of ours."""
    timm = pytest.importorskip('timm')
    with torch.device('meta'):
        model = timm.create_model('convnext_tiny').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    result = count('convnext_t_in1k_300e')
    assert result.flops == counter.get_total_flops() // 2
    assert result.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('reduce', [False, True])
def test_the_formula_of_the_operator(reduce):
    x = torch.rand(2, 3, 9, 11)
    kernels = [torch.rand(3, 7, 3), torch.rand(3, 3, 7), torch.rand(3, 3, 3)]
    flops, _ = module._count(lambda: cross_dwconv2d(x, *kernels, reduce=reduce))
    # In the reduced form the small kernel is part of the wide one.
    taps = 2 * 21 + (0 if reduce else 9)
    assert flops == 2 * 3 * 9 * 11 * taps


# ------------------------------------------------------------------------------------------ masks


def test_masked_slak_weights_by_hand():
    model = classifier('slak')
    result = measure(
        model,
        {
            'downsample_layers.1.1.weight': 100,  # a 2x2 convolution whose result is 12 x 16
            'stages.2.0.pwconv1.weight': 7,  # on 6 x 8 pixels
            'stages.3.0.large_kernel.wide.conv.weight': 11,  # on 3 x 4
            'stages.3.0.large_kernel.small.conv.weight': 2,
            'norm3.weight': 3,
        },
    )  # no weight of a layer that is counted
    assert result.masked_parameters == 100 + 7 + 11 + 2
    assert result.masked_large_parameters == 13
    assert result.masked_large_flops == 13 * 3 * 4
    assert result.masked_flops == 100 * 12 * 16 + 7 * 6 * 8 + 13 * 3 * 4


def test_masked_filters_are_the_zeros_of_the_kernels():
    """Compared with kernels of real weights, of which some filters are zero."""
    generator = torch.Generator().manual_seed(1)
    layer = ShiftWiseConv(8, 2, 13, 3, num_paths=2, num_reps=1, branch_norm=True, norm_cfg=dict(type='BN'))
    kept = torch.rand(layer.filters[0].weight.shape[0], 1, 1, 1, generator=generator) > 0.4
    with torch.no_grad():
        for path in layer.filters:
            path.weight.copy_(torch.rand(path.weight.shape, generator=generator) * kept + 0)
    zeros = sum(int((kernel == 0).sum()) for kernel in layer.kernels())
    assert 0 < zeros == layer.num_zero_taps([p.weight.detach() for p in layer.filters])
    # A filter that another path still has takes no tap away.
    mixed = [layer.filters[0].weight.detach(), torch.ones_like(layer.filters[1].weight)]
    assert layer.num_zero_taps(mixed) == 0


def test_shiftwise_parts():
    model = classifier('shiftwise')
    result = measure(model)
    filters = [
        layer.filters[0].weight.numel() for layer in model.backbone.modules() if isinstance(layer, ShiftWiseConv)
    ]
    assert result.path_parameters == sum(filters)  # two paths, one of which is merged away
    pixels = [24 * 32, 12 * 16, 6 * 8, 6 * 8, 3 * 4]
    assert result.filter_flops == sum(n * p for n, p in zip(filters, pixels))


def test_zeros_of_a_checkpoint(tmp_path, monkeypatch):
    config = tmp_path / 'tiny.py'
    head = dict(type='FCNHead', in_channels=32, in_index=3, channels=8, num_classes=4)
    model = dict(type='EncoderDecoder', backbone=TINY['slak'], decode_head=head)
    config.write_text(f"default_scope = 'mmseg'\nmodel = {model!r}\n")
    pytest.importorskip('mmseg')
    backbone = MODELS.build(TINY['slak'])
    backbone.init_weights()
    with torch.no_grad():
        backbone.stages[1][0].pwconv2.weight[:4] = 0  # 4 x 64 of a layer on 12 x 16 pixels
        backbone.stages[0][0].large_kernel.tall.conv.weight[2] = 0  # 51 x 5 on 24 x 32
        backbone.stages[0][0].gamma.zero_()
    file = tmp_path / 'sparse.pth'
    torch.save(backbone.state_dict(), file)
    result = count(str(config), (96, 128), checkpoint=file)
    assert result.masked_parameters == 4 * 64 + 51 * 5
    assert result.masked_flops == 4 * 64 * 12 * 16 + 51 * 5 * 24 * 32
    assert str(file) in result.masks and set(result.parts) == {'backbone', 'decode_head'}


@pytest.mark.parametrize('distribution', ['uniform', 'erk'])
def test_drawn_masks_have_their_sparsity(distribution):
    for kind, names in (('slak', 'weight'), ('shiftwise', 'filters')):
        backbone = classifier(kind).backbone
        masked = module._drawn_masks(backbone, 0.4, distribution)
        assert masked and all(names in name for name in masked)
        zeros = sum(num_masked(value) for value in masked.values())
        total = sum(p.numel() for name, p in backbone.named_parameters() if name in masked)
        # ShiftWise's are drawn.
        assert zeros / total == pytest.approx(0.4, abs=0.002 if kind == 'slak' else 0.05)
    assert module._drawn_masks(backbone, 0.0, distribution) == {}


def test_the_sparsity_of_the_config_is_taken():
    from mmengine.config import ConfigDict

    slak, convnext = classifier('slak').backbone, classifier('convnext').backbone
    hook = dict(type='SparsityHook', sparsity=0.7)
    later = dict(type='SparsityHook', distribution='from_weights', from_scratch=dict(sparsity=0.2))
    for hooks, expected in (([hook], 0.7), ([later], 0.2), ([dict(type='Other')], 0.4), ([], 0.4)):
        assert module._usual_sparsity(slak, ConfigDict(custom_hooks=hooks)) == expected
    assert module._usual_sparsity(convnext, None) == 0


# ------------------------------------------------------------------------------ errors and the tool


def test_errors(tmp_path):
    with pytest.raises(ConfigOverrideError, match='There is no config file "nothing.py"'):
        count('nothing.py')
    with pytest.raises(ConfigOverrideError, match=r'configs/upernet_slak_t_ade20k\.py'):
        count('upernet_slak_t_ade20k_160k')
    with pytest.raises(ConfigOverrideError, match='--sparsity must be from 0 to below 1, got 1.5'):
        count('slak_t_in1k_300e', sparsity=1.5)
    with pytest.raises(ConfigOverrideError, match='cannot be counted on an image of 16x16'):
        count('slak_t_in1k_300e', (16, 16))


def test_tool(call_tool, tmp_path):
    out = tmp_path / 'cost.json'
    done = call_tool('cost', 'slak_t_in1k_300e', 'convnext_t_in1k_300e', '--json', out, '--parts')
    assert done.code == 0, done.text
    assert '| 30 / 5 ' in done.out and 'What the published figures count' in done.out
    assert 'slak_t_in1k_300e: backbone' in done.out
    slak, convnext = json.loads(out.read_text())
    assert slak['masks'] == 'sparsity 0.4, uniform' and convnext['masks'] == 'none'
    assert convnext['counted_as_published']['flops'] == convnext['flops']
    dense = call_tool('cost', 'slak_t_in1k_300e', '--sparsity', 0)
    assert dense.code == 0 and '%' not in dense.out.split('\n')[4]
    two = call_tool('cost', 'slak_t_in1k_300e', 'slak_s_in1k_300e', '--checkpoint', 'x')
    assert two.code == 1 and 'belongs to one network' in two.err


def test_published_figures_name_their_convention():
    for published in PUBLISHED.values():
        assert published.counted in CONVENTIONS
