"""Renders router statistics by layer: arrays of a training step, TensorBoard scalars, lines of the log."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from switchyard.moe.metrics import max_violation

LAYER_FIGURES = ("dropped", "entropy", "max_violation", "z")  # one number of each conditional layer
EXPERT_FIGURES = ("load", "importance")  # one number of each expert
MOST_SCALARS = 256  # experts of a layer that get a TensorBoard scalar each; more get one histogram
MOST_SHOWN = 16  # experts whose loads stand in a line of the log; of more the least and the largest


def step_arrays(found: dict[str, np.ndarray]) -> dict[str, list]:
    """Returns the router metrics of a training step as JSON lists.

    Args:
        found: load, importance [M, E] and dropped, entropy, z [M], as arrays.

    Returns:
        load (whole numbers), importance [M][E]; layer_dropped, entropy, max_violation (of the step's load), z [M].
    """
    load = found["load"].astype(float)  # [M, E]
    lists = {
        "importance": found["importance"],
        "layer_dropped": found["dropped"],  # `dropped` of a line is their mean
        "entropy": found["entropy"],
        "max_violation": max_violation(load),
        "z": found["z"],
    }
    counts = [integers(of_layer) for of_layer in load]
    return {"load": counts, **{name: array.astype(float).tolist() for name, array in lists.items()}}


def integers(counts: np.ndarray) -> list[int | float]:
    """Returns counts [E] as whole numbers; one that is not finite, out of a broken model, stays as it is."""
    return [int(count) if math.isfinite(count) else float(count) for count in counts]


def layer_metrics(figures: dict[str, Any], layers: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns one dict for each conditional layer of a line of metrics.jsonl.

    Args:
        figures: a line of kind "train" or "evaluation".
        layers: indices of the conditional layers.

    Returns:
        [{layer, load [E], importance [E], dropped, entropy, max_violation, z}], [] where the line has none.
    """
    if "layers" in figures:
        return figures["layers"]
    if "load" not in figures:
        return []
    keys = {name: "layer_dropped" if name == "dropped" else name for name in (*EXPERT_FIGURES, *LAYER_FIGURES)}
    return [
        {"layer": layer, **{name: figures[key][place] for name, key in keys.items()}}
        for place, layer in enumerate(layers)
    ]


def scalars(kind: str, layers: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yields (TensorBoard tag, number).

    Tags are KIND/layer_L/NAME of a layer's figures and KIND/layer_L/NAME/expert_E of up to MOST_SCALARS experts.
    """
    for layer in layers:
        prefix = f"{kind}/layer_{layer['layer']}"
        for name in LAYER_FIGURES:
            yield f"{prefix}/{name}", layer[name]
        for name in EXPERT_FIGURES:
            if len(layer[name]) <= MOST_SCALARS:
                for expert, value in enumerate(layer[name]):
                    yield f"{prefix}/{name}/expert_{expert}", value


def histograms(kind: str, layers: list[dict[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (TensorBoard tag, [E]) of the layers whose experts are too many for scalars: KIND/layer_L/NAME."""
    for layer in layers:
        for name in EXPERT_FIGURES:
            if len(layer[name]) > MOST_SCALARS:
                yield f"{kind}/layer_{layer['layer']}/{name}", np.array(layer[name], float)


def layer_line(layer: dict[str, Any], most: int | None = None) -> str:
    """Returns the router metrics of one layer as a line.

    Args:
        layer: one of `layer_metrics`.
        most: experts whose loads are shown one by one; of more the least and the largest load. None shows all.
    """
    relative = np.array(layer["load"], float) / max(np.mean(layer["load"]), 1e-9)  # [E]
    if most is None or len(relative) <= most:
        loads = " ".join(f"{value:.2f}" for value in relative)
    else:
        loads = f"{relative.min():.2f}..{relative.max():.2f}"
    return (
        f"layer {layer['layer']}: load / mean {loads}  MaxVio {layer['max_violation']:.2f}  dropped "
        f"{100 * layer['dropped']:.1f} %  entropy {layer['entropy']:.2f} nats  z {layer['z']:.2f}"
    )
