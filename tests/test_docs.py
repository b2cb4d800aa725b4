"""Every command and snippet of the README and of the pages of the site runs, shrunken, page by page."""

import html
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import diffusers_dualrate
from conftest import reset_accelerate
from loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHRUNKEN = {  # flags that come last, and so win
    "train_dual_rate": ["--max_train_steps", "1", "--train_batch_size", "8", "--validation_steps", "0"],
    "train_single_rate": ["--max_train_steps", "1", "--train_batch_size", "8", "--validation_steps", "0"],
    "distill": ["--max_train_steps", "1", "--train_batch_size", "8", "--validation_steps", "0"],
    "train_classifier": ["--max_train_steps", "2", "--held_out", "0.25"],
    "evaluate": ["--num_samples", "8", "--num_noises", "8", "--num_inference_steps", "2", "--num_context_steps", "1"],
    "generate": ["--num_columns", "2", "--num_images_per_class", "1"],
    "make_card": [],
    "benchmark": ["--batch_size", "1", "--repeats", "2"],
}


def blocks(path):
    """(language, text) of every fenced block of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_python(code, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def run_script(words, folder):
    """A script of the examples, in this process, as a reader's shell would call it in the repository."""
    name, arguments = Path(words[0]).stem, words[1:]
    script = importlib.import_module(name)
    cache = [] if name in ("generate", "make_card", "benchmark") else ["--cache_dir", str(folder / "cache")]
    script.main(script.parse_args([*arguments, *SHRUNKEN[name], *cache]))
    reset_accelerate()


def run_demo(folder):
    """The last line of `make demo`, in the environment at hand."""
    recipe = subprocess.run(["make", "--no-print-directory", "-n", "demo"], cwd=ROOT, check=True, capture_output=True, text=True)  # fmt: skip
    _, *words = shlex.split(recipe.stdout.strip().splitlines()[-1])
    run_script([*words[:-1], str(folder / words[-1])], folder)
    assert Image.open(folder / "demo.png").width > 100


def install(folder):
    """`pip install .`, without what it depends on, from a copy: builds leave files beside their source."""
    source = shutil.copytree(ROOT / "src", folder / "source" / "src")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source.parent)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, str(source.parent)], check=True)
    assert (folder / "site" / "diffusers_dualrate" / "py.typed").is_file()


def upload(words, folder):
    """A command that publishes, to a Hub on this machine, which then holds a Space, or model, card and measurement."""
    with LoopbackHub() as hub:
        environment = hub.environment(folder / "huggingface") | {"PYTHONPATH": str(ROOT / "src")}
        program = {"hf": str(Path(sys.executable).with_name("hf")), "python": sys.executable}[words[0]]
        command = [program, *words[1:]]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        (repository,) = hub.repositories.values()
        _, files = repository.find("main")
    if "space" in words:
        assert {"README.md", "app.py", "requirements.txt", "diffusers_dualrate/__init__.py"} <= set(files)
        return
    assert {"README.md", "evaluation.json", "samples.png", "model_index.json", "training.json"} <= set(files)
    assert not [name for name in files if name.startswith("checkpoint")]


def run_command(line, folder):
    words = shlex.split(line, comments=True)
    if words == ["make", "test"]:  # this very test is part of it
        subprocess.run(["make", "-n", "test"], cwd=ROOT, check=True, capture_output=True)
    elif words == ["make", "demo"]:
        run_demo(folder)
    elif words[:2] == ["pip", "install"]:
        assert words[2:] in ([".[train,eval]"], [".[app]"])
        install(folder)
    elif words == ["make", "space"]:
        subprocess.run(["make", "space", f"SPACE={folder}/build/space"], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == [
        "python",
        "examples/app.py",
    ]:  # up to where it is served: tests/test_app.py opens it in a browser
        script = importlib.import_module("app")
        script.make_page(script.parse_args(words[2:]))
    elif words[:2] == ["hf", "upload"] or "--push_to_hub" in words:
        upload(words, folder)
    else:
        launcher = 2 if words[0] == "accelerate" else 1
        assert words[:launcher] in (["accelerate", "launch"], ["python"]), line
        run_script(words[launcher:], folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository of a reader's, with four images in two classes."""
    for name in ("examples", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        place = tmp_path / "images" / ("heart", "time")[i % 2] / f"{i:04}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "X")  # what the pages call a model of diffusers
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_the_other(page, folder):
    for language, text in blocks(page):
        if language == "python":
            run_python(text, folder)
        elif language == "bash":
            for line in filter(str.strip, text.splitlines()):
                run_command(line, folder)
    if page.name == "README.md":
        assert Image.open("apple.png").size == (128, 128) and Path("my-pair/model_index.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_only_blocks_that_these_tests_know(page):
    assert {language for language, _ in blocks(page)} <= {"bash", "python", "text", "bibtex"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_that_there_are(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_sentence_of_a_page_has_at_most_25_words(page):
    text = page.read_text(encoding="utf-8")
    generated = r"<!-- (\w+): begin -->.*?<!-- \1: end -->"
    text = re.sub(rf"{generated}|```.*?```|<!--.*?-->|\\\[.*?\\\]", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if line.strip() and line.strip()[0] not in "|#!<["]
    for line in lines:
        if line.startswith("    "):
            continue
        line = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line).replace("**", "")
        for sentence in re.split(r"(?<=[.:;?!])\s+", line):
            assert len(re.findall(r"[^\s·–-]+", sentence)) <= 25, sentence


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_reference_has_every_public_name(tmp_path):
    """As `make docs` does it. Kills: a broken link; a module without its place; a public name without a docstring."""
    pytest.importorskip("mkdocs")
    recipe = ["make", "--no-print-directory", "-n", "-o", ".venv/.dev", "docs"]
    line = subprocess.run(recipe, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    setting, _, *arguments = shlex.split(line)
    command = [sys.executable, *arguments, "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, **dict([setting.split("=")])}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "--strict" in arguments, result.stderr
    assert (tmp_path / "site" / "research-log" / "index.html").is_file()
    explained = (tmp_path / "site" / "how-it-works" / "index.html").read_text(encoding="utf-8")
    assert 'display="block"' in explained and not re.search(r"\\[([]", explained), "a formula is not drawn"
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    modules = {path.stem for path in (ROOT / "src/diffusers_dualrate").glob("*.py")} - {"__init__", "registration"}
    assert modules == set(
        re.findall(r"^::: diffusers_dualrate\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    )
    for name in diffusers_dualrate.__all__:
        thing = getattr(diffusers_dualrate, name)
        if thing.__module__.startswith("diffusers_dualrate"):
            first = thing.__doc__.split(",")[0].split("\n")[0][:20]
            assert f'id="{thing.__module__}.{name}"' in page and html.escape(first) in page, name
