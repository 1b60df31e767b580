"""Commands in forks of one process, alone or two that train together: killed, stopped and limited like any other."""

import contextlib
import io
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from switchyard import cli

POLL = 0.002  # seconds
LONGEST = 300.0  # seconds of a command
HANGS = "took too long"
DISTURBED = -signal.SIGKILL


class Forked:
    """Runs a function with arguments, such as a command line, in a fork of this process.

    Args:
        main: takes the arguments; returns an exit code or None.
        arguments: see `main`.
        log: file that gets stdout and stderr.
        environment: variables of the fork.
        before: called in the fork before the function, for limits.
    """

    def __init__(
        self,
        main: Callable,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], object] = lambda: None,
    ):
        self.log, self.code = log, None
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._work(main, list(arguments), environment or {}, before)

    def _work(self, main: Callable, arguments: list[str], environment: Mapping[str, str], before: Callable) -> None:
        code = 1
        try:
            os.setsid()
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(handle, 1), os.dup2(handle, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(environment)
            synchronous()
            before()
            code = cli.run(main, arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """Returns the exit code, -9 after SIGKILL; None while the process runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = LONGEST) -> int:
        """Returns the exit code; a process that takes longer is killed, and its log says so."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                with self.log.open("a", encoding="utf-8") as log:
                    log.write(f"{HANGS}\n")
                end = float("inf")
            time.sleep(POLL)
        return self.code

    def send(self, number: int) -> None:
        """Sends a signal to a process that runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the process, and what it has started, by SIGKILL."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # it had no session of its own yet
        self.wait()

    @property
    def said(self) -> str:
        """Returns what the process has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


class Job:
    """Runs train.py in two processes and their scheduler, as msrun does. The interface is that of `Forked`.

    Args:
        main, arguments, before: see `Forked`.
        log: of rank 0; those of the others stand beside it.
    """

    def __init__(self, main: Callable, arguments: Sequence[str], log: Path, before: Callable = lambda: None):
        self.log = log
        port = free_port()
        common = {"MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(port)}
        common |= {"MS_TOPO_TIMEOUT": "300"}
        scheduler = common | {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"}
        arguments = [*arguments, "context.device_target=CPU"]
        self.scheduler = Forked(main, arguments, log.with_suffix(".scheduler"), scheduler)
        self.workers = []
        for rank in range(2):
            one = common | {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank), "RANK_ID": str(rank), "DEVICE_ID": "0"}
            place = log if rank == 0 else log.with_suffix(f".{rank}")
            self.workers.append(Forked(main, arguments, place, one, before))

    def poll(self) -> int | None:
        """Returns the worst exit code of the workers when one has failed or all have ended; None while they run."""
        codes = [worker.poll() for worker in self.workers]
        if None in codes and not any(codes):
            return None
        return next((code for code in codes if code), 0)

    def wait(self, seconds: float = LONGEST) -> int:
        """Returns the worst exit code; where a worker has failed the others are ended, as the launcher does."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(POLL)
        code = self.poll()
        if code is None:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"{HANGS}\n")
        time.sleep(0.2 if code else 0.0)  # for the last words of the other rank
        for process in (*self.workers, self.scheduler):
            process.kill()
        return DISTURBED if code is None else code

    def kill(self, first: int = 0, pause: float = 0.0) -> None:
        """Kills a rank and, after a pause as long as a launcher takes to see it, all others."""
        self.workers[first].kill()
        time.sleep(pause)
        for process in (*self.workers, self.scheduler):
            process.kill()

    @property
    def said(self) -> str:
        """Returns what the ranks have printed."""
        return "".join(worker.said for worker in self.workers)


def called(main: Callable, arguments: Sequence[str]) -> tuple[int, str]:
    """Calls a command line in this process: for what ends before a device is chosen.

    Returns:
        The exit code, and what was said: a traceback where the command has none of its own errors.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.run(main, list(arguments))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            code = 1
            said.write(traceback.format_exc())
    return code, said.getvalue()


def synchronous() -> None:
    """Has operators of PyNative mode run one by one, which is several times faster for tiny models."""
    if ms := sys.modules.get("mindspore"):
        ms.set_context(mode=ms.PYNATIVE_MODE, pynative_synchronize=True)


def free_port() -> int:
    """Returns a port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def limited(name: int, size: int) -> Callable[[], None]:
    """Returns a function that sets a limit of the system, such as RLIMIT_FSIZE, for a process."""
    return lambda: resource.setrlimit(name, (size, resource.getrlimit(name)[1]))


def own_size() -> int:
    """Returns the bytes of the address space of this process."""
    return psutil.Process().memory_info().vms
