"""The import table of CONTRIBUTING.md, held against the code, and what `import diffusers_dualrate` may pull in."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffusers_dualrate"


def sources(folder):
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}


MODULES, EXAMPLES, RESEARCH = sources(ROOT / "src" / PACKAGE), sources(ROOT / "examples"), sources(ROOT / "research")
HOST = {"torch", "diffusers"}
BROUGHT_BY_HOST = {"numpy", "PIL", "safetensors", "huggingface_hub"}  # diffusers' own requirements
EXTRAS = {"accelerate", "datasets", "transformers", "matplotlib", "torchmetrics", "sklearn", "scipy"}


def imports_of(source, package=PACKAGE):
    """List (dotted name, name taken from it or None, whether inside a function) for every import of a module."""

    def visit(node, in_function):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, in_function
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, [package if node.level else None, node.module]))
            for alias in node.names:
                yield origin, alias.name, in_function
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    return list(visit(ast.parse(source), False))


def our_imports_of(source):
    """The modules of the package that `source` imports, as pairs (module, whether inside a function)."""
    found = set()
    for origin, name, in_function in imports_of(source):
        top, _, module = origin.partition(".")
        if top == PACKAGE:
            found.add((module or (name if name in MODULES else "__init__"), in_function))
    return found


def read_table(header):
    """A table of CONTRIBUTING.md as {module: (what the second column names, the third)}; None is anything."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(header)[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|$", section, re.MULTILINE)
    assert len(rows) == len({module for module, _, _ in rows}), "a module has two rows"
    return {
        module: (
            None if "anything" in anywhere else set(re.findall(r"`(\w+)`", anywhere)),
            set(re.findall(r"`(\w+)`", late)),
        )
        for module, anywhere, late in rows
    }


TABLE = read_table("| module | may import | inside a function |")
RESEARCH_TABLE = read_table("| module of research | imports of research | imports of the examples |")


def run(code):
    """What the last line of `code` prints as JSON, in a fresh interpreter that finds the package where this one does."""
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded_with_the_package():
    """The modules that the package's public names load: what `__init__` imports for type checkers, and so on."""
    seen, waiting = set(), {"__init__"}
    while waiting:
        seen.add(module := waiting.pop())
        waiting |= {name for name, inside in our_imports_of(MODULES[module]) if not inside} - seen
    return seen


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .models import UViTDenoiser", {("models", False)}),
        ("from . import models", {("models", False)}),
        ("import diffusers_dualrate.models", {("models", False)}),
        ("from diffusers_dualrate.models import UViTDenoiser", {("models", False)}),
        ("from diffusers_dualrate import models", {("models", False)}),
        ("from diffusers_dualrate import UViTDenoiser", {("__init__", False)}),
        ("if True:\n    from .models import UViTDenoiser", {("models", False)}),
        ("class A:\n    def f(self):\n        from .models import UViTDenoiser", {("models", True)}),
        ("import diffusers, torch\nfrom diffusers.models import ModelMixin", set()),
    ],
)
def test_the_reader_sees_every_form_of_import(source, expected, monkeypatch):
    monkeypatch.setitem(MODULES, "models", "")
    assert our_imports_of(source) == expected


def test_the_table_says_what_the_design_rests_on():
    leaves = {module for module, row in TABLE.items() if row == (set(), set())}
    assert leaves == {
        "diffusion",
        "conditions",
        "augmentation",
        "caches",
        "decoding",
        "folders",
        "guidance",
        "latents",
        "checkpoints",
        "pictures",
        "processes",
        "progress",
        "evaluation",
        "registration",
        "tables",
        "ranges",
        "records",
    }
    assert [module for module, (anywhere, _) in TABLE.items() if anywhere is None] == ["__init__"]
    assert TABLE["losses"] == ({"conditions", "diffusion"}, set())


def test_every_module_has_a_row_in_the_table():
    assert set(MODULES) == set(TABLE)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_table_allows(module):
    anywhere, late = TABLE[module]
    if anywhere is not None:
        wrong = {(name, inside) for name, inside in our_imports_of(MODULES[module]) if name not in anywhere}
        assert wrong <= {(name, True) for name in late}


def research_imports_of(source):
    """The modules of research and of the examples that one of research imports."""
    research, examples = set(), set()
    for origin, name, _ in imports_of(source, "research"):
        top, _, module = origin.partition(".")
        if top == "research":
            research.add(module or (name if name in RESEARCH else "__init__"))
        elif top in EXAMPLES:
            examples.add(top)
    return research, examples


def test_every_module_of_research_has_a_row_and_imports_what_it_says():
    assert {module: research_imports_of(source) for module, source in RESEARCH.items()} == RESEARCH_TABLE


def test_neither_the_package_nor_an_example_imports_research_or_an_example():
    for source in [*MODULES.values(), *EXAMPLES.values()]:
        assert not {origin.partition(".")[0] for origin, *_ in imports_of(source)} & {"research", *EXAMPLES}


def test_no_modules_form_a_cycle():
    graph = {module: {name for name, _ in our_imports_of(source)} for module, source in MODULES.items()}
    for edges in (graph, {module: research for module, (research, _) in RESEARCH_TABLE.items()}):
        graphlib.TopologicalSorter(edges).prepare()


def test_no_file_is_a_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    stems = {
        path.stem for folder in ("src", "examples", "research", "tests") for path in (ROOT / folder).rglob("*.py")
    }
    assert not stems & drawers


@pytest.mark.parametrize("folder", ["examples", "research"])
def test_examples_and_research_import_public_names_only(folder):
    for path in sorted((ROOT / folder).glob("*.py")):
        for origin, name, _ in imports_of(path.read_text(encoding="utf-8")):
            if origin.partition(".")[0] == PACKAGE:
                private = f".{origin}.{name}".replace(".__version__", "").count("._")
                assert not private, f"{path.name}: {origin}.{name}"


def test_importing_the_package_needs_torch_and_diffusers_only():
    allowed = HOST | BROUGHT_BY_HOST | {PACKAGE} | sys.stdlib_module_names
    for module in loaded_with_the_package():
        imported = {origin.partition(".")[0] for origin, _, inside in imports_of(MODULES[module]) if not inside}
        assert imported <= allowed, module


def test_importing_the_package_brings_no_extra_that_the_host_did_not_bring():
    host_imports = {
        f"import {origin}" if name is None else f"from {origin} import {name}"
        for module in loaded_with_the_package()
        for origin, name, inside in imports_of(MODULES[module])
        if origin.partition(".")[0] in HOST and not inside
    }
    report = f"\nimport json, sys; print(json.dumps([m for m in sys.modules if m in {EXTRAS!r} or '{PACKAGE}.' in m]))"
    baseline = run("\n".join(["import torch, diffusers", *sorted(host_imports)]) + report)
    ours = run(f"from {PACKAGE} import *" + report)
    assert set(ours) & EXTRAS == set(baseline)
    modules = {name.removeprefix(f"{PACKAGE}.") for name in ours if name.startswith(f"{PACKAGE}.")}
    assert modules | {"__init__"} == loaded_with_the_package()


@pytest.mark.parametrize("module", [module for module in MODULES if module != "registration"])
def test_only_registration_touches_private_names_of_the_host(module):
    private = re.compile(r"(^|\.)_(?!_)|LOADABLE_CLASSES|ALL_IMPORTABLE_CLASSES|pipeline_loading_utils")
    for origin, name, _ in imports_of(MODULES[module]):
        if origin.partition(".")[0] == "diffusers":
            assert not private.search(f"{origin}.{name}"), f"{origin}.{name}"
    for node in ast.walk(ast.parse(MODULES[module])):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert not (dotted.startswith("diffusers.") and private.search(dotted)), dotted
            assert "LOADABLE_CLASSES" not in dotted
