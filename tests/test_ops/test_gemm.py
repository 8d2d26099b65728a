"""Toeplitz matrices and their cache; the results are in test_cross_dwconv.py."""

import pytest
import torch
import torch.nn.functional as F
from op_helpers import convolution

from slak_mm.ops import cross_dwconv2d, use_backend
from slak_mm.ops.backends import gemm


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch):
    monkeypatch.setattr(gemm, '_cache', gemm._Cache())


def kernels(channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(channels, 9, 3, generator=g), torch.randn(channels, 3, 9, generator=g)


def run(x, *weights):
    with torch.no_grad(), use_backend('gemm'):
        return cross_dwconv2d(x, *weights, reduce=True)


@pytest.mark.parametrize('width, tile', [(20, 20), (5, 5), (72, 64)])
def test_a_row_times_its_matrix_is_its_convolution(width, tile):
    kernel = kernels()[1].double()
    row = torch.randn(3, tile if tile == width else tile + 8, generator=torch.Generator().manual_seed(1)).double()
    matrices = gemm.toeplitz_matrices(kernel, width, tile, torch.float64)
    padding = 4 if tile == width else 0  # of several tiles each sees the pixels around it
    for i in range(3):  # rows of the kernel
        want = F.conv1d(row, kernel[:, i : i + 1], padding=padding, groups=3)
        torch.testing.assert_close(torch.einsum('cu,cuw->cw', row, matrices[:, i]), want)


@pytest.mark.parametrize(
    'change',
    [
        lambda k: k.mul_(2),
        lambda k: k.data.mul_(2),  # the version counter does not see this one
        lambda k: k.data.copy_(k.flip(0)),
        lambda k: setattr(k, 'data', k.data * 3),
    ],
    ids=['in place', 'data', 'copy', 'replaced'],
)
def test_kept_matrices_follow_every_change(change):
    x = torch.randn(1, 3, 12, 14, generator=torch.Generator().manual_seed(1))
    tall, wide = (torch.nn.Parameter(k) for k in kernels())
    for _ in range(3):
        before = run(x, tall, wide)
    assert any(matrices is not None for _, matrices in gemm._cache._entries.values())
    with torch.no_grad():
        change(wide)
    want = convolution(x, tall) + convolution(x, wide)
    got = run(x, tall, wide)
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-4)
    assert not torch.allclose(got, before)


def test_nothing_is_kept_in_training():
    x = torch.randn(1, 3, 12, 14, generator=torch.Generator().manual_seed(1))
    weights = [k.requires_grad_() for k in kernels()]
    for _ in range(3):
        with use_backend('gemm'):
            loss = cross_dwconv2d(x, *weights, reduce=True).square().sum()
        grads = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, grad in zip(weights, grads):
                weight -= 0.01 * grad
    assert all(matrices is None for _, matrices in gemm._cache._entries.values())


def test_memory_of_the_cache_is_bounded(monkeypatch):
    x = torch.randn(1, 3, 12, 14, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(gemm, 'CACHE_BYTES', 40_000)
    held = [kernels(seed=i) for i in range(8)]
    for _ in range(2):
        for pair in held:
            run(x, *pair)
            run(x, *pair)
            assert gemm._cache.nbytes() <= 40_000
    assert gemm._cache.nbytes() > 0


@pytest.mark.parametrize('limit', [1, 20_000])
def test_groups_of_channels_do_not_matter(limit, monkeypatch):
    """As little memory as a group of one channel needs gives the same result."""
    x = torch.randn(2, 5, 12, 14, generator=torch.Generator().manual_seed(1)).double()
    weights = [k.double() for k in kernels(5)]
    want = run(x, *weights)
    monkeypatch.setitem(gemm.GROUP_BYTES, 'cpu', limit)
    torch.testing.assert_close(run(x, *weights), want, rtol=0, atol=1e-12)


def test_products_over_all_taps_at_once(monkeypatch):
    """How half precision is computed on a GPU."""
    x = torch.randn(2, 3, 12, 100, generator=torch.Generator().manual_seed(1)).double()
    matrices = gemm.toeplitz_matrices(kernels()[1].double(), 100, 64, torch.float64)
    one_by_one = gemm._rows_times_matrices(x, matrices, 9, 64, joint=False, dtype=torch.float64)
    at_once = gemm._rows_times_matrices(x, matrices, 9, 64, joint=True, dtype=torch.float64)
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=1e-12)
