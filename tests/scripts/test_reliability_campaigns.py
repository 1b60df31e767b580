"""Campaigns of benchmarks/reliability: their short forms hold, they see what is broken, and the tables show it."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "reliability"


@pytest.fixture
def campaigns(monkeypatch):
    """Modules of the folder by name; they are no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for path in FOLDER.glob("*.py"):  # another folder has a module `tables`, too
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    known = set(sys.modules)

    def module(name: str):
        return __import__(name)

    yield module
    for name in set(sys.modules) - known:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def _rows(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"reliability_{name}.json").read_text())["rows"]


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, FOLDER / "every.py", "--short", "--json", folder, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_the_short_forms_find_nothing_broken(tmp_path):
    done = _run(tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    rows = {name: _rows(tmp_path, name) for name in ("kills", "faults", "altered_files", "inputs")}
    assert sum(row["broken"] for found in rows.values() for row in found) == 0
    kills = {row["phase"]: row for row in rows["kills"]}
    assert all(kills[phase]["kills"] for phase in ("training", "saving", "evaluation", "preparing"))
    assert kills["finished"]["runs"] and kills["preparing"]["runs"]
    assert all(row["tries"] for row in rows["faults"] if row["fault"] not in ("full disk", "read-only folder"))
    assert sum(row["refused"] for row in rows["altered_files"]) > 90
    assert sum(row["calls"] for row in rows["inputs"]) == 120 and any(row["accepted"] for row in rows["inputs"])


@pytest.mark.long
def test_a_short_long_run_ends_as_the_undisturbed_one(tmp_path):
    done = _run(tmp_path, "--only", "long_run")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (row,) = _rows(tmp_path, "long_run")
    assert row["broken"] == 0 and row["kills"] == row["nan_batches"] == 1 and row["restarts"] >= 1
    assert row["validation_loss"] == row["validation_loss_undisturbed"]


def test_torn_and_doubled_lines_are_counted(tmp_path, campaigns):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"kind": "train", "step": 1}', '{"kind": "train", "step": 2}', '{"kind": "evaluation", "step": 2}']
    path.write_text("\n".join(lines) + "\n")
    assert campaigns("campaign").checked_lines(path) == (0, 0)
    path.write_text("\n".join([*lines, lines[1], '{"kind": "tra']) + "\n")
    assert campaigns("campaign").checked_lines(path) == (1, 1)
    path.write_text("\n".join(lines))  # the last line has no end
    assert campaigns("campaign").checked_lines(path) == (1, 0)


@pytest.mark.parametrize(
    "code, said, same, outcome",
    [
        (2, "error: checkpoint 'c': state.json was altered", False, "refused"),
        (0, "read", True, "same_content"),
        (0, "read", False, "accepted"),
        (2, "error: checkpoint 'c': something is wrong", False, "unnamed"),
        (2, "error: 'state.json'\nerror: twice", False, "unnamed"),
        (2, "error: checkpoint 'c': state.json was altered", True, "unnamed"),
        (1, "Traceback (most recent call last)\nKeyError: 'state.json'", False, "tracebacks"),
    ],
)
def test_what_becomes_of_an_altered_file(code, said, same, outcome, campaigns):
    assert campaigns("altered_files").outcome_of(code, said, "state.json", same) == outcome


@pytest.mark.parametrize(
    "code, said, kept",
    [
        (2, "step 1\nerror: 'a': File too large; raise it\n", True),
        (74, "error: 'a': File too large\n", True),
        (2, "error: 'a': No space left on device\n", False),
        (1, "error: 'a': File too large\n", False),
        (2, "Traceback (most recent call last)\nerror: 'a': File too large\n", False),
        (-9, "step 1\n", False),
    ],
)
def test_how_a_run_that_met_a_fault_must_end(code, said, kept, campaigns):
    assert (campaigns("faults").complaint(code, said, ("File too large",)) is None) == kept


def test_a_command_that_fails_without_a_line_is_a_fault(campaigns):
    fault_of = campaigns("campaign").fault_of
    assert fault_of("error: moe.groups: 3; must be less\n") is None
    assert fault_of("Segmentation fault\n") == "no line"
    assert fault_of("error: a\nTraceback (most recent call last)\n") == "traceback"
    assert fault_of("step 1\ntook too long\n") == "took too long"


def test_a_closed_terminal_is_met_under_nohup(campaigns, tmp_path):
    """nohup has the campaign ignore SIGHUP, and a training that inherits that would go on to its end."""

    def ignores(words):
        return int(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)

    faults, usual = campaigns("faults"), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        codes = [
            campaigns("forked").Forked(ignores, [], tmp_path / "log", before=before).wait(60)
            for before in (lambda: None, faults.hear_hang_ups)
        ]
    finally:
        signal.signal(signal.SIGHUP, usual)
    assert codes == [1, 0]


def test_generated_configurations_are_read_or_refused(campaigns, tmp_path):
    """The same seed generates the same; the values reach every kind of key."""
    inputs = campaigns("inputs")
    base = {"model": {"hidden_size": 16}, "train": {"steps": 1}}
    texts = [inputs.configuration(base, random.Random(seed)) for seed in range(60)]
    assert texts == [inputs.configuration(base, random.Random(seed)) for seed in range(60)] and len(set(texts)) > 50
    sections = Counter(name for name in inputs.sections() for text in texts if f"\n{name}:" in f"\n{text}")
    assert len(sections) == len(inputs.sections())


def test_tables_show_every_row_and_their_sums(campaigns, monkeypatch, tmp_path):
    tables = campaigns("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "`benchmarks/reliability/kills.py` has not been run in full." in tables.render()
    names = ("calls", "accepted", "refused", "tracebacks", "unclear", "overwritten")
    rows = [{"input": "corpora"} | dict(zip(names, (1500, 500, 999, 1, 0, 0)))]
    rows.append({"input": "prompts"} | dict(zip(names, (10, 4, 6, 0, 0, 0))))
    figures = {"question": "Q?", "command": "c", "machine": "m", "versions": {"mindspore": "2.9", "python": "3.11"}}
    (tmp_path / "reliability_inputs.json").write_text(json.dumps(figures | {"commit": "x", "date": "d", "rows": rows}))
    text = tables.render()
    assert "Q? `c` (needs: minutes to hours), m, MindSpore 2.9, Python 3.11, commit x, d." in text
    assert (
        "| corpora | 1,500 | 500 | 999 | 1 | 0 | 0 |" in text
        and "| **all** | 1,510 | 504 | 1,005 | 1 | 0 | 0 |" in text
    )
