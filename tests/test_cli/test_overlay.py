import numpy as np
import pytest

from slak_mm.cli.overlay import class_shares, colorize, overlay, panel, with_legend

PALETTE = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
LABELS = np.array([[0, 0, 0], [1, 1, 255]])


def test_class_shares_are_sorted_and_of_all_pixels():
    assert class_shares(LABELS, 3) == [(0, 3 / 6), (1, 2 / 6)]
    assert class_shares(np.full((2, 2), 255), 3) == []


def test_colorize():
    picture = colorize(LABELS, PALETTE)
    assert picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [255, 0, 0]
    assert picture[1, 0].tolist() == [0, 255, 0]
    assert picture[1, 2].tolist() == [0, 0, 0]
    assert colorize(LABELS, PALETTE, (9, 9, 9))[1, 2].tolist() == [9, 9, 9]


@pytest.mark.parametrize('opacity', [0.0, 0.25, 1.0])
def test_overlay_mixes_linearly_and_leaves_the_unlabeled(opacity):
    image = np.full((2, 3, 3), 100, np.uint8)
    picture = overlay(image, LABELS, PALETTE, opacity)
    expected = np.rint(100 * (1 - opacity) + np.array(PALETTE[0]) * opacity)
    assert picture[0, 0].tolist() == expected.tolist()
    assert picture[1, 2].tolist() == [100, 100, 100]


def test_overlay_refuses_what_does_not_fit():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match='differ in size'):
        overlay(image, LABELS, PALETTE)
    with pytest.raises(ValueError, match='Opacity'):
        overlay(np.zeros((2, 3, 3), np.uint8), LABELS, PALETTE, 1.5)


@pytest.mark.parametrize('height,entries', [(20, 3), (64, 1), (64, 40)])
def test_legend_is_beside_the_picture_and_has_every_color(height, entries):
    picture = np.full((height, 50, 3), 77, np.uint8)
    colors = [(10 + 5 * index, 200, 40) for index in range(entries)]
    result = with_legend(picture, [(f'class {index}', color) for index, color in enumerate(colors)])
    assert (result[:height, :50] == 77).all()
    legend = {tuple(pixel) for pixel in result[:, 50:].reshape(-1, 3).tolist()}
    assert set(colors) <= legend


def test_legend_without_entries_is_the_picture():
    picture = np.zeros((8, 8, 3), np.uint8)
    assert with_legend(picture, []) is picture


def test_panel_keeps_the_pixels_of_every_picture():
    pictures = [np.full((30 + 10 * index, 40, 3), 50 * index, np.uint8) for index in range(3)]
    result = panel(pictures, ['a', 'b', 'c'])
    assert result.shape[0] > 50 and result.shape[1] > 120
    for index, picture in enumerate(pictures):
        assert (result == 50 * index).all(-1).sum() >= picture[..., 0].size
    with pytest.raises(ValueError, match='titles'):
        panel(pictures, ['a'])
