"""Shows where each rank of a job stands, to the process that watches the job on the same machine.

A rank writes its step, its phase and the time into a file that is mapped into memory: no system call, and no rank waits
for another or for a disk. The watcher reads the files of all ranks, also of ranks that hang or are stopped. Nothing
heavy is imported.
"""

import mmap
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = "SWITCHYARD_PROGRESS"  # environment variable: where the ranks of a job put their files
NAME = "progress-{rank:05d}"
LAYOUT = struct.Struct("<qqdd")  # step, phase, time of the last beat, seconds that a step may take
PHASES = ("reading data", "training step", "waiting for other ranks", "saving", "evaluation")  # in the order of a step
DATA, STEP, WAIT, SAVE, EVALUATE = range(len(PHASES))


@dataclass(frozen=True)
class Standing:
    """Says where a rank stands: steps that have ended, phase, when it was last heard of, and its limit in seconds."""

    step: int
    phase: int
    time: float
    limit: float

    def overdue(self, now: float, grace: float = 0.0) -> bool:
        """Returns whether the rank has been in one phase for longer than its limit; a limit of 0 is none."""
        return self.limit > 0 and now - self.time > self.limit + grace

    def __str__(self) -> str:
        return f"{PHASES[self.phase]} after step {self.step}"


class Board:
    """Writes where one rank stands.

    Args:
        folder: of the job.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int):
        path = folder / NAME.format(rank=rank)
        with open(path, "wb") as file:
            file.write(bytes(LAYOUT.size))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), LAYOUT.size)

    def write(self, standing: Standing) -> None:
        """Replaces what is known of the rank."""
        self._map[:] = LAYOUT.pack(standing.step, standing.phase, standing.time, standing.limit)

    @classmethod
    def of_job(cls, rank: int, environment: Mapping[str, str] = os.environ) -> "Board | None":
        """Returns the board of this process; None where nobody watches, or the folder cannot be written."""
        try:
            return cls(Path(environment[FOLDER]), rank) if FOLDER in environment else None
        except OSError:
            return None


def standings(folder: Path) -> dict[int, Standing]:
    """Returns rank -> where it stands, for the ranks of this machine that have begun to say so."""
    found = {}
    for path in sorted(folder.glob("progress-*")):
        try:
            step, phase, beat, limit = LAYOUT.unpack(path.read_bytes())
        except (OSError, struct.error):
            continue
        if beat > 0 and 0 <= phase < len(PHASES):
            found[int(path.name.rpartition("-")[2])] = Standing(step, phase, beat, limit)
    return found


def clear(folder: Path) -> None:
    """Removes what an earlier job has left."""
    for path in folder.glob("progress-*"):
        path.unlink(missing_ok=True)


def laggards(found: Mapping[int, Standing]) -> list[int]:
    """Returns the ranks that stand behind the others: at an earlier step, or an earlier phase of the same step.

    [] where all ranks stand at the same place, as in a collective that hangs on all of them.
    """
    places = {rank: (one.step, one.phase) for rank, one in found.items()}
    first = min(places.values(), default=None)
    behind = [rank for rank, place in places.items() if place == first]
    return behind if len(behind) < len(places) else []


def stall(found: Mapping[int, Standing], now: float | None = None, grace: float = 0.0) -> str | None:
    """Describes a job of which some rank is overdue, and which rank lags; None where no rank is overdue."""
    now = time.monotonic() if now is None else now
    late = {rank: one for rank, one in found.items() if one.overdue(now, grace)}
    if not late:
        return None
    one = min(late.values(), key=lambda standing: standing.time)
    text = f"train.stall_seconds: {one.limit:g}; nothing has moved for {now - one.time:.0f} s"
    behind = laggards(found)
    if not behind:
        return f"{text}: all ranks of this machine are in {one}"
    named = ", ".join(map(str, behind[:8])) + (", ..." if len(behind) > 8 else "")
    other = next(standing for rank, standing in found.items() if rank not in behind)
    words = "rank" if len(behind) == 1 else "ranks"
    return f"{text}: {words} {named} lags in {found[behind[0]]}; the others are in {other}"
