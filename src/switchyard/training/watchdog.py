"""Ends a training that does not move any more, with the stacks of its threads.

The stacks are written by a timer in C (faulthandler), which needs no Python: also where a collective or a disk holds
the interpreter. Of a job that `switchyard.distributed.watch` runs, every rank writes its stacks; the watcher ends the
job and names the rank that lags. A process alone ends itself.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from switchyard.distributed.progress import DATA, PHASES, Board, Standing

STDERR = 2
AFTER_LINE = 0.5  # seconds from the line to the stacks
ALONE = 30.0  # seconds from the line to the end, where a watcher should have ended the job and has not
EXIT_STALLED = 1


class Watchdog:
    """Expects a sign of life within so many seconds of the last one.

    Args:
        seconds: train.stall_seconds; 0 expects nothing.
        step: optimizer steps that were made before.
        board: where the watcher of the job looks; None: nobody watches.
        end: ends the process.
        dump: arms the timer in C that writes the stacks: (seconds, whether it ends the process).
        clock: seconds.

    Examples:
        >>> with Watchdog(600.0) as watchdog:
        ...     watchdog.beat(DATA, step=1)
    """

    def __init__(
        self,
        seconds: float,
        step: int = 0,
        board: Board | None = None,
        end: Callable[[int], object] = os._exit,
        dump: Callable[[float, bool], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._seconds, self._board, self._end, self._clock = seconds, board, end, clock
        self._dump = dump or (lambda after, ends: faulthandler.dump_traceback_later(after, exit=ends, file=STDERR))
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._step, self._phase, self._last, self._armed = step, DATA, clock(), False
        self._thread: threading.Thread | None = None

    def beat(self, phase: int, step: int | None = None) -> None:
        """Says that the run is alive and begins a phase; from here on the time counts.

        Args:
            phase: see `distributed.progress.PHASES`.
            step: optimizer steps that have ended; None: as many as before.
        """
        with self._lock:
            self._phase, self._last, self._armed = phase, self._clock(), self._seconds > 0
            self._step = self._step if step is None else step
            self._show()
        if self._armed:
            self._dump(self._seconds + AFTER_LINE, self._board is None)
            self._watch()

    def pause(self) -> None:
        """Stops counting until the next beat: a compilation takes as long as it takes."""
        with self._lock:
            self._armed = False
            self._show()
        if self._seconds > 0:
            faulthandler.cancel_dump_traceback_later()

    def _show(self) -> None:
        if self._board is not None:
            limit = self._seconds if self._armed else 0.0
            self._board.write(Standing(self._step, self._phase, self._last, limit))

    def _watch(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        """Waits until the run is overdue; says so, and ends the process where nobody else does."""
        while not self._closed.wait(min(self._seconds / 4, 1.0)):
            if self.overdue():
                print(f"error: {self.line()}", file=sys.stderr, flush=True)
                if not self._closed.wait(ALONE) and self.overdue():
                    self._end(EXIT_STALLED)

    def overdue(self) -> bool:
        """Returns whether the last sign of life is too long ago."""
        with self._lock:
            return self._armed and self._clock() - self._last > self._seconds

    def line(self) -> str:
        """Returns what happened, in one line."""
        return (
            f"train.stall_seconds: {self._seconds:g}; {PHASES[self._phase]} after step {self._step} has taken longer; "
            "the stacks follow; continue with --resume"
        )

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self.pause()
