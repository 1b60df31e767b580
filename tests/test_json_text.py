"""JSON without NaN and Infinity, wherever the repository writes some."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from switchyard.json_text import to_json

ROOT = Path(__file__).parents[1]
# they write no numbers but whole ones
WHOLE_NUMBERS = {"data/images.py", "data/tokenizer.py", "moe/routing/replay.py", "inference/manifest.py"}


def test_numbers_that_are_not_finite_become_null():
    value = {"a": float("nan"), "b": [1, float("inf"), (2.5, -float("inf"))], "c": {"d": np.float64("nan")}, "e": "NaN"}
    wanted = {"a": None, "b": [1, None, [2.5, None]], "c": {"d": None}, "e": "NaN"}
    assert json.loads(to_json(value, indent=1)) == wanted
    assert to_json({"x": 0.1, "y": [True, None]}) == json.dumps({"x": 0.1, "y": [True, None]})


def _calls(path: Path):
    """(line, call) of json.dumps and json.dump in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("dump", "dumps"):
            yield node


@pytest.mark.parametrize("folder", ["src/switchyard", "benchmarks", "scripts", "."])
def test_no_file_writes_json_that_may_hold_nan(folder):
    """Call json_text.to_json, or json.dumps(..., allow_nan=False) where null would be wrong."""
    pattern = "*.py" if folder == "." else "**/*.py"
    for path in sorted((ROOT / folder).glob(pattern)):
        if any(str(path).endswith(name) for name in WHOLE_NUMBERS):
            continue
        for call in _calls(path):
            refused = any(word.arg == "allow_nan" and word.value.value is False for word in call.keywords)
            assert refused, f"{path}:{call.lineno}: call switchyard.json_text.to_json"
