"""Finds good checkpoints: complete, unaltered, and finite in every tensor.

A checkpoint is read in full to know it. Whoever asks again and again keeps a `Healthy`, which reads each one once.
"""

import os
from pathlib import Path

from switchyard.checkpoint.manifest import KINDS, DamagedError, listed, read_manifest, read_texts
from switchyard.checkpoint.reader import Tensors
from switchyard.errors import UserError


def fault(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint, which is read in full; None where it is good."""
    try:
        manifest = read_manifest(path)
        read_texts(manifest)
        for kind in KINDS:
            Tensors(manifest, kind).check_finite()
    except DamagedError as error:
        return error.what
    except UserError as error:  # of another format version
        return str(error)
    return None


class Healthy:
    """Knows which checkpoints are good, and reads one again only when a file of it has changed."""

    def __init__(self):
        self._seen: dict[Path, tuple] = {}

    def note(self, path: Path) -> None:
        """Takes a checkpoint as good, because this process has just written it."""
        self._seen[path] = _signature(path)

    def is_good(self, path: Path) -> bool:
        """Returns whether a checkpoint is good."""
        now = _signature(path)
        if now is not None and self._seen.get(path) == now:
            return True
        if fault(path) is not None:
            return False
        self._seen[path] = now
        return True

    def newest(self, run: str | Path, below: str | None = None) -> Path | None:
        """Returns the newest good checkpoint of a run, of those before the name `below`; None where there is none."""
        paths = [path for path in reversed(listed(run)) if below is None or _before(path.name, below)]
        return next((path for path in paths if self.is_good(path)), None)

    def kept(self, run: str | Path) -> str:
        """Returns words about the checkpoint that a message can send its reader to."""
        found = self.newest(run)
        if found is not None:
            return f"'{found}' is unchanged and good"
        return f"no checkpoint of '{run}' is good" if listed(run) else "no checkpoint was written"


def _before(name: str, other: str) -> bool:
    """Returns whether one checkpoint's name is of an earlier step than another's."""
    return (len(name), name) < (len(other), other)


def _signature(path: Path) -> tuple | None:
    """Returns names, sizes and times of a checkpoint's files; None where the system does not tell them."""
    try:
        with os.scandir(path) as entries:
            found = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return None
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in found))
