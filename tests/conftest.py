"""Fixtures that run the tools, on a generated data set and a tiny model."""

import importlib
import importlib.util
import os
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.utils import ManagerMixin
from web_server import server  # noqa: F401 - a fixture

from slak_mm.checkpoints import to_official

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
        'tests/test_erf.py::test_published_contributions',
        'tests/test_cli/test_prepare_data.py',
        'tests/test_metafiles.py',
        'tests/test_checkpoints/test_reader.py::test_small_files_that_ask_for_much',
        'tests/test_engine/test_checkpoint_hook.py',
        'tests/test_engine/test_detection_data.py',
        'tests/test_engine/test_layer_decay.py::test_groups_can_be_compiled',
        'tests/test_engine/test_reproducible.py',
        'tests/test_engine/test_sparsity_hook.py',
        'tests/test_cli/test_windows.py::test_labels_are_those_of_the_slide_mode',
        'tests/test_models/test_graphs.py',
        'tests/test_models/test_layers.py',
        'tests/test_models/test_out_indices.py',
        'tests/test_models/test_replknet_parity.py',
        'tests/test_models/test_shiftwise_parity.py',
        'tests/test_models/test_slak_parity.py',
        'tests/test_models/test_unireplknet_parity.py',
        'tests/test_ops/test_cpu_native.py',
        'tests/test_ops/test_cross_dwconv.py',
        'tests/test_ops/test_fused.py',
        'tests/test_ops/test_gated_rows.py',
        'tests/test_ops/test_grn_mlp.py',
        'tests/test_ops/test_triton.py',
        'tests/test_sparsity/test_sparsity_distributed.py',
        'tests/test_timm_models.py::test_both_orders_of_import',
        'tests/test_timm_models.py::test_compiled_in_one_graph',
        'tests/test_timm_models.py::test_every_name',
        'tests/test_timm_models.py::test_logits_of_the_official_code',
        'tests/test_timm_models.py::test_parameters_are_those_of_the_cost',
    ),
    'operators': (
        'tests/test_benchmarks/test_benchmark_infer.py::test_detectors',
        'tests/test_benchmarks/test_benchmark_infer.py::test_what_is_beside_is_the_model_of_the_framework[mmdet',
        'tests/test_cli/test_demo_data.py::test_voc_layout_and_metric',
        'tests/test_cli/test_demo_data.py::test_coco_layout_and_metric',
        'tests/test_cli/test_overrides.py::test_batch_size_and_workers',
        'tests/test_cli/test_overrides.py::test_img_scale_reaches_',
        'tests/test_cli/test_windows.py::test_an_object_inside_a_window',
        'tests/test_cli/test_windows.py::test_objects_up_to_half',
        'tests/test_configs.py::test_detector_is_built_',
        'tests/test_cost.py::test_a_config_called_like_its_checkpoint_is_counted',
        'tests/test_cost.py::test_detectors_of_the_framework',
        'tests/test_cost.py::test_published_figures[cascade_',
        'tests/test_engine/test_detection_data.py',
        'tests/test_metafiles.py::test_detector_',
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


def options(prefix, text):
    """The ``KEY=VALUE`` words of a text, below a prefix."""
    return [f'{prefix}.{word}' for word in text.split()]


# SLaK with one block per stage and 7x7 crosses: iterations take some hundredths of a second.
TINY_BACKBONE = options(
    'model.backbone', 'arch._delete_=True arch.depths=[1,1,1,1] arch.dims=[8,16,24,32] kernel_sizes=(7,7,7,7)'
)
TINY_SLAK = options('model.backbone', 'width_factor=1.0 small_kernel=3')
TINY = [
    *(TINY_BACKBONE + TINY_SLAK),
    *options('model.decode_head', 'in_channels=[8,16,24,32] channels=16'),
    *options('model.auxiliary_head', 'in_channels=24 channels=16'),
]
# The same backbone with narrow necks and heads, and few boxes to look at.
TINY_DETECTOR = [
    *TINY_BACKBONE,
    *options('model.neck', 'in_channels=[8,16,24,32] out_channels=16'),
    *options('model.rpn_head', 'in_channels=16 feat_channels=16'),
    'model.roi_head.bbox_roi_extractor.out_channels=16',
    'model.train_cfg.rpn_proposal.max_per_img=64',
    *options('model.test_cfg', 'rpn.max_per_img=64 rcnn.max_per_img=20'),
]
TINY_FASTER_RCNN = TINY_DETECTOR + options('model.roi_head.bbox_head', 'in_channels=16 fc_out_channels=32')
TINY_FASTER_RCNN += ['model.train_cfg.rcnn.sampler.num=32']
TINY_CASCADE = TINY_DETECTOR + options('model.roi_head', 'mask_roi_extractor.out_channels=16 mask_head.in_channels=16')
TINY_CASCADE += ['model.roi_head.mask_head.conv_out_channels=16']
for stage in range(3):
    heads = 'in_channels=16 conv_out_channels=16 fc_out_channels=32'
    TINY_CASCADE += options(f'model.roi_head.bbox_head.{stage}', heads)
    TINY_CASCADE += options('model.train_cfg.rcnn', f'{stage}.sampler.num=32')


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
    return TINY


@pytest.fixture(scope='session')
def tiny_detector():
    """Gives ``--cfg-options`` that make the model of a detection config tiny, by its name."""

    def options(name):
        detector = TINY_FASTER_RCNN if name.startswith('faster') else TINY_CASCADE
        return detector if 'shiftwise' in name or 'convnext' in name else detector + TINY_SLAK

    return options


def parsed(options):
    """The dict that ``--cfg-options`` makes of its words."""
    from mmengine.config import DictAction

    return {key: DictAction._parse_iterable(value) for key, value in (option.split('=', 1) for option in options)}


TINY_ARCH = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
TINY_SLAK_BACKBONE = dict(type='SLaK', arch=TINY_ARCH, width_factor=1.0, kernel_sizes=(7, 7, 7, 7), small_kernel=3)
TINY_SLAK_BACKBONE.update(norm_cfg=dict(type='BN'), out_norm=False)


@pytest.fixture(scope='session')
def build_tiny(config_path, tiny):
    """Builds the tiny model in this process, without weights and for the CPU."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from slak_mm import cli

    def build(**changes):
        cfg = Config.fromfile(config_path)
        cli.remove_weights(cfg)
        cli.adapt_to_device(cfg, has_gpu=lambda: False)
        cfg.merge_from_dict(parsed(tiny) | changes)
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


def load(path):
    """A checkpoint that a test wrote."""
    return torch.load(path, map_location='cpu', weights_only=False)


def officially_named(state_dict):
    """The weights of a segmentor or detector, with the backbone's names as the official code has them."""
    backbone = {key[9:]: value for key, value in state_dict.items() if key.startswith('backbone.')}
    others = {key: value for key, value in state_dict.items() if not key.startswith('backbone.')}
    return {f'backbone.{key}': value for key, value in to_official(backbone).items()} | others


def assert_same(ours, theirs, place=''):
    """Compare nested dicts and lists, tensors by their bits."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours:
            assert_same(ours[key], theirs[key], f'{place}.{key}')
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), place
        for index, pair in enumerate(zip(ours, theirs)):
            assert_same(*pair, f'{place}[{index}]')
    elif torch.is_tensor(ours):
        assert torch.equal(ours, theirs), place
    else:
        assert ours == theirs, place


def load_tool(name):
    """The module with the body of a tool, made anew: what a test replaces in the package is in it."""
    sys.modules.pop(f'slak_mm.cli.commands.{name}', None)
    return importlib.import_module(f'slak_mm.cli.commands.{name}')


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
    """Run a tool within this process: ``call_tool('train', *arguments, code=0)``.

    An argument that begins with ``--`` may hold several words. Returns the exit code, which is compared
    with ``code`` if given, what went to stdout and stderr, and both of these as one text.
    """
    from slak_mm.cli import run_tool

    def call(name, *arguments, code=None):
        arguments = split(arguments)
        if name in ('train', 'test'):
            # mmengine keeps loggers and visualizers by this name, which has only seconds.
            if '--cfg-options' not in arguments:
                arguments.append('--cfg-options')
            arguments.insert(arguments.index('--cfg-options') + 1, f'experiment_name=e{uuid.uuid4().hex}')
        forget_instances()
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *arguments])
        monkeypatch.setenv('LOCAL_RANK', '0')
        # For what the tool starts.
        monkeypatch.setenv('PYTHONPATH', python_path())
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            run_tool(load_tool(name).main)
        out, err = capfd.readouterr()
        result = SimpleNamespace(code=leaving.value.code, out=out, err=err, text=out + err)
        assert code is None or result.code == code, result.text
        assert result.code == 0 or 'Traceback' not in err or '--debug' in arguments, err
        return result

    return call


def split(arguments):
    """Arguments as words: those that begin with ``--`` may hold several."""
    texts = map(str, arguments)
    return [word for text in texts for word in (text.split() if text.startswith('--') else [text])]


@pytest.fixture
def small(demo_data):
    """Arguments for some hundredths of a second per iteration."""
    return ['--data-root', demo_data, *'--crop-size 64 --batch-size 2 --num-workers 0 --seed 5'.split()]


@pytest.fixture
def train(call_tool, config_path, small, tiny, tmp_path):
    """Train the tiny model in the folder ``work``, with further arguments and options."""

    def run(*arguments, options=(), config=config_path, work='work', code=None):
        common = [config, *small, '--work-dir', tmp_path / work]
        return call_tool('train', *common, *arguments, '--cfg-options', *tiny, *options, code=code)

    return run


@pytest.fixture
def start_tool():
    """Start a tool as a process of its own: ``start_tool('train', *arguments)``."""
    processes = []

    def start(name, *arguments, launcher=(), threads=1, as_module=False):
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=python_path())
        for variable in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
            env.pop(variable, None)
        tool = ['-m', 'slak_mm', name] if as_module else [str(ROOT / 'tools' / f'{name}.py')]
        command = [sys.executable, '-W', 'ignore', *launcher, *tool, *split(arguments)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, text=True, env=env, **pipes)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
