"""Grids of samples, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from diffusers_dualrate.pictures import draw_grid


def plain(level, side=16):
    return Image.fromarray(np.full((side, side, 3), level, dtype=np.uint8))


def test_small_images_are_enlarged_by_whole_pixels_and_lie_in_rows():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    picture = np.asarray(draw_grid([plain(10), plain(20), image], columns=2))
    assert picture.shape == (2 * (96 + 4) + 4, 2 * (96 + 4) + 4, 3)
    assert (picture[4:100, 4:100] == 10).all() and (picture[4:100, 104:200] == 20).all()
    np.testing.assert_array_equal(picture[104:200, 4:100], np.asarray(image).repeat(6, 0).repeat(6, 1))
    assert (picture[104:, 104:] == 255).all() and (picture[:4] == 255).all()


@pytest.mark.parametrize("side", [96, 128])
def test_large_images_stay_as_they_are(side):
    assert draw_grid([plain(10, side)], side=2 * side).size == (2 * side + 8, 2 * side + 8)
    assert draw_grid([plain(10, side)]).size == (side + 8, side + 8)


def test_each_image_stands_under_its_name_and_a_long_one_is_cut_to_its_width():
    """Kills: a name above the wrong image, or in the way of the next one's."""
    with_names = np.asarray(draw_grid([plain(10), plain(20)], ["a" * 100, ""]))
    lines = with_names[4:18]
    assert (with_names[18:114, 4:100] == 10).all() and (with_names[18:114, 104:200] == 20).all()
    assert (lines[:, 4:104] < 128).any() and (lines[:, 104:] == 255).all()
