"""Lets a job go on without a node that is lost: who is still there, and the command of those that are.

After a failure every node that is there leaves a file in a folder that all of them see, RENDEZVOUS/restart-K/node-N.
Node 0, which has the scheduler, waits for the others, at most so many seconds. It then takes as many of the nodes that
are there as the degrees allow, and writes RENDEZVOUS/restart-K/members.json; the others wait for that file. Ranks are
numbered anew. A step keeps its sequences: fewer devices take more micro-batches each (`switchyard.training.launch`).

Without node 0 the job ends. A node that comes back takes part when the full job is started again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from switchyard.json_text import to_json

MEMBERS = "members.json"
POLL = 0.2  # seconds
PATIENCE = 30.0  # seconds beyond those of node 0, in which its decision must have come
LAUNCH = "switchyard.training.launch"  # says which keys fewer devices need; a layer above, so it is a process
TARGET = "context.device_target="
RESTARTED = "--restarted"  # of train.py: goes on from a checkpoint if there is one
TRAINING = (RESTARTED, "--resume")


class Members:
    """Finds the nodes of a job after a failure, and makes the command of this node.

    Args:
        command: of the job with all nodes: msrun, its options, train.py and its arguments.
        least: workers with which the job goes on.
        folder: RENDEZVOUS, of this job alone; node 0 empties it.
        wait: seconds in which a node must have come.
        say: receives lines about who is there.
        keys_of: (arguments of train.py, devices, devices at first) -> overrides, or None: the degrees forbid it.
        sleep: waits.
    """

    def __init__(
        self,
        command: list[str],
        least: int,
        folder: Path,
        wait: float,
        say: Callable[[str], None],
        keys_of: Callable[[list[str], int, int], list[str] | None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._command, self._least, self._folder, self._wait = command, least, folder, wait
        self._say, self._keys_of, self._sleep = say, keys_of or keys_of_fewer, sleep
        self._workers, self._each, self._own = (
            int(option(command, name)) for name in ("worker_num", "local_worker_num", "node_rank")
        )
        self._nodes = self._workers // self._each
        if self._own == 0:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    def next_command(self, restart: int, is_asked: Callable[[], bool] = lambda: False) -> list[str] | None:
        """Returns this node's command of a restart; None: the job does not go on here, which has been said.

        Args:
            restart: its number, from 1, the same on all nodes.
            is_asked: whether to give up.
        """
        place = self._folder / f"restart-{restart}"
        place.mkdir(parents=True, exist_ok=True)
        own = place / f"node-{self._own}"
        write(own, "")
        found = self._decide(place, is_asked) if self._own == 0 else self._wait_for(place / MEMBERS, own, is_asked)
        if found is None:
            return None
        nodes, keys = found["nodes"], found["keys"]
        if self._own not in nodes:
            self._say(f"restart {restart}: goes on without this node ({self._own})")
            return None
        return changed(self._command, nodes, self._each, self._own, keys)

    def _decide(self, place: Path, is_asked: Callable[[], bool]) -> dict | None:
        """Waits for the nodes, chooses those that go on, and tells them; None: there are too few."""
        end = time.monotonic() + self._wait
        while len(present(place)) < self._nodes and time.monotonic() < end and not is_asked():
            self._sleep(POLL)
        here, found = present(place), None
        for count in range(len(here), 0, -1):
            workers = count * self._each
            if workers < self._least or 0 not in here:
                break
            keys = (
                [] if workers == self._workers else self._keys_of(arguments_of(self._command), workers, self._workers)
            )
            if keys is not None:
                found = {"nodes": here[:count], "keys": keys}
                break
        missing = sorted(set(range(self._nodes)) - set(here))
        write(place / MEMBERS, to_json(found or {"nodes": [], "keys": []}))
        self._say_decision(found, missing)
        return found

    def _say_decision(self, found: dict | None, missing: list[int]) -> None:
        lost = (
            f"nodes {', '.join(map(str, missing))} did not come within {self._wait:g} s"
            if missing
            else "all nodes came"
        )
        if found is None:
            self._say(f"error: {lost}; no {self._least} or more workers of the others fit the degrees: the job ends")
        elif missing:
            count, keys = len(found["nodes"]) * self._each, " ".join(found["keys"])
            self._say(f"{lost}; goes on with {count} of {self._workers} workers: {keys}")

    def _wait_for(self, members: Path, own: Path, is_asked: Callable[[], bool]) -> dict | None:
        """Returns what node 0 has decided after this node has come; None where it says nothing."""
        end = time.monotonic() + self._wait + PATIENCE
        while time.monotonic() < end and not is_asked():
            try:
                if members.stat().st_mtime_ns >= own.stat().st_mtime_ns:  # an older one is of another job
                    return json.loads(members.read_bytes())
            except (OSError, ValueError):
                pass
            self._sleep(POLL)
        self._say(f"error: node 0 did not say within {self._wait + PATIENCE:g} s who goes on; this node ends")
        return None


def option(command: list[str], name: str) -> str:
    """Returns the value of msrun's option --NAME=VALUE."""
    return next(word.partition("=")[2] for word in command if word.startswith(f"--{name}="))


def arguments_of(command: list[str]) -> list[str]:
    """Returns the arguments of train.py in a command."""
    place = next(index for index, word in enumerate(command) if word.endswith("train.py"))
    return command[place + 1 :]


def changed(command: list[str], nodes: list[int], each: int, own: int, keys: list[str]) -> list[str]:
    """Returns the command of one of the nodes that go on, ranks numbered anew, with further keys."""
    rank = nodes.index(own)
    values = {"worker_num": len(nodes) * each, "node_rank": rank, "tail_worker_log": rank * each}
    found = []
    for word in command:
        name, sign, _ = word.removeprefix("--").partition("=")
        found.append(f"--{name}={values[name]}" if word.startswith("--") and sign and name in values else word)
    return [word for word in found if word not in TRAINING] + keys + [RESTARTED]


def present(place: Path) -> list[int]:
    """Returns the nodes that have come, in order."""
    return sorted(int(path.name.removeprefix("node-")) for path in place.glob("node-*"))


def write(path: Path, text: str) -> None:
    """Writes a file that appears whole."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def keys_of_fewer(arguments: list[str], devices: int, before: int) -> list[str] | None:
    """Returns the keys by which fewer devices do the steps of a run; None where its degrees do not allow so few."""
    target = next(word.removeprefix(TARGET) for word in reversed(arguments) if word.startswith(TARGET))
    command = [sys.executable, "-m", LAUNCH, "--devices", str(devices), "--instead-of", str(before), "--target", target]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else None
