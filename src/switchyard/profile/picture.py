"""The table as a picture: a bar for each part, forward and backward, and a mark at its floor."""

import os
from pathlib import Path

from switchyard.file_errors import writing
from switchyard.files import unfinished
from switchyard.optional import require
from switchyard.profile.measure import Row


def draw(rows: list[Row], step: float, title: str, path: Path) -> None:
    """Writes the picture, whole or not at all."""
    require("matplotlib", "matplotlib", "profile: the picture").use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    total = sum(row.total for row in rows)
    names, places = [row.name for row in rows], range(len(rows))
    forward = [1e3 * max(row.forward, 0.0) for row in rows]
    backward = [1e3 * max(row.backward, 0.0) for row in rows]
    axes.barh(names, forward, color="C0", label="forward")
    axes.barh(names, backward, left=forward, color="C1", label="backward")
    floors = [(1e3 * row.floor, place) for row, place in zip(rows, places) if row.floor is not None]
    axes.scatter(*zip(*floors), marker="|", s=260, linewidths=2.5, color="black", label="floor", zorder=3)
    for row, place, drawn in zip(rows, places, map(sum, zip(forward, backward))):
        axes.annotate(f"  {row.total / total:.0%}", (max(drawn, 1e3 * (row.floor or 0.0)), place), va="center")
    axes.set_xmargin(0.1)  # for the label of the longest bar
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds; all parts {1e3 * total:.0f}, the whole step {1e3 * step:.0f}")
    axes.set_title(title)
    axes.legend(loc="lower right")
    try:
        with writing(path), unfinished(path.absolute()) as folder:
            figure.savefig(folder / path.name, format="png", dpi=120)
            os.replace(folder / path.name, path)
    finally:
        pyplot.close(figure)
