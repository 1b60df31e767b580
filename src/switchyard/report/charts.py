"""Draws charts as SVG text: curves with a cross-hair, and flows between the experts of layers. No library is needed.

Sizes are those of the drawing; a page scales it. Colours of axes and text come from the page's style sheet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 26
MOST_POINTS = 300  # of a curve; of more, neighbours are averaged
TICKS = 5


@dataclass(frozen=True)
class Series:
    """Holds one curve.

    Attributes:
        name: in the legend.
        x, y: [T]; numbers of y that are not finite are left out.
        colour: of CSS.
        marks: whether each point is marked.
        faint: drawn thin, under the others.
        low, high: [T] ends of an interval of each point, or None.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    marks: bool = False
    faint: bool = False
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Axis:
    """Maps numbers to places of the drawing.

    Attributes:
        first, last: ends of the range.
        start, stop: their places.
        log: whether the axis is logarithmic.
    """

    first: float
    last: float
    start: float
    stop: float
    log: bool = False

    def place(self, value):
        """Returns the place of a number, or of an array."""
        one, other, value = self.first, self.last, np.asarray(value, float)
        if self.log:
            one, other, value = math.log10(one), math.log10(other), np.log10(np.maximum(value, 1e-300))
        return self.start + (value - one) / ((other - one) or 1.0) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Returns round numbers in the range."""
        if not self.log:
            return round_numbers(self.first, self.last)
        low, high = math.floor(math.log10(self.first)), math.ceil(math.log10(self.last))
        powers = [10.0**power * digit for power in range(low, high + 1) for digit in (1, 2, 5)]
        inside = [power for power in powers if self.first <= power <= self.last]
        tens = [power for power in inside if math.log10(power) == round(math.log10(power))]
        return tens if len(tens) >= 2 else inside[:TICKS] or [self.first, self.last]


def round_numbers(first: float, last: float, count: int = TICKS) -> list[float]:
    """Returns about `count` round numbers from `first` to `last`."""
    span = (last - first) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = min((power * digit for digit in (1, 2, 5, 10)), key=lambda size: abs(span / size - count))
    start = math.ceil(first / step - 1e-9)
    return [round(index * step, 12) for index in range(start, int(last / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Returns a number in a few letters: 12.3k, 0.0004."""
    size = abs(value)
    if size >= 1e9 or (0 < size < 1e-3):
        return f"{value:.2g}"
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / {'M': 1e6, 'k': 1e3}[unit]:.3g}{unit}"
    return f"{value:.4g}"


def thinned(series: Series) -> Series:
    """Returns a curve of at most MOST_POINTS finite points."""
    keep = np.isfinite(series.x) & np.isfinite(series.y)
    x, y = series.x[keep], series.y[keep]
    low = series.low[keep] if series.low is not None else None
    high = series.high[keep] if series.high is not None else None
    if len(x) > MOST_POINTS:
        x, y = (np.array([part.mean() for part in np.array_split(values, MOST_POINTS)]) for values in (x, y))
        low = high = None
    return Series(series.name, x, y, series.colour, series.marks, series.faint, low, high)


@dataclass
class Chart:
    """Holds a drawn chart for the page.

    Attributes:
        title, unit: above it.
        svg: the drawing.
        legend: (name, colour) of each curve.
        data: what the cross-hair reads: places of x, x, and the numbers of each curve.
        note: one sentence below it.
        number: which of the charts of the page it is.
    """

    title: str
    unit: str
    svg: Markup
    legend: list[tuple[str, str]]
    data: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    number: int = 0


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log: bool = False,
    note: str = "",
    zero: bool = False,
) -> Chart | None:
    """Draws curves over a common axis; None where no curve has a point.

    Args:
        title: above the chart.
        series: the curves.
        x_label, y_label: of the axes.
        log: whether the vertical axis is logarithmic, where all numbers are above 0.
        note: one sentence below the chart.
        zero: whether a linear vertical axis begins at 0.
    """
    curves = [curve for curve in map(thinned, series) if len(curve.x)]
    if not curves:
        return None
    x_axis, y_axis = _axes(curves, log, zero)
    parts = [_grid(x_axis, y_axis, x_label)]
    for curve in sorted(curves, key=lambda one: not one.faint):
        parts.append(_curve(curve, x_axis, y_axis))
    parts.append(f'<line class="hair" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>')
    label = escape(f"{title}: {', '.join(curve.name for curve in curves)}")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    data = {
        "curves": [
            {
                "name": curve.name,
                "colour": curve.colour,
                "px": np.round(x_axis.place(curve.x), 1).tolist(),
                "x": [short(value) for value in curve.x],
                "y": [short(value) for value in curve.y],
            }
            for curve in curves
        ],
        "label": x_label,
    }
    return Chart(title, y_label, Markup(svg), [(curve.name, curve.colour) for curve in curves], data, note)


def _axes(curves: list[Series], log: bool, zero: bool) -> tuple[Axis, Axis]:
    x = np.concatenate([curve.x for curve in curves])
    ends = [end for curve in curves for end in (curve.y, curve.low, curve.high) if end is not None]
    y = np.concatenate(ends)
    low, high = float(y.min()), float(y.max())
    log = log and low > 0
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = (0.0 if zero or 0 <= low <= 0.2 * high else low - pad), high + pad
    first, last = float(x.min()), float(x.max())
    if first == last:
        first, last = first - 1.0, last + 1.0
    return Axis(first, last, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _grid(x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    """Returns lines at round numbers, their labels, and the name of the horizontal axis."""
    parts, floor = [], HEIGHT - BOTTOM
    for value in y_axis.ticks():
        y = float(y_axis.place(value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x_axis.ticks():
        x = float(x_axis.place(value))
        if x < WIDTH - RIGHT - 14 - 6.5 * len(x_label):  # the name of the axis stands there
            parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<text class="name" x="{WIDTH - RIGHT}" y="{floor + 15}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def _curve(curve: Series, x_axis: Axis, y_axis: Axis) -> str:
    """Returns the line of a curve, its marks and its intervals."""
    x, y, colour = x_axis.place(curve.x), y_axis.place(curve.y), escape(curve.colour)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    kind = "curve faint" if curve.faint else "curve"
    parts = [f'<polyline class="{kind}" stroke="{colour}" points="{points}"/>']
    if curve.low is not None and curve.high is not None:
        ends = zip(x, y_axis.place(curve.low), y_axis.place(curve.high))
        parts += [
            f'<line class="bar" stroke="{colour}" x1="{a:.1f}" x2="{a:.1f}" y1="{b:.1f}" y2="{c:.1f}"/>'
            for a, b, c in ends
        ]
    if curve.marks or len(x) == 1:
        parts += [f'<circle fill="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in zip(x, y)]
    return "".join(parts)


@dataclass(frozen=True)
class Node:
    """Holds one expert of one layer in a drawing of flows: its place and how tall it is."""

    x: float
    y: float
    height: float


FLOW_WIDTH, FLOW_HEIGHT, NODE = 1080, 420, 14


def flow_chart(flows: Sequence[np.ndarray], layers: Sequence[int], colours: Sequence[str], most: int) -> Markup:
    """Draws how tokens go from the experts of a layer to those of the next.

    Args:
        flows: M - 1 arrays [E, E] of tokens, see analysis.flow.
        layers: M indices of layers.
        colours: of the E experts.
        most: links between two layers that are drawn, the largest first.
    """
    loads = [flow.sum(1) for flow in flows] + [flows[-1].sum(0)]  # M times [E]
    step = (FLOW_WIDTH - NODE - 80) / max(len(loads) - 1, 1)
    columns = [_column(load, 40 + index * step) for index, load in enumerate(loads)]
    parts = [
        _links(flow, columns[index], columns[index + 1], colours, layers[index : index + 2], most)
        for index, flow in enumerate(flows)
    ]
    for layer, load, column in zip(layers, loads, columns):
        parts.append(
            f'<text class="name" x="{column[0].x + NODE / 2:.1f}" y="14" text-anchor="middle">layer {layer}</text>'
        )
        last = column is columns[-1]
        for expert, node in enumerate(column):
            parts.append(_node(expert, node, int(load[expert]), layer, colours[expert], last))
    size = f"0 0 {FLOW_WIDTH} {FLOW_HEIGHT}"
    return Markup(f'<svg class="flow" viewBox="{size}" role="img" aria-label="flow of tokens">{"".join(parts)}</svg>')


def _column(load: np.ndarray, x: float) -> list[Node]:
    """Returns the nodes of a layer, one below the other."""
    room, gap = FLOW_HEIGHT - 34, min(6.0, 120.0 / len(load))
    scale = (room - gap * (len(load) - 1)) / max(load.sum(), 1)
    nodes, y = [], 24.0
    for count in load:
        nodes.append(Node(x, y, float(count * scale)))
        y += count * scale + gap
    return nodes


def _links(flow: np.ndarray, left: list[Node], right: list[Node], colours, layers, most: int) -> str:
    """Returns the bands between two layers; bands of one node lie side by side in the order of the other's experts."""
    total = max(flow.sum(), 1)
    order = np.argsort(-flow, axis=None)[:most]
    drawn = {(int(place) // len(flow), int(place) % len(flow)) for place in order if flow.flat[place]}
    out_y, in_y, parts = [node.y for node in left], [node.y for node in right], []
    for one, other in np.ndindex(flow.shape):
        count = int(flow[one, other])
        height_left = left[one].height * count / max(flow[one].sum(), 1)
        height_right = right[other].height * count / max(flow[:, other].sum(), 1)
        if (one, other) in drawn:
            x1, x2 = left[one].x + NODE, right[other].x
            middle, top, end = (x1 + x2) / 2, out_y[one], in_y[other]
            low, end_low, share = top + height_left, end + height_right, 100 * count / total
            shape = (
                f"M{x1:.1f} {top:.1f}C{middle:.1f} {top:.1f} {middle:.1f} {end:.1f} {x2:.1f} {end:.1f}"
                f"V{end_low:.1f}C{middle:.1f} {end_low:.1f} {middle:.1f} {low:.1f} {x1:.1f} {low:.1f}Z"
            )
            names = f"layer {layers[0]} expert {one} → layer {layers[1]} expert {other}"
            title = f"<title>{names}: {count:,} ({share:.1f} %)</title>"
            parts.append(f'<path class="link" fill="{colours[one]}" d="{shape}">{title}</path>')
        out_y[one] += height_left
        in_y[other] += height_right
    return "".join(parts)


def _node(expert: int, node: Node, count: int, layer: int, colour: str, last: bool) -> str:
    """Returns the bar of an expert, with its number outside of the bands where the bar is high enough."""
    label, x, anchor = "", (node.x + NODE + 5 if last else node.x - 5), "start" if last else "end"
    if node.height >= 10:
        middle = node.y + node.height / 2 + 3.5
        label = f'<text class="tick" x="{x:.1f}" y="{middle:.1f}" text-anchor="{anchor}">{expert}</text>'
    return (
        f'<rect x="{node.x:.1f}" y="{node.y:.1f}" width="{NODE}" height="{max(node.height, 0.6):.1f}" rx="2" '
        f'fill="{colour}"><title>layer {layer} expert {expert}: {count:,} tokens</title></rect>{label}'
    )
