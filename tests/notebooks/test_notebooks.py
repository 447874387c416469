"""Every notebook is stored without outputs and runs, offline, in a kernel of its own; a false claim fails."""

import ast
import copy
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = (
    "01_step_saliency",
    "02_diagnose_correct_vs_wrong",
    "03_stepflow",
    "04_activation_patching_ablation",
    "05_your_own_model",
)
# They let the model write answers, or run hundreds of passes: over 20 s.
SLOW = ("02_diagnose_correct_vs_wrong", "03_stepflow", "04_activation_patching_ablation")
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
MOST_SECONDS = 600  # a cell, or the kernel's start; for a machine that does other things too


@pytest.fixture(autouse=True)
def offline_kernel(tmp_path, monkeypatch):
    """Kernels of this interpreter only, without a network, a model of one's own, or the user's settings."""
    monkeypatch.delenv("STEPFLOW_MODEL", raising=False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "JUPYTER_PREFER_ENV_PATH", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    # tqdm says so wherever ipywidgets is missing, and a progress bar is all that is lost.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))


def read(name: str) -> Any:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def run(notebook: Any) -> Any:
    """A copy of the notebook with its outputs; the kernel starts in the notebooks' folder."""
    client = NotebookClient(
        copy.deepcopy(notebook),
        timeout=MOST_SECONDS,
        startup_timeout=MOST_SECONDS,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    return client.execute()


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def claims(cell: Any) -> list[ast.Assert]:
    return [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assert)]


def test_the_folder_holds_these_notebooks_and_a_page_that_lists_them():
    files = [f"{name}.ipynb" for name in NAMES]
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_file()) == [*files, "README.md"]
    assert re.findall(r"\]\((.*?)\)", (FOLDER / "README.md").read_text("utf-8")) == files


@pytest.mark.parametrize("name", NAMES)
def test_stored_without_outputs_and_with_standard_metadata(name):
    notebook = read(name)
    assert notebook.metadata == {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    for cell in notebook.cells:
        assert cell.metadata == {}
        assert not cell.get("attachments")
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_teaches_in_prose_and_checks_a_claim(name):
    notebook = read(name)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 3
    assert any(claims(cell) for cell in code_cells(notebook))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NAMES]
)
def test_runs_from_top_to_bottom(name):
    done = run(read(name))
    cells = code_cells(done)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    complaints = [
        output.text
        for cell in cells
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert complaints == []


def test_a_false_claim_makes_the_run_fail():
    notebook = read("01_step_saliency")
    cell = next(cell for cell in code_cells(notebook) if claims(cell))
    module = ast.parse(cell.source)
    claim = next(node for node in module.body if isinstance(node, ast.Assert))
    claim.test = ast.UnaryOp(ast.Not(), claim.test)
    cell.source = ast.unparse(ast.fix_missing_locations(module))
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run(notebook)


def test_a_cell_that_raises_makes_the_run_fail():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('read'); 1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(notebook)
