"""The passes around squeeze-excite on GPUs: their arithmetic in Triton's interpreter, and their code."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from op_helpers import run_program, run_tests_in_interpreter
from test_ops import test_fused
from test_ops.test_fused import IS_INTERPRETED, LAYOUTS, TOLERANCE, interpreted, needs_triton, randn
from torch import nn

from slak_mm.models.layers import Branches
from slak_mm.models.shiftwise import ShiftWiseConv, SqueezeExcite
from slak_mm.ops import _fused, gated_rows, grn_mlp

assert_close = partial(
    test_fused.assert_close, least=0.1
)  # the norm removes what biases before it add: some gradients are 0


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason='would start itself')
def test_arithmetic_in_the_interpreter():
    run_tests_in_interpreter(__file__)


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(_fused, 'forced_backend', lambda: 'triton')


class Block(nn.Module):
    """What stands behind a block's convolutions, up to the linear layers, with drawn weights."""

    def __init__(self, kind, branches, c, channels):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(branches if kind != 'bare' else 0))
        self.norm, self.se = nn.BatchNorm2d(channels), SqueezeExcite(channels)
        for i, t in enumerate(self.state_dict().values()):
            if t.dtype is torch.float32:
                t.copy_(randn(*t.shape, seed=i) * (t[0].numel() ** -0.5 if t.dim() > 1 else 1))
        for bn in (*self.norms, self.norm):
            bn.running_var.square_().add_(0.5)
        self.train(kind != 'evaluation')

    def plain(self, extra, *maps):
        ys = [bn(y) for bn, y in zip(self.norms, maps)] if self.norms else maps
        width = maps[0].shape[1] if maps else 0
        z = torch.cat([extra[:, :width] + sum(ys), extra[:, width:]], 1) if maps else extra
        y = self.norm(z)
        return (y * self.se.gate(y)).permute(0, 2, 3, 1)

    def forward(self, extra, *maps):
        norms = Branches(maps, list(self.norms)).tensors_of_norms()
        norm = Branches([extra], [self.norm]).tensors_of_norms()
        assert not gated_rows.why_not_norms(norms, norm, extra)
        rows = gated_rows.gated_rows(maps, extra, norms=norms, norm=norm, gates=self.se.tensors())
        assert not rows[..., extra.shape[1] :].any()
        return rows[..., : extra.shape[1]]


def evaluate(function, block, maps, grad):
    maps = [y.detach().requires_grad_() for y in maps]
    result = function(*maps)
    return [result, *torch.autograd.grad(result, [*maps, *block.parameters()], grad.to(result.dtype)), *block.buffers()]


def draw(shape, c, branches, dtype, layout):
    n, _, h, w = shape
    maps = [randn(*shape, seed=50), *(randn(n, c, h, w, seed=60 + i) * (i + 1) for i in range(branches))]
    n, channels, h, w = shape
    return [y.to(dtype).contiguous(memory_format=layout) for y in maps], randn(n, h, w, channels, seed=70).to(dtype)


CASES = [  # shape, channels of the branches, norms, branches, dtype
    ((2, 12, 3, 5), 9, 'training', 3, torch.float32),
    ((3, 16, 9, 8), 12, 'training', 2, torch.float16),
    ((1, 70, 1, 67), 66, 'training', 3, torch.bfloat16),
    ((2, 8, 2, 42), 6, 'evaluation', 3, torch.float32),
    ((2, 8, 6, 7), 5, 'bare', 1, torch.float32),
    ((2, 8, 6, 7), 0, 'training', 0, torch.float32),
    ((17, 5, 2, 1), 5, 'training', 1, torch.float32),
]


@interpreted
@pytest.mark.parametrize('layout', LAYOUTS, ids=['nchw', 'channels_last'])
@pytest.mark.parametrize(('shape', 'c', 'kind', 'branches', 'dtype'), CASES, ids=str)
def test_results_and_gradients(fused, shape, c, kind, branches, dtype, layout):
    block = Block(kind, branches, c, shape[1]).to(dtype)
    maps, grad = draw(shape, c, branches, dtype, layout)
    exact = copy.deepcopy(block).double()
    want = evaluate(exact.plain, exact, [y.double() for y in maps], grad)
    again = copy.deepcopy(block)
    got = evaluate(block, block, maps, grad)
    assert got[0].dtype is dtype and got[1].is_contiguous(memory_format=layout)
    assert_close(got, want, TOLERANCE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(got, evaluate(again, again, maps, grad))), 'the same bits'


@interpreted
@pytest.mark.parametrize('layout', LAYOUTS, ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_order_of_channels(fused, layout, dtype):
    x = randn(2, 70, 5, 7).to(dtype).contiguous(memory_format=layout).requires_grad_()
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    rep, ghost = order[:66], order[66:]
    permuted, first, same = gated_rows.permute_channels(x, rep, ghost)
    assert (
        same.data_ptr() == x.data_ptr()
        and permuted.is_contiguous(memory_format=layout)
        and permuted.data_ptr() == first.data_ptr()
    )
    assert torch.equal(permuted, x[:, order]) and torch.equal(first, x[:, rep])
    grads = [randn(2, channels, 5, 7, seed=channels).to(dtype) for channels in (70, 66, 70)]
    (got,) = torch.autograd.grad((permuted, first, same), x, grads)
    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad((exact[:, order], exact[:, rep], exact), exact, [g.double() for g in grads])
    assert_close([got], [want], 1e-6 if dtype is torch.float32 else 1e-2)


@interpreted
@pytest.mark.parametrize('layout', LAYOUTS, ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('width', [0, 5])
def test_deployed(fused, width, layout):
    (x, *maps), _ = draw((2, 9, 3, 5), width, int(width > 0), torch.float32, layout)
    order, (scale, bias) = torch.tensor([2, 8, 3, 5, 6, 0, 1, 4, 7]), randn(2, 9 - width).float()
    extra, first = gated_rows.ordered_channels(x, order[:width], order[width:], scale, bias)
    ghosts = x[:, order[width:]] * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    assert_close([extra], [torch.cat([x[:, order[:width]], ghosts], 1)], 1e-6)
    assert torch.equal(first, x[:, order[:width]])
    se = Block('evaluation', 0, 0, 9).se
    with torch.no_grad():
        rows = gated_rows.deployed_rows(maps, extra, se.tensors())
        assert_close([rows[..., :9]], [se(torch.cat([*maps, ghosts], 1)).permute(0, 2, 3, 1)], 1e-5)
    assert rows.shape == (2, 3, 5, 16) and not rows[..., 9:].any()


@interpreted
def test_gradients_can_be_differentiated_again(fused):
    block = Block('training', 2, 3, 5)
    maps, _ = draw((2, 5, 2, 3), 3, 2, torch.float32, torch.contiguous_format)
    exact = copy.deepcopy(block).double()

    def penalty(function, block, maps):
        maps = [y.detach().requires_grad_() for y in maps]
        leaves = [*maps, *block.parameters()]
        grads = torch.autograd.grad(function(*maps).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().mean() for grad in grads), leaves)

    assert_close(penalty(block, block, maps), penalty(exact.plain, exact, [y.double() for y in maps]), 1e-3)


def _process(rank, file, results):
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    _fused.forced_backend = lambda: 'triton'
    block = nn.SyncBatchNorm.convert_sync_batchnorm(Block('training', 2, 3, 5))
    maps, grad = draw((3, 5, 2, 5), 3, 2, torch.float32, torch.contiguous_format)
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    messages, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: messages.append(1) or reduce(*args, **kwargs)
    found = evaluate(block, block, [y[own] for y in maps], grad[own])
    assert len(messages) == 3, 'the branches, the norm of the sum, and both in the backward pass'
    torch.save([t.detach() for t in found], f'{results}{rank}')
    dist.destroy_process_group()


@interpreted
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='this PyTorch has no gloo')
def test_sync_bn(fused, tmp_path):
    torch.multiprocessing.spawn(_process, (tmp_path / 'store', tmp_path / 'result'), nprocs=2)
    maps, grad = draw((3, 5, 2, 5), 3, 2, torch.float32, torch.contiguous_format)
    block = Block('training', 2, 3, 5).double()
    want = evaluate(block.plain, block, [y.double() for y in maps], grad)
    first, second = (torch.load(tmp_path / f'result{rank}') for rank in range(2))
    behind = 4 + len(list(block.parameters()))
    whole = [torch.cat(pair) for pair in zip(first[:4], second[:4])]
    sums = [a + b for a, b in zip(first[4:behind], second[4:])]
    assert_close(whole + sums + first[behind:], want, 1e-4)
    assert all(map(torch.equal, first[behind:], second[behind:]))


NETWORKS = dict(
    ShiftWise=dict(version=2, kernel_sizes=(7, 5), small_kernel=3, ghost_ratio=0.25),
    bare=dict(type='ShiftWise', version=2, kernel_sizes=(7, 5), small_kernel=3, branch_norm=False),
    UniRepLKNet=dict(kernel_sizes=((3,), (13,))),
)


@interpreted
@pytest.mark.parametrize('form', ['training', 'evaluation', 'deployed'])
@pytest.mark.parametrize('name', NETWORKS)
def test_backbones_agree_with_plain_pytorch(fused, monkeypatch, name, form):
    """In training with gradient checkpointing, which updates running statistics once."""
    ran, run = [], grn_mlp.grn_mlp
    monkeypatch.setattr(grn_mlp, 'grn_mlp', lambda *args: ran.append(1) or run(*args))
    kind = dict(type=name, arch=dict(depths=(1, 1), dims=(8, 12)), out_indices=(0, 1), norm_cfg=dict(type='BN'))
    model = MODELS.build(kind | NETWORKS[name] | dict(with_cp=form == 'training')).train(form == 'training')
    for i, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=i).float() / 3
    exact = copy.deepcopy(model).double()
    if form == 'deployed':
        model.switch_to_deploy()
    x = randn(2, 3, 16, 24).float()
    with torch.set_grad_enabled(form == 'training'):
        got, want = model(x), exact(x.double())
    assert len(ran) == 2
    assert_close(got, want, 1e-4)
    if form == 'training':
        for outs in (got, want):
            sum(y.square().mean() for y in outs).backward()
        assert len(ran) == 4
        assert_close([p.grad for p in model.parameters()], [p.grad for p in exact.parameters()], 1e-3)
        assert_close(model.buffers(), exact.buffers(), 1e-4)


CHANGES = dict(
    hook=lambda block: block.se.down.register_forward_hook(lambda module, args, result: None),
    adapter=lambda block: setattr(block.ffn, 'fc1', Adapter(8, 32)),
    frozen=lambda block: block.norm.eval(),
    filter=lambda block: setattr(block.large_kernel.filters[0], 'padding_mode', 'circular'),
    one_norm=lambda block: setattr(block.large_kernel, 'bn_wide', None),
    double=lambda block: block.double(),
)


class Adapter(nn.Linear):
    """Stands for a layer that was put in another's place."""


@interpreted
@pytest.mark.parametrize('change', CHANGES)
def test_what_is_not_plain_is_called(fused, monkeypatch, change):
    kind = dict(type='ShiftWise', arch=dict(depths=(1,), dims=(8,)), out_indices=(0,), norm_cfg=dict(type='BN'))
    model = MODELS.build(kind | dict(version=2, kernel_sizes=(7,), small_kernel=3)).train()
    block = model.stages[0][0]
    CHANGES[change](block)
    calls, forward = [], type(block.se).forward
    monkeypatch.setattr(type(block.se), 'forward', lambda *args: calls.append(1) or forward(*args))
    layers, convolve = [], ShiftWiseConv.forward
    monkeypatch.setattr(ShiftWiseConv, 'forward', lambda *args: layers.append(1) or convolve(*args))
    block(randn(2, 8, 6, 5).to(next(block.parameters()).dtype))
    # Where only the large-kernel layer must be called, what is behind it is fused all the same.
    assert layers == [1] and calls == ([] if change in ('filter', 'one_norm') else [1])


COMPILED = """
import sys
from slak_mm.ops.backends import _triton_gated as kernels
from tests.helpers.compiled_kernels import check

BF16 = 'x first whole y0 y1 y2 extra rows grad of_maps of_extra'.split()
FP32 = '''coefficients affine of_z logits moments sums of_means total own weight bias of_logits scale out
weight0 weight1 weight2 bias0 bias1 bias2'''.split()

def compile(name, half=BF16, **options):
    types = {n: '*fp32' for n in FP32} | {n: '*bf16' for n in half} | dict(rep='*i64', ghost='*i64', counter='*i64')
    check(getattr(kernels, name), int(sys.argv[1]), types | dict(share='fp32'), aligned=('HW',), **options)

form, tile = dict(B=3, NORMED=True), dict(T=64, CB=32, LAST=False)
for back in (False, True):
    compile('permute_channels', [*BF16, 'out'], BACKWARD=back, SCALED=not back, **tile)
compile('sum_moments', warps=4, **form, ADDED=True, COUNTED=True, LAST=False, T=1024, CB=1)
compile('gated_rows', **form, ADDED=True, AFFINE=True, **tile)
compile('gated_rows', B=1, NORMED=False, ADDED=False, AFFINE=False, **tile)
compile('gated_sums', **form, **tile)
compile('gated_gradients', **form, TRAINING=True, **tile)
small = dict(wide=False, warps=4)
compile('image_means', AFFINE=True, S=16, CB=64, **small)
compile('gate_gradients', S=16, CB=64, **small)
compile('batch_sums', NB=16, CB=16, **small)
compile('branch_norm_gradients', B=3, TRAINING=True, CB=64, **small)
"""


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('capability', [80, 90])
def test_passes_compile_to_wide_loads_without_spills(tmp_path, capability):
    done = run_program(tmp_path, COMPILED, str(capability), TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    if 'ASTSource' in done.stderr and 'ImportError' in done.stderr:
        pytest.skip('this Triton has another compiler interface')
    assert done.returncode == 0, done.stderr[-3000:]
