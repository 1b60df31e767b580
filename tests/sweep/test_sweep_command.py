"""The command: runs one after the other, goes on where it was stopped, reports what failed.

The trainings are a program that stands in, but for the last test, which trains.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from oracles.tiny_run import run_config, write_text

from switchyard import cli
from switchyard.sweep import __main__ as program
from switchyard.sweep import runner
from switchyard.sweep.plan import parse_axes, plan

SOURCE = Path(__file__).resolve().parents[2] / "src"
STAND_IN = """
import json, pathlib, signal, sys, time
resumed, folder, steps, seed = sys.argv[1] == "True", pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "order.txt", "a") as file:
    print(folder.name, resumed, file=file)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
for step in range(1, steps + 1):
    with open(folder / "metrics.jsonl", "a") as file:
        print(json.dumps({"kind": "train", "step": step}), file=file)
    (folder / "started").touch()
    while (folder.parent / f"hold-{seed}").exists():
        time.sleep(0.05)
print("step", steps)
if (folder.parent / f"fail-{seed}").exists():
    sys.exit("error: data.path: gone")
(folder / "result.json").write_text(json.dumps({"steps": steps, "validation_loss": 1.0 + seed}))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """(arguments -> exit code) of sweeps whose trainings are `STAND_IN`; no report."""
    path = tmp_path / "tiny.yaml"
    path.write_text(run_config(tmp_path).to_yaml())

    def command(_, run):
        resumed = run.folder.is_dir() and any(run.folder.iterdir())
        figures = (resumed, run.folder, run.config.train.steps, run.config.train.seed)
        return [sys.executable, "-c", STAND_IN, *map(str, figures)]

    monkeypatch.setattr(runner, "command_of", command)
    monkeypatch.setattr(runner, "POLL", 0.05)
    (tmp_path / "out").mkdir()

    def run(*arguments):
        return cli.run(program.main, ["--config", str(path), "--out", str(tmp_path / "out"), "--no-report", *arguments])

    return run


def order(tmp_path) -> list[str]:
    return (tmp_path / "out" / "order.txt").read_text().splitlines()


def test_runs_go_one_after_the_other_and_finished_ones_stay(sweep, tmp_path, capsys):
    assert sweep("--over", "train.seed=1,2,3", "train.steps=2") == 0
    assert order(tmp_path) == ["seed-1 False", "seed-2 False", "seed-3 False"]
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split() == ["3", "3.0000", "±", "1.0000"]
    assert "[2/3] seed-2: validation loss 3.0000" in said.err
    assert sweep("--over", "train.seed=1,2,3,4", "train.steps=2") == 0
    assert order(tmp_path)[3:] == ["seed-4 False"]
    assert "[1/4] seed-1: finished before" in capsys.readouterr().err
    assert (tmp_path / "out" / "seed-4.log").read_text() == "step 2\n"


def test_a_run_that_fails_does_not_stop_the_others(sweep, tmp_path, capsys):
    (tmp_path / "out" / "fail-1").touch()
    assert sweep("--over", "train.seed=1,2", "train.steps=2") == 2
    said = capsys.readouterr()
    assert "[1/2] seed-1: failed: error: data.path: gone" in said.err
    assert said.err.splitlines()[-1] == ("error: sweep: 1 of 2 runs failed (seed-1); the same command tries them again")
    assert said.out.splitlines()[1].split()[:2] == ["1", "3.0000"]
    (tmp_path / "out" / "fail-1").unlink()
    assert sweep("--over", "train.seed=1,2", "train.steps=2") == 0
    assert order(tmp_path)[2:] == ["seed-1 True"]


def test_several_jobs_run_at_a_time(sweep, tmp_path):
    """The first waits until the second has ended."""
    (tmp_path / "out" / "hold-1").touch()
    free = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
while not (out / "seed-2" / "result.json").exists():
    time.sleep(0.05)
(out / "hold-1").unlink()
"""
    waiting = subprocess.Popen([sys.executable, "-c", free, str(tmp_path / "out")])
    assert sweep("--over", "train.seed=1,2", "train.steps=1", "--jobs", "2") == 0
    assert waiting.wait(timeout=10) == 0


def test_a_signal_saves_the_run_in_training_and_starts_no_other(sweep, tmp_path, capsys):
    (tmp_path / "out" / "hold-2").touch()
    started = tmp_path / "out" / "seed-2" / "started"
    send = """
import os, pathlib, signal, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.05)
os.kill(int(sys.argv[2]), signal.SIGTERM)
"""
    sender = subprocess.Popen([sys.executable, "-c", send, str(started), str(os.getpid())])
    assert sweep("--over", "train.seed=1,2,3", "train.steps=1") == 75
    sender.wait(timeout=10)
    assert order(tmp_path) == ["seed-1 False", "seed-2 False"]
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: sweep: the runs in training were saved")
    (tmp_path / "out" / "hold-2").unlink()
    assert sweep("--over", "train.seed=1,2,3", "train.steps=1") == 0
    assert order(tmp_path)[2:] == ["seed-2 True", "seed-3 False"]


def test_nothing_starts_where_a_value_is_refused(sweep, tmp_path, capsys):
    assert sweep("--over", "train.seed=1,x") == 2
    assert sweep("--over", "train.seed=1", "--jobs", "0") == 2
    assert not (tmp_path / "out" / "order.txt").exists()
    assert capsys.readouterr().err.splitlines()[-1] == "error: --jobs: 0; from 1 to 64"


def test_a_dry_run_names_the_folders(sweep, tmp_path, capsys):
    assert sweep("--over", "train.seed=1,2", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out" / f"seed-{seed}") for seed in (1, 2)]


def test_progress_is_the_newest_step_of_the_metrics(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(run_config(tmp_path).to_yaml())
    (run,) = plan(path, parse_axes(["train.seed=1"]), [], None)
    assert runner.steps_of(run) == 0
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text(
        '{"kind":"train","step":3}\n{"kind": "train", "step": 12, "loss": 1}\n{"ki'
    )
    assert runner.steps_of(run) == 12


def test_a_report_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    """The real command, of a folder that is no run."""
    program._report([tmp_path], tmp_path / "report.html")
    assert capsys.readouterr().err.startswith("report: not written: ")


@pytest.mark.long
def test_two_real_runs(tmp_path):
    """Trained without compiling by the command itself; the second time nothing is trained."""
    write_text(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(run_config(tmp_path, context={"mode": "pynative"}).to_yaml())
    command = [sys.executable, "-m", "switchyard.sweep", "--config", path, "--over", "train.seed=1,2", "train.steps=2"]
    clean = os.environ | {"PYTHONPATH": str(SOURCE)}
    first = subprocess.run([*command, "--no-report"], capture_output=True, text=True, env=clean)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "runs" / "tiny-sweep"
    losses = [json.loads((out / f"seed-{seed}" / "result.json").read_text())["validation_loss"] for seed in (1, 2)]
    assert f"{sum(losses) / 2:.4f} ± " in first.stdout and losses[0] != losses[1]
    begun = time.monotonic()
    second = subprocess.run([*command, "--no-report"], capture_output=True, text=True, env=clean)
    assert second.stdout == first.stdout and time.monotonic() - begun < 60
    assert second.stderr.count("finished before") == 2
