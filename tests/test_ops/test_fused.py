"""The fused passes of a block on GPUs: their arithmetic in Triton's interpreter, what they leave alone, and code.

The interpreter must be chosen before Triton is imported: the tests of the arithmetic run in a process of their own.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from op_helpers import run_program, run_tests_in_interpreter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slak_mm.models.layers import Branches, LayerNorm2d, perceptron
from slak_mm.ops import _fused, branch_norm, row_mlp, use_backend
from slak_mm.ops.assembly import centered_kernels
from slak_mm.ops.backends import triton as backend
from slak_mm.ops.shift_tables import num_filters, shift_tables

IS_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, in another process")
needs_triton = pytest.mark.skipif(not backend.is_installed(), reason='Triton 3 or later is not installed')
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}  # the interpreter cuts bfloat16 off
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason='would start itself')
def test_arithmetic_in_the_interpreter():
    run_tests_in_interpreter(__file__)


@pytest.fixture
def fused(monkeypatch):
    """Fused passes as on a GPU; the convolutions stay on the CPU's own backend, which is faster here."""
    monkeypatch.setattr(_fused, 'forced_backend', lambda: 'triton')
    ran = []
    run = row_mlp.row_mlp
    monkeypatch.setattr(row_mlp, 'row_mlp', lambda *args: ran.append(1) or run(*args))
    return ran


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build_norms(kind, branches, channels, **options):
    """Batch norms with drawn tensors, in training or evaluation; none for ``'bare'``."""
    norms = nn.ModuleList(nn.BatchNorm2d(channels, **options) for _ in range(branches if kind != 'bare' else 0))
    for i, bn in enumerate(norms.train(kind == 'training')):
        bn.weight.data, bn.bias.data, mean = randn(3, channels, seed=i).float()
        if bn.running_mean is not None:
            bn.running_mean.data, bn.running_var.data = mean, mean.square() + 0.5
    return norms


class Block(nn.Module):
    """What stands behind a block's convolutions, with drawn weights."""

    def __init__(self, kind, branches, c, d, e, drop=0.0, scale=True, **options):
        super().__init__()
        self.norms = build_norms(kind, branches, c, **options)
        self.norm, self.act = nn.LayerNorm(c, eps=1e-6), nn.GELU()
        self.linear1, self.linear2 = nn.Linear(c, d), nn.Linear(d, e)
        self.scale = nn.Parameter(randn(e, seed=5).float()) if scale else None
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        for i, p in enumerate([*self.norm.parameters(), *self.linear1.parameters(), *self.linear2.parameters()]):
            p.data = randn(*p.shape, seed=20 + i).float() * p.shape[-1] ** -0.5

    def forward(self, residual, *maps):
        layers, rest = (self.linear1, self.act, self.linear2), dict(residual=residual, drop_path=self.drop_path)
        return perceptron(Branches(maps, list(self.norms)), *layers, norm=self.norm, scale=self.scale, **rest)


def evaluate(block, maps, grad):
    """Result, gradients of maps and parameters, and buffers."""
    maps = [y.detach().requires_grad_() for y in maps]
    result = block(*maps)
    leaves = [*maps, *block.parameters()]
    return [result, *torch.autograd.grad(result, leaves, grad.to(result.dtype)), *block.buffers()]


def assert_close(got, want, tolerance, least=1e-3):
    """Compare as a fraction of the largest value, or of ``least``."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        scale = max(float(b.detach().double().abs().max()), least)
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=0, atol=tolerance * scale)


def draw(shape, e, branches, dtype, layout=torch.contiguous_format, offset=0.0):
    n, c, h, w = shape
    maps = [randn(n, e, h, w, seed=50), *(randn(*shape, seed=60 + i) * (i + 1) + offset for i in range(branches))]
    return [y.to(dtype).contiguous(memory_format=layout) for y in maps], randn(n, e, h, w, seed=70).to(dtype)


CASES = [  # shape, hidden width, output width, norms, branches, dtype
    ((2, 12, 3, 5), 20, 12, 'training', 3, torch.float32),
    ((1, 10, 1, 67), 9, 10, 'training', 3, torch.bfloat16),
    ((2, 16, 9, 8), 24, 16, 'training', 2, torch.float16),
    ((1, 8, 2, 42), 8, 8, 'evaluation', 3, torch.float32),
    ((3, 5, 1, 1), 7, 6, 'training', 1, torch.float32),
    ((1, 9, 1, 84), 16, 9, 'bare', 1, torch.bfloat16),
    ((2, 66, 4, 4), 3, 1, 'bare', 2, torch.float32),
]


@interpreted
@pytest.mark.parametrize('layout', LAYOUTS, ids=['nchw', 'channels_last'])
@pytest.mark.parametrize(('shape', 'd', 'e', 'kind', 'branches', 'dtype'), CASES, ids=str)
def test_results_and_gradients(fused, shape, d, e, kind, branches, dtype, layout):
    block = Block(kind, branches, shape[1], d, e).to(dtype)
    maps, grad = draw(shape, e, branches, dtype, layout)
    exact = copy.deepcopy(block).double()
    want = evaluate(exact, [y.double() for y in maps], grad)
    assert not fused, 'float64 is left to PyTorch'
    again = copy.deepcopy(block)
    got = evaluate(block, maps, grad)
    assert fused and got[0].dtype is dtype
    assert got[0].is_contiguous(memory_format=layout) and got[1].is_contiguous(memory_format=layout)
    assert_close(got, want, TOLERANCE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(got, evaluate(again, maps, grad))), 'the same bits'


@interpreted
@pytest.mark.parametrize('momentum', [None, 0.7])
def test_running_statistics(fused, momentum):
    block = Block('training', 2, 3, 8, 3, momentum=momentum)
    plain = copy.deepcopy(block).double()
    for step in range(1, 4):
        maps = [step * y for y in draw((2, 3, 2, 5), 3, 2, torch.float32)[0]]
        assert_close([block(*maps)], [plain(*(y.double() for y in maps))], 1e-5)
    assert_close(block.buffers(), plain.buffers(), 1e-5)
    assert len(fused) == block.norms[1].num_batches_tracked == 3


@interpreted
@pytest.mark.parametrize('layout', LAYOUTS, ids=['nchw', 'channels_last'])
@pytest.mark.parametrize(
    ('dtype', 'offset'), [(torch.float16, 3e4), (torch.float32, 1e4), (torch.bfloat16, 256)], ids=str
)
def test_statistics_do_not_overflow_or_cancel(fused, dtype, offset, layout):
    norms = build_norms('training', 2, 3).to(dtype)
    maps = [(randn(2, 3, 40, 40, seed=i) * offset / 100 + offset).to(dtype) for i in range(2)]
    of_norms = Branches([y.contiguous(memory_format=layout) for y in maps], norms).tensors_of_norms()
    coefficients = branch_norm.batch_norm_coefficients([y.contiguous(memory_format=layout) for y in maps], of_norms)
    for y, mean, rstd in zip(maps, coefficients[:2], coefficients[2:4]):
        variance, exact = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        assert_close([mean], [exact], 1e-6)
        assert_close([rstd], [(variance + 1e-5).rsqrt()], 1e-4)


@interpreted
def test_padding_is_zero_and_half_precision_under_autocast(fused, monkeypatch):
    block = Block('training', 3, 12, 20, 12)
    maps, grad = draw((2, 12, 3, 5), 12, 3, torch.float32)
    rows, run = [], branch_norm.branch_norm_rows
    monkeypatch.setattr(branch_norm, 'branch_norm_rows', lambda *args: rows.append(run(*args)) or rows[0])
    with torch.autocast('cpu', torch.bfloat16):
        y = block(maps[0], *(m.bfloat16() for m in maps[1:]))
    assert y.dtype is torch.float32
    assert rows[0].dtype is torch.bfloat16 and rows[0].shape == (2, 3, 5, 16) and not rows[0][..., 12:].any()
    rows[0].retain_grad()
    y.backward(grad)
    assert not rows[0].grad[..., 12:].any()
    assert all(p.grad.dtype is torch.float32 and p.grad.shape == p.shape for p in block.parameters())


@interpreted
def test_drop_path(fused):
    """Each image is either kept, and divided by the probability for it, or left out."""
    block = Block('training', 1, 4, 8, 4, drop=0.5).train()
    maps, grad = draw((16, 4, 2, 2), 4, 1, torch.float32)
    torch.manual_seed(0)
    got = evaluate(block, maps, grad)
    whole = copy.deepcopy(block)
    whole.drop_path = nn.Identity()
    difference = (whole(*maps) - maps[0]).detach()
    kept = ((got[0] - maps[0]).flatten(1).abs().sum(1) > 0).double()
    assert 0 < kept.sum() < 16
    assert_close([got[0] - maps[0]], [2 * kept.view(-1, 1, 1, 1) * difference], 1e-5)
    norms, norm = Branches(maps[1:], whole.norms).tensors_of_norms(), (block.norm.weight, block.norm.bias, 1e-6)
    rows = branch_norm.reference(maps[1:], norms, norm)
    weights = (block.linear1.weight, block.linear1.bias, block.linear2.weight, block.linear2.bias, block.scale)
    want = row_mlp.reference(rows, *weights, maps[0], kept=kept.float(), keep=0.5)
    at = 3 + [name for name, _ in block.named_parameters()].index('linear1.weight')
    assert_close([got[0], got[at]], [want, *torch.autograd.grad(want, block.linear1.weight, grad)], 1e-4)


@interpreted
def test_training_with_padded_channels_equals_training_without(fused, monkeypatch):
    """Twenty steps of AdamW with weight decay; masked weights stay zero."""

    def train(block):
        mask = randn(*block.linear1.weight.shape, seed=3) > 0
        optimizer = torch.optim.AdamW(block.parameters(), 1e-2, weight_decay=0.1)
        for step in range(20):
            maps = [randn(2, 5, 2, 3, seed=10 * step + i).to(block.scale.dtype) for i in range(3)]
            optimizer.zero_grad()
            block(*maps).square().mean().backward()
            optimizer.step()
            block.linear1.weight.data *= mask
        assert not block.linear1.weight[~mask].any()
        return block.state_dict()

    block = Block('training', 2, 5, 11, 5)
    exact = train(copy.deepcopy(block).double())
    assert not fused
    got = train(block)
    assert len(fused) == 20 and got.keys() == exact.keys()
    assert_close(got.values(), exact.values(), 1e-3)


@interpreted
def test_gradients_can_be_differentiated_again(fused):
    block = Block('training', 2, 3, 5, 3)
    maps, _ = draw((2, 3, 2, 3), 3, 2, torch.float32)

    def penalty(block, maps):
        maps = [y.detach().requires_grad_() for y in maps]
        leaves = [*maps, *block.parameters()]
        grads = torch.autograd.grad(block(*maps).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().mean() for grad in grads), leaves)

    got = penalty(block, maps)
    assert fused
    assert_close(got, penalty(copy.deepcopy(block).double(), [y.double() for y in maps]), 1e-3)


def _process(rank, file, results):
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    _fused.forced_backend = lambda: 'triton'
    block = Block('training', 2, 3, 8, 3)
    block.norms = nn.SyncBatchNorm.convert_sync_batchnorm(block.norms)
    maps, grad = draw((3, 3, 2, 5), 3, 2, torch.float32)
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    messages, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: messages.append(1) or reduce(*args, **kwargs)
    found = evaluate(block, [y[own] for y in maps], grad[own])
    assert len(messages) == 2, 'one message for all branches, forward and backward'
    torch.save([t.detach() for t in found], f'{results}{rank}')
    dist.destroy_process_group()


@interpreted
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='this PyTorch has no gloo')
def test_sync_bn_reduces_all_branches_in_one_message(fused, tmp_path):
    torch.multiprocessing.spawn(_process, (tmp_path / 'store', tmp_path / 'result'), nprocs=2)
    maps, grad = draw((3, 3, 2, 5), 3, 2, torch.float32)
    block = Block('training', 2, 3, 8, 3)
    want = evaluate(copy.deepcopy(block).double(), [y.double() for y in maps], grad)
    first, second = (torch.load(tmp_path / f'result{rank}') for rank in range(2))
    of_maps, of_parameters = 4, len(list(block.parameters()))
    whole = [torch.cat(pair) for pair in zip(first[:of_maps], second[:of_maps])]
    sums = [a + b for a, b in zip(first[of_maps:][:of_parameters], second[of_maps:])]
    assert_close(whole + sums + first[of_maps + of_parameters :], want, 1e-4)
    assert all(map(torch.equal, first[of_maps + of_parameters :], second[of_maps + of_parameters :]))


@interpreted
@pytest.mark.parametrize('form', ['training', 'evaluation', 'deployed'])
def test_backbones_agree_with_plain_pytorch(fused, form):
    """In training with gradient checkpointing, which updates running statistics once."""
    kind = dict(type='SLaK', arch=dict(depths=(1, 1), dims=(9, 12)), width_factor=1.0, kernel_sizes=(7, 5))
    kind |= dict(small_kernel=3, out_indices=(0, 1), norm_cfg=dict(type='BN'), with_cp=form == 'training')
    model = MODELS.build(kind).train(form == 'training')
    for i, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=i).float() / 3
    exact = copy.deepcopy(model).double()
    if form == 'deployed':
        model.switch_to_deploy()
    x = randn(1, 3, 16, 24).float()
    got, want = model(x), exact(x.double())
    assert len(fused) == 2
    assert_close(got, want, 1e-4)
    if form == 'training':
        for outs in (got, want):
            sum(y.square().mean() for y in outs).backward()
        assert len(fused) == 4
        assert_close([p.grad for p in model.parameters()], [p.grad for p in exact.parameters()], 1e-3)
        assert_close(model.buffers(), exact.buffers(), 1e-4)


@interpreted
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(('size', 'small', 'reps'), [(13, 3, 2), (7, 5, 1), (5, 5, 3), (51, 3, 2)])
def test_kernels_assembled_from_filters(fused, size, small, reps, dtype):
    tables = shift_tables(3, size, small, reps)
    filters = randn(3 * num_filters(size, small), 1, small, small).to(dtype).requires_grad_()
    exact = filters.detach().double().requires_grad_()
    got, want = (centered_kernels(f, *tables, size) for f in (filters, exact))
    assert got[0].grad_fn.name() == '_CenteredKernelsBackward' and 'Centered' not in want[0].grad_fn.name()
    grads = [randn(*kernel.shape, seed=i).to(dtype) for i, kernel in enumerate(want)]
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    assert_close(got, want, tolerance)
    of_filters = (torch.autograd.grad(k, f, [g.to(f.dtype) for g in grads]) for k, f in ((got, filters), (want, exact)))
    assert_close(*of_filters, tolerance)


def build_layer_norm(channels):
    norm = LayerNorm2d(channels)
    norm.weight.data, norm.bias.data = randn(2, channels, seed=8).float()
    return norm


@interpreted
@pytest.mark.parametrize('layout', LAYOUTS, ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('shape', [(2, 12, 3, 5), (1, 66, 1, 67), (3, 1, 1, 1)], ids=str)
def test_layer_norm_of_maps(fused, shape, dtype, layout):
    norm = build_layer_norm(shape[1]).to(dtype)
    (x,), grad = draw(shape, shape[1], 0, dtype, layout)
    y = norm(x.requires_grad_())
    assert y.grad_fn.name() == '_BranchNormRowsBackward' and y.is_contiguous(memory_format=layout)
    want = evaluate(copy.deepcopy(norm).double(), [x.double()], grad)
    got = evaluate(norm, [x], grad)
    assert got[0].dtype is dtype and got[1].is_contiguous(memory_format=layout)
    assert_close(got, want, TOLERANCE[dtype])
    assert all(map(torch.equal, got, evaluate(norm, [x], grad))), 'the same bits'
    norm.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(norm(x), x, grad)[0], got[1]), 'frozen'


@interpreted
def test_layer_norm_of_maps_under_autocast(fused, monkeypatch):
    """On CPUs autocast leaves the dtype as it is; on GPUs the result is float32, without a copy of the map."""
    norm, x = build_layer_norm(5), randn(2, 5, 3, 4).bfloat16().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        assert norm(x).dtype is torch.bfloat16 and norm(x).grad_fn.name() != '_BranchNormRowsBackward'
        monkeypatch.setattr(branch_norm, '_CASTS_LAYER_NORM', ('cpu',))
        y = norm(x)
    assert y.dtype is torch.float32 and y.grad_fn.name() == '_BranchNormRowsBackward'
    grad = randn(*y.shape, seed=1).float()
    got = [y, *torch.autograd.grad(y, [x, *norm.parameters()], grad, retain_graph=True)]
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert_close(got, evaluate(norm.double(), [x.double()], grad), 1e-2)


@interpreted
@pytest.mark.parametrize('scale', [1e-3, 1e4])
@pytest.mark.parametrize('outlier', [0, 7], ids=['first', 'other'])
def test_layer_norm_of_maps_with_an_outlier(fused, outlier, scale):
    x = randn(1, 200, 3, 3) * scale + 100 * scale
    x[:, outlier] *= 1000
    norm = build_layer_norm(200)
    assert_close([norm(x.float())], [copy.deepcopy(norm).double()(x)], 1e-4)


@interpreted
def test_layer_norm_of_maps_leaves_to_pytorch_what_it_cannot_do(fused):
    norm, x = build_layer_norm(4), randn(2, 4, 3, 3).float().requires_grad_()
    (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    exact, z = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(exact(z).square().sum(), z, create_graph=True)
    assert_close([first, second], [want, *torch.autograd.grad(want.square().sum(), z)], 1e-3)
    assert exact(z).grad_fn.name() != '_BranchNormRowsBackward', 'float64'
    assert norm(x[:0]).shape == (0, 4, 3, 3)
    with pytest.raises(RuntimeError):
        norm(x[:, :3])


@interpreted
@pytest.mark.parametrize('channels', [6, 8])
@pytest.mark.parametrize(('kind', 'branches'), [('training', 3), ('evaluation', 2), ('bare', 1)])
def test_gradients_share_no_memory(fused, kind, branches, channels):
    """Clipping changes them in place: what two of them share would be scaled twice."""
    block = nn.Sequential(Block(kind, branches, channels, 16, channels), LayerNorm2d(channels))
    maps, grad = draw((2, channels, 3, 5), channels, branches, torch.float32)
    block[1](block[0](*maps)).backward(grad)
    parameters = list(block.parameters())
    assert fused and len({p.grad.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.grad.is_contiguous() and p.grad.shape == p.shape and p.grad.dtype is p.dtype for p in parameters)


@interpreted
def test_partial_sums_of_many_programs(fused):
    """More than are added up at a time, into gradients of several dtypes."""
    parts = randn(600, 5, 20).float()
    total = parts.double().sum(0)
    weight, bias, *rest = (torch.empty(20, dtype=t) for t in [torch.bfloat16] * 2 + [torch.float32] * 4)
    sums, of_weight, of_bias, *of_norms = branch_norm._norm_gradients(parts, [weight, bias, *rest])
    assert_close([sums, *of_norms], [total, *total[3:], total[2], total[2]], 1e-6)
    assert of_weight.dtype is of_bias.dtype is torch.bfloat16
    assert_close([of_weight, of_bias], total[:2], 1e-2)

    sums1, sums2 = randn(600, 24, seed=1).float(), randn(300, 2, 8, seed=2).float()
    products = randn(24, 16, seed=3).float(), randn(8, 24, seed=4).float()
    parameters = [torch.empty(shape) for shape in ((19, 10), (19,), (5, 19), (5,), (5,))]
    got = row_mlp._weight_gradients(products, sums1, sums2, parameters)
    (of_bias2, of_scale), of_bias1 = sums2.double().sum(0)[:, :5], sums1.double().sum(0)[:19]
    assert_close(got, [products[0][:19, :10], of_bias1, products[1][:5, :19], of_bias2, of_scale], 1e-6)


@interpreted
@pytest.mark.parametrize('frozen', ['norms', 'norm', 'linear1', 'linear2'])
def test_frozen_layers(fused, frozen):
    block = Block('training', 2, 5, 9, 5)
    maps, grad = draw((2, 5, 3, 3), 5, 2, torch.float32)

    def gradients(block):
        block(*maps).backward(grad)
        return {name: p.grad for name, p in block.named_parameters() if p.grad is not None}

    whole = copy.deepcopy(block)
    getattr(block, frozen).requires_grad_(False)
    got, want = gradients(block), gradients(whole)
    assert len(fused) == 2 and want.keys() - got.keys() == {k for k in want if k.startswith(f'{frozen}.')}
    assert all(torch.equal(got[k], want[k]) for k in got)


class Adapter(nn.Linear):
    """Stands for a layer that was put in another's place."""


CHANGES = dict(
    hook=lambda block: block.norms[0].register_forward_hook(lambda module, args, result: None),
    adapter=lambda block: setattr(block, 'linear1', Adapter(4, 8)),
    gelu=lambda block: setattr(block, 'act', nn.GELU('tanh')),
    frozen=lambda block: block.norms[0].eval(),
    untracked=lambda block: setattr(block, 'norms', build_norms('training', 2, 4, track_running_stats=False)),
    without_weights=lambda block: setattr(block, 'norm', nn.LayerNorm(4, elementwise_affine=False)),
    double=lambda block: block.double(),
)


@interpreted
@pytest.mark.parametrize('change', CHANGES)
def test_what_is_not_plain_is_called(fused, change):
    block = Block('training', 2, 4, 8, 4)
    CHANGES[change](block)
    maps, _ = draw((2, 4, 3, 3), 4, 2, next(block.parameters()).dtype)
    block(*maps)
    assert not fused


@interpreted
def test_what_looks_on_sees_plain_operators(fused):
    maps, _ = draw((2, 4, 3, 3), 4, 2, torch.float32)
    with FlopCounterMode(display=False) as counter:
        Block('training', 2, 4, 8, 4)(*maps)
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 3) * 4 * 8
    torch.func.vmap(Block('evaluation', 2, 4, 8, 4))(*(torch.stack([y, y]) for y in maps))
    assert Block('training', 2, 4, 8, 4)(*(y[:0] for y in maps)).shape == (0, 4, 3, 3)
    assert not fused


COMPILED = """
import sys
from slak_mm.ops.backends import _triton_passes as kernels
from tests.helpers.compiled_kernels import check

capability, sizes = int(sys.argv[1]), sys.argv[2:]
(T, CB), (R, PB) = (map(int, pair.split(',')) for pair in sizes)
tile, parts = dict(T=T, CB=CB), dict(R=R, CB=PB)
HALF = 'y0 y1 y2 rows grad residual out hidden activation grad_y grad_rows kept'.split()

def compile(name, warps=8, half=HALF, wide=True, **constants):
    function = getattr(kernels, name)
    kind = lambda n: ('fp32' if n in ('eps', 'share', 'momentum') else '*i64' if n.startswith('counter') else
                      'i32' if n in ('C', 'HW', *function.do_not_specialize) else '*bf16' if n in half else '*fp32')
    constants = {n: v for n, v in constants.items() if n in function.arg_names}
    types = {n: kind(n) for n in function.arg_names}
    check(function, capability, types, aligned=('HW',), warps=warps, wide=wide, **constants)

# Three norms in training and in evaluation, LayerNorms of rows and of a map.
for branches, *form in ((3, 1, 1, 1), (3, 1, 0, 1), (1, 0, 0, 1), (1, 0, 0, 0)):
    form = dict(zip(('NORMED', 'TRAINING', 'ROWS'), form), B=branches, LAST=False, **tile)
    compile('norm_rows', **form)
    compile('norm_rows_sums', **form)
form = dict(B=3, NORMED=True, HAS_SCALE=True, NEEDS_SCALE=True, LAST=False)
for name in ('norm_rows_gradients', 'scaled_residual', 'scaled_residual_gradients', 'gelu_gradients'):
    compile(name, **form, **tile)
compile('branch_moments', 4, half=['y0', 'y1', 'y2'], COUNTED=True, LAST=False, U=4, T=256, CB=1)
form = dict(TRAINING=True, CUMULATIVE=False, S=64, CB=16)
compile('batch_norm_coefficients', 4, half=[], wide=False, **form)
compile('merge_moments', 4, half=[], wide=False, **form)
compile('norm_gradients', half=[], wide=False, **parts)
compile('resize_weights', half=['weight1', 'weight2'], wide=False, ROW=512, **parts)
print('compiled')
"""


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('capability', [80, 90])
def test_passes_compile_to_wide_loads_without_spills(tmp_path, capability):
    """Without a GPU: loads of 16 bytes, and registers and shared memory that are there."""
    sizes = '{T},{CB}'.format(**_fused.TILE), '{R},{CB}'.format(**_fused.PARTS)
    environment = dict(TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    done = run_program(tmp_path, COMPILED, str(capability), *sizes, **environment)
    if 'ASTSource' in done.stderr and 'ImportError' in done.stderr:
        pytest.skip('this Triton has another compiler interface')
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', ['SLaK', 'ShiftWise'])
def test_a_captured_training_step_replays_to_the_same_bits(name):
    """Nothing waits for the GPU, forward or backward, which a capture would refuse."""
    kind = dict(type=name, arch=dict(depths=(1, 1), dims=(9, 12)), kernel_sizes=(21, 9), small_kernel=3)
    model = MODELS.build(dict(kind, out_indices=(0, 1), norm_cfg=dict(type='BN'))).cuda()
    x = randn(2, 3, 64, 64).float().cuda()

    def step():
        with torch.autocast('cuda', torch.bfloat16, cache_enabled=False):
            sum(y.float().square().mean() for y in model(x)).backward()

    def gradients():
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=False)
        return found

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replays = []
    for _ in range(2):
        gradients()
        graph.replay()
        replays.append(gradients())
    step()
    assert all(map(torch.equal, *replays))
    assert all(map(torch.equal, replays[0], gradients()))


def test_cpus_have_no_fused_passes():
    x = torch.ones(1, 2, 3, 3)
    assert _fused.why_not(x) == 'the input is on cpu, not on cuda'
    with use_backend('reference'):
        assert _fused.why_not(x) == "the backend 'reference' was asked for"
    assert _fused.why_not(x.to('meta')) is None, 'tensors without data show what a GPU would do'
    with use_backend('triton'):
        assert _fused.why_not(x[:0]) == 'the map is empty'
        assert 'float64' not in (_fused.why_not(x.half()) or '')
        assert _fused.why_not(x.double()) == 'a tensor is on another device, or not float16, bfloat16 or float32'
    with FlopCounterMode(display=False):
        assert _fused.why_not(x.to('meta')) == 'something looks at the operators'
