"""The terminal view of a run: before it starts, at work, at its end."""

import json
import os
import time

import pytest
from oracles.run_folders import evaluation_line, train_line, write_folder

from switchyard.cli import run
from switchyard.report import live
from switchyard.report.__main__ import main

MOE = {"expert_num": 4, "layers": [0, 2]}
LOAD = [[4, 0, 0, 0], [1, 1, 1, 1]]


def shown(folder, capsys, monkeypatch, width=100):
    """What one frame of a run prints."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(main, ["live", str(folder), "--once"]) == 0
    return capsys.readouterr().out


def test_bar_of_a_layer_has_the_mean_at_half_height():
    assert live.bar([4, 0, 0, 0]) == "█   "
    assert live.bar([1, 1, 1, 1]) == "▄▄▄▄"
    assert live.bar([0, 0]) == "  "
    assert live.bar([3, 1, 2, 2]) == "▆▂▄▄"


def test_spark_line_goes_from_least_to_largest():
    assert live.spark([0, 1, 2, 7], 10) == "▁▂▃█"
    assert live.spark([0, 0, 7, 7], 2) == "▁█"
    assert live.spark([], 5) == ""


def test_chart_of_a_falling_line():
    rows = live.chart(steps=live.np.array([0.0, 100.0]), values=live.np.array([2.0, 1.0]), last=100, width=4, rows=2)
    assert [row[:8] for row in rows] == ["   2.000", "   1.000"]
    assert rows[0][9] != "⠀" and rows[0][-1] == "⠀"  # begins at the top left
    assert rows[1][9] == "⠀" and rows[1][-1] != "⠀"  # ends at the bottom right


def test_run_before_its_first_step(tmp_path, capsys, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty: waiting for its configuration" in shown(empty, capsys, monkeypatch)
    folder = write_folder(tmp_path / "new", [], moe=MOE)
    text = shown(folder, capsys, monkeypatch)
    assert "new: before its first step" in text
    assert "step 0 of 100 (0 %)" in text


def test_run_at_work(tmp_path, capsys, monkeypatch):
    sample = {"kind": "sample", "step": 20, "prompt": "def ", "text": "[red]f\x1b[2J():"}
    lines = [train_line(1, LOAD), train_line(20, LOAD), evaluation_line(20, 2.5, LOAD), sample]
    sizes = {"model": {"num_layers": 3, "seq_length": 25}, "data": {"batch_size": 4}}  # 100 tokens a step
    folder = write_folder(tmp_path / "busy", lines, tail='{"kind": "tra', moe=MOE, **sizes)
    text = shown(folder, capsys, monkeypatch)
    assert "busy: training" in text
    assert "step 20 of 100 (20 %)" in text
    assert "loss 2.8000" in text and "validation 2.5000" in text
    assert "about 0 min 08 s left" in text  # 80 steps at 1,000 tokens a second
    assert "layer 0   █     MaxVio 0.25  dropped 25.0%" in text
    assert "layer 2   ▄▄▄▄" in text
    assert "def [red]f·[2J():" in text  # neither mark-up nor a steering character is obeyed
    assert "\x1b[2J" not in text


def test_run_that_is_silent(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "run", [train_line(1), train_line(20)])
    long_ago = time.time() - 3600 * 2
    os.utime(folder / "metrics.jsonl", (long_ago, long_ago))
    assert "no record for 120 min" in shown(folder, capsys, monkeypatch)


def test_run_at_its_end_ends_the_view(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "done", [train_line(100)], result={"steps": 100}, moe=MOE)
    monkeypatch.setenv("COLUMNS", "80")
    assert run(main, ["live", str(folder)]) == 0  # returns: nothing more will come
    assert "done: finished" in capsys.readouterr().out


def test_no_frame_is_wider_than_the_terminal(tmp_path, capsys, monkeypatch):
    load = [[1] * 200, [2] * 200]
    folder = write_folder(tmp_path / "wide", [train_line(1, load)], moe={"expert_num": 200, "layers": [0, 2]})
    for width in (60, 120):
        assert max(map(len, shown(folder, capsys, monkeypatch, width).splitlines())) <= width


def test_follower_reads_what_is_added_and_begins_anew_with_a_new_file(tmp_path):
    folder = write_folder(tmp_path / "run", [train_line(1)], tail='{"kind": "train", "st')
    follower = live.Follower(folder)
    assert [line["step"] for line in follower.read().kind("train")] == [1]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('ep": 2, "loss": 1.0}\n' + json.dumps(train_line(3)) + "\n")
    assert [line["step"] for line in follower.read().kind("train")] == [1, 2, 3]
    other = folder / "other"
    other.write_text(json.dumps(train_line(1)) + "\n")
    os.replace(other, folder / "metrics.jsonl")  # as a resumed run does
    assert [line["step"] for line in follower.read().kind("train")] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["live", "nowhere"], "run 'nowhere': no such folder"), (["live", ".", "--every", "0"], "at least 0.1")],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert run(main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
