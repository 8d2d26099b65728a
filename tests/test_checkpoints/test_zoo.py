import re

import pytest
from mmengine.registry import MODELS

from slak_mm.checkpoints import ZOO, find_model, normalize_url, zoo_table

DRIVE = 'https://drive.usercontent.google.com/download?id=a-B_1&export=download&confirm=t'
SURF = 'https://surfdrive.surf.nl/files/index.php/s/abc'


@pytest.mark.parametrize(
    ('pasted', 'direct'),
    [
        ('https://drive.google.com/file/d/a-B_1/view?usp=sharing', DRIVE),
        ('https://drive.google.com/file/d/a-B_1', DRIVE),
        ('https://drive.google.com/open?id=a-B_1', DRIVE),
        ('https://drive.google.com/uc?export=download&id=a-B_1', DRIVE),
        (SURF, f'{SURF}/download'),
        (f'{SURF}/download', f'{SURF}/download'),
        ('https://example.org/x.pth', 'https://example.org/x.pth'),
        ('file:///tmp/x.pth', 'file:///tmp/x.pth'),
    ],
)
def test_addresses_of_pages_become_addresses_of_files(pasted, direct):
    assert normalize_url(pasted) == direct


def test_entries_are_consistent():
    urls = [info.url for info in ZOO.values() if info.url]
    assert len(set(urls)) == len(urls)
    for name, info in ZOO.items():
        assert name == info.name and re.fullmatch(r'[a-z0-9_]+', name)
        assert info.source and info.figures
        assert info.task in ('classification', 'segmentation', 'detection')
        assert info.sha256 is None or re.fullmatch('[0-9a-f]{64}', info.sha256)


def test_constructors_are_those_of_our_class():
    import torch

    with torch.device('meta'):
        for info in ZOO.values():
            MODELS.build(dict(info.backbone))


def test_published_figures():
    # From the README of the official repository
    assert ZOO['slak_t_in1k_300e'].figures == dict(top1_percent=82.5, params_m=30, flops_g=5.0)
    assert ZOO['slak_b_in1k_300e'].figures['top1_percent'] == 84.0
    assert ZOO['upernet_slak_s_ade20k_160k'].figures == dict(miou_percent=49.4, params_m=91, flops_g=1028)
    assert ZOO['cascade_mask_rcnn_slak_t_coco_1x'].figures == dict(box_ap_percent=48.4, mask_ap_percent=41.8)
    # From the README of shift-wiseConv
    assert ZOO['shiftwise_t_in1k_300e'].figures == dict(top1_percent=83.39)
    # From the README of UniRepLKNet
    assert ZOO['unireplknet_b_in22k_to_in1k_384'].figures == dict(top1_percent=87.4, params_m=98, flops_g=47.2)
    figures = ZOO['casc_mask_rcnn_unireplknet_t_in1k_3x_coco'].figures
    assert figures == dict(box_ap_percent=51.7, mask_ap_percent=44.9, params_m=89, flops_g=749)


def test_lookup():
    info = ZOO['slak_t_in1k_300e']
    assert find_model('slak_t_in1k_300e') is info
    assert find_model(info.url) is info
    assert find_model(info.url + '?usp=sharing') is info
    assert find_model('https://example.org/x.pth') is None
    assert find_model('slak_x') is None


def test_table():
    rows = zoo_table()
    assert len(rows) == len(ZOO) + 1 and {len(row) for row in rows} == {5}
    assert ['47.6% mIoU ss, 65M, 936G'] == [row[2] for row in rows if row[0] == 'upernet_slak_t_ade20k_160k']
