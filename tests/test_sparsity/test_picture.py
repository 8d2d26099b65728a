"""Figures and pictures of zeros."""

import numpy as np
import pytest
import torch

from slak_mm.sparsity.picture import draw_sparsity, layer_sparsity, tap_densities


def test_counts_of_weights_alone():
    weight = torch.ones(2, 3)
    weight[0, 0] = 0
    layers = layer_sparsity(
        {
            'a.weight': weight,
            'a.bias': torch.zeros(2),
            'a.table': torch.zeros(2, 2, dtype=torch.long),
            'b.weight': torch.zeros(4, 1, 51, 5),
        }
    )
    assert [(x.name, x.zeros, x.total, x.kind) for x in layers] == [
        ('a.weight', 1, 6, 'linear'),
        ('b.weight', 1020, 1020, 'large kernel'),
    ]
    assert layers[0].sparsity == pytest.approx(1 / 6)


def test_taps_are_laid_over_each_other_at_the_center():
    tall, wide, small = torch.zeros(2, 1, 9, 3), torch.zeros(2, 1, 3, 9), torch.zeros(2, 1, 3, 3)
    tall[0, 0, 0, 1] = 1  # top of the column, in one of two channels
    wide[:, 0, 1, 0] = 1  # left end of the row, in both
    small[0, 0, 1, 1] = 1  # center: one of six, as all three reach it
    prefix = 'backbone.stages.2.0.large_kernel'
    maps = tap_densities(
        {
            f'{prefix}.tall.conv.weight': tall,
            f'{prefix}.wide.conv.weight': wide,
            f'{prefix}.small.conv.weight': small,
            'backbone.stages.1.0.dw.weight': torch.ones(2, 1, 3, 3),
        }
    )
    assert list(maps) == ['stage 2']
    expected = np.full((9, 9), np.nan)
    expected[:, 3:6] = expected[3:6, :] = 0
    expected[0, 4], expected[4, 0], expected[4, 4] = 1 / 2, 1, 1 / 6
    np.testing.assert_allclose(maps['stage 2'], expected)


def test_bars_are_as_long_as_the_layers_are_dense():
    state = {f'l{i}.weight': torch.ones(10, 10) for i in range(2)}
    state['l1.weight'][:5] = 0
    picture = draw_sparsity(state)
    # Widths of the bars, by rows of the picture in the color of linear layers.
    rows = (picture == (0xE6, 0x9F, 0x00)).all(-1).sum(1)
    widths = sorted(set(rows[rows > 100].tolist()))
    assert widths[-1] / widths[0] == pytest.approx(2, abs=0.1)
    with pytest.raises(ValueError, match='no weights'):
        draw_sparsity({'bias': torch.ones(3)})
