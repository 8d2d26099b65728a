"""Predictions in COCO's result format, read back by pycocotools."""

import json

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from slak_mm.cli import ConfigOverrideError
from slak_mm.cli.coco import CocoResults, rle

mask_api = pytest.importorskip('pycocotools.mask')

CLASSES = ('wall', 'building', 'sky')
LABELS = np.array([[0, 0, 2], [0, 2, 255]], np.uint8)


@pytest.mark.parametrize('share', [0, 0.2, 0.8, 1])
@pytest.mark.parametrize('place', [(0, 0), (3, 5), (7, 2)])
def test_masks_are_encoded_as_pycocotools_does(share, place):
    mask = np.random.default_rng(0).random((13, 18)) < share
    whole = np.zeros((20, 23), np.uint8)
    whole[place[0] : place[0] + 13, place[1] : place[1] + 18] = mask
    encoded = rle(mask, whole.shape, *place)
    assert encoded == dict(size=[20, 23], counts=mask_api.encode(np.asfortranarray(whole))['counts'].decode())


def load(path, annotations):
    from pycocotools.coco import COCO

    return COCO(str(annotations)).loadRes(str(path))


def test_label_maps_come_back(tmp_path):
    results = CocoResults(CLASSES)
    results.write(str(tmp_path / 'out.json'))
    assert not list(tmp_path.iterdir())  # nothing was predicted
    results.add_labels('a/b.png', LABELS)
    results.add_labels('clip.mp4#0', LABELS.T, video='clip.mp4', frame_id=0)
    results.write(str(tmp_path / 'deeper' / 'out.json'))
    loaded = load(tmp_path / 'deeper' / 'out.json', tmp_path / 'deeper' / 'out_dataset.json')
    images = {image['file_name']: image for image in loaded.loadImgs(loaded.getImgIds())}
    assert images['clip.mp4#0'] == dict(id=2, file_name='clip.mp4#0', height=3, width=2, video='clip.mp4', frame_id=0)
    again = np.full_like(LABELS, 255)
    for annotation in loaded.loadAnns(loaded.getAnnIds(imgIds=[images['a/b.png']['id']])):
        name = loaded.loadCats(annotation['category_id'])[0]['name']
        again[loaded.annToMask(annotation) == 1] = CLASSES.index(name)
    assert (again == LABELS).all()


def instances(**more):
    boxes = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    return InstanceData(bboxes=boxes, scores=torch.tensor([0.25]), labels=torch.tensor([1]), **more)


def test_boxes_with_the_ids_of_an_annotation_file(tmp_path):
    categories = [dict(id=90, name='building'), dict(id=7, name='wall'), dict(id=3, name='sky')]
    images = [dict(id=11, file_name='b.png'), dict(id=12, file_name='a/b.png')]
    path = tmp_path / 'data.json'
    path.write_text(json.dumps(dict(images=images, categories=categories, annotations=[])))
    results = CocoResults(CLASSES, str(path), ['/data/a/b.png', 'b.png'])
    mask = rle(np.ones((6, 3)), (10, 10), 2, 1)
    results.add_instances('/data/a/b.png', instances(masks=[mask]), (10, 10))
    results.add_instances('b.png', instances(), (10, 10))
    results.write(str(tmp_path / 'out.json'))
    assert sorted(file.name for file in tmp_path.iterdir()) == ['data.json', 'out.json']
    first, second = json.loads((tmp_path / 'out.json').read_text())
    assert first == dict(image_id=12, category_id=90, bbox=[1, 2, 3, 6], score=0.25, segmentation=mask)
    assert second == dict(image_id=11, category_id=90, bbox=[1, 2, 3, 6], score=0.25)
    assert load(tmp_path / 'out.json', path).anns[1]['area'] == 18


@pytest.mark.parametrize(
    'content, missing',
    [
        ('{"images": [], "categories": [{"id": 1, "name": "wall"}]}', 'has no "building"'),
        ('{"images": [], "categories": [{"id": 1, "name": "wall"}, {"id": 2, "name": "building"}]}', 'has no "a.png"'),
        ('[]', 'is no annotation file'),
        ('{', 'is no annotation file'),
    ],
)
def test_annotation_files_that_do_not_fit(tmp_path, content, missing):
    path = tmp_path / 'data.json'
    path.write_text(content)
    with pytest.raises(ConfigOverrideError, match=missing):
        CocoResults(CLASSES[:2], str(path), ['a.png'])
