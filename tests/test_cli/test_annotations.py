"""Classes and boxes of annotation files, data sets and heads, compared before a run."""

import json
from pathlib import Path

import pytest
from test_swap import CONFIGS

from slak_mm import cli
from slak_mm.bases import framework_configs
from slak_mm.cli import annotations

pytest.importorskip('mmdet')

ROOT = Path(__file__).parents[2]
TRAINING = ('train_dataloader', 'val_dataloader')
HEADS = [f'model.roi_head.{name}.num_classes' for name in ('bbox_head.0', 'bbox_head.1', 'bbox_head.2', 'mask_head')]
TWO = {f'{loader}.dataset.metainfo.classes': ['worker', 'thing'] for loader in TRAINING} | dict.fromkeys(HEADS, 2)

ORDERS = 'train_dataloader.dataset has the classes worker, thing.*val_dataloader.dataset has thing, worker'
REVERSED = {'val_dataloader.dataset.metainfo.classes': ['thing', 'worker']}


def coco():
    """A file as other tools write it: two classes of its own."""
    box = dict(image_id=1, iscrowd=0, bbox=[10, 12, 40, 30], area=1200, segmentation=[[10, 12, 50, 12, 50, 42]])
    return dict(
        images=[dict(id=1, file_name='a.jpg', width=80, height=64)],
        annotations=[dict(box, id=1, category_id=1), dict(box, id=2, category_id=2)],
        categories=[dict(id=1, name='worker'), dict(id=2, name='thing')],
    )


@pytest.fixture
def check_coco(tmp_path):
    """Check the files of training and validation with changes of the config."""

    def check(options, training, validation=None):
        cfg = cli.load_config(str(ROOT / 'configs' / 'cascade_mask_rcnn_slak_t_coco.py'))
        (tmp_path / 'annotations').mkdir()
        for split, content in (('train', training), ('val', coco() if validation is None else validation)):
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / 'annotations' / f'instances_{split}2017.json').write_text(text)
        cli.set_data_root(cfg, str(tmp_path))
        cfg.merge_from_dict(options)
        cli.check_annotations(cfg, TRAINING)

    return check


def each(key, value):
    """Change a key of every annotation; None removes it."""
    content = coco()
    for item in content['annotations']:
        item[key] = value
        if value is None:
            del item[key]
    return content


def without(key, of=None):
    content = coco()
    for item in [content] if of is None else content[of]:
        del item[key]
    return content


@pytest.mark.parametrize(
    'options,training,validation,message',
    [
        ({}, coco(), None, r'classes worker, thing \(2\), and .*person.*metainfo.classes.*mask_head.num_classes'),
        (TWO | dict.fromkeys(HEADS, 80), coco(), None, r'2 classes \(worker.*bbox_head.0.num_classes is 80.*mask_head'),
        (TWO | {HEADS[-1]: 80}, coco(), None, r'worker.*set model.roi_head.mask_head.num_classes to 2'),
        (TWO | {HEADS[1]: 3}, coco(), None, r'worker.*set model.roi_head.bbox_head.1.num_classes to 2'),
        (TWO | {'train_dataloader.dataset.metainfo.classes': 'worker'}, coco(), None, r'\("worker",\)'),
        (TWO | {'train_dataloader.dataset.metainfo.classes': ['thing', 'worker']}, coco(), None, 'in the order of'),
        (TWO | REVERSED, coco(), dict(coco(), categories=coco()['categories'][::-1]), ORDERS),
        (TWO, each('segmentation', []), None, 'train2017.json" have no segmentation.*a.jpg.*without a mask head'),
        (TWO, coco(), each('segmentation', None), 'val2017.json" have no segmentation'),
        (TWO, each('iscrowd', 1), None, 'train2017.json" has no box to train on'),
        (TWO, each('bbox', [10, 12, 0, 30]), None, 'no box to train on'),
        (TWO, each('bbox', [90, 12, 10, 10]), None, 'no box to train on'),
        (TWO, coco(), dict(coco(), annotations=[]), 'val2017.json" has no box to judge by'),
        (TWO, coco(), without('annotations'), 'val2017.json" has no box to judge by'),
        (TWO, without('categories'), None, "train2017.json\" lacks 'categories'"),
        (TWO, without('width', 'images'), None, "train2017.json\" lacks 'width'"),
        (TWO, without('area', 'annotations'), None, "Annotation 1 of .*train2017.json\" lacks 'area'"),
        (TWO, each('bbox', [1, 2, 3]), None, 'Annotation 1 of .*train2017.json'),
        (TWO, each('bbox', [1, 2, float('nan'), 3]), None, 'Annotation 1 of .*nan'),
        (TWO, '', None, 'train2017.json" is not valid JSON'),
        (TWO, json.dumps(coco())[:-20], None, 'train2017.json" is not valid JSON'),
        (TWO, '[]', None, 'train2017.json"'),
    ],
)
def test_coco_is_refused(check_coco, options, training, validation, message):
    with pytest.raises(cli.ConfigOverrideError, match=message):
        check_coco(options, training, validation)


def test_names_of_files_are_escaped(check_coco):
    content = coco()
    for category in content['categories']:
        category['name'] = f'\x1b[31m{category["id"]}' + 'x' * 10_000
    with pytest.raises(cli.ConfigOverrideError, match=r'\\x1b\[31m') as error:
        check_coco(TWO, content)
    assert '\x1b' not in str(error.value) and len(str(error.value)) < 1000


def test_what_is_ignored_is_counted(check_coco, monkeypatch):
    said = []
    monkeypatch.setattr(annotations, 'print_log', lambda text, **options: said.append(text))
    content = coco()
    first = content['annotations'][0]
    content['annotations'] += [dict(first, id=3, category_id=3), dict(first, id=4, bbox=[1, 1, 0, 5])]
    content['categories'].append(dict(id=3, name='other'))
    check_coco(TWO, content)
    assert len(said) == 2
    assert '1 of 4 boxes' in said[0] and "{'other': 1}" in said[0]
    assert '1 of 4 boxes' in said[1] and "['a.jpg']" in said[1]


def voc(root, size=(64, 64), name='cat', box=(5, 5, 40, 40)):
    width, height = size
    sides = ''.join(f'<{side}>{value}</{side}>' for side, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
    text = (
        f'<annotation><size><width>{width}</width><height>{height}</height></size>'
        f'<object><name>{name}</name><bndbox>{sides}</bndbox></object></annotation>'
    )
    for split in ('trainval', 'test'):
        listing = root / 'VOC2007' / 'ImageSets' / 'Main' / f'{split}.txt'
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(f'{split}\n')
        (root / 'VOC2007' / 'Annotations').mkdir(exist_ok=True)
        (root / 'VOC2007' / 'Annotations' / f'{split}.xml').write_text(text)
    return text


@pytest.fixture
def check_voc(tmp_path):
    def check(options=None):
        cfg = cli.load_config(str(ROOT / 'configs' / 'faster_rcnn_slak_t_voc07.py'))
        cli.set_data_root(cfg, str(tmp_path))
        cfg.merge_from_dict(options or {})
        cli.check_annotations(cfg, TRAINING)

    return check


@pytest.mark.parametrize(
    'change,message',
    [
        (dict(name='worker'), r'classes worker \(1\), and train_dataloader.dataset looks for aeroplane.*bbox_head'),
        (dict(box=(10, 10, 10, 40)), '1 boxes.*trainval.xml'),
        (dict(box=(20, 10, 10, 40)), '1 boxes.*trainval.xml'),
        (dict(box=(70, 10, 90, 40)), '1 boxes.*trainval.xml'),
        (dict(box=('nan', 10, 20, 40)), 'trainval.xml'),
        (dict(box=('inf', 10, 20, 40)), 'trainval.xml'),
        (dict(box=('', 10, 20, 40)), 'trainval.xml'),
        (dict(box=(10, 10)), 'trainval.xml'),
        (dict(size=(20, 20), box=(5, 5, 15, 15)), 'no box to train on.*min_size'),
    ],
)
def test_voc_is_refused(check_voc, tmp_path, change, message):
    voc(tmp_path)
    check_voc()
    voc(tmp_path, **change)
    with pytest.raises(cli.ConfigOverrideError, match=message):
        check_voc()


@pytest.mark.parametrize('share', [0, 0.5])
def test_broken_xml_is_named(check_voc, tmp_path, share):
    text = voc(tmp_path)
    (tmp_path / 'VOC2007' / 'Annotations' / 'test.xml').write_text(text[: int(share * len(text))])
    with pytest.raises(cli.ConfigOverrideError, match='test.xml" is not valid XML'):
        check_voc()


def test_a_missing_file_is_named(check_voc, tmp_path):
    voc(tmp_path)
    (tmp_path / 'VOC2007' / 'Annotations' / 'test.xml').unlink()
    with pytest.raises(cli.ConfigOverrideError, match='test.xml" cannot be read'):
        check_voc()


def test_classes_of_segmentation_are_compared(config_path):
    cfg = cli.load_config(config_path)
    cfg.model.auxiliary_head.num_classes = 3
    with pytest.raises(cli.ConfigOverrideError, match='150 classes.*set model.auxiliary_head.num_classes to 150'):
        cli.check_annotations(cfg, TRAINING)
    cfg.train_dataloader.dataset.metainfo = dict(classes=('cat', 'dog'))
    with pytest.raises(cli.ConfigOverrideError, match='cat, dog.*BaseSegDataset'):
        cli.check_annotations(cfg, TRAINING)


@pytest.mark.parametrize('name', [*CONFIGS, *sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))])
def test_published_configs_are_accepted(monkeypatch, name):
    monkeypatch.setattr(annotations, '_read_boxes', lambda *args: None)
    package, _, path = name.partition('/')
    file = framework_configs(package, f'../{path}.py')[0] if path else str(ROOT / 'configs' / f'{name}.py')
    cfg = cli.load_config(file)
    cli.check_annotations(cfg, (*TRAINING, 'test_dataloader'))
