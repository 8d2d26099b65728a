"""The configs are found by name: metafiles, the frameworks' inferencers, and the figures in them."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.infer.infer import BaseInferencer
from mmengine.registry import MODELS, init_default_scope

import slak_mm  # noqa: F401 - registers the models
from slak_mm.checkpoints import ZOO, cached_path, convert_checkpoint, write_checkpoint
from slak_mm.cli import adapt_to_device, remove_weights
from slak_mm.engine.inferencers import own_models

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
ENTRIES = {entry['Name']: entry for entry in own_models()}

spec = importlib.util.spec_from_file_location('make_metafiles', ROOT / 'tests' / 'data' / 'make_metafiles.py')
make_metafiles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_metafiles)
METAFILES = make_metafiles.metafiles()


def framework(name):
    """A framework, the operators of which may be missing."""
    if name == 'mmdet':
        pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")
    return pytest.importorskip(f'{name}.apis')


def test_every_config_has_an_entry_and_every_entry_a_config():
    assert sorted(ENTRIES) == CONFIGS
    assert all(Path(entry['Config']) == ROOT / 'configs' / f'{name}.py' for name, entry in ENTRIES.items())


def test_every_collection_is_defined():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    files = [yaml.safe_load((ROOT / name).read_text()) for name in index['Import']]
    assert sorted(index['Import']) == sorted(f'configs/{path.name}' for path in (ROOT / 'configs').glob('*.yml'))
    collections = {collection['Name'] for file in files for collection in file['Collections']}
    assert {entry['In Collection'] for entry in ENTRIES.values()} == collections
    assert all((ROOT / entry['README']).is_file() for entry in ENTRIES.values())


@pytest.mark.parametrize('name', METAFILES)
def test_files_are_what_configs_and_published_figures_say(name):
    assert (ROOT / name).read_text() == make_metafiles.as_text(METAFILES[name]), 'run tests/data/make_metafiles.py'


def figures_of(name):
    """Published figures of a metafile's entry by their names in the zoo."""
    names = {'mIoU': 'miou', 'mIoU(ms+flip)': 'miou_ms', 'box AP': 'box_ap', 'mask AP': 'mask_ap'}
    results = ENTRIES[name].get('Results', [])
    return {names[key]: value for result in results for key, value in result['Metrics'].items()}


# As printed in the sources: the READMEs of SLaK and ConvNeXt, PeLK's table 3, and summaries of ShiftWise's paper.
PRINTED = dict(
    upernet_slak_t_ade20k=(47.6,),
    upernet_slak_s_ade20k=(49.4,),
    upernet_slak_b_ade20k=(50.0,),
    upernet_shiftwise_t_ade20k=(49.22, 50.06),
    upernet_shiftwise_s_ade20k=(49.79, 50.83),
    upernet_convnext_t_ade20k=(46.0, 46.7),
    cascade_mask_rcnn_slak_t_coco_1x=(48.4, 41.8),
    cascade_mask_rcnn_slak_t_coco=(51.3, 44.3),
    cascade_mask_rcnn_slak_b_coco=(52.5, 45.5),
    cascade_mask_rcnn_shiftwise_t_coco=(52.21, 45.19),
    cascade_mask_rcnn_convnext_t_coco=(50.4, 43.7),
)


def test_figures_are_those_of_the_sources():
    assert {name: tuple(figures_of(name).values()) for name in PRINTED} == PRINTED
    for name in PRINTED:
        assert ENTRIES[name]['Source']['Remark'] == 'published, not reproduced here'


@pytest.mark.parametrize('document', ['README.md', 'docs/segmentation.md', 'docs/detection.md'])
def test_figures_of_the_documents_are_those_of_the_metafiles(document):
    """A figure is the text of the link to the config, or stands in its row, in the column of published ones."""
    found, column = {}, None
    for line in (ROOT / document).read_text().splitlines():
        cells = [cell.strip() for cell in line.split('|')]
        column = next((index for index, cell in enumerate(cells) if cell.startswith('published')), column)
        found.update((name, text) for text, name in re.findall(r'\[([\d. /]+)\]\([^)]*configs/(\w+)\.py\)', line))
        row = re.match(r'\| \[`(\w+)\.py`\]', line)
        if row and re.match(r'\d', cells[column]):
            found[row[1]] = cells[column].split('(')[0]
    assert len(found) >= 5
    for name, text in found.items():
        figures = [float(figure) for figure in re.findall(r'\d+(?:\.\d+)?', text)]
        assert figures == list(figures_of(name).values()), name
    if document != 'README.md':
        method = 'upernet' if 'segmentation' in document else 'rcnn'
        assert set(found) == {name for name in ENTRIES if method in name and figures_of(name)}


def test_a_framework_finds_its_own_models_as_before():
    apis = framework('mmseg')
    names = apis.MMSegInferencer.list_models('mmseg')
    assert [names.count(name) for name in ENTRIES] == [1] * len(ENTRIES)  # not a name that the framework has too
    assert 'fcn_r50-d8_4xb2-40k_cityscapes-512x1024' in names


def test_another_name_is_refused():
    apis = framework('mmseg')
    with pytest.raises(ValueError, match='Cannot find model: upernet_slak_x_ade20k'):
        apis.MMSegInferencer('upernet_slak_x_ade20k')


@pytest.mark.parametrize(
    'name, scope', [('upernet_slak_t_ade20k', 'mmseg'), ('cascade_mask_rcnn_slak_t_coco', 'mmdet')]
)
def test_name_leads_to_config_and_weights(name, scope):
    """Without an inferencer, so that it is tested where operators are missing."""
    pytest.importorskip(scope)

    class Finder(BaseInferencer):
        def __init__(self):
            self.scope = scope

        visualize = postprocess = _init_pipeline = None

    cfg, weights = Finder()._load_model_from_metafile(name.upper())
    assert cfg.filename == str(ROOT / 'configs' / f'{name}.py')
    # The authors published those of the segmentor only.
    assert weights == ('slak_mm://upernet_slak_t_ade20k_160k' if scope == 'mmseg' else None)


def test_weights_are_of_the_config():
    for name, entry in ENTRIES.items():
        if entry['Weights']:
            info = ZOO[entry['Weights'].removeprefix('slak_mm://')]
            assert info.config == f'{name}.py' and info.url


def test_segmentor_by_name_with_its_published_weights(tmp_path, monkeypatch):
    """The file that the name leads to is in the official spelling; here one of random values."""
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path))
    apis = framework('mmseg')
    cfg = Config.fromfile(ENTRIES['upernet_slak_t_ade20k']['Config'])
    remove_weights(cfg)
    adapt_to_device(cfg, has_gpu=lambda: False)
    init_default_scope('mmseg')
    weights = MODELS.build(cfg.model).state_dict()
    path = cached_path('upernet_slak_t_ade20k_160k')
    path.parent.mkdir()
    write_checkpoint(convert_checkpoint(dict(state_dict=weights), 'official'), path)

    inferencer = apis.MMSegInferencer('upernet_slak_t_ade20k', device='cpu')
    loaded = inferencer.model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    result = inferencer(image)['predictions']
    assert result.shape == (48, 64) and 0 <= result.min() and result.max() < 150


def test_detector_by_name_with_random_weights():
    apis = framework('mmdet')
    with pytest.warns(UserWarning, match='randomly initialized'):
        inferencer = apis.DetInferencer('cascade_mask_rcnn_slak_t_coco', device='cpu', show_progress=False)
    image = np.random.default_rng(0).integers(0, 255, (48, 96, 3), dtype=np.uint8)
    (result,) = inferencer(image)['predictions']
    boxes = np.array(result['bboxes']).reshape(-1, 4)
    assert len(boxes) == len(result['scores']) == len(result['labels'])
    assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= 96).all() and (boxes[:, [1, 3]] <= 48).all()
