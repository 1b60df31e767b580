"""The picture of a run: loss curves above, for images accuracy beside them, below the load of every expert by layer.

`python -m switchyard.report.picture runs/NAME` draws `runs/NAME/picture.png`.
"""

import math
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
    top = grid[0, :].subgridspec(1, 1 + bool(len(history.accuracies)))
    _draw_losses(figure.add_subplot(top[0]), history, title)
    if len(history.accuracies):
        _draw_accuracy(figure.add_subplot(top[1]), history)
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
    """Draws the loss of training and validation, beside that of a uniform guess where the answers are known."""
    axes.plot(history.steps, history.losses, color="0.6", linewidth=1, label="training")
    axes.plot(history.validation_steps, history.validation_losses, "o-", color="C0", markersize=4, label="validation")
    if history.choices:
        guess = math.log(history.choices)
        axes.axhline(guess, color="0.5", linestyle=":", label=f"uniform guess: ln {history.choices} = {guess:.2f}")
    _mark_last(axes, history.validation_steps, history.validation_losses, "{:.3f}")
    unit = "answer" if len(history.accuracies) else "token"
    axes.set(title=title, xlabel="step", ylabel=f"loss (nats / {unit})", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_accuracy(axes, history: History) -> None:
    """Draws the validation accuracy from 0 to 100 %, beside that of a uniform guess where the answers are known."""
    percent = 100 * history.accuracies
    axes.plot(history.validation_steps, percent, "o-", color="C0", markersize=4, label="validation")
    if history.choices:
        axes.axhline(100 / history.choices, color="0.5", linestyle=":", label="uniform guess")
    _mark_last(axes, history.validation_steps, percent, "{:.1f} %", below=True)
    axes.set(title="accuracy", xlabel="step", ylabel="right answers (%)", ylim=(0, 103))
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")


def _mark_last(axes, steps, values, text: str, below: bool = False) -> None:
    """Writes the last value beside its point."""
    if len(values):
        place = (0, -14) if below else (0, 8)
        axes.annotate(text.format(values[-1]), (steps[-1], values[-1]), place, textcoords="offset points", ha="right")


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
