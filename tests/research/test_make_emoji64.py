"""Tests of the script that renders emoji64, and of the data that it left."""

import re

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_dualrate.data import LabelledImages
from research import EXAMPLES, make_emoji64

FOLDER = EXAMPLES / "data" / "emoji64"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return {
        split: datasets.load_dataset(str(FOLDER), split=split, cache_dir=cache, keep_in_memory=True)
        for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def prompts():
    names = ("seen", "held_out", "novel")
    return {name: (FOLDER / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in names}


@pytest.mark.parametrize(
    ("name", "hexcode", "gender", "subgroup", "is_variant"),
    [
        ("red apple", "1F34E", False, "food-fruit", False),
        ("polar bear", "1F43B-200D-2744-FE0F", False, "animal-mammal", False),
        ("health worker", "1F9D1-200D-2695-FE0F", False, "person-role", False),
        ("kiss", "1F48F", False, "family", False),
        ("prince", "1F934", True, "person-role", False),
        ("man cook", "1F468-200D-1F373", False, "person-role", True),
        ("woman running", "1F3C3-200D-2640-FE0F", True, "person-activity", True),
        ("person running facing right", "1F3C3-200D-27A1-FE0F", False, "person-activity", True),
        ("right arrow", "27A1-FE0F", False, "arrow", False),
        ("person: red hair", "1F9D1-200D-1F9B0", False, "person", True),
        ("family", "1F9D1-200D-1F9D1-200D-1F9D2", False, "family", True),
        ("flag: France", "1F1EB-1F1F7", False, "country-flag", True),
        ("light skin tone", "1F3FB", False, "skin-tone", True),
    ],
)
def test_variants_of_another_emoji_are_left_out(name, hexcode, gender, subgroup, is_variant):
    assert make_emoji64.is_variant(hexcode.split("-"), gender, subgroup) is is_variant


def test_captions_say_name_style_and_the_keywords_that_the_name_does_not_have():
    keywords = ["apple", "diet", "fruit", "Red", "ripe", "a", "b", "c", "d", "e", "f"]
    assert make_emoji64.make_captions("red apple", keywords, "flat") == [
        "red apple, flat style",
        "red apple",
        "red apple, diet, ripe, b, d, flat style",
        "diet, ripe, b, d, flat style",
    ]
    assert make_emoji64.make_captions("keycap: 7", ["keycap"], "blob") == ["keycap: 7, blob style", "keycap: 7"]


def test_an_icon_is_found_by_code_points_or_by_another_vendors_name_but_not_mirrored():
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"heart": {"body": "<path/>", "width": 16}, "left": {"body": "<g/>"}},
        "aliases": {"love": {"parent": "heart"}, "right": {"parent": "left", "hFlip": True}},
    }
    heart = {"left": 0, "top": 0, "width": 16, "height": 32, "body": "<path/>"}
    assert make_emoji64.find_icon(["2764", "FE0F"], {"2764": "heart"}, {}, icons) == heart
    assert make_emoji64.find_icon(["2764", "FE0F"], {}, {"2764": "love"}, icons) == heart
    assert make_emoji64.find_icon(["2764"], {"1f": "heart"}, {"2764": "heart"}, icons) is None
    assert make_emoji64.find_icon(["27A1"], {"27a1": "right"}, {}, icons) is None


def test_rounding_to_six_bits_keeps_black_and_white_and_moves_no_channel_by_more_than_two():
    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(4, 2), "RGBA")
    rounded = np.asarray(make_emoji64.round_colours(every)).astype(int)[..., 0].ravel()
    assert len(set(rounded)) == 64 and (rounded[0], rounded[-1]) == (0, 255)
    assert np.abs(rounded - np.arange(256)).max() == 2


def test_a_folder_without_the_packages_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold one noto-\*\.tgz of `npm pack`, found 0"):
        make_emoji64.Package(tmp_path, "noto")


def test_emoji64_opens_with_lists_of_captions_and_the_card_counts_them(shipped):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{sum(map(len, shipped.values())):,} drawings of" in card
    rows = re.findall(r"^\| (\w+) \|.*\| ([\d,]+) \| (\d+) \| `[0-9a-f]{64}` \|$", card, re.MULTILINE)
    assert [style for style, _, _ in rows] == list(make_emoji64.STYLES)
    for style, train, test in rows:
        counted = [split["style"][:].count(style) for split in (shipped["train"], shipped["test"])]
        assert counted == [int(train.replace(",", "")), int(test)]
    for split in shipped.values():
        assert split.features["captions"] == datasets.List(datasets.Value("string"))
        for captions, name, style in zip(split["captions"], split["name"], split["style"], strict=True):
            assert captions[:2] == [f"{name}, {style} style", name] and len(captions) in (2, 4)


def test_emoji64_is_transparent_with_a_margin_of_two_pixels_and_repeats_no_drawing(shipped):
    part = shipped["train"].select(range(0, len(shipped["train"]), 7))
    pixels = np.stack([np.asarray(image.convert("RGBa")) for image in part["image"]])
    assert {image.mode for image in part["image"]} == {"RGBA"} and pixels.shape[1:] == (64, 64, 4)
    inside = pixels[:, 2:-2, 2:-2]
    assert inside.any((1, 2, 3)).all() and pixels.any(-1).sum() == inside.any(-1).sum()
    assert len({image.tobytes() for image in pixels}) == len(pixels)


def test_emoji64_trains_networks_of_half_its_size(shipped):
    images = LabelledImages(shipped["test"], 32, label_column="label")
    assert images[0]["pixel_values"].shape == (3, 32, 32) and images.num_classes == 97


def test_what_is_held_out_is_in_no_training_row_and_its_words_are(shipped, prompts):
    train, test = shipped["train"], shipped["test"]
    drawn = {split: set(zip(rows["name"], rows["style"], strict=True)) for split, rows in shipped.items()}
    assert not drawn["train"] & drawn["test"]
    assert not set(make_emoji64.COMBINATIONS) & set(train["name"])
    assert set(make_emoji64.COMBINATIONS) == set(test["name"]) - set(train["name"])
    trained = {caption for captions in train["captions"] for caption in captions}
    assert set(prompts["seen"]) <= trained and len(set(prompts["seen"])) == 100
    assert prompts["held_out"] == [captions[0] for captions in test["captions"]]
    assert prompts["novel"] == list(make_emoji64.NOVEL)
    assert not trained & {*prompts["held_out"], *prompts["novel"]}
    words = {word for caption in trained for word in re.split(r"[ ,:-]+", caption)}
    asked = {
        word for prompt in (*prompts["novel"], *make_emoji64.COMBINATIONS) for word in re.split(r"[ ,:-]+", prompt)
    }
    assert asked <= words, sorted(asked - words)
