"""The picture of a run: loss curves above, below them which expert got how much of each layer's load.

`python -m switchyard.report.picture runs/NAME` draws `runs/NAME/picture.png`.
"""

import os
import sys
from pathlib import Path

import numpy as np

from switchyard.cli import Parser, run
from switchyard.file_errors import writing
from switchyard.files import unfinished
from switchyard.optional import require
from switchyard.report.history import History, read_history

NAME = "picture.png"
COLUMNS = 4  # heat maps side by side
TOP_LOAD = 2.0  # colours end at twice the mean load


def draw(history: History, title: str, path: Path) -> None:
    """Writes the picture of a run, whole or not at all."""
    require("matplotlib", "matplotlib", "report: the picture of a run").use("Agg")
    from matplotlib import pyplot

    layers = history.load.shape[1]
    rows = -(-layers // COLUMNS)
    columns = min(layers, COLUMNS) or 1
    figure = pyplot.figure(figsize=(10, 4 + 2.2 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.6, *[1.0] * rows])
    _draw_losses(figure.add_subplot(grid[0, :]), history, title)
    maps = [figure.add_subplot(grid[1 + layer // COLUMNS, layer % COLUMNS]) for layer in range(layers)]
    for layer, axes in enumerate(maps):
        image = _draw_load(axes, history, layer)
        axes.set_ylabel("expert" if layer % COLUMNS == 0 else "")
    if maps:
        figure.colorbar(image, ax=maps, label="load / mean load", extend="max")
    try:
        with writing(path), unfinished(path.absolute()) as folder:
            figure.savefig(folder / NAME, format="png", dpi=120)
            os.replace(folder / NAME, path)
    finally:
        pyplot.close(figure)


def _draw_losses(axes, history: History, title: str) -> None:
    axes.plot(history.steps, history.losses, color="0.6", linewidth=1, label="training")
    axes.plot(history.validation_steps, history.validation_losses, "o-", color="C0", markersize=4, label="validation")
    if len(history.validation_losses):
        end = (history.validation_steps[-1], history.validation_losses[-1])
        axes.annotate(f"{end[1]:.3f}", end, (0, 8), textcoords="offset points", ha="right")
    axes.set(title=title, xlabel="step", ylabel="loss (nats / token)")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_load(axes, history: History, layer: int):
    """Draws a heat map of a layer: steps to the right, experts upwards; white is the mean, red more, blue less."""
    load = history.relative_load[:, layer].T  # [E, T]
    experts = np.arange(len(load))
    image = axes.pcolormesh(history.steps, experts, load, cmap="RdBu_r", vmin=0, vmax=TOP_LOAD, shading="nearest")
    axes.set(title=f"layer {history.layers[layer]}", xlabel="step", yticks=experts if len(experts) <= 16 else [])
    return image


def picture(run: Path, out: Path | None = None) -> Path:
    """Draws the run folder `run` and gives the picture's path.

    Raises:
        UserError: the folder holds no metrics.
    """
    out = out or run / NAME
    draw(read_history(run), run.name, out)
    return out


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = Parser(prog="python -m switchyard.report.picture", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the picture (default: RUN/{NAME})")
    options = parser.parse_args(arguments)
    print(picture(options.run, options.out))


if __name__ == "__main__":
    sys.exit(run(main))
