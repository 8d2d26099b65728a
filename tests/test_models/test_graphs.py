"""All backbones under torch.compile, torch.export and the exporters of slak_mm.export."""

import copy
import importlib.util
import os
import shutil

import backbone_helpers
import pytest
import torch
from backbone_helpers import BACKBONES, images, random_

from slak_mm import export as module
from slak_mm import switch_to_deploy
from slak_mm.export import ExportError, export

TWO_STAGES = dict(arch=dict(depths=(1, 1), dims=(8, 12)), kernel_sizes=(13, 11), out_indices=(0, 1))
needs_library = pytest.mark.skipif(not hasattr(torch.library, 'register_autograd'), reason='graphs need torch 2.4')
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get('CXX', 'c++')) is None, reason='inductor needs a C++ compiler'
)
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in module._ONNX_PACKAGES),
    reason='onnx, onnxscript and onnxruntime are not installed',
)


def build(name, form='training'):
    model = random_(backbone_helpers.build(name, **TWO_STAGES)).eval()
    return switch_to_deploy(model) if form == 'deployed' else model


@needs_library
@pytest.mark.parametrize('name', ['slak', 'shiftwise2', 'replknet', 'unireplknet'])
def test_compiled_in_one_graph(name):
    """A training step and inference in deployed form: features, gradients, statistics.

    The backend 'aot_eager' runs what TorchDynamo and AOTAutograd record, without the minutes that a C++ compiler takes.
    """
    torch._dynamo.reset()
    model = build(name).train()
    check_compiled_step(model, 'aot_eager')
    check_compiled_inference(switch_to_deploy(model.eval()), 'aot_eager')


@needs_library
@needs_compiler
@pytest.mark.parametrize('name', ['slak', 'shiftwise2', 'unireplknet'])
def test_compiled_by_inductor(name, tmp_path, monkeypatch):
    """The default of torch.compile: inference in deployed form, and a training step of SLaK."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    torch._dynamo.reset()
    check_compiled_inference(build(name, 'deployed'), 'inductor')
    if name == 'slak':
        check_compiled_step(build(name).train(), 'inductor')


def check_compiled_step(model, backend):
    x = images(2, 32, 32)
    eager = copy.deepcopy(model)
    results = []
    for network, run in ((model, torch.compile(model, fullgraph=True, backend=backend)), (eager, eager)):
        outs = run(x)
        sum(out.square().mean() for out in outs).backward()
        results.append([*outs, *(p.grad for p in network.parameters()), *network.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_compiled_inference(model, backend):
    x = images(2, 32, 32)
    run = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for a, b in zip(run(x), model(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize('form', ['training', 'deployed'])
@pytest.mark.parametrize('name', BACKBONES)
def test_exported_program_of_any_size(name, form):
    model = build(name, form)
    batch = torch.export.Dim('batch', min=1, max=16)
    rows, columns = (8 * torch.export.Dim(side, min=2, max=64) for side in ('rows', 'columns'))
    program = torch.export.export(model, (images(2, 32, 32),), dynamic_shapes=({0: batch, 2: rows, 3: columns},))
    operators = [node.target for node in program.graph.nodes if 'slak_mm' in str(node.target)]
    assert operators == [torch.ops.slak_mm.cross_dwconv2d.default] * 2
    x = images(1, 48, 64)
    with torch.no_grad():
        for a, b in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize(
    'name, form, dynamic',
    [
        ('slak', 'training', 'batch'),
        ('slak', 'deployed', 'size'),
        ('shiftwise2', 'deployed', 'size'),
        ('shiftwise1', 'training', 'none'),
        ('unireplknet', 'training', 'batch'),
        ('unireplknet', 'deployed', 'size'),
        ('replknet', 'deployed', 'size'),
    ],
)
def test_onnx_has_standard_operators(name, form, dynamic, tmp_path):
    """onnxruntime agrees to 1e-4 also for batches and sizes that were not exported."""
    import onnx

    path = tmp_path / 'network.onnx'
    assert export(build(name, form), path, 'onnx', (64, 64), dynamic) < 1e-4
    graph = onnx.load(str(path))
    assert {node.domain for node in graph.graph.node} <= {'', 'ai.onnx'}
    grouped = [
        node
        for node in graph.graph.node
        if node.op_type == 'Conv' and any(a.name == 'group' and a.i > 1 for a in node.attribute)
    ]
    # Two blocks of three branches, deployed of two; RepLKNet has one, and three in the stem and the transition.
    # UniRepLKNet's are one convolution in eval mode.
    branches = dict(replknet=5, unireplknet=2)
    assert len(grouped) == branches.get(name, 4 if form == 'deployed' else 6)
    assert list(tmp_path.iterdir()) == [path]


@needs_library
@pytest.mark.parametrize('file_format', ['torchscript', 'exported-program'])
def test_files_run_without_this_package(file_format, tmp_path):
    """The operators in the file are PyTorch's own."""
    path = tmp_path / f'network{module.SUFFIXES[file_format]}'
    model = build('shiftwise2', 'deployed')
    assert export(model, path, file_format, (32, 64)) < 1e-5
    if file_format == 'torchscript':
        kinds = {node.kind() for node in torch.jit.load(str(path)).inlined_graph.nodes()}
        assert 'aten::_convolution' in kinds and not any('slak' in kind for kind in kinds)
    else:
        assert 'slak_mm' not in str(torch.export.load(str(path)).graph)


class TestRefusals:
    def test_a_file_that_computes_something_else(self, tmp_path, monkeypatch):
        path = tmp_path / 'network.pt'
        path.write_text('the old one')
        write = module._write_torchscript

        def write_other(model, *arguments):
            with torch.no_grad():
                next(model.parameters()).mul_(1.01)
            write(model, *arguments)
            with torch.no_grad():
                next(model.parameters()).div_(1.01)

        monkeypatch.setitem(module._WRITERS, 'torchscript', (write_other, module._load_torchscript))
        with pytest.raises(ExportError, match='differs from the network by .*not kept'):
            export(build('slak'), path, 'torchscript', (32, 32))
        assert path.read_text() == 'the old one' and list(tmp_path.iterdir()) == [path]

    def test_what_cannot_be_exported(self, tmp_path):
        class Branching(torch.nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else -x

        with pytest.raises(ExportError, match='Branching cannot be exported as exported-program'):
            export(Branching(), tmp_path / 'x.pt2', 'exported-program', (32, 32))
        assert not list(tmp_path.iterdir())

    def test_arguments(self, tmp_path, monkeypatch):
        model = build('slak')
        with pytest.raises(ExportError, match="no format 'tflite'; choose from onnx, torchscript"):
            export(model, tmp_path / 'x', 'tflite')
        with pytest.raises(ExportError, match='multiples of 32, from 64 on; 48x64 is not'):
            export(model, tmp_path / 'x', 'torchscript', (48, 64), 'size')
        monkeypatch.setattr(module, '_ONNX_PACKAGES', ('onnx_that_is_not_there',))
        with pytest.raises(ExportError, match='pip install onnx_that_is_not_there'):
            export(model, tmp_path / 'x', 'onnx')
