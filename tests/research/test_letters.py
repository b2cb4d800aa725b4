"""Tests of the rendered letters."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffusers_dualrate.configuration import Data
from research import letters
from research.letters import FACES, LETTERS, Letters


@pytest.fixture(scope="module")
def images():
    return Letters(16)


def test_every_image_is_a_function_of_seed_epoch_and_index_alone(images):
    wanted = [(0, 3), (7, 3), (7, 29), (0, 25_999)]
    again = pickle.loads(pickle.dumps(Letters(16)))  # as a loader's worker has it
    forwards = [images[position]["pixel_values"] for position in wanted]
    backwards = [again[position]["pixel_values"] for position in reversed(wanted)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert torch.equal(images[3]["pixel_values"], forwards[0])
    other = [Letters(16, seed=1)[0, 3]["pixel_values"], *forwards]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(other, 2))


def test_the_class_is_the_letter_that_is_drawn_and_every_class_is_equally_frequent(images):
    labels = [images[index]["class_labels"].item() for index in range(52)]
    assert labels == [*range(26)] * 2 and len(images) % 26 == 0
    assert images.num_classes == 26 and images.id2label[labels[4]] == "E"


def test_images_are_grey_within_range_and_darker_round_the_letter_than_on_it(images):
    for index in range(52):
        item = images[1, index]["pixel_values"]
        assert item.shape == (1, 16, 16) and item.dtype == torch.float32
        assert item.min() >= -1 and item.max() <= 1
        assert -1 <= item.mode().values.median() <= -0.5 and item.max() - item.min() > 0.3


def test_no_face_draws_a_placeholder_or_one_letter_as_another():
    for face, masks in zip(FACES, letters._render_glyphs(), strict=True):
        drawn = [np.asarray(mask) for mask in masks]
        assert len({glyph.tobytes() for glyph in drawn}) == len(LETTERS), face
        holes = []
        for glyph in drawn:
            rows, columns = np.nonzero(glyph)
            assert 0 < rows.min() and rows.max() < 95 and 0 < columns.min() and columns.max() < 95, face
            holes.append(ndimage.label(glyph < 128)[1] - 1)
        # Regions that a letter encloses: what tells a capital from a box or a sign that stands in for it.
        closed = {letter: count for letter, count in zip(LETTERS, holes, strict=True)}
        assert all(closed[letter] == 1 for letter in "ADOP") and closed["B"] == 2, (face, closed)
        assert all(closed[letter] == 0 for letter in "CILTVXZ"), (face, closed)


def test_what_is_drawn_stays_within_its_ranges_and_fills_them(images):
    """Measured on the pictures of one letter: its height, its centre and how far it is from its paper."""
    paper, ink, height, offset = [], [], [], []
    view = Letters(64)
    for epoch in range(300):
        pixels = view[epoch, LETTERS.index("H")]["pixel_values"][0].numpy()
        paper.append(pixels[0, 0])
        ink.append(pixels.max())
        rows, columns = np.nonzero(pixels > (paper[-1] + ink[-1]) / 2)
        height.append((rows.max() - rows.min() + 1) / 64)
        offset.append(((rows.max() + rows.min() + 1) / 128 - 0.5, (columns.max() + columns.min() + 1) / 128 - 0.5))
    offset = np.array(offset)
    assert -1 <= min(paper) < -0.98 and -0.82 < max(paper) <= -0.8
    assert 0.45 < min(ink) < 0.53 and 0.95 < max(ink) <= 1
    assert 0.50 < min(height) < 0.60 and 0.72 < max(height) < 0.95  # turned, a letter stands higher
    assert (abs(offset.mean(0)) < 0.02).all() and (offset.max(0) > 0.04).all() and (abs(offset) < 0.09).all()


def test_without_a_label_column_there_are_no_classes():
    images = Letters(16, label_column=None)
    assert images.num_classes is images.id2label is None and "class_labels" not in images[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resolution": 0}, "is 0"), ({"resolution": 8.0}, "is 8.0"), ({"label_column": "letter"}, "'letter'")],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Letters(**options)


def test_an_index_outside_is_refused(images):
    with pytest.raises(IndexError, match="26000"):
        images[26_000]


@pytest.mark.parametrize(
    ("told", "channels", "sentence"),
    [
        ({}, 3, "letters are grey, and the networks take 3 channels: take a preset with 1, such as letters16"),
        ({"streaming": True}, 1, "they take neither --streaming nor --num_classes"),
        ({"num_classes": 9, "label_column": "label"}, 1, "they take neither --streaming nor --num_classes"),
    ],
)
def test_letters_are_refused_where_the_preset_or_a_flag_wants_other_images(told, channels, sentence):
    with pytest.raises(ValueError, match=sentence):
        letters.open_images(Data(dataset_name="letters", **told), 16, channels=channels)


def test_letters_are_opened_by_their_name_and_other_data_as_ever():
    opened = letters.open_images(Data(dataset_name="letters", label_column="label"), 16, channels=1, seed=5)
    assert torch.equal(opened[2, 7]["pixel_values"], Letters(16, seed=5)[2, 7]["pixel_values"])
    digits = letters.open_images(Data(dataset_name="digits", label_column="label"), 8, channels=1)
    assert digits.num_classes == 10 and len(digits) == 1797
