"""Joins the logs of all ranks of a machine in one file while they are written: TIME rank RANK | LINE.

The time is that at which the line was seen, to half a second or so. `grep ' rank 3 |' all.log` shows one rank,
`grep -i error all.log` all of them, `sort all.log all-1.log` the nodes of a job. Nothing heavy is imported.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

NAME = re.compile(r"worker_(\d+)\.log")
MOST = 1 << 20  # bytes of a log that are read at once
LONGEST = 1 << 16  # bytes of a line that is joined in pieces, because its end has not come yet


def stamp() -> str:
    """Returns the present time in UTC: it sorts as text."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 10) % 10}Z"


class MergedLog:
    """Appends the new lines of worker_RANK.log of a folder to one file.

    A file that cannot be written, as on a full disk, ends the joining with one warning; the job goes on.

    Args:
        folder: of the logs.
        path: of the joined log, which is added to.
        warn: takes the warning.
        now: returns the time as text.
    """

    def __init__(
        self,
        folder: Path,
        path: Path,
        warn: Callable[[str], object] = print,
        now: Callable[[], str] = stamp,
    ):
        self._folder, self._path, self._warn, self._now = folder, path, warn, now
        self._places: dict[Path, int] = {}
        self._rests: dict[Path, bytes] = {}
        self._works = True

    def begin(self) -> None:
        """Reads the logs from their beginning: those of an earlier job were removed."""
        self._places.clear()
        self._rests.clear()

    def say(self, line: str) -> None:
        """Adds a line of the launcher itself."""
        self._write([f"{self._now()} launcher | {line}\n".encode()])

    def follow(self, last: bool = False) -> None:
        """Adds what the logs have got since the last call; `last`: a line without an end is one, too."""
        now, found = self._now(), []
        for path in sorted(self._folder.glob("worker_*.log")):
            match = NAME.fullmatch(path.name)
            if match:
                found += [f"{now} rank {match[1]} | ".encode() + line + b"\n" for line in self._lines(path, last)]
        if found:
            self._write(found)

    def _lines(self, path: Path, last: bool) -> list[bytes]:
        """Returns the new lines of a log."""
        try:
            with open(path, "rb") as file:
                file.seek(self._places.get(path, 0))
                data = file.read(-1 if last else MOST)
                self._places[path] = file.tell()
        except OSError:
            return []
        *lines, rest = (self._rests.pop(path, b"") + data).split(b"\n")
        if rest and (last or len(rest) > LONGEST):
            lines.append(rest)
        elif rest:
            self._rests[path] = rest
        return lines

    def _write(self, lines: list[bytes]) -> None:
        if not self._works:
            return
        try:
            with open(self._path, "ab") as file:
                file.write(b"".join(lines))
        except OSError as error:
            self._works = False
            self._warn(f"warning: '{self._path}': {error.strerror}; the logs of the ranks are not joined any more")
