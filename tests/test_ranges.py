"""Values of the wrong type or out of range are refused in one sentence with name, range and value."""

import json
import math
import os

import numpy as np
import pytest

from diffusers_dualrate.ranges import check_boolean, check_choice, check_integer, check_number, check_output


@pytest.mark.parametrize("value", [True, 2.0, "2", None, math.nan, [2], np.float32(2), 0, 6], ids=repr)
def test_what_is_no_integer_in_its_range_is_refused_by_its_name_and_value(value):
    """Mutants: `least` or `most` not compared, `>=` made `>`, `<=` made `<`, booleans let through."""
    with pytest.raises(ValueError) as caught:
        check_integer("count", value, 1, 5)
    assert str(caught.value) == f"count must be an integer in [1, 5], got {value!r}."
    assert check_integer("count", 1, 1, 5) == 1 and check_integer("count", 5, 1, 5) == 5


@pytest.mark.parametrize("value", [True, "0.5", None, math.nan, math.inf, -math.inf, [1], 1j, 0, 1], ids=repr)
def test_what_is_no_finite_number_in_its_range_is_refused_by_its_name_and_value(value):
    """Mutants: nan or infinity let through, `above` compared as `least`, `below` as `most`."""
    with pytest.raises(ValueError) as caught:
        check_number("share", value, above=0, below=1)
    assert str(caught.value) == f"share must be a finite number in (0, 1), got {value!r}."
    assert check_number("share", 0, least=0, most=1) == 0 and check_number("share", 1, least=0, most=1) == 1


@pytest.mark.parametrize(
    ("bounds", "value", "words"),
    [
        ({}, "x", "a finite number"),
        ({"least": 0}, -1, "a finite number of at least 0"),
        ({"most": 0}, 1, "a finite number of at most 0"),
        ({"above": 0}, 0, "a finite number above 0"),
        ({"below": 0}, 0, "a finite number below 0"),
        ({"least": 0, "below": 1}, 1, r"a finite number in \[0, 1\)"),
        ({"above": 0, "most": 1}, 0, r"a finite number in \(0, 1\]"),
    ],
    ids=str,
)
def test_a_range_is_said_as_it_is_meant(bounds, value, words):
    with pytest.raises(ValueError, match=f"^x must be {words}, got {value!r}.$"):
        check_number("x", value, **bounds)


def test_numbers_of_numpy_come_back_as_ones_that_json_holds():
    values = [check_integer("n", np.int64(3)), check_number("x", np.float32(0.5)), check_number("y", 10**400)]
    assert json.loads(json.dumps(values)) == [3, 0.5, 10**400]


@pytest.mark.parametrize("value", [1, 0, "yes", "", None, np.True_], ids=repr)
def test_what_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(ValueError, match="^flag must be True or False, got "):
        check_boolean("flag", value)
    assert check_boolean("flag", True) is True and check_boolean("flag", False) is False


@pytest.mark.parametrize("value", ["c", "", None, 1, ["a"], np.array(["a", "b"])], ids=repr)
def test_what_is_none_of_the_choices_is_refused(value):
    with pytest.raises(ValueError, match="^kind must be one of 'a', 'b', got "):
        check_choice("kind", value, ("a", "b"))
    assert check_choice("kind", "a", ("a", "b")) == "a"


def test_a_long_value_is_cut_in_the_sentence():
    with pytest.raises(ValueError) as caught:
        check_integer("n", list(range(1000)))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("path", "is_folder", "sentence"),
    [
        ("", True, "--to is empty, and must name a folder."),
        ("", False, "--to is empty, and must name a file."),
        ("file", True, "--to must be a folder, but 'file' is none."),
        ("link", True, "--to must be a folder, but 'link' is none."),
        ("folder", False, "--to must be a file, but 'folder' is a folder."),
        ("file/deep/run", True, r"--to is 'file/deep/run', but '.*/file' is no folder."),
        ("link/run", True, r"--to is 'link/run', but '.*/link' is no folder."),
        ("file/a.png", False, r"--to is 'file/a.png', but '.*/file' is no folder."),
        ("/proc/run", True, "--to is '/proc/run', which cannot be written: .+"),
        ("/proc/a.png", False, "--to is '/proc/a.png', which cannot be written: .+"),
        ("new/" + "long" * 100, True, "--to is 'new/long.*long', which cannot be written: File name too long."),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_by_the_flag_that_names_it(
    tmp_path, monkeypatch, path, is_folder, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        check_output("--to", path, is_folder=is_folder)
    assert sorted(os.listdir()) == ["file", "folder", "link"] and not os.listdir("folder")


def test_a_place_that_can_be_written_is_found_so_without_a_trace(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here/file").touch()
    for path, is_folder in (
        ("file", False),
        (".", True),
        ("new/run", True),
        ("new/a.png", False),
        ("new/../../b", True),
    ):
        check_output("--to", path, is_folder=is_folder)
    assert os.listdir() == ["file"] and os.listdir("..") == ["here"]
