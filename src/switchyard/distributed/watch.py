"""Watches a job that msrun runs: passes signals on, shows the first error, and leaves no process behind.

    python -m switchyard.distributed.watch [--max-restarts N] [--restart-wait SECONDS]
        [--min-workers N --rendezvous DIR [--rejoin-wait SECONDS]] LOG_DIR COMMAND ...

msrun puts every worker into a session of its own, so that neither Ctrl-C nor the end of msrun reaches them; it dies of
SIGTERM and leaves them running; and after a worker's death it waits half a minute for its scheduler. So: SIGINT and
SIGTERM go to the workers, who save and end together, and a second one ends everything; where no worker is left the
scheduler is ended; and whatever is left when msrun has ended, is killed. SIGHUP, of a terminal that closes, counts as
SIGTERM, but never as the second signal, for it comes twice; under nohup it is ignored.

Ranks that train with train.stall_seconds say where they stand (distributed.progress). Where they stand still for too
long, the job is ended, and the rank that lags is named. The logs of all ranks are joined in LOG_DIR/all.log.

With --max-restarts a job that has failed is started again, at most N times, with --restarted at its end: after
--restart-wait seconds (5), twice as many the next time, and so on up to 5 minutes. A mistake in the input is not, nor a
job that a signal to this process has ended. With --min-workers the nodes that are left go on without those that do not
come back: distributed.members.

Exit code: 0, or that of the worker which failed first (2 a mistake in the input, 74 a disk that is full or fails, 75
saved after a signal), 1 where it was killed. Nothing heavy is imported.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import psutil

from switchyard.cli import EXIT_KILLED
from switchyard.distributed import progress
from switchyard.distributed.first_error import SPOKEN, TRACEBACK, first_error
from switchyard.distributed.members import Members
from switchyard.distributed.merged_log import MergedLog
from switchyard.distributed.restarts import Restarts
from switchyard.errors import EXIT_DISK, EXIT_INTERRUPTED, EXIT_USER_ERROR
from switchyard.streams import hangs_up

POLL = 0.2  # seconds
PATIENCE = 1.0  # seconds that msrun gets to end by itself when no worker is left, one of them having failed
WAIT_WELL = 60.0  # the same where none has
LAST_WORDS = 5.0  # seconds for msrun to say what it has seen, after all others were ended
FAILED = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")
LOUD_ENOUGH = "3"  # GLOG_v with which msrun writes that line
LAUNCHER_LOG = "msrun.log"
HINDERED = {psutil.STATUS_STOPPED: "was stopped by a signal", psutil.STATUS_DISK_SLEEP: "waits for a disk"}
GRACE = 2.0  # seconds beyond train.stall_seconds in which every rank writes its stacks
FIRST_WAIT = 5.0  # seconds before the first restart
REJOIN_WAIT = 180.0  # seconds in which the other nodes must have seen the failure too, and come
USAGE = (
    "error: usage: python -m switchyard.distributed.watch [--max-restarts N] [--restart-wait SECONDS] [--min-workers N "
    "--rendezvous DIR [--rejoin-wait SECONDS]] LOG_DIR COMMAND ..."
)


class Job:
    """Runs msrun once, with everything that it starts.

    Args:
        command: msrun with its arguments.
        log_dir: where msrun writes worker_RANK.log; exists.
        merged: gets the lines of all ranks; None: nothing joins them.
    """

    def __init__(self, command: list[str], log_dir: Path, merged: MergedLog | None = None):
        self.log_dir, self.signals, self.merged = log_dir, 0, merged
        self.stalled: str | None = None  # why the job was ended: its ranks stood still
        self.ranks: dict[int, int] = {}  # pid of a worker -> rank
        self._seen: dict[int, psutil.Process] = {}
        progress.clear(log_dir)
        environment = os.environ | {progress.FOLDER: str(log_dir.absolute()), "GLOG_v": audible(os.environ)}
        with open(log_dir / LAUNCHER_LOG, "w", encoding="utf-8") as log:
            self.launcher = subprocess.Popen(command, stderr=log, start_new_session=True, env=environment)
        self._process = psutil.Process(self.launcher.pid)

    def wait(self) -> int:
        """Returns the job's exit code when everything has ended."""
        empty = None  # since when no worker runs
        try:
            while self.launcher.poll() is None and self.signals < 2:
                self._look()
                self.stalled = progress.stall(progress.standings(self.log_dir), grace=GRACE)
                if self.stalled:
                    self.stalled += self._hindered()
                    break
                if self.merged:
                    self.merged.follow()
                if self._seen and not self._alive(self.ranks) and (self.ranks or self.failure()):
                    empty = empty or time.monotonic()
                    if time.monotonic() - empty > (WAIT_WELL if self.failure() is None else PATIENCE):
                        break
                time.sleep(POLL)
        finally:
            self._kill_all()
            if self.merged:
                self.merged.follow(last=True)
            progress.clear(self.log_dir)
        return self.exit_code()

    def on_signal(self, number: int, _frame: object) -> None:
        """Passes the first signal to the workers, which save; the second signal ends the job, unless it is SIGHUP."""
        if number == signal.SIGHUP and self.signals:
            return
        self.signals += 1
        for pid in self._alive(self.ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen[pid].send_signal(signal.SIGTERM)
        if not self.ranks:
            self.signals = 2  # nothing has begun that could be saved

    def failure(self) -> tuple[int | None, int] | None:
        """Returns (rank, exit code) of the worker that failed first; None where msrun saw none. -9: killed by signal 9.

        The rank is None where the worker ended before it was seen and its log does not tell it from the others.
        """
        found = FAILED.search((self.log_dir / LAUNCHER_LOG).read_text(encoding="utf-8", errors="replace"))
        if found is None:
            return None
        loudest = None  # the lowest rank whose log holds an error
        for rank, log in sorted((int(log.stem.split("_")[1]), log) for log in self.log_dir.glob("worker_*.log")):
            said = first_error(log)
            if loudest is None and said and said[0].startswith((*SPOKEN, TRACEBACK)):
                loudest = rank
        return self.ranks.get(int(found[1]), loudest), int(found[2])

    def exit_code(self) -> int:
        """Returns the exit code of the full job."""
        if self.stalled:
            return 1
        failure = self.failure()
        if failure is not None:
            if failure[1] < 0 and self.signals:
                return EXIT_KILLED
            return failure[1] if failure[1] in (EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_DISK) else 1
        if self.signals:
            return EXIT_KILLED
        return min(abs(self.launcher.returncode), 1)

    def report(self) -> str:
        """Returns which worker failed first and its message; '' where none failed."""
        failure = self.failure()
        if self.stalled:
            return f"error: {self.stalled}; the stacks of the ranks are in {self.log_dir}/worker_*.log"
        if self.exit_code() == EXIT_KILLED:
            return "interrupted: the job was ended before it could save"
        if failure is None:
            ended = self.exit_code()
            return f"error: msrun ended with code {ended}; see {self.log_dir / LAUNCHER_LOG}" if ended == 1 else ""
        rank, code = failure
        if rank is None:
            return f"error: a worker ended with code {code} and said nothing; the logs are in {self.log_dir}"
        log = self.log_dir / f"worker_{rank}.log"
        said = first_error(log)
        if len(said) == 1 and said[0].startswith(SPOKEN):
            return f"{said[0]} (rank {rank}, {log})"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return "\n".join([f"error: rank {rank} {how}; its log {log}" + (" says:" if said else ""), *said])

    def _look(self) -> None:
        """Notes what msrun has started: its children, and theirs."""
        try:
            children = self._process.children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for child in children:
            self._seen.setdefault(child.pid, child)
            if child.pid not in self.ranks and (rank := _rank_of(child, self.launcher.pid)) is not None:
                self.ranks[child.pid] = rank

    def _hindered(self) -> str:
        """Names the ranks whose processes do not run: somebody has stopped them, or a disk does not answer."""
        found = ""
        for pid, rank in sorted(self.ranks.items(), key=lambda pair: pair[1]):
            with contextlib.suppress(psutil.Error):
                words = HINDERED.get(self._seen[pid].status())
                found += f"; rank {rank} {words}" if words else ""
        return found

    def _alive(self, pids) -> list[int]:
        """Returns the processes that still run."""
        alive = []
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                if self._seen[pid].is_running() and self._seen[pid].status() != psutil.STATUS_ZOMBIE:
                    alive.append(pid)
        return alive

    def _kill_all(self) -> None:
        """Ends msrun and all that it started."""
        if self.launcher.poll() is None:
            self._look()
        for pid in self._alive(list(self._seen)):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen[pid].kill()
        if self.ranks or self.signals:
            try:
                self.launcher.wait(LAST_WORDS)  # it reads the workers' codes first
            except subprocess.TimeoutExpired:
                self.launcher.kill()
        else:
            self.launcher.kill()
        self.launcher.wait()


def audible(environment: Mapping[str, str]) -> str:
    """Returns the level of MindSpore's log, at most 3 (errors): above it msrun does not say which worker failed."""
    level = environment.get("GLOG_v", LOUD_ENOUGH)
    return level if level in ("0", "1", "2") else LOUD_ENOUGH


def _rank_of(process: psutil.Process, launcher: int) -> int | None:
    """Returns the rank of a worker; None for other processes, such as the `tail` by which msrun follows a worker's
    log."""
    try:
        environment = process.environ()
        if environment.get("MS_ROLE") != "MS_WORKER" or process.ppid() != launcher or process.name() == "tail":
            return None
        return int(environment["RANK_ID"])
    except (psutil.Error, KeyError):
        return None


def main(arguments: list[str]) -> int:
    """Runs the command, see the top of this file."""
    options = {"--max-restarts": "0", "--restart-wait": str(FIRST_WAIT), "--min-workers": "0"}
    options |= {"--rendezvous": "", "--rejoin-wait": str(REJOIN_WAIT)}
    while len(arguments) > 1 and arguments[0] in options:
        options[arguments[0]] = arguments[1]
        arguments = arguments[2:]
    if len(arguments) < 2 or not is_right(options):
        print(USAGE, file=sys.stderr)
        return EXIT_USER_ERROR
    log_dir, command = Path(arguments[0]), arguments[1:]
    log_dir.mkdir(parents=True, exist_ok=True)
    most, wait, least = int(options["--max-restarts"]), float(options["--restart-wait"]), int(options["--min-workers"])
    members = None
    if least:
        folder, patience = Path(options["--rendezvous"]), float(options["--rejoin-wait"])
        members = partial(Members, command, least, folder, patience)
    restarts = Restarts(command, log_dir, most, wait, Job, members=members)
    for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up() else [])):
        signal.signal(number, restarts.on_signal)
    return restarts.run()


def is_right(options: Mapping[str, str]) -> bool:
    """Returns whether the values of the options are numbers, and there is a folder where nodes meet."""
    counts = (options["--max-restarts"], options["--min-workers"])
    seconds = (options["--restart-wait"], options["--rejoin-wait"])
    numbers = all(one.isdecimal() for one in counts) and all(
        re.fullmatch(r"\d{1,6}(\.\d{1,6})?", one) for one in seconds
    )
    return numbers and bool(options["--rendezvous"]) == (int(options["--min-workers"]) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
