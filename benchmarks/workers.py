"""Contenders in processes of their own, in turn: one that waits is stopped by a signal, for idle thread pools spin.

A script that measures calls `alternate(__file__, names, rounds, steps)`, and itself again with `--work NAME`, where it
calls `serve(run)` of that contender.
"""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from switchyard.json_text import to_json

PACKAGES = ("mindspore", "numpy", "torch", "transformers")


def has_torch() -> bool:
    """Returns whether torch is installed, and says in a line what is left out where it is not."""
    found = importlib.util.find_spec("torch") is not None
    if not found:
        print("torch is not installed: its contenders are left out (pip install torch)")
    return found


def serve(run: Callable[[], object], warm_up: int = 3) -> None:
    """Runs a contender: for each number read, that many calls; answers with their seconds."""
    for _ in range(warm_up):
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            run()
        print(time.perf_counter() - start, flush=True)


def alternate(script: str, names: Sequence[str], rounds: int, steps: int) -> dict[str, list[float]]:
    """Returns the seconds of a call of each contender, in each of `rounds` rounds of `steps` calls in turn."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen([sys.executable, script, "--work", name], **pipes) for name in names}
    try:
        for name, worker in workers.items():
            while worker.stdout.readline().strip() != "ready":
                if worker.poll() is not None:
                    sys.exit(f"{name}: ended before its first step")
            worker.send_signal(signal.SIGSTOP)
        seconds = {name: [] for name in names}
        for _ in range(rounds):
            for name, worker in workers.items():
                worker.send_signal(signal.SIGCONT)
                print(steps, file=worker.stdin, flush=True)
                seconds[name].append(float(worker.stdout.readline()) / steps)
                worker.send_signal(signal.SIGSTOP)
        return seconds
    finally:
        for worker in workers.values():
            worker.kill()


def summary(seconds: dict[str, list[float]], **other: object) -> list[dict]:
    """Returns a row for each contender: its least and median milliseconds."""
    return [
        {**other, "contender": name, "min_ms": 1e3 * min(found), "median_ms": 1e3 * statistics.median(found)}
        for name, found in seconds.items()
    ]


def record(path: str, question: str, command: str, rows: list[dict], commit: str | None = None) -> None:
    """Writes what was measured, with machine, versions, commit (None: that of now) and date."""
    versions = {}
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    found = {
        "question": question,
        "command": command,
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit or newest_commit(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    with open(path, "w", encoding="utf-8") as file:
        file.write(to_json(found, indent=1) + "\n")


def newest_commit() -> str:
    """Returns the short hash of the commit that is checked out."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def processor() -> str:
    """Returns the name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
