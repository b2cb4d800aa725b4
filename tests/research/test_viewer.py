"""research.viewer: the viewer sees each drawing once, half of them under another's text, and answers count for the right places."""

import json

import pytest
from PIL import Image

from diffusers_dualrate.pictures import draw_grid
from research import viewer


@pytest.mark.parametrize("seed", ["pair seen 1", "pair seen 2"])
def test_half_of_the_texts_are_another_drawing_s_and_the_rest_its_own(seed):
    prompts = viewer.read_prompts("seen")
    texts, wrong, order = viewer.mislead(prompts, seed)
    assert [i for i in range(100) if texts[i] != prompts[i]] == wrong and len(wrong) == 50
    assert sorted(texts) == sorted(prompts) and sorted(order) == list(range(100)) != order


def test_each_judge_is_misled_elsewhere_and_in_each_picture(tmp_path):
    """One that saw a model's clear drawings would else know which texts of another's are wrong."""
    keys = []
    for model, judge in (("heavy", 1), ("heavy", 2), ("pair", 1)):
        (tmp_path / model).mkdir(exist_ok=True)
        draw_grid([Image.new("RGB", (64, 64))] * 30, viewer.read_prompts("novel"), 10, 128, lines=2).save(
            tmp_path / model / "samples-novel.png"
        )
        viewer.write_pages(tmp_path / model / "samples-novel.png", judge, tmp_path / f"{model}-{judge}")
        keys.append(json.loads((tmp_path / f"{model}-{judge}.key.json").read_text()))
    assert len({str(key["wrong"]) for key in keys}) == len({str(key["order"]) for key in keys}) == 3


def test_drawings_are_cut_as_the_grid_laid_them_and_answers_count_at_their_places(tmp_path):
    """Mutants: the name's height left out, the order read backwards, numbers counted from 0."""
    prompts = viewer.read_prompts("novel")
    drawings = [Image.new("RGB", (64, 64), (i, 2 * i, 3 * i)) for i in range(len(prompts))]
    (tmp_path / "model").mkdir()
    picture = tmp_path / "model" / "samples-novel.png"
    draw_grid(drawings, prompts, 10, 128, lines=2).save(picture)
    found = viewer.cut(Image.open(picture), len(prompts))
    assert [image.getcolors() for image in found] == [[(128 * 128, (i, 2 * i, 3 * i))] for i in range(len(prompts))]

    viewer.write_pages(picture, 3, tmp_path / "pages")
    key = json.loads((tmp_path / "pages.key.json").read_text())
    page, place = Image.open(tmp_path / "pages" / "2.png"), key["order"][20 + 6]  # seventh drawing of the second page
    left, top = viewer.SHOWN + viewer.LINE, viewer.SHOWN + 3 * viewer.LINE
    assert page.getpixel((left + 9, top + 9)) == (place, 2 * place, 3 * place)
    lines = (tmp_path / "pages" / "texts.txt").read_text().splitlines()
    texts = dict(line.split(". ", 1) for line in lines[2:])
    yes = [number for number, place in enumerate(key["order"], 1) if texts[str(number)] == prompts[place]]
    row = viewer.count(key, yes)
    assert row["right_accepted"] == [i for i in range(30) if i not in key["wrong"]] and row["wrong_accepted"] == []
    assert (row["model"], row["list"], row["judge"], row["right"], row["wrong"]) == ("model", "novel", 3, 15, 15)
    row = viewer.count(key, [1, 1, 30])
    assert sorted(row["right_accepted"] + row["wrong_accepted"]) == sorted([key["order"][0], key["order"][29]])
    for number in (0, 31):
        with pytest.raises(ValueError, match=f"numbered from 1 to 30, but got {number}"):
            viewer.count(key, [1, number])


def test_what_cannot_be_shown_or_would_be_overwritten_is_refused_in_one_sentence(tmp_path):
    picture = tmp_path / "model" / "samples-novel.png"
    with pytest.raises(ValueError, match="There is no picture"):
        viewer.write_pages(picture, 1, tmp_path / "pages")
    with pytest.raises(ValueError, match="a list of held_out, novel, seen"):
        viewer.write_pages(picture.with_stem("samples"), 1, tmp_path / "pages")
    with pytest.raises(ValueError, match="no drawing of"):
        viewer.decode(viewer.ROOT, picture)
    picture.parent.mkdir()
    draw_grid([Image.new("RGB", (64, 64))] * 30, viewer.read_prompts("novel"), 10, 128, lines=2).save(picture)
    viewer.write_pages(picture, 1, tmp_path / "pages")
    with pytest.raises(ValueError, match="has pages already"):
        viewer.write_pages(picture, 2, tmp_path / "pages")


def test_a_judge_s_second_answer_replaces_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "RECORD", tmp_path / "record.json")
    viewer.RECORD.write_text('{"question": "?", "rows": []}')
    row = {"model": "m", "list": "seen", "judge": 2, "right_accepted": [1]}
    for entered in (row, row | {"judge": 1}, row | {"right_accepted": [7]}):
        viewer.enter(entered)
    record = json.loads(viewer.RECORD.read_text())
    assert [(r["judge"], r["right_accepted"]) for r in record["rows"]] == [(1, [1]), (2, [7])]
    assert record["question"] == "?"
