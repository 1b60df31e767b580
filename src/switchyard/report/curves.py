"""The curves of one or several runs, and the data of the heat maps of load. Nothing here imports MindSpore.

Legend: T logged steps, M conditional layers, E experts.
"""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from switchyard.report.analysis import dead_experts, starved_experts
from switchyard.report.charts import Chart, Series, line_chart
from switchyard.report.colours import expert_colours
from switchyard.report.records import EVALUATION, TRAIN, Records

COLUMNS = 160  # of a heat map; of more steps, neighbours are averaged
UNIT = 32  # a byte of a heat map is the load in 1/32 of the mean
STARVED = 0.1  # of the mean load
TRAIN_COLOUR, VALIDATION_COLOUR = "var(--quiet)", "var(--accent)"
BY_LAYER = (  # title, key of the training records, axis, note
    ("Entropy of the router", "entropy", "nats", "High: undecided. Choices evenly over all {experts} have {most:.2f}."),
    ("MaxVio of a training step", "max_violation", "load / mean - 1", "0: all experts of the layer get the same load."),
    ("Dropped choices", "layer_dropped", "share", "Choices that got no slot because their expert was full."),
)


def run_colours(count: int) -> list[str]:
    """Returns one colour for each of `count` runs."""
    return [VALIDATION_COLOUR] if count == 1 else expert_colours(count)


def curve_charts(runs: Sequence[Records]) -> list[Chart]:
    """Draws all curves that the runs have numbers for; those of several runs lie over each other."""
    several = len(runs) > 1
    unit = runs[0].config.unit if runs[0].config else "tokens"
    charts = [_loss_chart(runs), _accuracy_chart(runs)]
    charts.append(_plain(runs, "Learning rate", TRAIN, "learning_rate", ""))
    charts.append(_plain(runs, "Gradient norm", TRAIN, "gradient_norm", "", log=True))
    charts.append(_plain(runs, "Speed", TRAIN, "tokens_per_second", f"{unit} / s", zero=True))
    charts.append(_plain(runs, "Loss scale", TRAIN, "loss_scale", "", log=True))
    if any(run.layers for run in runs):
        charts.append(_plain(runs, "Balance loss", TRAIN, "balance_loss", "mean of the layers"))
    experts = max([run.config.moe.expert_num for run in runs if run.config], default=1)
    for title, key, axis, text in BY_LAYER:
        note = text.format(experts=experts, most=math.log(experts))
        charts.append(
            _mean_of_layers(runs, title, key, axis, note) if several else _layers(runs[0], title, key, axis, note)
        )
    return [chart for chart in charts if chart is not None]


def _loss_chart(runs: Sequence[Records]) -> Chart | None:
    series = []
    for run, colour in zip(runs, run_colours(len(runs))):
        alone = len(runs) == 1
        steps, losses = run.series(TRAIN, "loss")
        series.append(
            Series(
                "training" if alone else f"{run.name} (training)",
                steps,
                losses,
                TRAIN_COLOUR if alone else colour,
                faint=True,
            )
        )
        lines = [line for line in run.kind(EVALUATION) if isinstance(line.get("loss"), float)]
        ends = np.array([line.get("loss_ci95") or [line["loss"]] * 2 for line in lines], float).reshape(-1, 2)
        steps, losses = run.series(EVALUATION, "loss")
        known = len(ends) == len(losses)
        low, high = (ends[:, 0], ends[:, 1]) if known else (None, None)
        series.append(
            Series("validation" if alone else run.name, steps, losses, colour, marks=True, low=low, high=high)
        )
    note = "Bars: 95 % interval of the validation loss." if any(len(one.x) for one in series[1::2]) else ""
    chart = line_chart("Loss", series, "step", "nats", log=False, note=note)
    if chart and len(runs) > 1:  # the faint curve of a run has the colour of the other
        chart.legend = [entry for entry in chart.legend if not entry[0].endswith("(training)")]
        chart.note = f"Thin: training. {chart.note}"
    return chart


def _accuracy_chart(runs: Sequence[Records]) -> Chart | None:
    series = []
    for run, colour in zip(runs, run_colours(len(runs))):
        steps, values = run.series(EVALUATION, "accuracy")
        series.append(Series("validation" if len(runs) == 1 else run.name, steps, 100 * values, colour, marks=True))
    return line_chart("Accuracy", series, "step", "%")


def _plain(
    runs: Sequence[Records], title: str, kind: str, key: str, axis: str, log: bool = False, zero: bool = False
) -> Chart | None:
    series = [
        Series(title.lower() if len(runs) == 1 else run.name, *run.series(kind, key), colour)
        for run, colour in zip(runs, run_colours(len(runs)))
    ]
    return line_chart(title, series, "step", axis, log=log, zero=zero)


def _layers(run: Records, title: str, key: str, axis: str, note: str) -> Chart | None:
    steps, values = run.by_layer(key)  # [T, M]
    if not values.size:
        return None
    colours = expert_colours(len(run.layers))
    series = [
        Series(f"layer {layer}", steps, values[:, place], colours[place]) for place, layer in enumerate(run.layers)
    ]
    return line_chart(title, series, "step", axis, note=note)


def _mean_of_layers(runs: Sequence[Records], title: str, key: str, axis: str, note: str) -> Chart | None:
    series = []
    for run, colour in zip(runs, run_colours(len(runs))):
        steps, values = run.by_layer(key)
        if values.size:
            series.append(Series(run.name, steps, values.mean(1), colour))
    return line_chart(f"{title} (mean of the layers)", series, "step", axis, note=note)


def heat_maps(run: Records) -> dict[str, Any] | None:
    """Returns what the page draws the heat maps of load and importance from; None where no step has a load.

    Each number is relative to the mean of its layer and step, in 1/UNIT, at most 255; [E, columns] bytes of a layer in
    base64.
    """
    steps, load = run.by_layer("load")  # [T, M, E]
    if load.ndim != 3:
        return None
    found = {"steps": [int(part[-1]) for part in _parts(steps)], "unit": UNIT, "load": _bytes(load), "importance": []}
    _, importance = run.by_layer("importance")
    if importance.shape == load.shape:
        found["importance"] = _bytes(importance)
    return found


def _parts(values: np.ndarray) -> list[np.ndarray]:
    return np.array_split(values, min(len(values), COLUMNS))


def _bytes(values: np.ndarray) -> list[str]:
    """Returns the columns of [T, M, E] as base64 of bytes [E, columns] for each layer."""
    relative = values / np.maximum(values.mean(2, keepdims=True), 1e-9)
    columns = np.stack([part.mean(0) for part in _parts(relative)])  # [columns, M, E]
    scaled = np.clip(np.rint(columns * UNIT), 0, 255).astype(np.uint8)
    return [
        base64.b64encode(np.ascontiguousarray(scaled[:, layer].T).tobytes()).decode()
        for layer in range(scaled.shape[1])
    ]


def idle_experts(run: Records) -> list[str]:
    """Returns one sentence for each layer with experts that the last evaluation (or else the last step) did not use, or
    hardly."""
    found = []
    for layer, load, where in _last_loads(run):
        dead, starved = dead_experts(load), starved_experts(load, STARVED)
        if dead:
            found.append(f"layer {layer}: dead in {where} (no choice at all): {_listed(dead)}")
        if starved:
            found.append(f"layer {layer}: below {100 * STARVED:.0f} % of the mean load in {where}: {_listed(starved)}")
    return found


def _last_loads(run: Records) -> list[tuple[int, np.ndarray, str]]:
    evaluations = [line for line in run.kind(EVALUATION) if line.get("layers")]
    if evaluations:
        last = evaluations[-1]
        return [
            (layer["layer"], np.array(layer["load"], float), f"the evaluation of step {last['step']}")
            for layer in last["layers"]
        ]
    steps, load = run.by_layer("load")
    if load.ndim != 3:
        return []
    return [(layer, load[-1, place], f"training step {int(steps[-1])}") for place, layer in enumerate(run.layers)]


def _listed(experts: list[int]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"
