"""What the page shows of an inspection: cards of experts, a text in colours, co-activation, paths, confidence.

Legend: N tokens, M conditional layers, E experts, K choices of a token.
"""

import base64
import itertools
from typing import Any

import numpy as np

from switchyard.report import analysis
from switchyard.report.charts import Chart, Series, flow_chart, line_chart
from switchyard.report.colours import expert_colours
from switchyard.report.inspection import Inspection

BEFORE, AFTER = 28, 14  # tokens around an example
MOST_SIDE, MOST_IMAGES = 32, 12  # pixels of an image's side; images of an expert
MOST_FLOWS = 8  # layers side by side in the drawing of flows
LINKS = 220  # links between two layers that are drawn
PATHS = 12
BINS = 10
FEW_EXPERTS = 16


def expert_data(found: Inspection) -> dict[str, Any]:
    """Returns what the page draws the experts of a run from, as JSON types."""
    layers = range(len(found.config.moe_layers))
    data: dict[str, Any] = {
        "cards": [
            [_card(found, layer, expert, counts) for expert in range(found.experts)]
            for layer, counts in ((layer, _counts(found, layer)) for layer in layers)
        ],
        "coactivation": [],
        "lift": [],
    }
    if found.choices.shape[2] > 1:
        pairs = [analysis.coactivation(found.choices[layer], found.experts) for layer in layers]
        data["coactivation"] = [one.tolist() for one in pairs]
        data["lift"] = [np.round(analysis.pair_lift(one), 2).tolist() for one in pairs]
    if found.images is not None:
        data["classes"] = found.labels
        data["side"] = _small(found.images).shape[1:]
    else:
        data["text"] = _passage(found)
    return data


def _counts(found: Inspection, layer: int) -> np.ndarray:
    return analysis.count_choices(found.tokens, found.choices[layer], len(found.labels), found.experts)


def _card(found: Inspection, layer: int, expert: int, counts: np.ndarray) -> dict[str, Any]:
    """Returns what the card of an expert shows."""
    choices, gates = found.choices[layer], found.gates[layer]
    mine = choices == expert  # [N, K]
    rows = mine.any(1)
    mean = max(counts.sum() / found.experts, 1e-9)
    card: dict[str, Any] = {
        "load": round(float(counts[:, expert].sum() / mean), 3),
        "tokens": int(rows.sum()),
        "gate": round(float(gates[mine].mean()), 3) if mine.any() else None,
        "loss": round(float(found.losses[rows].mean()), 3) if rows.any() else None,
    }
    if found.images is not None:
        return card | {"classes": counts[:, expert].tolist(), "images": _examples_of_images(found, mine, gates)}
    occurrences = np.bincount(found.tokens, minlength=len(found.labels))
    few = found.experts <= FEW_EXPERTS
    most, least = (12, 8) if few else (6, 5)
    frequent = analysis.frequent_tokens(counts, occurrences, expert, most)
    exclusive = analysis.exclusive_tokens(counts, occurrences, expert, most, least)
    card["frequent"] = [[found.labels[use.token], use.count, use.total] for use in frequent]
    card["exclusive"] = [[found.labels[use.token], use.count, use.total, round(use.pmi, 2)] for use in exclusive]
    card["contexts"] = _contexts(found, mine, gates, [use.token for use in exclusive or frequent], 4 if few else 2)
    return card


def _contexts(found: Inspection, mine: np.ndarray, gates: np.ndarray, tokens: list[int], most: int) -> list[list]:
    """Returns [text before, token, text after, gate] of the places where the expert was surest of each token."""
    strength, contexts = np.where(mine, gates, -np.inf).max(1), []  # [N]
    size = found.window or len(found.tokens)
    for token in tokens[:most]:
        places = np.flatnonzero((found.tokens == token) & mine.any(1))
        place = int(places[strength[places].argmax()])
        first = place // size * size  # of its batch: the text of another one is not its context
        start, stop = max(place - BEFORE, first), min(place + 1 + AFTER, first + size)
        before, here, after = (
            "".join(found.labels[one] for one in found.tokens[a:b])
            for a, b in ((start, place), (place, place + 1), (place + 1, stop))
        )
        contexts.append([before, here, after, round(float(strength[place]), 2)])
    return contexts


def _passage(found: Inspection) -> dict[str, Any]:
    """Returns a run of consecutive tokens with the choices of every layer: gates in %, losses in 1/100 nat."""
    start, stop = found.passage
    choices, gates = found.choices[:, start:stop], found.gates[:, start:stop]
    return {
        "pieces": found.pieces,
        "loss": np.rint(100 * found.losses[start:stop]).astype(int).tolist(),
        "choices": choices.tolist(),
        "gates": np.rint(100 * gates).astype(int).tolist(),
    }


def _small(images: np.ndarray) -> np.ndarray:
    """Returns images whose sides have at most MOST_SIDE pixels, by leaving rows and columns out."""
    every = -(-max(images.shape[1:]) // MOST_SIDE)
    return images[:, ::every, ::every]


def _examples_of_images(found: Inspection, mine: np.ndarray, gates: np.ndarray) -> list[str]:
    """Returns the images whose rows the expert took most surely, as base64 of bytes [H, W]."""
    strength = np.where(mine, gates, -np.inf).max(1)
    order = [row for row in np.argsort(-strength, kind="stable") if np.isfinite(strength[row])]
    images = list(dict.fromkeys(int(row) // found.rows for row in order))[:MOST_IMAGES]
    small = np.clip(np.rint(255 * _small(found.images)), 0, 255).astype(np.uint8)
    return [base64.b64encode(small[image].tobytes()).decode() for image in images]


def flows(found: Inspection) -> list[np.ndarray]:
    """Returns how many tokens go from the first choice of each layer to that of the next: M - 1 times [E, E]."""
    first = found.choices[:, :, 0]  # [M, N]
    return [analysis.flow(before, after, found.experts) for before, after in itertools.pairwise(first)]


def drawn_flows(found: Inspection):
    """Returns (the drawing of the flows, a note); (None, why not) with fewer than two conditional layers."""
    between, layers = flows(found), found.config.moe_layers
    if not between:
        return None, "One layer is conditional: there is no path across layers."
    shown = between[: MOST_FLOWS - 1]
    note = f" The first {MOST_FLOWS} of {len(layers)} conditional layers." if len(shown) < len(between) else ""
    limit = f" Between two layers the {LINKS} largest links are drawn." if found.experts**2 > LINKS else ""
    drawing = flow_chart(shown, layers[: len(shown) + 1], expert_colours(found.experts), LINKS)
    return drawing, f"First choice of each token; the height is the number of tokens.{limit}{note}"


def path_rows(found: Inspection) -> list[dict[str, Any]]:
    """Returns the most frequent paths through all conditional layers."""
    if len(found.config.moe_layers) < 2:
        return []
    first = found.choices[:, :, 0]
    rows, number = [], max(int((first >= 0).all(0).sum()), 1)
    for path in analysis.frequent_paths(first, PATHS):
        on_path = (first == np.array(path.experts)[:, None]).all(0)  # [N]
        tokens, counts = np.unique(found.tokens[on_path], return_counts=True)
        top = tokens[np.argsort(-counts, kind="stable")[:8]]
        rows.append(
            {
                "experts": path.experts,
                "share": 100 * path.count / number,
                "lift": path.count / max(path.expected, 1e-9),
                "loss": float(found.losses[on_path].mean()),
                "tokens": [found.labels[token] for token in top],
            }
        )
    return rows


def confidence_chart(found: Inspection) -> Chart | None:
    """Draws the mean loss of the tokens by the confidence of each layer's router."""
    colours, series = expert_colours(len(found.config.moe_layers)), []
    for place, layer in enumerate(found.config.moe_layers):
        points = np.array(analysis.binned(found.confidence[place], found.losses, BINS)).reshape(-1, 3)
        x, y, error = points.T
        low, high = y - 1.96 * error, y + 1.96 * error
        series.append(Series(f"layer {layer}", x, y, colours[place], marks=True, low=low, high=high))
    note = f"{BINS} parts of equal size by the largest probability of the router; bars: 95 % interval of the mean loss."
    return line_chart("Router confidence against loss", series, "largest probability", "loss, nats", note=note)
