"""Makes the notebooks of docs/notebooks from the examples, and keeps what their cells print and draw.

    python scripts/renew_notebooks.py                 all notebooks, executed
    python scripts/renew_notebooks.py own_router      one of them

An example is a script whose cells begin with `# %%`; `# %% [markdown]` begins a cell of text, each line behind `# `.
The docstring becomes the first text. The code of a notebook is that of the example, to the letter, with a figure behind
it where `FIGURES` has one; a test holds both equal.
"""

import ast
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, NOTEBOOKS = ROOT / "examples", ROOT / "docs" / "notebooks"
NAMES = ("layer_in_own_network", "own_router", "own_loss", "finetune_export_generate")  # what a course would use
MARK = re.compile(r"^# %%(?P<markdown> \[markdown\])?[^\n]*\n", flags=re.MULTILINE)
FIGURES = {  # name -> the last cell of the notebook, which draws what the example has printed
    "layer_in_own_network": """from matplotlib import pyplot

load = network.moe.metrics()["load"]
figure, axes = pyplot.subplots(figsize=(6, 2.5))
axes.bar(range(len(load)), load)
axes.axhline(load.mean(), color="0.4", linestyle="--", label="mean")
axes.set(xlabel="expert", ylabel="choices, two a row")
axes.legend()
pyplot.show()""",
    "own_loss": """from matplotlib import pyplot

weights = (0.0, 0.03, 0.1, 0.3, 1.0)
figure, axes = pyplot.subplots(figsize=(6, 2.5))
axes.plot([str(weight) for weight in weights], [train(weight).metrics()["entropy"] for weight in weights], "o-")
axes.axhline(math.log(4), color="0.4", linestyle="--", label="log E: a router that is undecided")
axes.set(xlabel="weight of the loss", ylabel="entropy (nats)")
axes.legend()
pyplot.show()""",
}
LONGEST = 3600  # seconds of a cell
INFO = {"name": "python3", "display_name": "Python 3", "language": "python"}


def cells_of(text: str) -> list[tuple[str, str]]:
    """Returns ("markdown" | "code", source) of each cell of an example; empty cells are left out.

    Examples:
        >>> cells_of('\"\"\"Says two.\"\"\"\\n\\n# %% [markdown]\\n# ## Two\\n\\n# %%\\nprint(2)\\n')
        [('markdown', '# Says two'), ('markdown', '## Two'), ('code', 'print(2)')]
    """
    marks = list(MARK.finditer(text))
    title, _, rest = (ast.get_docstring(ast.parse(text[: marks[0].start()])) or "").partition("\n")
    found = [("markdown", f"# {title.rstrip('.')}\n{rest}".strip())] if title else []
    for mark, following in zip(marks, [*marks[1:], None]):
        source = text[mark.end() : following.start() if following else len(text)].strip()
        if mark["markdown"]:
            lines = (line.removeprefix("#").removeprefix(" ") for line in source.splitlines())
            found.append(("markdown", "\n".join(lines).strip()))
        else:
            found.append(("code", source))
    return [(kind, source) for kind, source in found if source]


def notebook_of(name: str) -> nbformat.NotebookNode:
    """Returns an example as a notebook without outputs; cells are numbered, so that equal examples are equal files."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    parts = cells_of((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    if name in FIGURES:
        parts.append(("code", FIGURES[name]))
    cells = [make[kind](source, id=f"cell-{number}") for number, (kind, source) in enumerate(parts)]
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": INFO})


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Executes a notebook in an empty folder, with this repository's package, and returns it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    os.environ |= {
        "GLOG_v": "4"
    }  # MindSpore looks for the file of each cell that it compiles, and logs that there is none
    path = filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=LONGEST, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Returns a notebook without times, lines of stderr and paths, which differ from machine to machine."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined(output for output in cell.outputs if output.get("name") != "stderr")
    notebook.metadata = {"kernelspec": INFO}
    return notebook


def joined(outputs: Iterable[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Returns outputs with what was printed in pieces in one piece, without the paths of a machine."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if found and output.get("name") == found[-1].get("name") == "stdout":
            found[-1].text += output.text
        else:
            found.append(output)
    for output in found:
        if output.get("name") == "stdout":
            text = output.text.replace(sys.base_prefix, "...")
            output.text = re.sub(r"/tmp/switchyard-\w+", "/tmp/switchyard", text)
    return found


def main(names: list[str]) -> None:
    """Renews notebooks by the names of their examples."""
    for name in names or NAMES:
        if name not in NAMES:
            sys.exit(f"renew_notebooks: {name}; one of {', '.join(NAMES)}")
        path = NOTEBOOKS / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        notebook = executed(notebook_of(name))
        nbformat.write(notebook, path)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
