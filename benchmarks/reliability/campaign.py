"""What the campaigns share: folders that are checked, small disks, progress, the command line, figures as JSON.

MindSpore takes five seconds to import, so a campaign imports it once and forks a process for each command (forked).
"""

import argparse
import contextlib
import importlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from forked import HANGS  # noqa: E402
from workers import newest_commit, record  # noqa: E402

from switchyard import device  # noqa: E402

TRACEBACK = "Traceback (most recent call last)"


def ready() -> None:
    """Imports all that the commands need; no device is chosen, so that forks can choose one."""
    device.prepare_environment()
    for name in ("commands", "data.prepare", "inference.export", "inference.generate", "training.loop"):
        importlib.import_module(f"switchyard.{name}")


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
    begun, commit = time.monotonic(), newest_commit()
    with workplace(args.folder) as folder:
        rows = campaign(folder, args.short, random.Random(args.seed), **{size: getattr(args, size) for size in sizes})
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    if args.json:
        command = f"python benchmarks/reliability/{name}.py" + (" --short" if args.short else "")
        command += "".join(f" --{size} {getattr(args, size)}" for size in sizes)
        question = description.strip().splitlines()[0]
        record(args.json, question, f"{command} --seed {args.seed}", rows, commit)
    broken = sum(row["broken"] for row in rows)
    print(f"{name}: {broken} broken promises; {time.monotonic() - begun:.0f} s", flush=True)
    return int(broken > 0)
