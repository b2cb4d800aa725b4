"""What is published: one version, two requirements, the extras by name, and nothing in the archives but the package."""

import ast
import html
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement

import diffusers_dualrate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def metadata(monkeypatch):
    """The arguments that setup.py hands to setuptools."""
    captured = {}
    monkeypatch.setattr(setuptools, "setup", captured.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return captured


def names(requirements):
    return {Requirement(line).name for line in requirements}


def test_the_version_is_written_in_one_place(metadata):
    assert metadata["version"] == diffusers_dualrate.__version__
    written = re.compile(r"(?<![\d.])" + re.escape(diffusers_dualrate.__version__) + r"(?![\d.])")
    package = ROOT / "src" / "diffusers_dualrate"
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *package.glob("*.py")]
    assert [path.name for path in files if written.search(path.read_text(encoding="utf-8"))] == ["__init__.py"]


def test_the_core_needs_torch_and_diffusers_only(metadata):
    assert sorted(metadata["install_requires"]) == ["diffusers>=0.40", "torch>=2.6"]
    assert metadata["python_requires"] == ">=3.11"


def test_the_extras_are_train_eval_and_dev_which_holds_both(metadata):
    extras = {name: names(lines) for name, lines in metadata["extras_require"].items()}
    assert set(extras) == {"train", "eval", "dev"}
    assert {"accelerate", "datasets", "pillow"} <= extras["train"]
    assert {"torchmetrics", "transformers", "matplotlib", "scikit-learn"} <= extras["eval"]
    assert extras["train"] | extras["eval"] | {"pytest", "pytest-xdist", "ruff", "peft"} <= extras["dev"]


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_every_requirement_is_pinned_and_torchvision_is_not_among_them(metadata, constraints):
    lines = (ROOT / constraints).read_text(encoding="utf-8").splitlines()
    pins = {pin.name: pin.specifier for pin in (Requirement(line) for line in lines if line and line[0] != "#")}
    required = [*metadata["install_requires"], *metadata["extras_require"]["dev"]]
    assert "torchvision" not in names(required) | set(pins)
    for requirement in map(Requirement, required):
        (pin,) = pins[requirement.name]
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement


def test_the_oldest_pins_are_the_oldest_versions_that_setup_allows(metadata):
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    for requirement in metadata["install_requires"]:
        name, _, floor = requirement.partition(">=")
        assert f"{name}=={floor}.0" in lines


def test_the_package_is_typed():
    assert (Path(diffusers_dualrate.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: path.name)
def test_a_file_has_at_most_400_lines_and_a_function_80(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert not {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 80}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(sdist, wheel), built as `make dist` does, from a copy with files that do not belong into them."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("tests/test_x.py", "examples/x.py", "model_cards/x/denoiser/model.safetensors"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("a stand-in", encoding="utf-8")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_the_archives_hold_the_package_and_neither_tests_nor_weights(archives):
    sdist, wheel = archives
    stem = f"diffusers_dualrate-{diffusers_dualrate.__version__}"
    modules = {f"diffusers_dualrate/{path.name}" for path in (ROOT / "src" / "diffusers_dualrate").glob("*.py")}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in in_wheel if ".dist-info/" not in name} == modules | {"diffusers_dualrate/py.typed"}
    assert f"{stem}.dist-info/licenses/LICENSE" in in_wheel

    in_sdist = {name.removeprefix(f"{stem}/") for name in tarfile.open(sdist).getnames()}
    assert {f"src/{name}" for name in modules | {"diffusers_dualrate/py.typed"}} | {"LICENSE", "setup.py"} <= in_sdist
    assert not [name for name in in_sdist if name.startswith(("tests", "examples", "model_cards"))]


@pytest.mark.slow
def test_the_archives_are_what_a_package_index_accepts(archives):
    check = [sys.executable, "-m", "twine", "check", "--strict", *archives]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("PASSED") == 2, result.stdout + result.stderr


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_imports(archives, tmp_path):
    """The requirements are borrowed from the environment that runs the tests; our package there stays out of sight."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", archives[1]]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    code = "import diffusers_dualrate; print(diffusers_dualrate.__version__, diffusers_dualrate.__file__)"
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([python, "-c", code], cwd=tmp_path, env=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version, file = result.stdout.split()
    assert version == diffusers_dualrate.__version__ and Path(file).is_relative_to(site)


@pytest.mark.slow
def test_the_reference_is_rendered_with_a_page_for_every_module_and_every_public_name(tmp_path):
    """As `make docs` does it. Kills: a docstring that does not render; a public name without one."""
    recipe = ["make", "--no-print-directory", "-n", "-o", ".venv/.dev", "docs"]
    line = subprocess.run(recipe, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    _, *arguments = shlex.split(line)
    arguments[arguments.index("--output-directory") + 1] = str(tmp_path)
    command = [sys.executable, "-W", "error::UserWarning:pdoc", *arguments]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    pages = {path.stem: path.read_text() for path in (tmp_path / "diffusers_dualrate").glob("*.html")}
    modules = {path.stem for path in (ROOT / "src/diffusers_dualrate").glob("*.py")} - {"__init__", "registration"}
    assert pages.keys() == modules
    for name in diffusers_dualrate.__all__:
        thing = getattr(diffusers_dualrate, name)
        if thing.__module__.startswith("diffusers_dualrate"):
            page = pages[thing.__module__.rpartition(".")[2]]
            assert f'id="{name}"' in page and html.escape(thing.__doc__.split(",")[0].split("\n")[0][:20]) in page


ONLY_TORCH_AND_DIFFUSERS = """
import importlib.util, sys

hidden = {"accelerate", "datasets", "transformers", "peft", "torchmetrics", "matplotlib", "sklearn", "tensorboard"}
find_spec = importlib.util.find_spec


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Hide())
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in hidden else find_spec(name, package)
)

from diffusers_dualrate import DualRatePipeline

pipe = DualRatePipeline.from_pretrained(sys.argv[1])
images = pipe(batch_size=1, num_inference_steps=2, num_context_steps=1).images
assert images[0].size == (8, 8) and not hidden & sys.modules.keys()
"""


def test_a_model_loads_and_samples_with_only_torch_and_diffusers_installed(make_pipe, tmp_path):
    make_pipe(num_classes=None).save_pretrained(tmp_path)
    command = [sys.executable, "-c", ONLY_TORCH_AND_DIFFUSERS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
