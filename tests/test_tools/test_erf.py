"""`slak-mm erf`, with networks of one block per stage."""

import json

import numpy as np
import pytest
import torch
from conftest import load_tool
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from slak_mm.cli import contributions as module
from slak_mm.cli.contributions import Images
from slak_mm.cli.networks import build_network
from slak_mm.erf import area_ratios, contribution_map

ARGUMENTS = 'arch.depths=[1,1,1,1] arch.dims=[8,16,24,32] kernel_sizes=[13,11,9,7] norm_cfg.type=BN'
TINY = f'tiny=SLaK {ARGUMENTS} width_factor=1.0 small_kernel=3'


@pytest.fixture
def run(call_tool, tmp_path):
    def run(*arguments, out='out', code=0):
        return call_tool('erf', *arguments, '--size 64x64', '--out-dir', tmp_path / out, code=code)

    return run


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images, a broken one, and a text file."""
    for index, name in enumerate(('a/0.png', 'a/1.png', 'a/2.png', 'b/0.png', 'b/1.png', 'b/2.png')):
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (48, 80, 3), np.uint8)).save(path)
    (tmp_path / 'images' / 'a' / '1.png').write_bytes(b'no image')
    (tmp_path / 'images' / 'a' / 'note.txt').write_text('no image')
    return tmp_path / 'images'


def test_out_of_the_box(run, tmp_path):
    pytest.importorskip('timm')
    done = run(TINY, 'timm:resnet10t', '--num 2')
    results = json.loads((tmp_path / 'out' / 'erf.json').read_text())
    assert [row['name'] for row in results['networks']] == ['tiny', 'resnet10t'] and results['images'] == 'generated'
    for row in results['networks']:
        scores = np.load(tmp_path / 'out' / row['map'])
        assert scores.shape == (64, 64) and scores.dtype == np.float64 and scores.sum() == pytest.approx(1)
        squares = [(area['side'], area['ratio']) for area in row['areas']]
        assert squares == area_ratios(scores) and row['images'] == 2
        assert f'{squares[0][1]:.1%} ({squares[0][0]})' in done.out
    assert Image.open(tmp_path / 'out' / 'erf.png').mode == 'RGB'
    network = build_network(TINY)
    images = [network.normalize(image) for _, image in zip(range(2), (x for _, x in Images([], (64, 64)).read()))]
    np.testing.assert_allclose(np.load(tmp_path / 'out' / 'tiny.npy'), contribution_map(network.model, images))


def test_an_interrupted_run_goes_on(run, tmp_path, monkeypatch):
    run(TINY, '--num 4', out='whole')
    contributions, calls = module.contributions, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return contributions(*arguments)

    monkeypatch.setattr(module, 'contributions', interrupt)
    assert 'interrupted' in run(TINY, '--num 4', code=130).err
    assert not (tmp_path / 'out' / 'tiny.npy').exists()
    run(TINY, '--num 4')
    assert len(calls) == 3 + 2
    whole, resumed = (np.load(tmp_path / name / 'tiny.npy') for name in ('whole', 'out'))
    assert (whole == resumed).all()


def test_what_is_there_is_not_mixed_with_something_else(run, folder):
    run(TINY, '--num 1')
    for arguments, what in (
        ([TINY, '--num 1 --seed 1'], 'other network and images'),
        ([TINY.replace('13,', '15,'), '--num 1'], 'other network:'),
        ([TINY, '--num 1 --official'], 'other official'),
        ([TINY, '--num 1', '--images', folder], 'other images:'),
    ):
        assert f'is from a run with {what}' in run(*arguments, code=1).err
    run(TINY, '--num 2')
    assert 'has 2 images already' in run(TINY, '--num 1', code=1).err
    run(TINY, '--num 1', '--restart')


def test_unreadable_images_are_counted(run, folder, tmp_path):
    done = run(TINY, '--images', folder, '--num 9')
    row = json.loads((tmp_path / 'out' / 'erf.json').read_text())['networks'][0]
    assert row['images'] == 5 and row['unreadable'] == [str(folder / 'a' / '1.png')]
    assert '1 images could not be read' in done.out
    # They do not count among those that were asked for.
    run(TINY, '--images', folder, '--num 5', out='five')
    assert (np.load(tmp_path / 'out' / 'tiny.npy') == np.load(tmp_path / 'five' / 'tiny.npy')).all()
    only = run(TINY, '--images', folder / 'a' / '1.png', out='none', code=1)
    assert 'no image could be used (1 could not be read' in only.err


def test_official_images_are_those_of_image_folder(folder):
    (folder / 'a' / '1.png').unlink()
    resize = transforms.Resize((64, 96), interpolation=transforms.InterpolationMode.BICUBIC)
    expected = ImageFolder(folder, transforms.Compose([resize, transforms.ToTensor()]))
    found = list(Images([str(folder)], (64, 96), official=True).read())
    assert [name for name, _ in found] == [path for path, _ in expected.samples]
    for (_, got), (want, _) in zip(found, expected):
        assert torch.equal(got, want)
    # By default the first images are of several classes.
    order = [name for name, _ in Images([str(folder)], (64, 96)).read()]
    assert sorted(order) == sorted(name for name, _ in found) != order


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['SLakk'], 'There is no network "SLakk": did you mean SLaK'),
        (['SLaK depth=3'], "unexpected keyword argument 'depth'"),
        (['SLaK tiny'], '"tiny" of the network "SLaK tiny" is no key=value'),
        (['SLaK@pretrained'], 'SLaK has no weights of its own'),
        (['SLaK@missing.pth'], 'missing.pth'),
        (['timm:convnext_tinny'], 'Did you mean convnext_tiny'),
        (['configs/upernet_slak_q_ade20k.py'], 'There is no config file'),
        ([TINY, '--device nonsense'], 'The device "nonsense" cannot be used'),
        ([TINY, TINY], 'Two networks are named tiny'),
        ([TINY + ' in_channels=4'], 'tiny cannot be evaluated on an RGB image of 64x64'),
        ([TINY, '--images', 'nowhere'], 'There is no image or folder "nowhere"'),
        ([TINY, '--images', 'configs'], '"configs" has no images'),
    ],
)
def test_errors(run, arguments, message):
    pytest.importorskip('timm')
    assert message in run(*arguments, '--num 1', code=1).err


def test_official_settings(monkeypatch):
    monkeypatch.setattr('sys.argv', ['erf.py', 'SLaK', '--official'])
    args = load_tool('erf').parse_args()
    assert (args.num, args.size) == (50, (1024, 1024))


# --------------------------------------------------------------------------------------------- networks


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_random_weights_are_those_of_the_seed():
    one, two, three = (weights_of(build_network(TINY, seed).model) for seed in (0, 0, 1))
    assert same(one, two) and not same(one, three)
    assert one['stages.0.0.pwconv1.weight'].std() == pytest.approx(0.02, rel=0.1)  # the network's own initialization


def test_weights_of_a_registered_backbone(tmp_path):
    torch.save(weights_of(build_network(TINY, 7).model), tmp_path / 'own.pth')
    network = build_network(f'{TINY}@{tmp_path / "own.pth"}')
    assert same(weights_of(network.model), weights_of(build_network(TINY, 7).model)) and network.name == 'tiny'


def test_backbone_of_a_config_of_the_framework(tmp_path):
    """With BGR images, in a whole model's checkpoint."""
    pytest.importorskip('mmdet')
    config = tmp_path / 'foreign.py'
    config.write_text(
        "default_scope = 'mmdet'\n"
        "optim_wrapper = dict(type='AmpOptimWrapper')\n"
        "model = dict(type='SingleStageDetector', data_preprocessor=dict(type='DetDataPreprocessor',\n"
        '    mean=[102.0, 51.0, 255.0], std=[1.0, 1.0, 255.0], bgr_to_rgb=False),\n'
        "    backbone=dict(type='ResNet', depth=18, norm_cfg=dict(type='SyncBN')),\n"
        "    bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=512, stacked_convs=0))\n"
    )
    first = build_network(str(config), 3)
    assert first.channels == (2, 1, 0) and first.mean == pytest.approx((0.4, 0.2, 1.0))
    whole = {f'backbone.{name}': value for name, value in weights_of(first.model).items()}
    whole |= {'bbox_head.retina_cls.weight': torch.zeros(18, 512, 3, 3), 'bbox_head.retina_cls.bias': torch.zeros(18)}
    whole |= {'bbox_head.retina_reg.weight': torch.zeros(36, 512, 3, 3), 'bbox_head.retina_reg.bias': torch.zeros(36)}
    torch.save(dict(state_dict=whole), tmp_path / 'whole.pth')
    second = build_network(f'{config}@{tmp_path / "whole.pth"}')
    assert same(weights_of(first.model), weights_of(second.model))
    image = torch.rand(3, 32, 32)
    expected = (image.flip(0) * 255 - torch.tensor([102.0, 51, 255]).view(3, 1, 1)) / torch.tensor([1.0, 1, 255]).view(
        3, 1, 1
    )
    torch.testing.assert_close(second.normalize(image), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_timm(tmp_path):
    timm = pytest.importorskip('timm')
    model = timm.create_model('resnet10t')
    torch.save(model.state_dict(), tmp_path / 'timm.pth')
    network = build_network(f'timm:resnet10t@{tmp_path / "timm.pth"}')
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.model(image), model.eval().forward_features(image))


@pytest.mark.parametrize('name', ['swin_tiny_patch4_window7_224', 'vit_tiny_patch16_224'])
def test_maps_of_transformers_have_channels_first(name):
    pytest.importorskip('timm')
    network = build_network(f'timm:{name} img_size=128')
    with torch.no_grad():
        features = network.model(torch.rand(1, 3, 128, 128))
    assert features.shape[1] == network.model.num_channels and features.shape[2] == features.shape[3]


def test_zoo_names_stand_for_their_weights(monkeypatch):
    assert build_network('slak_t_in1k_300e@random').weights == 'random'
    asked = []
    monkeypatch.setattr('slak_mm.cli.networks.load_pretrained', lambda model, source: asked.append(source))
    assert build_network('slak_t_in1k_300e').weights == 'pretrained' and asked == ['slak_t_in1k_300e']


def test_configs_go_by_name():
    network = build_network('upernet_shiftwise_t_ade20k')
    assert (network.name, type(network.model).__name__) == ('upernet_shiftwise_t_ade20k', 'ShiftWise')
