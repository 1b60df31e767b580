"""Metrics: one JSON object a line, what a resumed run keeps, load figures by hand."""

import json

import numpy as np
import pytest

from switchyard.training.metrics import MetricsLog, load_range, train_figures


def _lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _write(folder, steps, resume: int = 0) -> None:
    log = MetricsLog(folder, resume)
    for step in steps:
        log.write({"kind": "train", "step": step, "loss": float(step)})
    log.close()


def test_lines_and_events_are_written(tmp_path):
    _write(tmp_path, [1, 2])
    assert _lines(tmp_path) == [{"kind": "train", "step": step, "loss": float(step)} for step in (1, 2)]
    assert [path for path in tmp_path.glob("events.out.tfevents*") if path.stat().st_size > 60]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    """The line that a kill has cut goes too."""
    _write(tmp_path, [1, 2, 3, 4])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    _write(tmp_path, [3], resume=2)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_evaluations_that_were_made_are_known(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"kind": "evaluation", "step": 5, "loss": 1.0})
    log.close()
    log = MetricsLog(tmp_path, 6)
    assert log.evaluated(5, whole=True) == 1.0
    assert log.evaluated(6, whole=True) is None and log.evaluated(5, whole=False) is None
    log.close()


def test_numbers_without_a_json_word_become_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"kind": "train", "step": 1, "loss": 1.0, "gradient_norm": float("inf"), "load": [[float("nan"), 1]]})
    log.close()
    assert _lines(tmp_path)[0] == {"kind": "train", "step": 1, "loss": 1.0, "gradient_norm": None, "load": [[None, 1]]}


def test_loads_are_relative_to_the_mean_of_their_layer():
    assert load_range(np.array([[10.0, 30.0], [4.0, 4.0]])) == (0.5, 1.5)
    assert load_range(np.array([[0.0, 0.0]])) == (0.0, 0.0)


def test_figures_of_a_step():
    routers = {
        "load": np.array([[6.0, 2.0], [4.0, 4.0]]),
        "importance": np.array([[5.0, 3.0], [3.5, 4.5]]),
        "dropped": np.array([0.25, 0.0]),
        "entropy": np.array([0.5, 0.25]),
        "max_violation": np.array([0.75, 0.25]),  # mean over micro-batches: not what is written
        "z": np.array([1.5, 2.5]),
    }
    scalars = dict.fromkeys(("loss", "balance_loss", "z_loss", "gradient_norm", "loss_scale"), 1.5)
    line = train_figures(9, {**scalars, "skipped": 0.0, "routers": routers}, 1e-3, None)
    assert line["load"] == [[6, 2], [4, 4]] and (line["load_min"], line["load_max"]) == (0.5, 1.5)
    assert line["dropped"] == pytest.approx(0.125) and line["entropy"] == [0.5, 0.25]
    assert line["step"] == 9 and line["loss"] == 1.5 and line["learning_rate"] == 1e-3
    assert line["layer_dropped"] == [0.25, 0.0] and line["z"] == [1.5, 2.5]
    assert line["importance"] == [[5.0, 3.0], [3.5, 4.5]]
    assert line["max_violation"] == [0.5, 0.0]  # of the load of the whole step: 6 / 4 - 1
    json.dumps(line)
