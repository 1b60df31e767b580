"""Trains the runs of a sweep, each in a process of its own that keeps its log beside the run folder."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path

import switchyard
from switchyard.config import recipes
from switchyard.errors import EXIT_INTERRUPTED, Interrupted
from switchyard.file_errors import writing
from switchyard.sweep.plan import Run, result_of

POLL = 1.0  # seconds between two looks at the runs
TAIL = 4096  # bytes of metrics.jsonl that are read for progress


def command_of(path: str | Path, run: Run) -> list[str]:
    """Returns the command that trains a run, or goes on with a run that has begun."""
    resume = ["--resume"] if run.folder.is_dir() and any(run.folder.iterdir()) else []
    command = [sys.executable, "-m", "switchyard", "train", "--config", str(recipes.find(path).absolute())]
    return [*command, *resume, *run.overrides]


def log_of(run: Run) -> Path:
    """Returns the file that takes what the training prints."""
    return run.folder.with_name(f"{run.name}.log")


class Runner:
    """Trains runs, as many at a time as asked for.

    Args:
        path: the configuration.
        jobs: processes at a time.
        say: takes a line for the user.
        on_step: called about once a second with the number of steps that all runs have made.
    """

    def __init__(self, path: str | Path, jobs: int, say: Callable[[str], None], on_step: Callable[[int], None]):
        self.path, self.jobs, self._say, self._on_step = path, jobs, say, on_step
        self._processes: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def train(self, runs: Sequence[Run]) -> dict[str, str]:
        """Trains all runs that are not finished.

        Returns:
            Name -> last line of the log of each run that has failed.

        Raises:
            Interrupted: a signal came, here or to a run; what was trained is saved.
        """
        failed: dict[str, str] = {}
        with self._stops(), futures.ThreadPoolExecutor(self.jobs) as pool:
            places = (f"[{number}/{len(runs)}]" for number in range(1, len(runs) + 1))
            pending = deque(pool.submit(self._train, run, place, failed) for run, place in zip(runs, places))
            try:
                while pending:
                    with contextlib.suppress(futures.TimeoutError):
                        pending[0].result(timeout=POLL)
                        pending.popleft()
                    self._on_step(sum(map(steps_of, runs)))
            except BaseException:
                self._stop()
                raise
        if self._stopped:
            raise Interrupted("sweep: the runs in training were saved; the same command goes on")
        return failed

    @contextlib.contextmanager
    def _stops(self) -> Iterator[None]:
        """SIGINT and SIGTERM, meanwhile, ask the runs in training to save and end; no further run starts."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, lambda *_: self._stop())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        self._stopped = True
        for process in list(self._processes):
            with contextlib.suppress(OSError):
                process.terminate()

    def _train(self, run: Run, place: str, failed: dict[str, str]) -> None:
        """Trains one run, unless it is finished or the sweep has been stopped."""
        if self._stopped:
            return
        if result_of(run):
            self._say(f"{place} {run.name}: finished before")
            return
        with writing(run.folder.parent):
            run.folder.parent.mkdir(parents=True, exist_ok=True)
        self._say(f"{place} {run.name}: training (log: {log_of(run)})")
        code = self._wait(run)
        if code == EXIT_INTERRUPTED:
            self._stopped = True
        elif code or not result_of(run):
            failed[run.name] = last_line(log_of(run)) or f"exit code {code}"
            self._say(f"{place} {run.name}: failed: {failed[run.name]}")
        elif loss := result_of(run)["validation_loss"]:
            self._say(f"{place} {run.name}: validation loss {loss:.4f}")

    def _wait(self, run: Run) -> int:
        """Runs the process of a run to its end and returns the exit code."""
        source = str(Path(switchyard.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        with writing(log_of(run)), open(log_of(run), "ab") as log:
            process = subprocess.Popen(
                command_of(self.path, run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # a terminal's Ctrl-C comes here alone, which passes it on once
            )
        self._processes.add(process)
        if self._stopped:  # between the look and the start
            process.terminate()
        try:
            return process.wait()
        finally:
            self._processes.discard(process)


def steps_of(run: Run) -> int:
    """Returns the newest step in the metrics of a run; 0 where there is none."""
    text = tail(run.folder / "metrics.jsonl")
    for line in reversed(text.splitlines()):
        _, found, rest = line.partition('"step": ')
        if not found:
            _, found, rest = line.partition('"step":')
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        if found and digits:
            return int(digits)
    return 0


def last_line(path: Path) -> str:
    """Returns the last line of a log that is not empty."""
    lines = [line.strip() for line in tail(path).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def tail(path: Path) -> str:
    """Returns the end of a file as text; empty where there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
