"""Every code block of the README runs, and every figure in it and in the model cards is the one its JSON holds."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import distill
import train_dual_rate
import train_single_rate
from research import arms, networks, report, study

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "model_cards").iterdir())
SCRIPTS = {f"examples/{module.__name__}.py": module for module in (train_dual_rate, train_single_rate, distill)}


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def run_python(code, folder):
    """Run a block in a fresh process and folder, where the repository's model_cards are at hand."""
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_readme_has_only_blocks_that_these_tests_run():
    languages = re.findall(r"^```(\w+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(languages) == {"bash", "python", "text", "bibtex"}


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks(ROOT / "README.md", "python"))
def test_a_python_block_of_the_readme_runs(code, tmp_path):
    run_python(code, tmp_path)
    if "fruit.png" in code:
        assert Image.open(tmp_path / "fruit.png").size == (256, 256)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_snippet_of_a_card_runs(card, tmp_path):
    (code,) = blocks(card / "README.md", "python")
    run_python(code, tmp_path)


def shell_commands():
    lines = "".join(blocks(ROOT / "README.md", "bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("command", shell_commands(), ids=lambda command: " ".join(command[:3]))
def test_a_shell_command_of_the_readme_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if command == ["make", "test"]:  # this very test is part of it
        subprocess.run(["make", "-n", "test"], check=True, capture_output=True)
    elif command == ["make", "demo"]:  # its last line, in the environment at hand
        recipe = subprocess.run(
            ["make", "--no-print-directory", "-n", "demo"], check=True, capture_output=True, text=True
        ).stdout
        _, *arguments = shlex.split(recipe.strip().splitlines()[-1])
        arguments[-1] = str(tmp_path / arguments[-1])
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert (
            "single-rate, DPM-Solver++" in result.stdout
            and "distilled" in result.stdout
            and Image.open(tmp_path / "demo.png").width > 1000
        )
    elif command[:2] == ["pip", "install"]:
        offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(tmp_path / "site")]
        source = shutil.copytree(ROOT / "src", tmp_path / "source" / "src")  # builds leave files beside their source
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, source.parent)
        assert command[2:] == ["."]
        subprocess.run([sys.executable, "-m", "pip", "install", *offline, str(source.parent)], check=True)
        assert (tmp_path / "site" / "diffusers_dualrate" / "py.typed").is_file()
    else:
        assert command[:2] == ["accelerate", "launch"]
        script, arguments = SCRIPTS[command[2]], command[3:]
        images = tmp_path / "images"
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            (images / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(images / f"class {i % 2}" / f"{i}.png")
        here = {"path/to/images": str(images), "runs/": f"{tmp_path}/runs/"}
        arguments = [here.get(word, word.replace("runs/", here["runs/"])) for word in arguments]
        tiny = ["--max_train_steps", "1", "--train_batch_size", "8", "--validation_steps", "0"]
        script.main(script.parse_args([*arguments, *tiny, "--cache_dir", str(tmp_path / "cache")]))
        output = Path(arguments[arguments.index("--output_dir") + 1])
        assert (output / "model_index.json").is_file()


def test_the_readme_repeats_the_figures_of_the_cards():
    text = (ROOT / "README.md").read_text()
    nearest_of = re.search(r"of (\d+) samples, how many", text).group(1)
    evaluations = {card.name: json.loads((card / "evaluation.json").read_text()) for card in CARDS}
    shown = [(f"| [{name}]", evaluation["samples"][0], evaluation) for name, evaluation in evaluations.items()]
    solvers = evaluations["single-rate-emoji32"]["samples"]
    shown += [(f"|  | the same under DPM-Solver++, N = {s['num_inference_steps']}", s, None) for s in solvers[2:]]
    for start, samples, evaluation in shown:
        (row,) = [line for line in text.splitlines() if line.startswith(start)]
        distance, recall, nearest = (
            samples[f"{name}_{nearest_of}"] for name in ("fd_local", "recall_local", "class_of_nearest")
        )
        figures = [f"{samples['flops_with_guidance'] / 1e9:.2f}", f"{distance['mean']:.2f} ± {distance['std']:.2f}"]
        figures += [f"{recall['mean']:.0%}".replace("%", " %"), f"{nearest['mean']:.1%}".replace("%", " %")]
        if evaluation is not None:  # a student has no v-loss
            figures += [f"{evaluation['v_loss']['model']:.4f}" if "v_loss" in evaluation else "–"]
        assert [cell.strip() for cell in row.split("|")[3 : 3 + len(figures)]] == figures
        assert f"N = {samples['num_inference_steps']}" in row
    pair = evaluations["dualrate-emoji32"]
    assert f"K = {pair['samples'][0]['num_context_steps']}" in text
    fresh = f"{pair['floor'][f'class_of_nearest_{nearest_of}']['mean']:.1%}".replace("%", " %")
    assert f"training\nimages it is {fresh}" in text


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


def test_the_readme_shows_the_study_that_its_json_holds():
    study = json.loads((ROOT / "research/study.json").read_text())
    table = f"{report.MARKERS[0]}\n\n{report.write_table(study)}\n\n{report.MARKERS[1]}"
    assert table in (ROOT / "README.md").read_text(), (
        "run: python -m research.study --output research/study.json --report_only --readme README.md, with the arms and data of the file"
    )
    assert (ROOT / "research/study.md").read_text(encoding="utf-8") == report.write_points(study)
    assert (ROOT / "research/study.png").is_file()
    assert "/tmp" not in study["command"] and study["commit"]
    for point in study["points"]:
        floor = study["floors"][point["data"]]
        assert point["n"] == floor["n"] and point["fd"] > 0 and point["flops"] > 0 and point["training_flops"] > 0
        n, k, evaluations = point["N"], point["K"], point["evaluations"]
        assert evaluations.pop("denoiser") == (n - k if point["arm"].endswith("-spared") else n)
        assert evaluations.pop("light", None) == (n - k if point["arm"] == "stitching" else None)
        assert set(evaluations.values()) == (set() if k is None else {k})


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_no_file_of_a_model_names_a_path_of_the_machine_it_was_made_on(card):
    for path in [*card.rglob("*.json"), *card.rglob("*.md")]:
        assert not re.search(r'["\s]/[a-z]+/', path.read_text()), path


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_has_what_the_hub_asks_for(card):
    data = ModelCard.load(card / "README.md").data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert "dual-rate-diffusion" in data["tags"]
    for name in ("tags", "datasets", "metrics"):  # what the Hub shows as links: lists of identifiers
        assert data[name] and all(re.fullmatch(r"[a-z0-9][\w.:-]*", entry) for entry in data[name])


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_model_folder_is_the_content_of_a_hub_repository(card):
    files = {str(path.relative_to(card)) for path in card.rglob("*") if path.is_file()}
    names = json.loads((card / "model_index.json").read_text())
    networks = [name for name in ("context_encoder", "denoiser") if names.get(name, [None])[0]]
    expected = {"README.md", "model_index.json", "evaluation.json", "training.json", "notes.json", "samples.png"}
    expected |= {"pipeline.py", "scheduler/scheduler_config.json", "scheduler/diffusers_dualrate.py"}
    expected |= {
        f"{name}/{file}"
        for name in networks
        for file in ("config.json", "diffusion_pytorch_model.safetensors", "diffusers_dualrate.py")
    }
    assert files - {"comparison.png"} == expected
    assert sum(path.stat().st_size for path in card.rglob("*") if path.is_file()) < 10e6
