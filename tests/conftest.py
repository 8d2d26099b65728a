"""Fixtures that run the tools, on a generated data set and a tiny model."""

import importlib.util
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.utils import ManagerMixin
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# What each marker of pyproject.toml stands on: beginnings of the tests' names.
MARKED = {
    'slow': (
        'tests/test_benchmarks/',
        'tests/test_tools/',
        'tests/test_configs.py',
        'tests/test_packaging.py',
        'tests/test_swap.py',
        'tests/test_checkpoints/test_reader.py::test_every_process_hears_of_a_failure',
        'tests/test_cost.py',
        'tests/test_cli/test_prepare_data.py',
        'tests/test_engine/test_detection_data.py',
        'tests/test_engine/test_reproducible.py',
        'tests/test_engine/test_sparsity_hook.py',
        'tests/test_models/test_graphs.py',
        'tests/test_models/test_shiftwise_parity.py',
        'tests/test_models/test_slak_parity.py',
        'tests/test_ops/test_cpu_native.py',
        'tests/test_ops/test_triton.py',
        'tests/test_sparsity/test_sparsity_distributed.py',
    ),
    'operators': (
        'tests/test_cli/test_demo_data.py::test_voc_layout_and_metric',
        'tests/test_cli/test_demo_data.py::test_coco_layout_and_metric',
        'tests/test_cli/test_overrides.py::test_batch_size_and_workers',
        'tests/test_cli/test_overrides.py::test_img_scale_reaches_',
        'tests/test_configs.py::test_detector_is_built_',
        'tests/test_cost.py::test_detectors_of_the_framework',
        'tests/test_cost.py::test_published_figures[cascade_',
        'tests/test_engine/test_detection_data.py',
        'tests/test_swap.py::test_stock_config[mmdet/',
        'tests/test_tools/test_detection.py',
        'tests/test_tools/test_train.py::test_detection_configs',
        'tests/test_tools/test_train_sparse.py::test_any_framework',
    ),
}


def pytest_collection_modifyitems(items):
    """Mark the tests named above, and skip those that need operators where there are none."""
    without_operators = importlib.util.find_spec('mmcv._ext') is None
    for item in items:
        for marker, beginnings in MARKED.items():
            if item.nodeid.startswith(beginnings):
                item.add_marker(marker)
                if marker == 'operators' and without_operators:
                    item.add_marker(pytest.mark.skip(reason="needs mmcv's compiled operators"))


# SLaK with one block per stage and 7x7 crosses: iterations take some hundredths of a second.
TINY_BACKBONE = (
    'model.backbone.arch._delete_=True',
    'model.backbone.arch.depths=[1,1,1,1]',
    'model.backbone.arch.dims=[8,16,24,32]',
    'model.backbone.kernel_sizes=(7,7,7,7)',
)
TINY_SLAK = ('model.backbone.width_factor=1.0', 'model.backbone.small_kernel=3')
TINY = (
    *TINY_BACKBONE,
    *TINY_SLAK,
    'model.decode_head.in_channels=[8,16,24,32]',
    'model.decode_head.channels=16',
    'model.auxiliary_head.in_channels=24',
    'model.auxiliary_head.channels=16',
)


# The same backbone with narrow necks and heads, and few boxes to look at.
TINY_DETECTOR = (
    *TINY_BACKBONE,
    'model.neck.in_channels=[8,16,24,32]',
    'model.neck.out_channels=16',
    'model.rpn_head.in_channels=16',
    'model.rpn_head.feat_channels=16',
    'model.roi_head.bbox_roi_extractor.out_channels=16',
    'model.train_cfg.rpn_proposal.max_per_img=64',
    'model.test_cfg.rpn.max_per_img=64',
    'model.test_cfg.rcnn.max_per_img=20',
)
TINY_FASTER_RCNN = (
    *TINY_DETECTOR,
    'model.roi_head.bbox_head.in_channels=16',
    'model.roi_head.bbox_head.fc_out_channels=32',
    'model.train_cfg.rcnn.sampler.num=32',
)
TINY_CASCADE = (
    *TINY_DETECTOR,
    'model.roi_head.mask_roi_extractor.out_channels=16',
    'model.roi_head.mask_head.in_channels=16',
    'model.roi_head.mask_head.conv_out_channels=16',
    *(
        f'model.roi_head.bbox_head.{stage}.{key}'
        for stage in range(3)
        for key in ('in_channels=16', 'conv_out_channels=16', 'fc_out_channels=32')
    ),
    *(f'model.train_cfg.rcnn.{stage}.sampler.num=32' for stage in range(3)),
)


@pytest.fixture(scope='session')
def config_path():
    """The main config."""
    return str(ROOT / 'configs' / 'upernet_slak_t_ade20k.py')


@pytest.fixture(scope='session')
def tta_config_path(config_path, tmp_path_factory):
    """A config whose model is a test-time augmentation wrapper already, as some users write it."""
    path = tmp_path_factory.mktemp('config') / 'tta.py'
    path.write_text(
        f'_base_ = {config_path!r}\n'
        "model = dict(_delete_=True, type='SegTTAModel', module=_base_.model)\n"
        'test_dataloader = dict(dataset=dict(pipeline=_base_.tta_pipeline))\n'
    )
    return str(path)


@pytest.fixture(scope='session')
def tiny():
    """``--cfg-options`` that make the main config's model tiny."""
    return list(TINY)


@pytest.fixture(scope='session')
def tiny_detector():
    """Gives ``--cfg-options`` that make the model of a detection config tiny, by its name."""

    def options(name):
        detector = list(TINY_FASTER_RCNN if name.startswith('faster') else TINY_CASCADE)
        return detector if 'shiftwise' in name or 'convnext' in name else [*detector, *TINY_SLAK]

    return options


@pytest.fixture(scope='session')
def build_tiny(config_path, tiny):
    """Builds the tiny model in this process, without weights and for the CPU."""
    from mmengine.config import Config, DictAction
    from mmengine.registry import MODELS, init_default_scope

    from slak_mm import cli

    def build(**changes):
        cfg = Config.fromfile(config_path)
        cli.remove_weights(cfg)
        cli.adapt_to_device(cfg, has_gpu=lambda: False)
        cfg.merge_from_dict(
            {key: DictAction._parse_iterable(value) for key, value in (option.split('=', 1) for option in tiny)}
        )
        cfg.merge_from_dict(changes)
        init_default_scope('mmseg')
        return MODELS.build(cfg.model)

    return build


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory):
    """A small generated data set in ADE20K's layout."""
    from slak_mm.cli.demo_data import write_demo_data

    return str(write_demo_data(tmp_path_factory.mktemp('demo'), 8, 2, size=96, seed=3))


@pytest.fixture(scope='session')
def demo_voc(tmp_path_factory):
    """A small generated data set in VOC's layout, of both years."""
    from slak_mm.cli.demo_data import write_demo_voc

    return str(write_demo_voc(tmp_path_factory.mktemp('VOCdevkit'), 6, 2, size=96, seed=3, years=(2007, 2012)))


@pytest.fixture(scope='session')
def demo_coco(tmp_path_factory):
    """A small generated data set in COCO's layout."""
    pytest.importorskip('mmdet')
    from slak_mm.cli.demo_data import write_demo_coco

    return str(write_demo_coco(tmp_path_factory.mktemp('coco'), 6, 2, size=96, seed=3))


@pytest.fixture(scope='session')
def coco_data(tmp_path_factory):
    """Three images with boxes in COCO's layout."""
    pytest.importorskip('mmdet')
    root = tmp_path_factory.mktemp('coco')
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir()
    for split in ('train2017', 'val2017'):
        (root / split).mkdir()
        images, annotations = [], []
        for index in range(3):
            name = f'{index:012d}.jpg'
            Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)).save(root / split / name)
            images.append(dict(id=index, file_name=name, height=64, width=80))
            annotations.append(
                dict(
                    id=index + 1,
                    image_id=index,
                    category_id=1,
                    iscrowd=0,
                    bbox=[10, 12, 40, 30],
                    area=1200,
                    segmentation=[[10, 12, 50, 12, 50, 42, 10, 42]],
                )
            )
        from mmdet.datasets import CocoDataset

        categories = [dict(id=number, name=name) for number, name in enumerate(CocoDataset.METAINFO['classes'], 1)]
        (root / 'annotations' / f'instances_{split}.json').write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )
    return str(root)


def load_tool(name):
    """The module of a tool."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool_main(name):
    """The ``main`` function of a tool."""
    return load_tool(name).main


def exit_code(main, *arguments):
    """What a process that runs this ``main`` function ends with."""
    from slak_mm.cli import run_tool

    with pytest.raises(SystemExit) as exit_info:
        run_tool(lambda: main(*arguments))
    return exit_info.value.code


def forget_instances(kind=ManagerMixin):
    """Drop mmengine's global loggers, visualizers and message hubs.

    A logger keeps the stderr of the test that made it, a visualizer the folder.
    """
    for subclass in kind.__subclasses__():
        subclass._instance_dict.clear()
        forget_instances(subclass)


def python_path():
    """The checkout first, whatever is installed."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])


@pytest.fixture
def call_tool(monkeypatch, capfd):
    """Run a tool within this process: ``call_tool('train', *arguments)``.

    Returns exit code, what went to stdout and stderr, and both of these as one text.
    """

    def call(name, *arguments):
        arguments = [str(argument) for argument in arguments]
        if name in ('train', 'test'):
            # mmengine keeps loggers and visualizers by this name, which has only seconds.
            unique = f'experiment_name=e{uuid.uuid4().hex}'
            if '--cfg-options' in arguments:
                arguments.insert(arguments.index('--cfg-options') + 1, unique)
            else:
                arguments += ['--cfg-options', unique]
        forget_instances()
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *arguments])
        monkeypatch.setenv('LOCAL_RANK', '0')
        # For what the tool starts.
        monkeypatch.setenv('PYTHONPATH', python_path())
        capfd.readouterr()
        code = exit_code(tool_main(name))
        captured = capfd.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err, text=captured.out + captured.err)

    return call


@pytest.fixture
def start_tool():
    """Start a tool as a process of its own: ``start_tool('train', *arguments)``."""
    processes = []

    def start(name, *arguments, launcher=(), threads=1):
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=python_path())
        for variable in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
            env.pop(variable, None)
        process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', *launcher, str(ROOT / 'tools' / f'{name}.py'), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
