"""Chooses the checkpoints that a run keeps for good, besides its newest ones and the best. The rest may be removed."""

from collections.abc import Callable, Sequence
from pathlib import Path

from switchyard.checkpoint.manifest import MANIFEST, NAME

HOUR = 3600.0


def written_at(path: Path) -> float | None:
    """Returns when the manifest of a checkpoint was written, in seconds; None where there is none."""
    try:
        return (path / MANIFEST).stat().st_mtime
    except OSError:
        return None


def kept_for_good(
    paths: Sequence[Path],
    every_steps: int,
    every_hours: float,
    time_of: Callable[[Path], float | None] = written_at,
) -> set[Path]:
    """Returns the checkpoints that are never removed.

    Args:
        paths: checkpoints of a run, the oldest first.
        every_steps: a checkpoint whose step is a multiple of it is kept; 0: none for this reason.
        every_hours: the oldest checkpoint is kept, and then the first that was written so many hours or more after the
            last one kept by this rule; 0: none for this reason. The choice is the same whenever it is made.
        time_of: returns when a checkpoint was written.
    """
    kept = {path for path in paths if every_steps and int(NAME.fullmatch(path.name)[1]) % every_steps == 0}
    last = None
    for path in paths if every_hours else ():
        time = time_of(path)
        if time is not None and (last is None or time - last >= every_hours * HOUR):
            kept.add(path)
            last = time
    return kept
