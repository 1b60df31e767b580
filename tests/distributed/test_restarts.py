"""Restarts of a job: which failures, how long between them, with what command; with jobs that are numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

from switchyard.distributed import restarts
from switchyard.distributed.restarts import Restarts, merged_name


class _Job:
    """Ends with the next of CODES."""

    def __init__(self, command, log_dir, merged):
        self.code = CODES.pop(0)
        STARTED.append(command)

    def wait(self) -> int:
        return self.code

    def report(self) -> str:
        return f"error: code {self.code}" if self.code else ""


CODES, STARTED = [], []


class _Time:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = _Time()
    monkeypatch.setattr(restarts.time, "monotonic", clock.monotonic)
    STARTED.clear()
    return clock


@pytest.mark.parametrize(
    "codes, most, ends, seconds",
    [
        ([0], 3, 0, 0),
        ([1, 1, 0], 3, 0, 5 + 10),
        ([1, 75, 1, 1], 3, 1, 5 + 10 + 20),  # 75: preempted, and nobody asked this process to end it
        ([74, 0], 3, 0, 5),  # a full disk
        ([2], 3, 2, 0),  # a mistake in the input
        ([1, 2], 3, 2, 5),
        ([130], 3, 130, 0),
        ([1], 0, 1, 0),
        ([1] * 9 + [0], 9, 0, 5 * (1 + 2 + 4 + 8 + 16 + 32) + 3 * 300),
    ],
)
def test_what_is_tried_again_and_when(tmp_path, clock, codes, most, ends, seconds):
    CODES[:] = codes
    job = Restarts(["run", "--init", "other"], tmp_path, most, 5.0, create=_Job, sleep=clock.sleep)
    assert job.run() == ends and clock.now == pytest.approx(seconds)
    first, *again = STARTED
    assert first == ["run", "--init", "other"] and len(again) == len(codes) - 1
    assert all(command == ["run", "--init", "other", "--restarted"] for command in again)


def test_a_signal_ends_the_restarts(tmp_path, clock):
    CODES[:] = [1, 0]

    def sleep(seconds):
        clock.sleep(seconds)
        job._job = None
        job.on_signal(15, None)

    job = Restarts(["run"], tmp_path, 3, 5.0, create=_Job, sleep=sleep)
    assert job.run() == 1 and len(STARTED) == 1 and clock.now < 1


def test_restarts_are_in_the_joined_log(tmp_path, clock):
    CODES[:] = [1, 0]
    Restarts(["run"], tmp_path, 1, 0.5, create=_Job, sleep=clock.sleep).run()
    lines = [line.partition(" | ")[2] for line in (tmp_path / "all.log").read_text().splitlines()]
    assert lines == ["error: code 1", "restart 1 of 1 in 0.5 s, from the newest whole checkpoint"]


def test_each_node_has_a_joined_log_of_its_own():
    assert merged_name(["msrun", "--node_rank=0"]) == "all.log" == merged_name(["x"])
    assert merged_name(["msrun", "--node_rank=3"]) == "all-3.log"


@pytest.mark.parametrize(
    "arguments", [[], ["logs"], ["--max-restarts", "x", "l", "c"], ["--restart-wait", "-1", "l", "c"]]
)
def test_a_wrong_command_line_is_one_line(arguments, tmp_path):
    command = [sys.executable, "-m", "switchyard.distributed.watch", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: usage: ") and done.stderr.count("\n") == 1
    assert not list(Path(tmp_path).iterdir())
