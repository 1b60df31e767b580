"""Renders what the layout of a configuration costs: memory, collectives, the host. No MindSpore in here."""

from switchyard.config import Config
from switchyard.planner.costs import Costs
from switchyard.planner.host import DRAW_RATE, HostCosts, host_costs
from switchyard.text_table import table

SHORT = {"data_parallel": "dp", "expert_parallel": "ep", "model_parallel": "tp", "pipeline_stage": "pp"}


def render_own(config: Config, cost: Costs, dropped: float) -> list[str]:
    """Renders the costs per device of the layout in the configuration, and those of its host."""
    rows = [
        ["weights", giga(cost.weights)],
        ["gradients", giga(cost.gradients)],
        ["optimizer state", giga(cost.optimizer)],
        ["weights that ZeRO gathers", giga(cost.gathered)],
        ["activations (estimate)", giga(cost.activations)],
        ["together", giga(cost.memory)],
    ]
    lines = [f"the configuration's own layout: {describe(config.parallel.model_dump())}", ""]
    lines += [*table(["memory per device", "GB"], rows), ""]
    alike = {}
    for one in cost.exchanges:
        key = (one.kind, one.group, one.ranks)
        number, size, sent = alike.get(key, (0, 0, 0.0))
        alike[key] = (number + one.number, size + one.bytes * one.number, sent + one.sent)
    rows = [
        [kind, group, str(ranks), str(number), f"{size:,}", giga(sent)]
        for (kind, group, ranks), (number, size, sent) in alike.items()
    ]
    lines += table(["collective", "group", "ranks", "number", "bytes together", "GB sent"], rows)
    work = f"{cost.flops / 1e12:.2f} TFLOP per device and step; expected share of dropped choices {dropped:.2%}"
    return [*lines, "", *render_host(host_costs(config), cost), "", work]


def render_host(host: HostCosts, cost: Costs) -> list[str]:
    """Renders what the process of one device holds in the memory of the host, and the time to draw the noise."""
    rows = [
        ["tokens, labels, valid of a step", giga(host.batch)],
        ["noise of a step", giga(host.noise)],
        *([["forced choices of a step", giga(host.choices)]] if host.choices else []),
        ["weights and optimizer state, at the start", giga(cost.weights + cost.optimizer)],
    ]
    lines = table(["host memory per device", "GB"], rows)
    if not host.noise:
        return lines
    rate = f"{DRAW_RATE / 1e9:g} GB/s, as measured on a Xeon"
    return [*lines, f"drawing the noise of a step takes {host.seconds():.2f} s on one core, at {rate}"]


def giga(size: float) -> str:
    """Returns bytes in units of 10^9, as text."""
    if size == 0:
        return "-"
    return "<0.001" if size < 1e6 else f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.1f}"


def describe(parallel: dict) -> str:
    """ParallelDims in few words."""
    words = [f"{short} {parallel[name]}" for name, short in SHORT.items() if parallel[name] > 1] or ["one device"]
    words += [f"ZeRO {parallel['optimizer_shard']}"] if parallel["optimizer_shard"] else []
    return ", ".join(words + [name for name in ("sequence_parallel", "recompute") if parallel[name]])
