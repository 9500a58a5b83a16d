"""The notebooks run from a clean kernel, only import what they use, and are committed with what they show."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from places import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRAIN = ("02", "04")


def run(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if not path.name.startswith(TRAIN)], ids=lambda p: p.stem)
def test_it_runs(path, monkeypatch):
    run(path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.name.startswith(TRAIN)], ids=lambda p: p.stem)
def test_one_that_trains_runs(path, monkeypatch):
    run(path, monkeypatch)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_shows_its_outputs_and_no_error_or_private_path(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # top to bottom, once
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert str(Path.home()) + "/" not in path.read_text()
    assert "site-packages" not in path.read_text()
