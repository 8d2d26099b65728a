"""Effective receptive fields, against results of the published scripts, identities and slow ways."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_helpers import SMALL, build, random_
from reference import Goldens, input_for, official_weights
from torch import nn

from slak_mm import load_pretrained
from slak_mm.erf import THRESHOLDS, MeanMap, area_ratios, contribution_map, contributions, draw_maps
from slak_mm.models import RepLKNet, SLaK, UniRepLKNet

DATA = np.load(Path(__file__).parent / 'data' / 'erf_goldens.npz')
GOLDENS = Goldens(Path(__file__).parent / 'data' / 'erf_goldens.npz')
SYNTHETIC = [name.removesuffix('/formula') for name in DATA.files if name.endswith('/formula')]
CONVNEXT = dict(kernel_sizes=(7, 7, 7, 7), small_kernel=None, decomposed=False, width_factor=1.0)


def synthetic_map(name):
    """The formula of the reference: a bell or a bell with heavy tails, and noise."""
    height, width, dy, dx, kind, amplitude, sigma_y, sigma_x, noise, seed = DATA[f'{name}/formula']
    height, width = int(height), int(width)
    y = (np.arange(height)[:, None] - (height // 2 + float(dy))) / float(sigma_y)
    x = (np.arange(width)[None, :] - (width // 2 + float(dx))) / float(sigma_x)
    distance = y * y + x * x
    bell = float(amplitude) * (np.exp(-distance / 2) if kind == 'gauss' else 1 / (1 + distance))
    random = np.abs(np.random.RandomState(int(seed)).standard_normal((height, width)))
    return (bell + float(noise) * random).astype(np.float32)


def published(name):
    return [(int(side), pytest.approx(ratio)) if side > 0 else None for side, ratio in DATA[f'{name}/squares']]


@pytest.mark.parametrize('name', SYNTHETIC)
def test_published_area_ratios(name):
    assert area_ratios(synthetic_map(name), official=True) == published(name)


@pytest.mark.parametrize(
    ('case', 'build'),
    [
        ('erf_slak_tiny_convnext_w1.0__1x3x256x256', lambda: SLaK(**CONVNEXT)),
        ('erf_slak_tiny_k51_w1.3__1x3x256x256', SLaK),
        ('erf_unireplknet_t__1x3x192x192', UniRepLKNet),
        ('erf_replknet_31b__1x3x128x160', RepLKNet),
    ],
)
def test_published_contributions(case, build):
    model = build()
    load_pretrained(model, official_weights(model, model.family.name))
    shape = map(int, case.split('__')[1].split('x'))
    got = contribution_map(model.double(), input_for(tuple(shape), 5).double(), official=True)
    GOLDENS.assert_close(case, 'contribution', torch.from_numpy(got), 1e-6)
    assert got.sum() == pytest.approx(DATA[f'{case}/total'], rel=1e-9)
    assert area_ratios(got, official=True) == published(case)


# ----------------------------------------------------------------------------------------- the default


@pytest.mark.parametrize('shape', [(40, 40), (33, 33), (24, 37), (38, 21)])
def test_area_ratios_against_growing_squares(shape):
    scores = np.random.default_rng(0).random(shape) ** 4
    y, x = (np.abs(np.arange(size) - (size - 1) / 2) for size in shape)
    expected = []
    for threshold in THRESHOLDS:
        for side in range(1, 2 * max(shape)):
            inside = (y <= (side - 1) / 2)[:, None] & (x <= (side - 1) / 2)[None, :]
            if inside.any() and scores[inside].sum() > threshold * scores.sum():
                expected.append((side, pytest.approx(inside.mean())))
                break
    assert area_ratios(scores) == expected


def test_ratios_do_not_depend_on_the_scale_of_the_gradient():
    scores = synthetic_map('big1024')
    assert area_ratios(scores) == area_ratios(1024 * scores)
    assert area_ratios(scores, official=True) != area_ratios(1024 * scores, official=True)


class SamePadding(nn.Conv2d):
    """TensorFlow's: the odd pixel of the padding lies behind."""

    def forward(self, x):
        padding = [max((-(-size // 2) - 1) * 2 + self.kernel_size[0] - size, 0) for size in x.shape[2:]]
        padding = [side for total in reversed(padding) for side in (total // 2, total - total // 2)]
        return super().forward(F.pad(x, padding))


def conv(kernel, stride, padding, dilation=1):
    return nn.Conv2d(1, 1, kernel, stride, padding, dilation)


class WithShortcut(nn.Module):
    """A layer, beside one that looks at a smaller map on the side, as attention does."""

    def __init__(self, layer):
        super().__init__()
        self.side, self.layer = nn.AvgPool2d(4), layer

    def forward(self, x):
        return self.layer(x) + 0 * self.side(x).sum()


NETWORKS = dict(
    patches=lambda: (conv(4, 4, 0), conv(5, 1, 2), conv(2, 2, 0)),
    padded=lambda: (conv(3, 2, 1), conv(3, 2, 1), conv(3, 1, 2, 2), conv(3, 2, 1)),
    pooled=lambda: (conv(7, 2, 3), nn.AvgPool2d(2), conv(3, 1, 1)),
    beside=lambda: (WithShortcut(conv(3, 2, 1)), WithShortcut(conv(2, 2, 0))),
    same=lambda: (SamePadding(1, 1, 3, 2), SamePadding(1, 1, 5, 2)),
    # Without a layer that says so: tiles.
    unshuffled=lambda: (nn.PixelUnshuffle(4), nn.Conv2d(16, 1, 3, padding=1)),
)


@pytest.mark.parametrize('size', [(64, 64), (80, 48), (96, 104)])
@pytest.mark.parametrize('name', NETWORKS)
def test_the_map_is_centered(name, size):
    """With equal weights it is symmetric about the pixel of the last stage."""
    network = nn.Sequential(*NETWORKS[name]())
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    scores = contribution_map(network, torch.ones(1, 1, *size))
    for axis, length in enumerate(size):
        seen = np.flatnonzero(scores.sum(1 - axis))
        assert abs(seen[0] + seen[-1] - (length - 1)) <= 1
        profile = scores.sum(1 - axis)[seen[0] : seen[-1] + 1]
        np.testing.assert_allclose(profile, profile[::-1], rtol=1e-5)
    assert scores.sum() == pytest.approx(1)


def test_official_maps_stay_where_they_are():
    """Half a stride off for patches: the pixel (4, 4) of a map of 8x8 covers the image from 32 to 39."""
    network = nn.Sequential(nn.Conv2d(1, 1, 8, 8, bias=False))
    nn.init.ones_(network[0].weight)
    image = torch.ones(1, 1, 64, 64)
    assert np.argwhere(contribution_map(network, image, official=True)).mean() == 35.5
    assert np.argwhere(contribution_map(network, image)).mean() == 31.5


def test_gradient_against_differences():
    """Contributions of one channel, by central differences of the score."""
    model = random_(SLaK(**SMALL)).double().eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)).double()

    def score(x):
        with torch.no_grad():
            for downsample, stage in zip(model.downsample_layers, model.stages):
                x = stage(downsample(x))
        return float(x[:, :, 1, 1].relu().sum())

    got = contributions(model, image, official=True)[0]
    for y, x in ((40, 41), (10, 50), (47, 33)):
        expected = 0.0
        for channel in range(3):
            step = torch.zeros_like(image)
            step[0, channel, y, x] = 1e-5
            expected += max(0.0, (score(image + step) - score(image - step)) / 2e-5)
        assert got[y, x] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_each_image_counts_alike():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)).double()
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    one, two = (contribution_map(network, image[None]) for image in images)
    both = contribution_map(network, images)
    np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-12)
    np.testing.assert_allclose(contribution_map(network, list(images)), both)
    raw = [contribution_map(network, image[None], official=True) for image in images]
    np.testing.assert_allclose(contribution_map(network, images, official=True), sum(raw) / 2, rtol=1e-12)


@pytest.mark.parametrize(('official', 'left_out'), [(False, 3), (True, 1)])
def test_maps_without_meaning_are_left_out(official, left_out):
    average = MeanMap(official)
    for value in (1.0, np.nan, np.inf, 0.0):
        average.add(np.full((2, 2), value))
    assert (average.num_left_out, average.count) == (left_out, 4 - left_out)


def test_the_network_is_left_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Dropout())
    network[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        contributions(network, torch.rand(1, 3, 32, 32))
    assert all(module.training for module in network.modules())
    assert [p.requires_grad for p in network.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in network.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_errors():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(ValueError, match='leave out its pooling'):
        contribution_map(flat, torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match='no images'):
        contribution_map(flat, [])
    with pytest.raises(ValueError, match='one size'):
        contribution_map(nn.Conv2d(3, 4, 3), [torch.rand(3, 32, 32), torch.rand(3, 32, 40)])
    with pytest.raises(ValueError, match='all 1 images were left out'):
        contribution_map(nn.Sequential(nn.GELU(), nn.Conv2d(3, 4, 3)), torch.full((1, 3, 32, 32), torch.nan))
    for wrong in (np.ones(3), -np.ones((3, 3)), np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match=r'shape \(H, W\)'):
            area_ratios(wrong)
    assert area_ratios(np.zeros((8, 8))) == [None] * 4


@pytest.mark.parametrize('official', [False, True])
def test_picture(official):
    """One row for one network, and a second on one scale for several; the squares are white lines."""
    maps = {name: synthetic_map(name) for name in ('gauss257', 'heavy224')}
    one, two = draw_maps(dict(a=maps['gauss257']), official), draw_maps(maps, official, 'two')
    assert one.dtype == np.uint8 and one.shape[2] == 3
    assert two.shape[0] > 1.5 * one.shape[0] and two.shape[1] > 1.5 * one.shape[1]
    assert draw_maps(dict(empty=np.zeros((8, 8))), official).any()


@pytest.mark.parametrize('name', ['slak', 'shiftwise2'])
def test_large_kernels_are_computed_by_the_operator(name, monkeypatch):
    """They are not where a layer has a hook, which is many times slower."""
    calls = []
    module = sys.modules[type(build(name)).__module__]
    operator = module.cross_dwconv2d
    monkeypatch.setattr(module, 'cross_dwconv2d', lambda *args, **kwargs: calls.append(1) or operator(*args, **kwargs))
    contribution_map(build(name), torch.rand(1, 3, 64, 64))
    assert len(calls) == sum(SMALL['arch']['depths'])
