"""examples/quickstart.ipynb runs from top to bottom, and the outputs that it is shown with are its own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "examples/quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def outputs_of(notebook):
    """What each cell of code prints, and how many pictures it shows."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = [out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout"]
            yield "".join(printed), sum("image/png" in out.get("data", {}) for out in cell.outputs)


def test_the_notebook_is_kept_with_all_its_outputs_small_and_without_errors(notebook):
    assert PATH.stat().st_size < 300_000
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 4
    assert not [out for out in outputs if out.output_type == "error"]
    assert not [out for out in outputs if str(Path.home()) in out.get("text", "")]


@pytest.mark.slow
def test_the_notebook_runs_with_a_shorter_training(notebook):
    """All else is as it stands: the plan and what an image costs come out as they are shown."""
    kept = list(outputs_of(notebook))
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith("STEPS = 300")
    first.source = "STEPS = 3"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    now = list(outputs_of(notebook))
    assert [pictures for _, pictures in now] == [pictures for _, pictures in kept]
    assert [text for text, _ in now if text.startswith("step")] == [
        text for text, _ in kept if text.startswith("step")
    ]
    costs = [
        [line.split("GFLOP")[0] for text, _ in each for line in text.splitlines() if "network runs" in line]
        for each in (now, kept)
    ]
    assert costs[0] == costs[1] and len(costs[0]) == 2
    assert "steps 0 to 3, each of 48 images" in "".join(text for text, _ in now)
