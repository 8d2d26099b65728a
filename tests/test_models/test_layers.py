"""Layers which the backbones share."""

import pytest
import torch

from slak_mm.models.layers import sum_of_squares


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-3)], ids=str
)
@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (5000, 7), (1000, 300), (2, 70000)])
def test_sum_of_squares(shape, dtype, tolerance):
    """Thousands of terms are not rounded to half precision one after the other."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 1
    want = x.double().square().sum(0)
    # A square alone is rounded to the dtype.
    single = 2**-8 if dtype is torch.bfloat16 else 0
    worst = float(((sum_of_squares(x).double() - want) / want).abs().max())
    assert worst <= max(tolerance, single if shape[0] < 100 else 0)
