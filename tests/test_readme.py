"""The README is short, and every figure in it, in the pages of the site and in the model cards is the one its JSON holds."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_dualrate import UViTContextEncoder, UViTDenoiser, plan_refreshes
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.flops import training_image_flops
from diffusers_dualrate.models import SINGLE_RATE
from diffusers_dualrate.recipes import PairRecipe, SingleRateRecipe
from research import arms, gains, networks, report, study

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "model_cards").iterdir())
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_at_most_1400_words_and_200_lines():
    assert len(README.split()) <= 1400 and len(README.splitlines()) <= 200


def test_the_first_screen_says_what_it_is_for_whom_what_one_gains_and_for_whom_not():
    opening = README[: README.index("![")]
    for words in ("heavy network", "**For you**", "**You gain**", "**Not for you**"):
        assert words in opening
    claimed = [float(x) for x in re.search(r"([\d.]+) to ([\d.]+) times fewer FLOPs", opening).groups()]
    found = json.loads(gains.GAINS.read_text(encoding="utf-8"))
    fewer = [row["times_fewer_flops"] for row in found["pairs"]]
    assert claimed == [round(min(fewer), 1), round(max(fewer), 1)]
    ratios = [row["distance_ratio"]["mean"] for row in found["pairs"]]
    low, high = (f"{ratio(ratios):.2f}".removeprefix("0") for ratio in (min, max))
    assert f"needs {claimed[0]} to {claimed[1]} times fewer FLOPs for {low} to {high} times the distance" in README
    students = found["students"]
    assert all(row["times_fewer_flops"] > 2 for row in students)  # half the FLOPs ...
    assert [row["distance_ratio"]["mean"] < 1 for row in students] == [True, True, False, True]  # ... on three of four


def test_every_claim_of_gain_is_what_the_points_of_the_study_give():
    found = gains.compute(*map(gains.read, (gains.STUDY, gains.TIMING, gains.SIX_STEPS, gains.EARLIER, *gains.EMOJI)))
    assert json.loads(json.dumps(found)) == gains.read(gains.GAINS), "run: python -m research.gains"
    tables = gains.write_tables(found)
    shown = set()
    for page in gains.PAGES:
        text = page.read_text(encoding="utf-8")
        for name, table in tables.items():
            if f"<!-- {name}: begin -->" in text:
                assert f"<!-- {name}: begin -->\n\n{table}\n\n<!-- {name}: end -->" in text, (
                    "run: python -m research.gains"
                )
                shown.add((page.name, name))
    assert {name for _, name in shown} == set(tables) and ("README.md", "prompts") in shown


def test_a_gain_is_computed_from_points_as_one_would_by_hand():
    """Mutants: the ratio inverted, seeds paired wrongly, another budget's points let in."""
    point = {"data": "digits", "budget": "steps", "solver": "ancestral", "sampling_seed": 0, "training_flops": 10}
    heavy = [
        point | {"arm": "single-rate", "N": 2, "K": None, "seed": s, "flops": 40, "fd": fd}
        for s, fd in ((1, 2.0), (2, 4.0))
    ]
    heavy += [point | {"arm": "single-rate", "N": 1, "K": None, "seed": s, "flops": 20, "fd": 8.0} for s in (1, 2)]
    pair = [
        point | {"arm": "dual-rate", "N": 2, "K": 1, "seed": s, "flops": 10, "fd": fd}
        for s, fd in ((2, 2.0), (1, 3.0))
    ]
    light = [point | {"arm": "single-rate-light", "N": 2, "K": None, "seed": 1, "flops": 4, "fd": 9.0}]
    longer = [point | {"arm": "dual-rate", "budget": "flops", "N": 2, "K": 1, "seed": 1, "flops": 10, "fd": 0.1}]
    row = gains.compare_pair(gains.collect({"points": heavy + pair + light + longer}), "digits", 2, 1)
    assert row["times_fewer_flops"] == 4
    assert row["distance_ratio"]["values"] == [1.5, 0.5] and row["pair"]["fd"]["mean"] == 2.5
    assert row["flops_of_heavy_at_equal_distance"] is None and row["light"]["fd"]["std"] is None


def test_on_letters_four_steps_of_the_heavy_network_come_as_low_as_the_pair():
    points = gains.collect(gains.read(gains.STUDY))
    (row,) = [row for row in gains.read(gains.GAINS)["pairs"] if row["pair"]["data"] == "letters"]
    four = gains.describe(points, ("letters", "single-rate", "steps", "ancestral", 4, None))
    assert four["fd"]["mean"] <= row["pair"]["fd"]["mean"] and "with four of its own steps" in README


def test_the_page_of_gains_says_what_the_light_network_reaches_on_emoji():
    points, text = gains.collect(gains.read(gains.STUDY)), (ROOT / "docs" / "gains.md").read_text(encoding="utf-8")
    light, heavy = (
        gains.describe(points, ("emoji32", arm, "steps", "ancestral", 16, None))["fd"]["mean"]
        for arm in ("single-rate-light", "single-rate")
    )
    assert f"with 16 ancestral steps, it has {light:.2f} where the heavy network has {heavy:.2f}" in text


def test_the_picture_repeats_what_the_cards_measured():
    record = json.loads((ROOT / "docs" / "images" / "comparison.json").read_text(encoding="utf-8"))
    student, pair = (json.loads((card / "evaluation.json").read_text()) for card in reversed(CARDS))
    measured = [pair["rivals"]["single_rate_heavy"]["samples"][0], pair["samples"][0], student["samples"][0]]
    for row, sample in zip(record["rows"].values(), measured, strict=True):
        assert row["fd_local_500"] == sample["fd_local_500"]
        assert row["gflop"] * 1e9 == pytest.approx(sample["flops_with_guidance"])
        counted = sample["evaluations"]
        heavy, light = counted["context_encoder"], counted["denoiser"]
        assert (row["heavy"], row["light"]) == ((heavy, light) if heavy else (light, 0)) and row["milliseconds"] > 0
    assert (ROOT / "docs" / "images" / "comparison.png").stat().st_size < 400e3


def test_figures_that_stand_in_sentences_are_those_of_their_records():
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    fewer = [row["times_fewer_flops"] for row in gains.read(gains.GAINS)["pairs"]]
    assert f"for {min(fewer):.1f} to {max(fewer):.1f} times fewer FLOPs" in (ROOT / "docs" / "hooks.py").read_text()
    presets = {name: json.loads((ROOT / f"examples/presets/{name}.json").read_text()) for name in ("quick", "emoji64")}
    size, steps = presets["quick"]["denoiser"]["sample_size"], presets["quick"]["training"]["max_train_steps"]
    assert f"{size} pixels and {steps} steps" in pages["folder-to-hub.md"]
    sampling = presets["emoji64"]["sampling"]
    words = "N = {num_inference_steps}, K = {num_context_steps}, guidance {guidance_scale:g}".format(**sampling)
    assert f"{words}, second order" in pages["models.md"] and sampling["second_order"]
    images = f"{gains.read(CARDS[0] / 'evaluation.json')['data']['images']:,}"
    assert f"{images} drawings of emoji" in README and f"{images} drawings" in pages["models.md"]


def test_what_sentences_say_of_the_models_of_text_is_what_their_records_hold():
    pair, student = (gains.read(card / "evaluation.json") for card in CARDS)
    teacher = student["rivals"]["single-rate-emoji64"]
    six = gains.read(gains.SIX_STEPS)
    far, near, goal, short = (
        f"{record['samples'][0]['fd_local_500']['mean']:.1f}" for record in (pair, student, teacher, six)
    )
    page, distillation = ((ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("models", "distillation"))
    assert f"distance of {near} for {goal}" in README and f"than the undistilled pair, {short} for {far}." in README
    assert f"than the pair:** {short} for {far}." in page and f"nearer than either, at {near}," in page
    recalls = [f"{record['samples'][0]['recall_local_500']['mean']:.0%}" for record in (student, teacher)]
    assert "On `emoji64` it is {} for {}".format(*recalls).replace("%", " %") in distillation

    earlier = gains.read(gains.EARLIER)
    heavy, light = (
        f"{(student['rivals'][name]['training_flops'] + earlier[name]['training_flops']) / 1e12:.0f}"
        for name in ("single-rate-emoji64", "dualrate-emoji64")
    )
    cards = [(card / "README.md").read_text("utf-8") for card in CARDS]
    assert f"({heavy} TFLOP)" in cards[0] and f"({light} TFLOP)" in cards[0]
    assert f"{heavy} and {light} TFLOP in all" in cards[1] and f"*fd_local* is {short} for {far}." in cards[0]


def test_what_stricter_judges_accepted_and_what_students_lost_are_what_their_records_hold():
    judged = {}
    for row in gains.read(ROOT / "research/emoji64-viewer.json")["rows"]:
        judged.setdefault((row["model"], row["list"]), []).append(row)
    assert {len(rows) for rows in judged.values()} == {3}

    def share(*key, texts="right"):
        return fmean(len(row[f"{texts}_accepted"]) / row[texts] for row in judged[key])

    pair, student, heavy = "dualrate-emoji64", "dualrate-emoji64-distilled", "single-rate-emoji64"
    each = [len(row["right_accepted"]) / row["right"] for row in judged[pair, "seen"]]
    said = "accepted {:.0%} of the right texts and {:.0%} of the wrong ones. The strictest accepted {:.0%} of the right ones, the kindest {:.0%}. "
    said += "For the student it was {:.0%}, for the heavy network {:.0%}, for the drawings themselves {:.0%}. "
    said += "Of held-out prompts it was {:.0%} for the pair, of those never drawn {:.0%}."
    figures = [share(pair, "seen"), share(pair, "seen", texts="wrong"), min(each), max(each), share(student, "seen")]
    figures += [share(heavy, "seen"), share("drawings", "seen"), share(pair, "held_out"), share(pair, "novel")]
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert said.format(*figures).replace("%", " %") in page
    seen, _, _, _, distilled, _, _, held_out, novel = (f"{figure:.0%}".replace("%", " %") for figure in figures)
    assert f"accept {seen[:-2]}, {held_out[:-2]} and {novel} of the pair's drawings, and {distilled} of the" in README
    cards = [(card / "README.md").read_text(encoding="utf-8") for card in CARDS]
    assert f"accepted {seen} of the right texts" in cards[0] and f"accepted {distilled} of the right" in cards[1]
    assert f"Of held-out prompts they accepted {held_out}, of those never drawn {novel}." in cards[0]
    student = gains.read(gains.EMOJI[0])
    ways = student["samples"][0], student["rivals"]["single-rate-emoji32"]["samples"][0]
    recalls = "{:.0%} for the teacher's {:.0%}".format(*(way["recall_local_500"]["mean"] for way in ways))
    assert recalls.replace("%", " %") in (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")


def test_the_tables_of_the_comparison_that_are_written_by_hand_have_the_points_of_the_study():
    points, text = gains.collect(gains.read(gains.STUDY)), (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    found = {}
    for n in (8, 10, 12, 16):
        found[f"| {n}/{n // 2} |"] = ("emoji32", "dual-rate", "steps", "dpmsolver++", n, n // 2)
    for n in (8, 10):
        found[f"| T-Stitch {n}/{n // 2} |"] = (
            "digits",
            "stitching",
            "steps",
            "sde-dpmsolver++",
            n,
            n // 2,
        )
    for arm in ("dual-rate-converted-spared", "dual-rate-half-fresh"):
        budget = next(key[2] for key in points if key[:2] == ("digits", arm))
        found[f"| `{arm}` 10/5 |"] = ("digits", arm, budget, "sde-dpmsolver++", 10, 5)
    for start, key in found.items():
        point = gains.describe(points, key)
        (row,) = [line for line in text.splitlines() if line.startswith(start)]
        digits, spread = (2 if key[0] == "emoji32" else 3), row.split("|")[3].strip().partition(" ± ")[2]
        figures = [f"{point['flops'] / 1e6:,.0f}", f"{point['fd']['mean']:.{digits}f}".removeprefix("0")]
        if spread:
            figures[1] += f" ± {point['fd']['std']:.{digits}f}".replace(" 0.", " .")
        assert [cell.strip() for cell in row.split("|")[2:4]] == figures
    eight = gains.describe(points, ("emoji32", "single-rate", "steps", "dpmsolver++", 8, None))["fd"]["mean"]
    assert f"eight steps of DPM-Solver++ have {eight:.2f}" in text


@pytest.mark.slow
def test_what_the_page_of_trainings_says_of_their_cost_is_what_the_networks_of_the_presets_take():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [name for name, *_ in shown] == ["imagenet64", "imagenet128", "emoji32", "letters16", "digits8"]
    for name, *figures in shown:
        (path,) = ROOT.glob(f"*/presets/{name}.json")
        preset = json.loads(path.read_text())
        with torch.device("meta"):
            heavy = UViTDenoiser(**preset["context_encoder"] | SINGLE_RATE)
            pair = UViTDenoiser(**preset["denoiser"]), UViTContextEncoder(**preset["context_encoder"])
        told = preset["training"] | {"augmentation": Augmentation()}
        single = {field.name for field in dataclasses.fields(SingleRateRecipe)}
        alone = training_image_flops(heavy, None, SingleRateRecipe(**{key: told[key] for key in single & told.keys()}))
        ways = ({}, {"context_dropout": 0.5}, {"follow_encoder": True})
        taken = [training_image_flops(*pair, PairRecipe(**told | {"context_dropout": 0.0} | way)) for way in ways]
        assert figures == [f"{flops / alone:.2f}" for flops in taken], name


def test_what_the_quick_preset_took_is_what_its_run_recorded():
    record = json.loads((ROOT / "docs" / "images" / "quick.json").read_text(encoding="utf-8"))
    seconds = f"{record['training']['seconds']:.0f} seconds on one CPU core"
    for page in (README, (ROOT / "docs" / "folder-to-hub.md").read_text(encoding="utf-8")):
        assert seconds in page and f"{record['images']} emoji" in page and record["command"] in page
    page = (ROOT / "docs" / "folder-to-hub.md").read_text(encoding="utf-8")
    later = record["seconds_of_what_follows"]
    assert (
        "the classifier {train_classifier}, the evaluation {evaluate} and the card {make_card}".format(**later) in page
    )
    assert f"For {record['class_of_nearest_192']['mean']:.0%}".replace("%", " %") in page
    recipe = json.loads((ROOT / "examples" / "presets" / "quick.json").read_text())["training"]
    assert record["training"]["images_seen"] == recipe["max_train_steps"] * recipe["train_batch_size"]


def test_each_tick_of_the_readme_names_a_test_that_holds_it():
    table = README[README.index("## Works with diffusers") : README.index("## What we found")]
    rows = re.findall(r"^\| (.+?) \| (✓|refused) \| \[(\w+)\]\((.+?)\) \|$", table, re.MULTILINE)
    words = {
        "DPM-Solver++": "DPMSolverMultistepScheduler",
        "LoRA": "add_adapter",
        "compile": "compile_repeated_blocks",
        "offload": "enable_group_offload",
        "TaylorSeer": "TaylorSeerCacheConfig",
        "Hub": "custom_pipeline",
        "Modular": "DualRateBlocks",
        "prompts": "negative_prompt",
        "--vae": "--vae",
        "your own": "follow",
    }
    assert len(rows) == len(words) == table.count("| ✓ |") + table.count("| refused |")
    for feature, _, name, path in rows:
        assert path == f"tests/{name}.py"
        (word,) = [word for start, word in words.items() if feature.strip("`").startswith(start)]
        assert word in (ROOT / path).read_text(encoding="utf-8"), feature


@pytest.mark.slow
def test_the_apple_of_the_readme_is_what_its_snippet_draws(tmp_path):
    (code,) = [code for code in blocks(ROOT / "README.md", "python") if "apple.png" in code]
    run_python(code, tmp_path)
    drawn, shown = (
        np.asarray(Image.open(path), dtype=float) for path in (tmp_path / "apple.png", ROOT / "docs/images/apple.png")
    )
    assert np.abs(drawn - shown).mean() < 2  # other machines round otherwise


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def run_python(code, folder):
    """Run a block in a fresh process and folder, where the repository's model_cards are at hand."""
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_snippet_of_a_card_runs(card, tmp_path):
    (code,) = blocks(card / "README.md", "python")
    run_python(code, tmp_path)


def test_the_published_points_are_found_again_by_the_code_as_it_stands(tmp_path, monkeypatch):
    """Whatever decides a point, a preset, a recipe, steps or a classifier, has not changed since, so `--measured` takes it.

    What a step of training costs is read off the points, which takes no training.
    """
    published = ROOT / "research/study.json"
    command = shlex.split(json.loads(published.read_text())["command"])
    flags = command[next(i for i, word in enumerate(command) if word.startswith("--")) :]
    costs = {}
    for point in json.loads(published.read_text())["points"]:
        arm = arms.ARMS[point["arm"]]
        if arm.beside is None and not networks.TRAININGS[arm.training].starts:
            batch = networks.make_preset(point["data"], arm.training)["training"]["train_batch_size"]
            costs[point["data"], arm.training] = point["training_flops"] * batch // point["training_images"]
    monkeypatch.setattr(networks, "step_flops", lambda args, data, training: costs[data, training])
    args = study.parse_args([*flags, "--work_dir", str(tmp_path)])
    measured = study.read_measured(published)
    series = study.list_series(args)
    assert len(series) > 100 and all(study.is_measured(args, key, measured) for key in series)


def test_the_page_of_the_comparison_shows_the_study_that_its_json_holds():
    study = json.loads((ROOT / "research/study.json").read_text())
    table = f"{report.MARKERS[0]}\n\n{report.write_table(study)}\n\n{report.MARKERS[1]}"
    assert table in (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8"), (
        "run: python -m research.study --output research/study.json --report_only --readme docs/comparison.md, with the arms and data of the file"
    )
    assert (ROOT / "research/study.md").read_text(encoding="utf-8") == report.write_points(study)
    assert (ROOT / "research/study.png").is_file()
    assert "/tmp" not in study["command"] and study["commit"]
    for point in study["points"]:
        floor = study["floors"][point["data"]]
        assert point["n"] == floor["n"] and point["fd"] > 0 and point["flops"] > 0 and point["training_flops"] > 0
        n, k, evaluations = point["N"], point["K"], point["evaluations"]
        arm = arms.ARMS[point["arm"]]
        assert evaluations.pop("denoiser") == (n - k if arm.sample is arms.sample_spared else n)
        assert evaluations.pop("light", None) == (n - k if arm.beside else None)
        assert set(evaluations.values()) == (set() if k is None else {k})


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_no_file_of_a_model_names_a_path_of_the_machine_it_was_made_on(card):
    for path in [*card.rglob("*.json"), *card.rglob("*.md")]:
        assert not re.search(r'["\s]/[a-z]+/', path.read_text()), path


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_has_what_the_hub_asks_for(card):
    data = ModelCard.load(card / "README.md").data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image" and "text-to-image" in data["tags"]
    assert "dual-rate-diffusion" in data["tags"]
    for name in ("tags", "metrics"):  # what the Hub shows as links: lists of identifiers
        assert data[name] and all(re.fullmatch(r"[a-z0-9][\w.:-]*", entry) for entry in data[name])


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_model_folder_is_the_content_of_a_hub_repository(card):
    files = {str(path.relative_to(card)) for path in card.rglob("*") if path.is_file()}
    names = json.loads((card / "model_index.json").read_text())
    networks = [name for name in ("context_encoder", "denoiser", "vae") if names.get(name, [None])[0]]
    expected = {"README.md", "model_index.json", "evaluation.json", "training.json", "notes.json", "samples.png"}
    expected |= {"configuration.json"}
    expected |= {"pipeline.py", "scheduler/scheduler_config.json", "scheduler/diffusers_dualrate.py"}
    expected |= {f"samples-{name}.png" for name in ("seen", "held_out", "novel")}
    expected |= {f"text_encoder/{file}" for file in ("config.json", "model.safetensors")}
    expected |= {f"tokenizer/{file}" for file in ("tokenizer.json", "tokenizer_config.json")}
    expected |= {
        f"{name}/{file}" for name in networks for file in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    expected |= {f"{name}/diffusers_dualrate.py" for name in networks if names[name][0] == "diffusers_dualrate"}
    assert files == expected
    assert sum(path.stat().st_size for path in card.rglob("*") if path.is_file()) < 14e6


def test_the_diagram_of_two_rates_is_what_a_plan_prints():
    for page in (README, (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")):
        assert f"```text\n{plan_refreshes(8, 2)}\n```" in page


def test_where_late_contexts_are_ahead_is_what_the_table_of_the_study_says():
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    letters = page[page.index("**letters** – ") :]
    rows = [line.split(" | ") for line in letters.splitlines() if line.startswith("| flops | dual-rate-late sde")]
    below = [int(row[2]) for row in rows if row[-1] == "below |"]
    assert below == [39, 42, 59]
    assert f"at {below[0]}, {below[1]} and {below[2]} MFLOP" in README
    log = (ROOT / "docs" / "hooks.py").read_text(encoding="utf-8")
    assert (
        f"{below[0]}, {below[1]} and {below[2]} MFLOP" in page
        and f"{below[0]}, {below[1]} and {below[2]} MFLOP" in log
    )
