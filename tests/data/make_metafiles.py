#!/usr/bin/env python
"""Write ``model-index.yml`` and ``configs/metafile_*.yml``, in which OpenMMLab's tools find the configs by name.

Everything in them is read from the configs and from the published figures of the families, so that nothing is
written twice. A test compares the files with what this script would write.
"""

from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

from slak_mm.checkpoints import PUBLISHED, ZOO, ModelInfo, normalize_url
from slak_mm.cli import datasets_of, model_of

ROOT = Path(__file__).resolve().parents[2]

# What a collection is called, by the word for it in the names of configs: title and address of the paper, and code.
COLLECTIONS = dict(
    convnext=('ConvNeXt', 'A ConvNet for the 2020s', '2201.03545', 'facebookresearch/ConvNeXt'),
    replknet=(
        'RepLKNet',
        'Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs',
        '2203.06717',
        'DingXiaoH/RepLKNet-pytorch',
    ),
    shiftwise=(
        'ShiftWise',
        'Scale Up Composed Kernels: A Shift-wise Convolution with a Large Effective Receptive Field',
        '2401.12736',
        'lidc54/shift-wiseConv',
    ),
    slak=(
        'SLaK',
        'More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity',
        '2207.03620',
        'VITA-Group/SLaK',
    ),
    unireplknet=(
        'UniRepLKNet',
        'UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image '
        'Recognition',
        '2311.15599',
        'AILab-CVC/UniRepLKNet',
    ),
)
# Names of the published figures, by task.
_SEGMENTATION = {'Semantic Segmentation': dict(miou_percent='mIoU', miou_ms_percent='mIoU(ms+flip)')}
_DETECTION = {
    'Object Detection': dict(box_ap_percent='box AP'),
    'Instance Segmentation': dict(mask_ap_percent='mask AP'),
}
# Method, document and figures by the type of the model.
METHODS = dict(
    EncoderDecoder=('UPerNet', 'segmentation', _SEGMENTATION),
    FasterRCNN=('Faster R-CNN', 'detection', _DETECTION),
    MaskRCNN=('Mask R-CNN', 'detection', _DETECTION),
    CascadeRCNN=('Cascade Mask R-CNN', 'detection', _DETECTION),
)
DATASETS = dict(ADE20KDataset='ADE20K', CocoDataset='COCO', VOCDataset='PASCAL VOC')


def family_of(stem: str) -> str:
    """The collection that a config belongs to."""
    return next(word for word in COLLECTIONS if f'_{word}_' in stem)


def entry(path: Path) -> dict[str, Any]:
    """A config's entry of ``Models``."""
    cfg, stem = Config.fromfile(path), path.stem
    collection = COLLECTIONS[family_of(stem)][0]
    method, document, tasks = METHODS[model_of(cfg).type]
    _, train_set = next(datasets_of(cfg, ('train_dataloader',)))
    dataset = DATASETS[train_set.type]
    loop = cfg.train_cfg
    length = {'Epochs': loop.max_epochs} if 'max_epochs' in loop else {'Iterations': loop.max_iters}
    metadata = {
        'Training Data': dataset,
        **length,
        'Batch Size': cfg.auto_scale_lr.base_batch_size,
        'Architecture': [collection, method],
    }
    sources = {}
    if published := PUBLISHED.get(stem):
        sources['parameters and FLOPs'] = published.source
        metadata |= {'Parameters': round(published.parameters_m * 1e6), 'FLOPs': round(published.flops_g * 1e9)}
    result = {'Name': stem, 'In Collection': collection, 'Config': str(path.relative_to(ROOT)), 'Metadata': metadata}
    info: ModelInfo | None = next((info for info in ZOO.values() if info.config == path.name), None)
    if info:
        result['Results'] = [
            {
                'Task': task,
                'Dataset': dataset,
                'Metrics': {name: info.figures[key] for key, name in names.items() if key in info.figures},
            }
            for task, names in tasks.items()
        ]
        sources['accuracy'] = info.source
        if info.url:
            result['Weights'] = normalize_url(info.url)
    if sources:
        result['Source'] = {'Remark': 'published, not reproduced here', **sources}
    return {**result, 'README': f'docs/{document}.md'}


def metafiles() -> dict[str, Any]:
    """Content of each file by its path below the checkout."""
    paths = sorted((ROOT / 'configs').glob('*.py'))
    files: dict[str, Any] = {}
    for word, (name, title, paper, code) in COLLECTIONS.items():
        collection = {
            'Name': name,
            'Paper': {'Title': title, 'URL': f'https://arxiv.org/abs/{paper}'},
            'Code': f'https://github.com/{code}',
            'README': 'README.md',
        }
        models = [entry(path) for path in paths if family_of(path.stem) == word]
        files[f'configs/metafile_{word}.yml'] = {'Collections': [collection], 'Models': models}
    return {'model-index.yml': {'Import': list(files)}, **files}


def as_text(content: Any) -> str:
    """A file's content in YAML."""
    note = '# Written by tests/data/make_metafiles.py.\n'
    return note + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


if __name__ == '__main__':
    for name, content in metafiles().items():
        (ROOT / name).write_text(as_text(content))
