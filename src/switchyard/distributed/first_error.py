"""Finds the first error in the log of a worker."""

from pathlib import Path

SPOKEN = ("error: ", "interrupted: ")  # how the command lines say what happened, see switchyard.cli
TRACEBACK = "Traceback (most recent call last)"
TRACEBACK_LINES, TAIL_LINES = 40, 5


def first_error(log: Path) -> list[str]:
    """Returns the first error in a worker's log: the message of the command line, or a traceback, else the last
    lines."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for number, line in enumerate(lines):
        if line.startswith(SPOKEN):
            return [line]
        if line.startswith(TRACEBACK):
            return lines[number : number + TRACEBACK_LINES]
    return lines[-TAIL_LINES:]
