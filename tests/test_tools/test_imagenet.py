"""tools/imagenet.py: accuracy of classifiers, with timm's ConvNeXt and plain transforms as the judge."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from backbone_helpers import random_
from conftest import load_tool
from PIL import Image
from torchvision import transforms

timm = pytest.importorskip('timm')

from slak_mm.checkpoints import to_official  # noqa: E402
from slak_mm.cli import imagenet  # noqa: E402
from slak_mm.cli.errors import explain  # noqa: E402

NUM_IMAGES = 12
RANKS = np.array([0] * 5 + [2] * 3 + [4] + [5] * 2 + [500])  # of the label in the scores: 5 hits for top-1, 9 for top-5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope='module')
def judge():
    """timm's ConvNeXt-T, with layer scales that do not hide the blocks."""
    torch.manual_seed(0)
    model = timm.create_model('convnext_tiny').eval()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope='module')
def data(judge, tmp_path_factory):
    """Images, labels whose ranks in the judge's scores are those above, and the judge's weights."""
    root = tmp_path_factory.mktemp('imagenet')
    (root / 'images').mkdir()
    rng = np.random.RandomState(0)
    prepare = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    lines = []
    for number, rank in enumerate(RANKS):
        height, width = rng.randint(180, 400, 2)
        coarse = Image.fromarray(rng.randint(0, 256, (7, 9, 3), np.uint8))
        image = coarse.resize((width, height), Image.BICUBIC)
        name = f'val_{number:08}.png'
        (image.convert('L') if number == 3 else image).save(root / 'images' / name)
        with torch.no_grad():
            scores = judge(prepare(Image.open(root / 'images' / name).convert('RGB'))[None])[0]
        lines.append(f'{name} {int(scores.argsort(descending=True)[rank])}')
    (root / 'val.txt').write_text('\n'.join(lines) + '\n')
    torch.save({'model': judge.state_dict(), 'args': argparse.Namespace(lr=1)}, root / 'convnext.pth')
    return root


def run(monkeypatch, *words):
    """The tool in this process."""
    monkeypatch.setattr(sys, 'argv', ['imagenet.py', *map(str, words), '--device', 'cpu', '--workers', '0'])
    load_tool('imagenet').main()


# timm evaluates its own at 288 pixels.
TIMM = ('--model', 'convnext_tiny', '--size', '224x224', '--crop-pct', '0.875')


@pytest.mark.parametrize('options', [(), TIMM, ('--deploy', '--batch-size', '5')])
def test_counts_what_the_judge_counts(data, tmp_path, monkeypatch, capsys, options):
    """In our ConvNeXt, whose network is found from the names of timm's; and in timm's own."""
    out = tmp_path / 'out.json'
    files = '--data', data / 'images', '--labels', data / 'val.txt', '--json', out
    run(monkeypatch, data / 'convnext.pth', *files, *options)
    result = json.loads(out.read_text())
    assert (result['correct1'], result['correct5'], result['images']) == (5, 9, NUM_IMAGES)
    printed = capsys.readouterr().out
    assert 'top-1 41.67 %, top-5 75.00 %' in printed and '224x224, crop 0.875' in printed
    if not options:
        # Two published checkpoints are of this network.
        published = {'convnext_l2s_t_in1k_300e': 83.1, 'convnext_t_in1k_300e': 82.1}
        assert result['network'] == 'convnext_t' and result['published'] == published
        assert '82.1 % (convnext_t_in1k_300e); 12 of them tell little.' in printed


def test_mixed_precision_and_other_sizes(data, monkeypatch, capsys):
    files = '--data', data / 'images', '--labels', data / 'val.txt'
    run(monkeypatch, data / 'convnext.pth', *files, '--amp', '--size', '64x96', '--crop-pct', '1')
    assert '12 images, 64x96, crop 1, cpu' in capsys.readouterr().out


@pytest.mark.parametrize('names', ['synsets', 'others'])
def test_folders_of_classes(data, tmp_path, names):
    """WordNet ids have the numbers of ImageNet, also of a part of it; other names are sorted."""
    synsets = ['n01440764', 'n01443537', 'n15075141'] if names == 'synsets' else ['ant', 'bee', 'cat']
    for name in reversed(synsets):
        (tmp_path / 'val' / name).mkdir(parents=True)
        (tmp_path / 'val' / name / 'a.png').write_bytes((data / 'images' / 'val_00000000.png').read_bytes())
    labels = [label for _, label in imagenet.LabelledImages(tmp_path, 1000 if names == 'synsets' else 3).samples]
    assert labels == ([0, 1, 999] if names == 'synsets' else [0, 1, 2])
    with pytest.raises(imagenet.ConfigOverrideError, match='3 folders, of which 3 .* head is for 5 classes'):
        imagenet.LabelledImages(tmp_path, 5)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('val_00000000.png 1000\n', "Line 1 of .* has the class '1000'; the head knows the numbers 0 to 999"),
        ('val_00000000.png n1\n', "has the class 'n1'"),
        ('image label\n', "has the class 'label'|names no images"),
        ('490\n361\n', 'development kit are in another order'),
        ('ImageId,Prediction\nnone.png,n01440764 1 2 3 4\n', 'Line 2 of .* names none.png, which is not in'),
        ('\n', 'names no images'),
    ],
)
def test_labels_that_do_not_fit(data, tmp_path, text, message):
    (tmp_path / 'labels.txt').write_text(text)
    with pytest.raises(imagenet.ConfigOverrideError, match=message):
        imagenet.LabelledImages(data / 'images', 1000, tmp_path / 'labels.txt')


def test_folders_that_do_not_fit(data, tmp_path):
    (tmp_path / 'n01440764').mkdir()
    for root, message in (
        (data / 'images', 'has no folders of classes: sort the images into one folder per class, or give --labels'),
        (tmp_path, 'have no images'),
        (tmp_path / 'missing', 'There is no folder'),
    ):
        with pytest.raises(imagenet.ConfigOverrideError, match=message):
            imagenet.LabelledImages(root, 1000)


def test_data_are_looked_for_before_weights(monkeypatch):
    with pytest.raises(imagenet.ConfigOverrideError, match=r'There is no missing/val\.'):
        run(monkeypatch, 'slak_t_in1k_300e', '--data', 'missing/val')


def test_a_damaged_image_is_named(data, tmp_path):
    """It is not passed over, as timm's own data set does: the accuracy would be that of other images."""
    (tmp_path / 'n01440764').mkdir()
    whole = (data / 'images' / 'val_00000000.png').read_bytes()
    (tmp_path / 'n01440764' / 'broken.png').write_bytes(whole[: len(whole) // 2])
    images = imagenet.LabelledImages(tmp_path, 1000)
    model = timm.create_model('resnet18')
    with pytest.raises(ValueError, match='broken.png cannot be read') as raised:
        imagenet.evaluate(model, images, imagenet.data_config(model), torch.device('cpu'), workers=1)
    assert explain(raised.value).startswith('The image ')


@pytest.mark.parametrize(
    ('top1', 'images', 'sentence', 'is_within'),
    [
        (82.4, 50_000, 'within 0.1 of that of slak_t_in1k_300e.', True),
        (82.39, 50_000, 'NOT within 0.1', False),
        (82.5, 49_999, 'tell little', None),
    ],
)
def test_verdict(top1, images, sentence, is_within):
    network = imagenet.Network(
        torch.nn.Identity(), 'slak_tiny', {'slak_t_in1k_300e': 82.5, 'slak_t_k51_in1k_120e': 81.6}
    )
    text, verdict = imagenet.verdict(network, dict(top1=top1, images=images))
    assert verdict is is_within
    __import__('re').search(sentence, text) or pytest.fail(text)


# Which network


def small(monkeypatch, tmp_path, **content):
    """A file of SLaK-T in small, beside a zoo in which it is the published one."""
    from backbone_helpers import SMALL

    from slak_mm import timm_models

    kind, _ = timm_models.NETWORKS['slak_tiny']
    arguments = dict(arch=SMALL['arch'], kernel_sizes=(13, 11, 9, 7), small_kernel=3, width_factor=1.0)
    monkeypatch.setitem(timm_models.NETWORKS, 'slak_tiny', (kind, arguments))
    return random_(kind(**arguments, **content)).eval()


@pytest.mark.parametrize('form', ['training', 'deployed'])
def test_network_is_found_from_the_tensors(monkeypatch, tmp_path, form):
    model = small(monkeypatch, tmp_path, num_classes=9)
    weights = model.state_dict() if form == 'training' else imagenet.fold(model).state_dict()
    torch.save({'model': weights, 'model_ema': {key: value * 0 for key, value in weights.items()}}, tmp_path / 'a.pth')
    network = imagenet.load_network(str(tmp_path / 'a.pth'))
    assert (
        network.name == 'slak_tiny' and network.model.num_classes == 9 and network.model.deploy == (form != 'training')
    )
    assert network.published == {'slak_t_in1k_300e': 82.5, 'slak_t_k51_in1k_120e': 81.6}
    assert torch.equal(network.model.head.weight, weights['head.weight'])
    assert not imagenet.load_network(str(tmp_path / 'a.pth'), use_ema=True).model.head.weight.any()


@pytest.mark.parametrize('name', ['slak_t_in1k_300e', 'slak_tiny', 'slak_tiny.in1k_300e'])
def test_names_of_zoo_and_timm_are_one(monkeypatch, tmp_path, name):
    model = small(monkeypatch, tmp_path)
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    torch.save({'model': to_official(model.state_dict())}, tmp_path / 'checkpoints' / 'slak_t_in1k_300e.pth')
    network = imagenet.load_network(name)
    assert network.published == {'slak_t_in1k_300e': 82.5}
    assert torch.equal(network.model.head.weight, model.head.weight)


def test_checkpoints_without_a_network(monkeypatch, tmp_path):
    model = small(monkeypatch, tmp_path, num_classes=0)
    torch.save(model.state_dict(), tmp_path / 'headless.pth')
    torch.save(
        random_(type(model)(arch=dict(depths=(1, 1), dims=(8, 8)), kernel_sizes=(7, 7))).state_dict(),
        tmp_path / 'other.pth',
    )
    for source, message in (
        (tmp_path / 'headless.pth', 'has no classification head: give an ImageNet checkpoint'),
        (tmp_path / 'other.pth', 'is of none of the known networks, but another architecture .*--model'),
        ('upernet_slak_t_ade20k_160k', 'is a checkpoint for segmentation, without an ImageNet classifier'),
        ('resnet18.nothing', 'timm cannot make resnet18.nothing'),
    ):
        with pytest.raises(imagenet.ConfigOverrideError, match=message):
            imagenet.load_network(str(source))
    with pytest.raises(RuntimeError, match='no published checkpoint of that name'):
        imagenet.load_network('nothing.pth')
