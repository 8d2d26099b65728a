"""`tools/benchmark.py infer` on tiny networks."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import infer
from slak_mm import cli

pytest.importorskip('mmseg')

CONFIGS = Path(__file__).parents[2] / 'configs'
SLAK, SHIFTWISE = (CONFIGS / f'upernet_{name}_t_ade20k.py' for name in ('slak', 'shiftwise'))
DETECTOR = CONFIGS / 'cascade_mask_rcnn_slak_t_coco.py'
OPTIONS = '--size 64x96 --repeats 2'
CONVNEXT = 'ConvNeXt-T (mmpretrain)' if importlib.util.find_spec('mmpretrain') else 'ConvNeXt-T (slak_mm)'


def shapes(cfg):
    """Names and shapes of the weights of a config's model."""
    cli.adapt_to_device(cfg, has_gpu=lambda: False)
    return {key: value.shape for key, value in cli.build_model(cfg, cfg.model).state_dict().items()}


@pytest.mark.parametrize(
    'scope, heads, name',
    [('mmseg', SLAK, 'Swin-T (mmseg)'), ('mmdet', 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'Swin-T (mmdet)')],
)
def test_what_is_beside_is_the_model_of_the_framework(scope, heads, name):
    source = infer.load(infer.beside(scope)[name])
    cfg = infer.load(str(heads))
    infer.replace_backbone(cfg, source)
    assert shapes(cfg) == shapes(source)


def test_table_and_json(call_tool, tiny, tmp_path):
    out = tmp_path / 'out.json'
    # The heads fit the backbones of both, and are beside them once.
    options = [option for option in tiny if 'small_kernel' not in option]
    arguments = [SLAK, SHIFTWISE, OPTIONS, '--no-memory --json', out, '--plot', tmp_path / 'out.png']
    result = call_tool('benchmark', 'infer', *arguments, '--cfg-options', *options, code=0)
    rows = json.loads(out.read_text())['rows']
    assert [(row['model'], row['form']) for row in rows] == [
        ('upernet_slak_t_ade20k', 'as built'),
        ('upernet_slak_t_ade20k', 'deploy'),
        ('upernet_shiftwise_t_ade20k', 'as built'),
        ('upernet_shiftwise_t_ade20k', 'deploy'),
        ('Swin-T (mmseg)', 'as built'),
        (CONVNEXT, 'as built'),
    ]
    assert result.out.count('| 64x96, batch 1 |') == 6 and '1.00x (1.00-1.00)' in result.out
    baseline = rows[-1]['all_seconds']
    for row in rows:
        ratios = [ours / theirs for ours, theirs in zip(row['all_seconds'], baseline)]
        assert row['ratio_range'] == [min(ratios), max(ratios)]
        assert row['ratio'] == pytest.approx(sum(ratios) / 2)
        assert row['seconds'] * row['images_per_second'] == pytest.approx(1)


def test_mixed_precision_and_compiled(call_tool, tiny, tmp_path, monkeypatch):
    # The graph is captured, which is what can fail; compilers take minutes.
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    out = tmp_path / 'out.json'
    arguments = [SLAK, '--alone --amp --compile --no-memory --size 64x64 --batch 2 --repeats 1 --json', out]
    call_tool('benchmark', 'infer', *arguments, '--cfg-options', *tiny, code=0)
    rows = json.loads(out.read_text())['rows']
    assert [row['form'] for row in rows] == ['as built', 'deploy', 'deploy, amp', 'deploy, compile']


def test_memory(call_tool, tiny, tmp_path):
    """Class scores of all classes, at the image's size, are the largest tensor."""
    out = tmp_path / 'out.json'
    arguments = [SLAK, '--alone --size 256x320 --repeats 1 --json', out]
    call_tool('benchmark', 'infer', *arguments, '--cfg-options', *tiny, code=0)
    for row in json.loads(out.read_text())['rows']:
        assert 1 < row['peak_mib'] / (150 * 256 * 320 * 4 / 2**20) < 5


def test_detectors(call_tool, tiny_detector, tmp_path):
    options = tiny_detector(DETECTOR.stem)
    arguments = [DETECTOR, '--size 96x128 --repeats 1 --no-memory --cfg-options', *options]
    result = call_tool('benchmark', 'infer', *arguments, code=0)
    assert result.out.count('| 96x128, batch 1 |') == 4 and 'Swin-T (mmdet)' in result.out


def test_no_figure_for_a_form_that_differs(call_tool, tiny, monkeypatch):
    def double(model):
        model.backbone.register_forward_hook(lambda module, args, maps: tuple(2 * y for y in maps))

    monkeypatch.setattr(infer, 'switch_to_deploy', double)
    arguments = [SLAK, OPTIONS, '--alone --no-memory --cfg-options', *tiny]
    result = call_tool('benchmark', 'infer', *arguments, code=1)
    assert '| as built  | ' in result.out and 'disagrees' in result.out
    assert 'error: a result disagrees with the reference' in result.err


@pytest.mark.parametrize(
    'config, options, message',
    [
        ('no_such_config.py', '', 'no_such_config.py'),
        ('mmseg::no/such_config.py', '', 'such_config.py'),
        ('mmseg::pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py', '', '--alone'),
        (DETECTOR, '--amp', 'no bfloat16 on the CPU'),
    ],
)
def test_errors_are_one_sentence(call_tool, config, options, message):
    result = call_tool('benchmark', 'infer', config, OPTIONS, *options.split(), code=1)
    assert message in result.err and result.err.count('error: ') == 1
