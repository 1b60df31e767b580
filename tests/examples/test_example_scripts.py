"""Each example runs as it stands, says what it shows, and keeps its length."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from oracles.marks import long_but

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {  # what an example prints -> what must hold of the numbers in it
    "layer_in_own_network": (r"accuracy (\d\.\d+)", lambda accuracy: accuracy > 0.8),
    "own_router": (r"temperature +100.0: entropy of the router (\d\.\d+)", lambda entropy: 1.38 < entropy <= 1.387),
    "own_dispatcher": (r"dispatcher pass_through: 50% of .* (\d+) rows are zero, 32 unchanged", lambda zero: zero == 0),
    "own_expert": (r"loss \d\.\d+ -> (\d\.\d+)", lambda loss: loss < 0.3),
    "own_loss": (r"weight 0.1: entropy (\d\.\d+) nats", lambda entropy: 1.3 < entropy <= 1.387),
    "finetune_export_generate": (r"(\d\.\d+) on the second", lambda loss: loss < 4.5),
}


def test_every_example_is_tested():
    assert [path.stem for path in EXAMPLES] == sorted(SAYS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_reads_as_a_tutorial(path):
    """At most 60 lines, a docstring that says what it shows, and cells whose text stands before the code."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60 and ast.get_docstring(ast.parse(text)).splitlines()[0].endswith(".")
    assert text.count("# %% [markdown]") >= 2 and len(re.findall(r"^# %%$", text, re.MULTILINE)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(SAYS, SAYS.keys() - {"finetune_export_generate"}))
def test_an_example_runs_and_prints_what_it_shows(name, tmp_path):
    """In a process and a folder of its own, as a user runs it."""
    path = next(path for path in EXAMPLES if path.stem == name)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    pattern, holds = SAYS[path.stem]
    found = re.search(pattern, done.stdout)
    assert found and holds(float(found[1])), done.stdout
