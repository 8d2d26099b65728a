import pytest
import torch

from slak_mm import switch_to_deploy
from slak_mm.checkpoints import convert_state_dict, describe, likely_causes
from slak_mm.models import SLaK


def of(model):
    return describe(model.state_dict())


def test_real_slak_t(toy):
    layout = toy.layout((3, 3, 9, 3), (96, 192, 384, 768), (51, 49, 47, 13), width_factor=1.3)
    official = {key: torch.empty(shape, device='meta') for key, shape in layout}
    variant = describe(convert_state_dict(official)[0])
    assert (variant.arch, variant.width_factor) == ('tiny', 1.3)
    assert variant.dims == (124, 249, 499, 998) and variant.depths == (3, 3, 9, 3)
    assert variant.kernel_sizes == (51, 49, 47, 13) and variant.small_kernel == 5
    assert variant.decomposed and variant.branch_norm and not variant.conv_bias
    assert variant.num_classes == 1000 and variant.output_norms == ()
    assert str(variant).startswith('tiny (depths 3/3/9/3), width factor 1.3, channels 124/249')


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(decomposed=False),
        dict(branch_norm=False),
        dict(small_kernel=3),
        dict(layer_scale_init_value=0.0),
        dict(out_indices=(1, 3)),
        dict(out_norm=False),
        dict(in_channels=1),
        dict(small_kernel=None, decomposed=False),
    ],
)
def test_constructor_arguments_are_recovered(toy, options):
    model = toy.backbone(**options)
    variant = of(model)
    for name in ('depths', 'dims', 'kernel_sizes', 'decomposed', 'branch_norm'):
        assert getattr(variant, name) == getattr(model, name)
    assert variant.family == 'slak' and variant.small_kernel == options.get('small_kernel', 5)
    assert variant.layer_scale == ('layer_scale_init_value' not in options)
    assert variant.in_channels == options.get('in_channels', 3)
    assert variant.output_norms == (model.out_indices if model.out_norm else ())
    assert not variant.deploy and not variant.is_convnext
    assert not likely_causes(variant, variant)


def test_folded(toy):
    variant = of(switch_to_deploy(toy.backbone()))
    assert variant.deploy and variant.small_kernel == 5 and variant.decomposed
    [cause] = likely_causes(of(toy.backbone()), variant)
    assert 'switch_to_deploy afterwards' in cause


def test_convnext(toy):
    with torch.device('meta'):
        variant = of(SLaK(arch='tiny', width_factor=1.0, **toy.CONVNEXT))
    assert variant.is_convnext and variant.arch == 'tiny' and variant.width_factor == 1.0
    assert str(variant).startswith('ConvNeXt, tiny')


@pytest.mark.parametrize(
    ('options', 'argument'),
    [
        (dict(decomposed=False), 'decomposed=False'),
        (dict(branch_norm=False), 'branch_norm=False'),
        (dict(small_kernel=3), 'small_kernel'),
        (dict(layer_scale_init_value=0.0), 'to 0'),
        (dict(in_channels=4), 'in_channels'),
        (dict(kernel_sizes=(9, 9, 9, 7)), 'kernel_sizes'),
        (dict(arch=dict(depths=(2, 1, 2, 1), dims=(8, 16, 24, 32))), 'set arch'),
        (dict(width_factor=2.0), 'set arch or width_factor'),
        (dict(conv_bias=True), 'conv_bias=True'),
    ],
)
def test_every_difference_names_its_argument(toy, options, argument):
    theirs, ours = of(toy.backbone(**options)), of(toy.backbone())
    assert any(argument in cause for cause in likely_causes(theirs, ours))
    assert likely_causes(ours, theirs)


@pytest.mark.parametrize(
    ('depths', 'dims', 'name', 'factor'),
    [
        ((3, 3, 27, 3), (124, 249, 499, 998), 'small', 1.3),
        ((3, 3, 27, 3), (166, 332, 665, 1331), 'base', 1.3),
        ((3, 3, 27, 3), (128, 256, 512, 1024), 'base', 1.0),
        ((3, 3, 9, 3), (96, 192, 384, 768), 'tiny', 1.0),
        ((3, 3, 9, 3), (97, 192, 384, 768), None, None),
    ],
)
def test_published_widths_are_named(toy, depths, dims, name, factor):
    layout = toy.layout(depths, dims, (51, 49, 47, 13))
    official = {key: torch.empty(shape, device='meta') for key, shape in layout}
    variant = describe(convert_state_dict(official)[0])
    assert (variant.arch, variant.width_factor) == (name, factor)


def test_named_architectures_are_compared_by_name():
    with torch.device('meta'):
        tiny, small, base = (of(SLaK(arch=arch)) for arch in ('tiny', 'small', 'base'))
        narrow = of(SLaK(arch='tiny', width_factor=1.0))
    [cause] = likely_causes(small, tiny)
    assert '3/3/27/3 blocks (small), the model 3/3/9/3 (tiny); set arch' in cause
    [cause] = likely_causes(base, small)
    assert '(base, width_factor 1.3), the model 124/249/499/998 (small, width_f' in cause
    assert cause.endswith('set arch or width_factor')
    [cause] = likely_causes(narrow, tiny)
    assert cause.endswith('(tiny, width_factor 1.3); set width_factor')
