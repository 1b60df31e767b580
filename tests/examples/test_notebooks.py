"""The notebooks: their code is that of the examples, they keep what was printed and drawn, and they run."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from oracles.marks import long_but

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("renew_notebooks", ROOT / "scripts" / "renew_notebooks.py")
renew = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(renew)


def held(name: str) -> nbformat.NotebookNode:
    """The notebook as it is in the repository."""
    return nbformat.read(renew.NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", renew.NAMES)
def test_the_code_is_that_of_the_example(name):
    made = renew.notebook_of(name)
    assert [(cell.cell_type, cell.source) for cell in held(name).cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ], f"run: python scripts/renew_notebooks.py {name}"


@pytest.mark.parametrize("name", renew.NAMES)
def test_outputs_and_figures_are_kept(name):
    notebook = held(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any(output.get("name") == "stdout" for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert ("image/png" in str(outputs)) == (name in renew.FIGURES)


def test_no_path_of_a_machine_is_kept():
    for name in renew.NAMES:
        text = nbformat.writes(held(name))
        assert str(Path.home()) not in text and "site-packages" not in text, name


def test_cells_are_found():
    text = (
        '"""One.\n\nTwo lines\nof text.\n"""\n\n# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1  # %% no mark\n\n\n# %%\n'
    )
    assert renew.cells_of(text) == [
        ("markdown", "# One\n\nTwo lines\nof text."),
        ("markdown", "# A\n\nb"),
        ("code", "x = 1  # %% no mark"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(renew.NAMES, ["own_router"]))
def test_a_notebook_runs(name):
    """In a kernel of its own, as a reader runs it. All of them run as scripts in test_examples.py."""
    notebook = renew.executed(renew.notebook_of(name))
    assert any(cell.get("outputs") for cell in notebook.cells)
