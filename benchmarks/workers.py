"""Contenders in processes of their own, in turn: one that waits is stopped by a signal, for idle thread pools spin.

A script that measures calls `alternate(__file__, names, rounds, steps)`, and itself again with `--work NAME`, where it
calls `serve(run)` of that contender. Contenders whose names have the word torch may run in another environment, which
has PyTorch and not MindSpore: TORCH_PYTHON names its interpreter.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

PACKAGES = ("mindspore", "numpy", "torch", "transformers")


def has_torch(package: str = "torch") -> bool:
    """Returns whether torch, or a package beside it, is installed, and says in a line what is left out otherwise."""
    found = package in versions(torch_python())
    if not found:
        print(f"{package} is not installed: its contenders are left out (pip install {package}, or set TORCH_PYTHON)")
    return found


def torch_python() -> str:
    """Returns the interpreter that runs PyTorch."""
    return os.environ.get("TORCH_PYTHON", sys.executable)


def interpreter(name: str) -> tuple[str, dict[str, str]]:
    """Returns the interpreter of a contender, and its environment."""
    if "torch" not in name.split() or torch_python() == sys.executable:
        return sys.executable, dict(os.environ)
    return torch_python(), {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def versions(python: str = sys.executable) -> dict[str, str]:
    """Returns the versions of the packages that an interpreter has."""
    script = f"""
import importlib.metadata as found, json
names = {{one.metadata["Name"] for one in found.distributions()}}
print(json.dumps({{name: found.version(name) for name in {PACKAGES!r} if name in names}}))
"""
    if python == sys.executable:
        names = {one.metadata["Name"] for one in importlib.metadata.distributions()}
        return {name: importlib.metadata.version(name) for name in PACKAGES if name in names}
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def serve(run: Callable[[], object], warm_up: int = 3, least: bool = False) -> None:
    """Runs a contender: for each number n read, n calls; answers with their seconds.

    `least`: with n times those of the quickest call, where calls are so short that another process hits some of them.
    """
    for _ in range(warm_up):
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(min(seconds) * len(seconds) if least else sum(seconds), flush=True)


def alternate(script: str, names: Sequence[str], rounds: int, steps: int) -> dict[str, list[float]]:
    """Returns the seconds of a call of each contender, in each of `rounds` rounds of `steps` calls in turn."""
    from switchyard.cli import cleans_up  # here: PyTorch's interpreter has no switchyard

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {}
    try:
        with cleans_up():  # SIGTERM would leave workers that are stopped
            for name in names:
                python, environment = interpreter(name)
                workers[name] = subprocess.Popen([python, script, "--work", name], env=environment, **pipes)
            for name, worker in workers.items():
                wait_for(name, worker)
            return take_turns(workers, rounds, steps)
    finally:
        for worker in workers.values():
            worker.kill()


def wait_for(name: str, worker: subprocess.Popen) -> None:
    """Waits until a worker has warmed up, and stops it."""
    while worker.stdout.readline().strip() != "ready":
        if worker.poll() is not None:
            sys.exit(f"{name}: ended before its first step")
    worker.send_signal(signal.SIGSTOP)


def take_turns(workers: dict[str, subprocess.Popen], rounds: int, steps: int) -> dict[str, list[float]]:
    """Lets each worker make `steps` calls a round, while the others are stopped; returns the seconds of a call."""
    seconds = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            worker.send_signal(signal.SIGCONT)
            print(steps, file=worker.stdin, flush=True)
            seconds[name].append(float(worker.stdout.readline()) / steps)
            worker.send_signal(signal.SIGSTOP)
    return seconds


def summary(seconds: dict[str, list[float]], **other: object) -> list[dict]:
    """Returns a row for each contender: its least and median milliseconds."""
    return [
        {**other, "contender": name, "min_ms": 1e3 * min(found), "median_ms": 1e3 * statistics.median(found)}
        for name, found in seconds.items()
    ]


def record(path: str, question: str, command: str, rows: list[dict], commit: str | None = None) -> None:
    """Writes what was measured, with machine, versions, commit (None: that of now) and date."""
    from switchyard.json_text import to_json

    found = {
        "question": question,
        "command": command,
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "versions": {"python": platform.python_version(), **versions(torch_python()), **versions()},
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
