"""The watchdog: quiet while a run moves, a line and stacks when it does not."""

import subprocess
import sys
import time

import pytest

from switchyard.distributed.progress import DATA, STEP, Board, standings
from switchyard.training.watchdog import Watchdog


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_only_a_phase_that_takes_too_long_is_overdue(tmp_path):
    clock, armed = _Clock(), []
    with Watchdog(5.0, 3, Board(tmp_path, 2), dump=lambda *how: armed.append(how), clock=clock) as watchdog:
        clock.now = 1000.0
        assert not watchdog.overdue()  # the program compiles: nothing was heard of it yet
        watchdog.beat(DATA, 4)
        clock.now = 1004.0
        watchdog.beat(STEP)
        held = standings(tmp_path)[2]
        assert (held.step, held.phase, held.time, held.limit) == (4, STEP, 1004.0, 5.0)
        clock.now = 1009.0
        assert not watchdog.overdue()
        clock.now = 1009.1
        assert watchdog.overdue() and "training step after step 4 has taken longer" in watchdog.line()
        watchdog.pause()
        assert not watchdog.overdue() and standings(tmp_path)[2].limit == 0
    assert armed == [(5.5, False), (5.5, False)]  # the watcher of the job ends it


def test_no_seconds_watch_nothing(tmp_path):
    armed, clock = [], _Clock()
    with Watchdog(0.0, dump=lambda *how: armed.append(how), clock=clock) as watchdog:
        watchdog.beat(DATA, 1)
        clock.now = 1e9
        assert not watchdog.overdue() and not armed


HANG = """
import threading, time
from switchyard.training.watchdog import Watchdog
from switchyard.distributed.progress import STEP
watchdog = Watchdog(0.5)
watchdog.beat(STEP, 7)
def waits_for_ever():
    {how}
waits_for_ever()
"""


@pytest.mark.parametrize(
    "how, says",
    [
        ("time.sleep(60)", True),
        # holds the interpreter for a minute, as a library may: no Python runs, and the timer in C does
        ("import ctypes; ctypes.PyDLL(None).sleep(60)", False),
    ],
)
def test_a_process_that_hangs_ends_with_its_stack(how, says):
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", HANG.format(how=how)], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1 and time.monotonic() - started < 40
    assert "in waits_for_ever" in ended.stderr and "Timeout" in ended.stderr
    line = "error: train.stall_seconds: 0.5; training step after step 7 has taken longer; the stacks follow; continue with --resume"  # noqa: E501
    assert (line in ended.stderr) == says
