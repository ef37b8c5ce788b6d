"""The notebooks of docs/notebooks run from their first cell to their last, in a kernel of Jupyter."""

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest

import soflow_fast

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
STEPS = "30"
FIGURES = {"sample.ipynb": 12, "train.ipynb": 6}


def read(path: Path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_file_is_a_notebook_without_outputs(path: Path):
    """Outputs are not kept: nobody would notice that they are old. Code is Python alone, without Jupyter's commands."""
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []
    for node in ast.walk(ast.parse("\n".join(cell.source for cell in code))):
        if isinstance(node, ast.ImportFrom) and node.module == "soflow_fast":
            assert [alias.name for alias in node.names if not hasattr(soflow_fast, alias.name)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("https://")]
    assert len(targets) >= 2 and [target for target in targets if not (path.parent / target).exists()] == []


def test_every_notebook_is_there():
    assert {path.name for path in NOTEBOOKS} == FIGURES.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Proactor event loop:RuntimeWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_cell_runs(path: Path, tmp_path: Path):
    from nbclient import NotebookClient

    places = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = os.environ | places | {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": paths}
    notebook = read(path)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment | {"SOFLOW_NOTEBOOK_STEPS": STEPS})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[path.name]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    said = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "classified as their label" in said
