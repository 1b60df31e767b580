"""Starts a job again where it fails: how often, after what time, with which command."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchyard.cli import EXIT_KILLED
from switchyard.distributed.members import RESTARTED, Members
from switchyard.distributed.merged_log import MergedLog
from switchyard.errors import EXIT_USER_ERROR

POLL = 0.2  # seconds
LONGEST_WAIT = 300.0  # seconds before a restart
MERGED = "all.log"  # of node K > 0: all-K.log


class Restarts:
    """Runs a job, and again where it fails, at most so many times.

    Args:
        command: of the job, which ends with the arguments of train.py.
        log_dir: exists.
        most: restarts.
        wait: seconds before the first restart.
        create: (command, log_dir, joined log) -> a job, such as `watch.Job`.
        sleep: waits up to so many seconds, and returns early for a signal.
        members: (what says a line) -> finds the nodes that are left; None: all must come back.
    """

    def __init__(
        self,
        command: list[str],
        log_dir: Path,
        most: int,
        wait: float,
        create: Callable,
        sleep=time.sleep,
        members: Callable[[Callable[[str], None]], Members] | None = None,
    ):
        self._command, self._log_dir, self._most, self._wait = command, log_dir, most, wait
        self._create, self._sleep = create, sleep
        self._merged = MergedLog(log_dir, log_dir / merged_name(command), say)
        self._members = None if members is None else members(self._tell)
        self._job: Any = None
        self._asked = False  # to end

    def run(self) -> int:
        """Returns the exit code of the last job."""
        for number in range(self._most + 1):
            for old in self._log_dir.glob("worker_*.log"):
                old.unlink()  # of an earlier job, perhaps with more workers; all.log has its lines
            self._merged.begin()
            self._job = self._create(self._command, self._log_dir, self._merged)
            code = self._job.wait()
            if report := self._job.report():
                self._tell(report)
            if self._asked or number == self._most or not may_restart(code):
                break
            pause = min(self._wait * 2**number, LONGEST_WAIT)
            self._tell(f"restart {number + 1} of {self._most} in {pause:g} s, from the newest whole checkpoint")
            self._pause(pause)
            if self._asked:
                break
            self._command = self._next_command(number + 1)
            if self._command is None:
                break
        return code

    def _next_command(self, restart: int) -> list[str] | None:
        """Returns the command of a restart; None where this node takes part no longer."""
        if self._members is not None:
            return self._members.next_command(restart, lambda: self._asked)
        return [word for word in self._command if word != RESTARTED] + [RESTARTED]

    def _tell(self, line: str) -> None:
        """Says a line, and writes it into the joined log."""
        say(line)
        self._merged.say(line)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._asked and time.monotonic() < end:
            self._sleep(min(POLL, max(end - time.monotonic(), 0)))

    def on_signal(self, number: int, frame: object) -> None:
        """Ends the job, see `Job.on_signal`, and restarts it no more."""
        self._asked = True
        if self._job is not None:
            self._job.on_signal(number, frame)


def may_restart(code: int) -> bool:
    """Returns whether a job that ended so is worth another try: a mistake in the input is not."""
    return code not in (0, EXIT_USER_ERROR, EXIT_KILLED)


def merged_name(command: list[str]) -> str:
    """Returns the name of the joined log of this node; nodes may share the folder."""
    node = next((word.partition("=")[2] for word in command if word.startswith("--node_rank=")), "0")
    return MERGED if node == "0" else f"all-{node}.log"


def say(line: str) -> None:
    """Prints a line on stderr; the terminal may be gone."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
