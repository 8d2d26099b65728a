"""The fused feed-forward layer with GRN: its arithmetic in Triton's interpreter, what it leaves alone, and code.

The interpreter must be chosen before Triton is imported: the tests of the arithmetic run in a process of their own.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from op_helpers import run_program, run_tests_in_interpreter
from test_ops.test_fused import IS_INTERPRETED, LAYOUTS, TOLERANCE, assert_close, interpreted, needs_triton, randn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slak_mm.models.layers import GRN, Branches
from slak_mm.ops import grn_mlp, use_backend
from slak_mm.ops.backends.layout import eights, memory_format


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason='would start itself')
def test_arithmetic_in_the_interpreter():
    run_tests_in_interpreter(__file__)


class Block(nn.Module):
    """The feed-forward half of a block, of PyTorch's layers and by fused passes, with drawn tensors."""

    def __init__(self, form, c, d, e, momentum=0.1, scale=True):
        super().__init__()
        is_deployed = form == 'deployed'
        self.linear1, self.linear2 = nn.Linear(c, d), nn.Linear(d, e, bias=is_deployed)
        self.grn = GRN(d, bias=not is_deployed)
        self.norm = None if is_deployed else nn.BatchNorm2d(e, momentum=momentum)
        self.scale = nn.Parameter(torch.empty(e)) if scale else None
        for i, p in enumerate(self.parameters()):
            p.data = randn(*p.shape, seed=i).float() * (p.shape[1] ** -0.5 if p.dim() == 2 else 1.0)
        if self.norm is not None:
            self.norm.running_mean.data, variance = randn(2, e, seed=40).float()
            self.norm.running_var.data = variance.square() + 0.5
        self.train(form == 'training')

    def forward(self, x, residual):
        y = self.linear2(self.grn(F.gelu(self.linear1(x)))).permute(0, 3, 1, 2)
        y = y if self.norm is None else self.norm(y)
        return residual + (y if self.scale is None else self.scale.view(-1, 1, 1) * y)

    def tensors(self):
        norm = None if self.norm is None else Branches([], [self.norm]).tensors_of_norms()
        weights = self.linear2.weight, self.linear2.bias, norm, self.scale
        return self.linear1.weight, self.linear1.bias, *self.grn.tensors(), *weights

    def fused(self, x, residual, keep=1.0):
        rows = F.pad(x, (0, eights(x.shape[-1]) - x.shape[-1]))
        return grn_mlp.grn_mlp(rows, *self.tensors(), keep, residual)


def evaluate(block, function, x, residual, grad):
    """Result, gradients of inputs and parameters, and buffers."""
    x, residual = (t.detach().requires_grad_() for t in (x, residual))
    result = function(x, residual)
    parameters = dict(block.named_parameters())
    grads = torch.autograd.grad(result, [x, residual, *parameters.values()], grad.to(result.dtype))
    found = dict(zip(['x', 'residual', *parameters], grads), result=result, **dict(block.named_buffers()))
    if block.training:  # the norm removes what beta adds: its gradient is 0, which has no size of its own
        found['grn'] = torch.cat([found.pop('grn.gamma'), found.pop('grn.beta')])
    return found


def assert_alike(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in got:
        try:
            assert_close([got[name]], [want[name]], tolerance)
        except AssertionError as error:
            raise AssertionError(name) from error


def draw(shape, c, e, dtype=torch.float32, layout=torch.contiguous_format):
    n, h, w = shape
    x, residual, grad = randn(n, h, w, c, seed=50), randn(n, e, h, w, seed=51), randn(n, e, h, w, seed=52)
    return x.to(dtype), residual.to(dtype).contiguous(memory_format=layout), grad.to(dtype)


CASES = [  # images, height and width; C, D and E; form; dtype
    ((2, 3, 5), (12, 20, 12), 'training', torch.float32),
    ((1, 1, 67), (10, 9, 10), 'training', torch.bfloat16),
    ((2, 9, 8), (16, 24, 16), 'training', torch.float16),
    ((1, 2, 42), (8, 8, 8), 'evaluation', torch.float32),
    ((1, 1, 1), (9, 16, 9), 'evaluation', torch.bfloat16),
    ((2, 4, 4), (66, 3, 1), 'deployed', torch.float32),
    ((2, 3, 5), (12, 20, 70), 'deployed', torch.bfloat16),
]


@interpreted
@pytest.mark.parametrize('layout', LAYOUTS, ids=['nchw', 'channels_last'])
@pytest.mark.parametrize(('shape', 'widths', 'form', 'dtype'), CASES, ids=str)
def test_results_and_gradients(shape, widths, form, dtype, layout):
    check(Block(form, *widths).to(dtype), *draw(shape, widths[0], widths[2], dtype, layout))


def check(block, x, residual, grad):
    """Compare with the layers in float64, and with a second run."""
    exact, again = copy.deepcopy(block).double(), copy.deepcopy(block)
    want = evaluate(exact, exact, x.double(), residual.double(), grad)
    got = evaluate(block, block.fused, x, residual, grad)
    layout = memory_format(residual)
    assert got['result'].dtype is x.dtype
    assert all(got[name].is_contiguous(memory_format=layout) for name in ('result', 'residual'))
    assert_alike(got, want, TOLERANCE[x.dtype])
    same = evaluate(again, again.fused, x, residual, grad)
    assert all(torch.equal(same[name], got[name]) for name in got), 'the same bits'


@pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('layout', LAYOUTS, ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(('shape', 'c'), [((4, 96, 128), 80), ((3, 25, 42), 84)])
def test_on_a_gpu(shape, c, dtype, layout):
    tensors = (t.cuda() for t in draw(shape, c, c, dtype, layout))
    check(Block('training', c, 4 * c, c).cuda().to(dtype), *tensors)


@interpreted
@pytest.mark.parametrize(
    ('shape', 'd', 'programs'), [((1, 20, 60), 10, 12), ((66, 1, 1), 10, 99), ((1, 2, 2), 520, 99)]
)
def test_sums_of_several_tiles_many_images_and_wide_layers(monkeypatch, shape, d, programs):
    monkeypatch.setattr(grn_mlp, '_PROGRAMS', programs)
    block = Block('training', 3, d, 3)
    x, residual, grad = draw(shape, 3, 3)
    exact = copy.deepcopy(block).double()
    got = evaluate(block, block.fused, x, residual, grad)
    assert_alike(got, evaluate(exact, exact, x.double(), residual.double(), grad), 1e-4)


@interpreted
@pytest.mark.parametrize('form', ['training', 'deployed'])
def test_the_reference_is_the_composition_of_layers(form):
    block = Block(form, 5, 7, 6, scale=False).double()
    x, residual, grad = draw((2, 3, 4), 5, 6, torch.float64)
    got = evaluate(block, lambda x, residual: grn_mlp.reference(x, *block.tensors(), residual), x, residual, grad)
    want = evaluate(block, block, x, residual, grad)
    assert_alike(got, want, 1e-12)


@interpreted
@pytest.mark.parametrize('momentum', [None, 0.7])
def test_running_statistics(momentum):
    block = Block('training', 3, 8, 3, momentum=momentum)
    plain = copy.deepcopy(block).double()
    x, residual, _ = draw((2, 2, 5), 3, 3)
    for step in range(1, 4):
        assert_close([block.fused(step * x, residual)], [plain(step * x.double(), residual.double())], 1e-5)
    assert_close(block.buffers(), plain.buffers(), 1e-5)
    assert block.norm.num_batches_tracked == 3


@interpreted
@pytest.mark.parametrize('form', ['training', 'deployed'])
def test_drop_path(form):
    """Each image is either kept, and divided by the probability for it, or left out."""
    block = Block(form, 4, 8, 4)
    x, residual, grad = draw((16, 9, 8), 4, 4)  # two tiles of each image
    whole = block(x, residual) - residual
    torch.manual_seed(0)
    got = evaluate(block, lambda *inputs: block.fused(*inputs, keep=0.5), x, residual, grad)
    change = got['result'] - residual
    kept = (change.flatten(1).abs().sum(1) > 0).float()
    assert 0 < kept.sum() < 16
    assert_close([change], [2 * kept.view(-1, 1, 1, 1) * whole], 1e-5)

    def plain(x, residual):
        return grn_mlp.reference(x, *exact.tensors(), residual, kept.double(), 0.5)

    exact = copy.deepcopy(block).double()
    assert_alike(got, evaluate(exact, plain, x.double(), residual.double(), grad), 1e-4)


@interpreted
def test_images_without_response():
    """Where all of an image is zero behind GELU there is no direction for the gradient of its norm: it is zero."""
    block = Block('training', 4, 8, 4)
    block.linear1.bias.data.zero_()
    x, residual, grad = draw((3, 2, 2), 4, 4)
    x[1] = 0
    exact = copy.deepcopy(block).double()
    got = evaluate(block, block.fused, x, residual, grad)
    assert_alike(got, evaluate(exact, exact, x.double(), residual.double(), grad), 1e-4)
    assert got['x'][1].any()


@interpreted
def test_padding_is_zero_and_half_precision_under_autocast(monkeypatch):
    """Rows come in the dtype of autocast; weights and residual are float32."""
    made = []
    for name in ('_grn_rows', '_normed_residual_gradients'):
        run = getattr(grn_mlp, name)
        monkeypatch.setattr(grn_mlp, name, lambda *args, run=run: made.append(run(*args)) or made[-1])
    block = Block('training', 12, 20, 12)
    x, residual, grad = draw((2, 3, 5), 12, 12)
    x = x.bfloat16()
    exact = copy.deepcopy(block).double()
    rows = F.pad(x, (0, 4)).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        y = grn_mlp.grn_mlp(rows, *block.tensors(), 1.0, residual)
    y.backward(grad)
    want = evaluate(exact, exact, x.double(), residual.double(), grad)
    assert y.dtype is torch.float32
    assert_close([y, rows.grad[..., :12]], [want['result'], want['x']], 2e-2)
    assert not rows.grad[..., 12:].any()
    assert [tuple(t.shape) for t in made] == [(30, 24), (30, 16)]
    assert all(t.dtype is torch.bfloat16 and not t[:, -4:].any() for t in made)
    grads = [p.grad for p in block.parameters()]
    assert all(g.dtype is torch.float32 and g.shape == p.shape for g, p in zip(grads, block.parameters()))
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads), 'no memory is shared'


@interpreted
@pytest.mark.parametrize('form', ['training', 'deployed'])
def test_frozen_tensors_have_no_gradients(form):
    x, residual, grad = draw((2, 3, 3), 5, 6)
    every = Block(form, 5, 8, 6)
    every.fused(x, residual).backward(grad)
    want = {name: p.grad for name, p in every.named_parameters()}
    for frozen in want:
        block = Block(form, 5, 8, 6)
        block.get_parameter(frozen).requires_grad_(False)
        block.fused(x, residual).backward(grad)
        for name, p in block.named_parameters():
            assert p.grad is None if name == frozen else torch.equal(p.grad, want[name]), (frozen, name)


@interpreted
@pytest.mark.parametrize('form', ['training', 'evaluation', 'deployed'])
def test_gradients_can_be_differentiated_again(form):
    block = Block(form, 3, 5, 3)
    inputs = draw((2, 2, 3), 3, 3)[:2]

    def penalty(block, function, inputs):
        leaves = [*(t.detach().requires_grad_() for t in inputs), *block.parameters()]
        grads = torch.autograd.grad(function(*leaves[:2]).square().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(grad.square().mean() for grad in grads), leaves)
        return [torch.cat([grad.flatten() for grad in again])]

    exact = copy.deepcopy(block).double()
    want = penalty(exact, exact, [t.double() for t in inputs])
    assert_close(penalty(block, block.fused, inputs), want, 1e-4)


def _process(rank, file, results):
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    block = Block('training', 3, 8, 3)
    block.norm = nn.SyncBatchNorm.convert_sync_batchnorm(block.norm)
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    messages, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: messages.append(1) or reduce(*args, **kwargs)
    found = evaluate(block, block.fused, *(t[own] for t in draw((3, 2, 5), 3, 3)))
    assert len(messages) == 2, 'one message forward and one backward'
    torch.save({name: t.detach() for name, t in found.items()}, f'{results}{rank}')
    dist.destroy_process_group()


@interpreted
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='this PyTorch has no gloo')
def test_sync_bn_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(_process, (tmp_path / 'store', tmp_path / 'result'), nprocs=2)
    block = Block('training', 3, 8, 3).double()
    want = evaluate(block, block, *(t.double() for t in draw((3, 2, 5), 3, 3)))
    first, second = (torch.load(tmp_path / f'result{rank}') for rank in range(2))
    buffers = dict(block.named_buffers())
    got = {name: first[name] + second[name] for name in first}
    got |= {name: torch.cat([first[name], second[name]]) for name in ('x', 'residual', 'result')}
    got |= {name: first[name] for name in buffers}
    assert all(torch.equal(first[name], second[name]) for name in buffers)
    assert_alike(got, want, 1e-4)


class Launches(TorchDispatchMode):
    """Counts what a GPU would be sent; views and memory are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(a.alias_info and not a.alias_info.is_write for a in function._schema.arguments)
        self.count += not is_view and 'empty' not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(('form', 'forward', 'backward'), [('training', 9, 11), ('deployed', 7, 13)])
def test_number_of_launches(form, forward, backward):
    """In half precision with float32 weights; in deployed form two make the coefficients of no norm."""
    block = Block(form, 80, 320, 80).to('meta')
    x = torch.empty(2, 8, 8, 80, dtype=torch.bfloat16, device='meta', requires_grad=True)
    residual = torch.empty(2, 80, 8, 8, device='meta', requires_grad=True)
    with Launches() as launches:
        y = grn_mlp.grn_mlp(x, *block.tensors(), 1.0, residual)
    assert launches.count <= forward and y.shape == residual.shape
    leaves = [x, residual, *block.parameters()]
    with Launches() as launches:
        grads = torch.autograd.grad(y, leaves, torch.empty_like(y))
    assert launches.count <= backward
    assert all(g.shape == t.shape and g.dtype is t.dtype for g, t in zip(grads, leaves, strict=True))


def test_says_why_not():
    block = Block('training', 4, 8, 4).to('meta')
    residual = torch.empty(1, 4, 1, 1, device='meta')
    *weights, norm, scale = block.tensors()
    assert grn_mlp.why_not_fused(*weights, norm, scale, residual) == 'there is one value per channel'
    assert grn_mlp.why_not_fused(*weights, norm._replace(training=False), scale, residual) is None
    residual = torch.empty(1, 4, 3, 3, device='meta')
    assert grn_mlp.why_not_fused(*weights, norm, None, residual) is None
    assert 'has a bias and a norm' in grn_mlp.why_not_fused(*weights[:-1], scale, norm, None, residual)
    assert 'no bias' in grn_mlp.why_not_fused(weights[0], None, *weights[2:], norm, None, residual)
    assert 'not float16, bfloat16 or float32' in grn_mlp.why_not_fused(*block.double().tensors(), residual)
    with use_backend('reference'):
        assert 'was asked for' in grn_mlp.why_not_fused(*block.float().tensors(), residual)


COMPILED = """
import sys
from slak_mm.ops.backends import _triton_grn as kernels
from tests.helpers.compiled_kernels import check

BF16 = 'rows hidden activation grad_rows product1 product2'.split()
FP32 = '''sums coefficients totals factors responses reciprocals means gamma beta weight bias scale kept of_weight
of_bias of_scale of_gamma of_beta of_weight1 of_weight2 residual out grad'''.split()

def compile(name, half=BF16, **options):
    types = {n: '*fp32' for n in FP32} | {n: '*bf16' for n in half} | dict(share='fp32')
    check(getattr(kernels, name), int(sys.argv[1]), types, aligned=('C', 'HW'), **options)

tile = dict(T=64, CB=64)
for last in (False, True):
    compile('norm_sums', LAST=last, **tile)
    compile('normed_residual_gradients', LAST=last, **tile)
compile('norm_totals', HAS_SCALE=True, R=64, CB=16, warps=4, wide=False)
compile('gelu_squares', **tile)
compile('grn_responses', R=8, CB=512)
compile('grn_rows', HAS_BETA=True, **tile)
compile('grn_sums', [*BF16, 'grad'], **tile)
compile('grn_totals', R=8, CB=512)
compile('grn_gradients', [*BF16, 'grad'], HAS_BETA=True, **tile)
compile('parameter_gradients', HAS_BETA=True, R=64, KB=16, CB=512, warps=4)
"""


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('capability', [80, 90])
def test_passes_compile_to_wide_loads_without_spills(tmp_path, capability):
    """Without a GPU: loads of 16 bytes, and registers and shared memory that are there."""
    done = run_program(tmp_path, COMPILED, str(capability), TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    if 'ASTSource' in done.stderr and 'ImportError' in done.stderr:
        pytest.skip('this Triton has another compiler interface')
    assert done.returncode == 0, done.stderr[-3000:]
