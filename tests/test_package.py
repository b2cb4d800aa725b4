"""What is published: one version, two requirements, the extras by name, and nothing in the archives but the package."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from build.util import project_wheel_metadata
from packaging.requirements import Requirement

import diffusers_dualrate

ROOT = Path(__file__).resolve().parents[1]


def copy_of_the_package(folder):
    """What the archives are made of: builds leave files beside their source."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """What setuptools makes of pyproject.toml, as an installer reads it."""
    return project_wheel_metadata(copy_of_the_package(tmp_path_factory.mktemp("tree")), isolated=False)


def requirements(metadata, extra=""):
    """What an installation with an extra, or without, asks for beside the package itself."""
    lines = map(Requirement, metadata.get_all("Requires-Dist"))
    found = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
    inner = [name for line in found if line.name == "diffusers-dualrate" for name in line.extras]
    own = [line for line in found if line.name != "diffusers-dualrate"]
    return own + [line for name in inner for line in requirements(metadata, name)]


def names(requirements):
    return {requirement.name for requirement in requirements}


def test_the_version_is_written_in_one_place(metadata):
    assert metadata["Version"] == diffusers_dualrate.__version__
    written = re.compile(r"(?<![\d.])" + re.escape(diffusers_dualrate.__version__) + r"(?![\d.])")
    package = ROOT / "src" / "diffusers_dualrate"
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *package.glob("*.py")]
    assert [path.name for path in files if written.search(path.read_text(encoding="utf-8"))] == ["__init__.py"]


def test_the_core_needs_torch_and_diffusers_only(metadata):
    assert sorted(map(str, requirements(metadata))) == ["diffusers>=0.40", "torch>=2.6"]
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_extras_are_train_eval_app_and_dev_which_holds_all(metadata):
    extras = {name: names(requirements(metadata, name)) for name in metadata.get_all("Provides-Extra")}
    assert set(extras) == {"train", "eval", "app", "dev"}
    assert {"accelerate", "datasets", "pillow"} <= extras["train"]
    assert {"torchmetrics", "transformers", "matplotlib", "scikit-learn"} <= extras["eval"]
    assert "gradio" in extras["app"]
    assert (
        extras["train"] | extras["eval"] | extras["app"] | {"pytest", "pytest-xdist", "ruff", "peft"} <= extras["dev"]
    )


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_every_requirement_is_pinned_and_torchvision_is_not_among_them(metadata, constraints):
    lines = (ROOT / constraints).read_text(encoding="utf-8").splitlines()
    pins = {pin.name: pin.specifier for pin in (Requirement(line) for line in lines if line and line[0] != "#")}
    required = requirements(metadata, "dev")
    assert {"torch", "datasets", "ruff"} <= names(required)
    assert "torchvision" not in names(required) | set(pins)
    for requirement in required:
        (pin,) = pins[requirement.name]
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement


def test_the_oldest_pins_are_the_oldest_versions_that_are_allowed(metadata):
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    for requirement in map(str, requirements(metadata)):
        name, _, floor = requirement.partition(">=")
        assert f"{name}=={floor}.0" in lines


def test_what_an_index_shows_is_said(metadata):
    assert metadata["Name"] == "diffusers-dualrate" and "heavy context encoder" in metadata["Summary"]
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE"]
    assert metadata.get_payload().startswith("# ") and metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2605.18190"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_no_build_imports_torch(tmp_path):
    """The version is read as text, so that an environment without torch can build."""
    tree = copy_of_the_package(tmp_path)
    for name in ("torch", "diffusers"):
        (tree / "hidden").mkdir(exist_ok=True)
        (tree / "hidden" / f"{name}.py").write_text("raise ImportError('imported by a build')")
    environment = {**os.environ, "PYTHONPATH": str(tree / "hidden")}
    command = [sys.executable, "setup.py", "--version"]
    found = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.split()[-1] == diffusers_dualrate.__version__, found.stderr


def test_the_citation_is_that_of_the_readme_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors", "type"} <= citation.keys()
    assert "version" not in citation  # it is written in one place
    paper, text = citation["preferred-citation"], (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["type"] == "article" and paper["title"] in text and str(paper["year"]) in text
    (names,) = re.findall(r"^  author  = \{(.*)\},$", text, re.MULTILINE)
    assert [author["family-names"] for author in paper["authors"]] == names.split(" and ")
    assert {"type": "other", "value": "arXiv:2605.18190"} in paper["identifiers"]


def test_the_hooks_run_what_make_lint_runs():
    recipe = ["make", "--no-print-directory", "-n", "-o", ".venv/.dev", "lint"]
    lines = subprocess.run(recipe, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = hooks["repos"]
    (hook,) = local["hooks"]
    assert local["repo"] == "local" and hook["entry"] == "make lint" and hook["language"] == "system"
    assert all(tool in lines for tool in ("ruff check", "ruff format --check", "mypy")) and not hook["pass_filenames"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_a_form_for_issues_asks_something(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
    else:
        assert form["name"] and form["description"] and any(part["type"] == "textarea" for part in form["body"])
        assert len({part["id"] for part in form["body"] if "id" in part}) == sum("id" in part for part in form["body"])


def test_the_package_is_typed():
    assert (Path(diffusers_dualrate.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: path.name)
def test_a_file_has_at_most_400_lines_and_a_function_80_beside_its_docstring(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {f.name: f.end_lineno - f.lineno + 1 - len((ast.get_docstring(f) or "").splitlines()) for f in functions}
    assert not {name: length for name, length in lengths.items() if length > 80}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(sdist, wheel), built as `make dist` does, from a copy with files that do not belong into them."""
    tree, out = copy_of_the_package(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("out")
    for name in (
        "tests/test_x.py",
        "examples/x.py",
        "research/__init__.py",
        "model_cards/x/denoiser/model.safetensors",
    ):
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
    modules |= {"diffusers_dualrate/py.typed", "diffusers_dualrate/card_template.md"}
    assert {name for name in in_wheel if ".dist-info/" not in name} == modules
    assert f"{stem}.dist-info/licenses/LICENSE" in in_wheel

    in_sdist = {name.removeprefix(f"{stem}/") for name in tarfile.open(sdist).getnames()}
    assert {f"src/{name}" for name in modules} | {"LICENSE", "setup.py"} <= in_sdist
    assert not [name for name in in_sdist if name.startswith(("tests", "examples", "research", "model_cards"))]


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
