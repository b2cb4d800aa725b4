"""Tests of the script that renders emoji32, where its font is installed."""

import datasets
import numpy as np
import pytest
from PIL import features

from research import EXAMPLES, make_emoji32


@pytest.fixture(scope="module")
def args():
    args = make_emoji32.parse_args([])
    if not args.font.is_file() or not args.emoji_test.is_file() or not features.check("raqm"):
        pytest.skip(f"rendering needs Raqm and `{make_emoji32.PACKAGES}`")
    card = (args.output_dir / "README.md").read_text(encoding="utf-8")
    if make_emoji32.write_card(make_emoji32.read_emoji(args.emoji_test), args.font, args.emoji_test) != card:
        pytest.skip("the installed font or emoji list is of another version than that of emoji32")
    return args


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return datasets.load_dataset(str(EXAMPLES / "data" / "emoji32"), split="train", cache_dir=cache)


def test_the_list_of_the_shipped_data_is_that_of_the_script(args, shipped):
    rows = make_emoji32.read_emoji(args.emoji_test)
    names = shipped.features["label"].names
    columns = shipped.remove_columns("image")
    assert [{**row, "label": names[row["label"]]} for row in columns] == [
        {key: row[key] for key in columns.column_names} for row in rows
    ]


def test_rendering_again_gives_the_shipped_pixels(args, shipped):
    font = make_emoji32.load_font(args.font)
    for row in shipped.select(range(0, len(shipped), 23)):
        np.testing.assert_array_equal(np.asarray(make_emoji32.render(font, row["emoji"])), np.asarray(row["image"]))


def test_an_emoji_without_a_drawing_of_its_own_is_refused(args):
    font = make_emoji32.load_font(args.font)
    for emoji in ("\U0010fffd", "\N{CAT FACE}\N{ZERO WIDTH JOINER}\N{DOG FACE}"):
        with pytest.raises(ValueError, match="does not draw .* as one picture"):
            make_emoji32.render(font, emoji)


def test_the_script_writes_a_data_set_that_loads(args, tmp_path):
    lines = args.emoji_test.read_text(encoding="utf-8").splitlines()
    short = tmp_path / "emoji-test.txt"
    short.write_text("\n".join(lines[:60]), encoding="utf-8")
    output = tmp_path / "out"
    make_emoji32.main(make_emoji32.parse_args([f"--emoji_test={short}", f"--output_dir={output}"]))
    dataset = datasets.load_dataset(str(output), split="train", cache_dir=tmp_path / "cache")
    assert dataset.column_names == ["image", "label", "group", "name", "emoji"]
    assert dataset[0]["name"] == "grinning face" and dataset.features["label"].names[0] == "face-smiling"
    assert f"{len(dataset)} colour emoji" in (output / "README.md").read_text(encoding="utf-8")


def test_a_missing_font_or_list_is_answered_with_how_to_install_it(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.ttf' does not exist; install it with `apt-get"):
        make_emoji32.load_font(tmp_path / "absent.ttf")
    with pytest.raises(ValueError, match=r"absent\.txt' does not exist; install it with `apt-get"):
        make_emoji32.read_emoji(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("# group: none\n")
    with pytest.raises(ValueError, match="lists no fully-qualified emoji"):
        make_emoji32.read_emoji(tmp_path / "empty.txt")
