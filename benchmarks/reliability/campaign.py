"""What the campaigns share: commands in forks of one process, folders that are checked, figures as JSON.

MindSpore takes five seconds to import, so a campaign imports it once and forks a process for each command. Such a
process is killed, stopped and limited like any other.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from workers import record  # noqa: E402

from switchyard import cli, device  # noqa: E402

POLL = 0.002  # seconds
LONGEST = 300.0  # seconds of a command
HANGS = "took too long"
TRACEBACK = "Traceback (most recent call last)"
DISTURBED = -signal.SIGKILL


def ready() -> None:
    """Imports all that the commands need; no device is chosen, so that forks can choose one."""
    device.prepare_environment()
    for name in ("commands", "data.prepare", "inference.export", "inference.generate", "training.loop"):
        importlib.import_module(f"switchyard.{name}")


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


def fault_of(said: str) -> str | None:
    """Returns what is wrong with the output of a command that has failed: a traceback, or no line that says why."""
    if TRACEBACK in said:
        return "traceback"
    if said.rstrip().endswith(HANGS):
        return HANGS
    return None if any(line.startswith(("error: ", "interrupted: ")) for line in said.splitlines()) else "no line"


def checked_lines(path: Path) -> tuple[int, int]:
    """Returns how many lines of a metrics.jsonl are torn, and how many are there twice."""
    if not path.exists():
        return 0, 0
    torn, keys = 0, Counter()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            found = json.loads(line if line.endswith("\n") else "torn")
            keys[found["kind"], found["step"], found.get("number", found.get("whole"))] += 1
        except (ValueError, KeyError, TypeError):
            torn += 1
    return torn, sum(count - 1 for count in keys.values())


def damaged(run: Path) -> list[str]:
    """Returns a line for each checkpoint of a run folder that cannot be read."""
    from switchyard.checkpoint import store
    from switchyard.errors import UserError

    found = []
    for path in store.listed(run):
        try:
            store.read(path)
        except UserError as error:
            found.append(str(error))
    return found


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Puts a small file system in memory in the place of a folder meanwhile; yields whether that could be done."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def mount(*words: str) -> bool:
    """Calls `mount`, which needs root, and returns whether it has worked."""
    try:
        return subprocess.run(["mount", *words], capture_output=True).returncode == 0
    except OSError:
        return False


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a folder, by its path in it."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


class Shown:
    """Shows how far a campaign is, a line each few seconds.

    Attributes:
        limit: seconds after which `over` is true for all of them, see --minutes.
    """

    limit = float("inf")

    def __init__(self, name: str, total: int, every: float = 10.0):
        self._name, self._total, self._every, self._said = name, total, every, 0.0
        self.count, self._begun = 0, time.monotonic()

    @property
    def over(self) -> bool:
        """Returns whether the time that was given is over: what was counted until then is published."""
        return time.monotonic() - self._begun > self.limit

    def advance(self, text: str = "") -> None:
        """Counts one more, and shows the count where it is time."""
        self.count += 1
        now = time.monotonic()
        if now - self._said >= self._every or self.count == self._total:
            self._said = now
            seconds = now - self._begun
            print(f"{self._name}: {self.count:,} of {self._total:,} in {seconds:.0f} s {text}".rstrip(), flush=True)


@contextlib.contextmanager
def workplace(folder: str | None) -> Iterator[Path]:
    """Yields an empty folder to work in, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="switchyard-campaign-", dir=folder) as name:
        yield Path(name)


def run_campaign(
    name: str, description: str, campaign: Callable[..., list[dict]], arguments: list[str] | None, **sizes: int
) -> int:
    """Runs a campaign by its command line, and returns 0 where its promise held.

    Args:
        name: of the script.
        description: its docstring.
        campaign: takes a folder to work in, whether the short form is asked for, and random numbers; returns rows,
            each with a count `broken` of what has broken the promise.
        arguments: of the command line.
        sizes: more options of the command line, whole numbers, with what they are by default; the campaign takes them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a small part of it: seconds")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (default 1)")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin nothing new after so many minutes")
    parser.add_argument("--folder", metavar="DIR", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    for size, usual in sizes.items():
        parser.add_argument(f"--{size}", type=int, default=usual, help=f"(default {usual:,})")
    args = parser.parse_args(arguments)
    Shown.limit = 60 * (args.minutes or float("inf"))
    ready()
    begun = time.monotonic()
    with workplace(args.folder) as folder:
        rows = campaign(folder, args.short, random.Random(args.seed), **{size: getattr(args, size) for size in sizes})
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    if args.json:
        command = f"python benchmarks/reliability/{name}.py" + (" --short" if args.short else "")
        question = description.strip().splitlines()[0]
        record(args.json, question, f"{command} --seed {args.seed}", rows)
    broken = sum(row["broken"] for row in rows)
    print(f"{name}: {broken} broken promises; {time.monotonic() - begun:.0f} s", flush=True)
    return int(broken > 0)
