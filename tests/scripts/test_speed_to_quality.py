"""Cases of a device train in turn: hand-made processes that count while they run."""

import importlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from switchyard.config import build

COUNT = """
import sys, time
while True:
    with open(sys.argv[1], "a") as file:
        file.write(f"{time.monotonic()}\\n")
    time.sleep(0.01)
"""


@pytest.fixture
def quality(monkeypatch):
    """The script, where a case has trained a second for each hundred lines that it has written."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    module = importlib.import_module("speed_to_quality")
    monkeypatch.setattr(module, "trained_seconds", lambda run: len(times(run)) / 100)
    return module


def times(path: Path) -> list[float]:
    """Returns when a case ran."""
    return [float(line) for line in path.read_text().split()] if path.exists() else []


def case_of(quality, tmp_path: Path, name: str, device: str | None):
    return quality.Case(name, [sys.executable, "-c", COUNT, str(tmp_path / name)], tmp_path, device)


def turns(ran: dict[str, list[float]]) -> list[str]:
    """Returns the names in the order in which they ran, each turn once."""
    order = [name for _, name in sorted((when, name) for name, found in ran.items() for when in found)]
    return [name for name, before in zip(order, [None, *order]) if name != before]


def test_cases_of_a_device_take_turns_and_end_after_their_seconds(quality, tmp_path):
    cases = [case_of(quality, tmp_path, name, "0") for name in ("a", "b")]
    quality.train(cases, seconds=1.0, turn=0.4)
    ran = {name: times(tmp_path / name) for name in ("a", "b")}
    assert all(len(found) >= 100 for found in ran.values())
    assert len(turns(ran)) >= 4 and turns(ran)[:2] == ["a", "b"]
    assert all(case.process.poll() is not None for case in cases)


def test_without_a_turn_they_train_one_after_another(quality, tmp_path):
    quality.train([case_of(quality, tmp_path, name, None) for name in ("a", "b")], seconds=0.3, turn=math.inf)
    assert turns({name: times(tmp_path / name) for name in ("a", "b")}) == ["a", "b"]


def test_devices_train_at_the_same_time(quality, tmp_path):
    quality.train([case_of(quality, tmp_path, name, device) for name, device in (("a", "0"), ("b", "1"))], 0.5, 9.0)
    ran = {name: times(tmp_path / name) for name in ("a", "b")}
    assert max(found[0] for found in ran.values()) < min(found[-1] for found in ran.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_every_process(quality, tmp_path, monkeypatch, number):
    cases = [case_of(quality, tmp_path, name, "0") for name in ("a", "b")]
    until = time.monotonic() + 1.0

    def interrupted(run):
        if time.monotonic() > until:
            os.kill(os.getpid(), number)
        return 0.0

    monkeypatch.setattr(quality, "trained_seconds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quality.train(cases, seconds=9.0, turn=0.3)
    assert all(case.process is None or case.process.poll() is not None for case in cases)


def test_a_curve_reaches_a_loss_between_two_evaluations(quality):
    """From 2.0 at step 100 to 1.0 at step 200: 1.25 is reached at step 175, after 17.5 s."""
    curve = [[100, 10.0, 2.0], [200, 20.0, 1.0]]
    assert quality.reached(curve, 1.25, 0) == 175 and quality.reached(curve, 1.25, 1) == 17.5
    assert quality.reached(curve, 0.5, 0) is None


def test_runs_that_are_there_are_compared_without_training(quality, tmp_path, monkeypatch, capsys):
    """A step of 0.1 s: the experts reach the dense model's last loss, 3.0, half way between steps 10 and 20."""
    config = build({"model": {"hidden_size": 8, "num_heads": 2, "seq_length": 8}, "data": {"batch_size": 4}}).to_yaml()
    for name, losses in {"dense": (3.5, 3.0), "8-experts-1-chosen": (3.2, 2.8)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config)
        lines = [{"kind": "train", "step": step, "loss": 3.0, "tokens_per_second": 320.0} for step in (10, 20)]
        lines += [{"kind": "evaluation", "step": step, "loss": loss} for step, loss in zip((10, 20), losses)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(quality, "trained_seconds", lambda run: float(run.exists()))
    monkeypatch.setattr(quality, "train", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr(sys, "argv", ["quality", "--corpus", "none", "--runs", str(tmp_path), "--compare"])
    quality.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("8 experts, 1 chosen "))
    assert row.split()[4:] == ["15", "1.5", "2.8000", "320"]
