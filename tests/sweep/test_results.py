"""The table and the CSV of a sweep against numbers typed by hand."""

import csv
import json

import pytest
from oracles.tiny_run import run_config

from switchyard.sweep.plan import parse_axes, plan
from switchyard.sweep.results import summary, write_csv


@pytest.fixture
def swept(tmp_path):
    """(runs, axes) of two numbers of experts and two seeds, three of four finished."""
    path = tmp_path / "tiny.yaml"
    path.write_text(run_config(tmp_path, moe={"expert_num": 4}).to_yaml())
    axes = parse_axes(["moe.expert_num=2,8", "train.seed=1,2", "train.steps=5"])
    runs = plan(path, axes, [], None)
    for run, loss in zip(runs, (2.0, 3.0, 1.5)):
        run.folder.mkdir(parents=True)
        result = {"steps": 5, "validation_loss": loss, "bits_per_byte": loss / 2, "tokens_per_second": 1234.5}
        (run.folder / "result.json").write_text(json.dumps(result))
    return runs, axes


def test_seeds_become_mean_and_standard_deviation(swept):
    """Of 2 and 3 the mean is 2.5, the standard deviation of the sample 1 / sqrt(2)."""
    assert summary(*swept) == [
        "moe.expert_num  runs  validation loss  bits/byte        tokens/s",
        "2               2     2.5000 ± 0.7071  1.2500 ± 0.3536  1,234 ± 0",
        "8               1     1.5000           0.7500           1,234      *",
    ]


def test_without_a_finished_run_there_is_a_table_still(swept, tmp_path):
    runs, axes = swept
    for run in runs:
        (run.folder / "result.json").unlink(missing_ok=True)
    assert summary(runs, axes) == ["moe.expert_num  runs", "2               0", "8               0"]


def test_seeds_alone_are_one_row(swept):
    runs, axes = swept
    lines = summary(runs[:2], axes[1:])
    assert lines[1].split()[:4] == ["2", "2.5000", "±", "0.7071"] and "*" not in lines[1]


def test_the_csv_has_a_row_for_each_run(swept, tmp_path):
    runs, axes = swept
    with open(write_csv(runs, axes, tmp_path)) as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [run.name for run in runs]
    assert [row["validation_loss"] for row in rows] == ["2.0", "3.0", "1.5", ""]
    assert [row["train.seed"] for row in rows] == ["1", "2", "1", "2"]
