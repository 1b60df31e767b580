"""Pictures of the routing experiments, drawn from results/NAME.json alone.

    python benchmarks/experiments/plots.py [--out FOLDER]     # every experiment that has results, anew

An experiment draws its own when it ends; what is in the picture is in the file, so a picture can be changed without
running anything again.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
LOSS = "validation loss (nats / byte)"
DENSE, SPARSE, RANDOM = "tab:orange", "tab:blue", "tab:gray"
EVALUATED = 40 * 16 * 64  # tokens of the validation batches: batches, sequences, bytes; see common.py
CHANCE = {"color": RANDOM, "linestyle": ":", "linewidth": 1.2}


def importance_load(rows: list[dict]):
    """Draws CV(importance) and CV(load) of each pair of weights, beside an even split and a uniform random choice."""
    names = [f"importance {row['w_importance']:g}, load {row['w_load']:g}" for row in rows][::-1]
    figure, axes = plt.subplots(figsize=(7.5, 3.4))
    for key, label, marker, shift in (("cv_importance", "importance", "o", 0.12), ("cv_load", "load", "s", -0.12)):
        values, spread = of(rows[::-1], key)
        places = [place + shift for place in range(len(rows))]
        axes.errorbar(values, places, xerr=spread, fmt=marker, capsize=3, label=f"CV({label})")
    chance = (15 / (2 * EVALUATED)) ** 0.5  # 16 experts, 2 choices of a token
    axes.axvline(chance, label=f"load of a uniform random choice: {chance:.2f} (computed)", **CHANCE)
    axes.set(xlabel="coefficient of variation over 16 experts; 0 is an even split", xlim=(-0.05, None))
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylabel("weights of the losses")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def losses(rows: list[dict]):
    """Draws the loss of each setting as a point with the standard deviation over the seeds, the best at the top.

    The dashed line is the dense model, the dotted one routing at random at each step, where the experiment has it.
    """
    ordered = sorted(rows, key=lambda row: row["mean"]["loss"], reverse=True)
    figure, axes = plt.subplots(figsize=(7.5, 1.3 + 0.26 * len(rows)))
    for row in rows:
        line = {"x": row["mean"]["loss"], "zorder": 0}
        if is_dense(row["name"]):
            axes.axvline(label="dense model", color=DENSE, linestyle="--", **line)
        elif row["name"] == "random (each step)":
            axes.axvline(label="random at each step", **line, **CHANCE)
    for place, row in enumerate(ordered):
        (value,), (spread,) = of([row], "loss")
        axes.errorbar(value, place, xerr=spread, fmt="o", capsize=3, color=colour(row["name"]))
    axes.set_yticks(range(len(rows)), [row["name"] for row in ordered])
    axes.set(xlabel=f"{LOSS}; the axis does not begin at 0", ylim=(-0.7, len(rows) - 0.3))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    return figure


def efficiency(rows: list[dict]):
    """Draws the loss against three prices: active FLOPs, parameters, time of a step."""
    prices = {"active_flops": "active FLOPs / token", "parameters": "parameters", "step_ms": "ms / step"}
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True)
    twin, shades = rows[0], plt.get_cmap("viridis_r")
    for axes, (key, label) in zip(panels, prices.items()):
        axes.axhline(twin["mean"]["loss"], color=DENSE, linestyle="--", linewidth=1, label=f"level of {twin['name']}")
        for number, row in enumerate(rows):
            (value,), (spread,) = of([row], "loss")
            style = {"fmt": "o", "color": shades(number / 8)}
            if is_dense(row["name"]):
                style = {"fmt": "s^"[number % 2], "color": DENSE}
            axes.errorbar(row["mean"][key], value, yerr=spread, capsize=3, markersize=7, label=row["name"], **style)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
        if key == "parameters":
            axes.set_xscale("log")
        else:
            axes.set_xlim(0, None)
    panels[0].xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:.0f} k")
    panels[0].set_ylabel(f"{LOSS}\nthe axis does not begin at 0")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def digits(rows: list[dict]):
    """Draws the accuracy of each setting, and what the cascade's accuracy and time cost in FLOPs."""
    stages = [row for row in rows if "threshold" in row]
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=[1.2, 1, 1])
    _accuracies(panels[0], [row for row in rows if "threshold" not in row])
    flops = [row["mean"]["flops"] for row in stages]
    panels[1].plot(flops, [100 * row["mean"]["accuracy"] for row in stages], "k.-", label="cascade, by threshold")
    twin = rows[0]["mean"]
    panels[1].plot(twin["flops"], 100 * twin["accuracy"], "s", color=DENSE, label="dense model")
    panels[1].set(xlabel="mean FLOPs / image", ylabel="validation accuracy (%)", xscale="log", ylim=(95, 100))
    panels[1].legend(fontsize=8, loc="lower right")
    panels[2].plot([value / 1e6 for value in flops], [row["mean"]["us_per_image"] for row in stages], "k.-")
    panels[2].set(xlabel="mean MFLOPs / image", ylabel="microseconds / image", title="time of the cascade")
    panels[2].set(xlim=(0, None), ylim=(0, None))
    for axes in panels[1:]:
        axes.grid(alpha=0.3)
    return figure


def _accuracies(axes, rows):
    """Draws the accuracy of each setting as a point with its deviation, the dense model as a line."""
    ordered = sorted(rows, key=lambda row: row["mean"]["accuracy"])
    for place, row in enumerate(ordered):
        (value,), (spread,) = of([row], "accuracy")
        axes.errorbar(100 * value, place, xerr=100 * spread, fmt="o", capsize=3, color=colour(row["name"]))
    axes.axvline(100 * rows[0]["mean"]["accuracy"], color=DENSE, linestyle="--", zorder=0, label="dense model")
    axes.set_yticks(range(len(ordered)), [row["name"] for row in ordered])
    axes.set(xlabel="validation accuracy (%); the axis does not begin at 0")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def of(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Returns the means and the standard deviations of a figure."""
    return [row["mean"][key] for row in rows], [row["deviation"][key] for row in rows]


def is_dense(name: str) -> bool:
    """Returns whether a setting is a dense model: one network for every row, no router."""
    return name in ("dense", "dense model") or name.startswith("dense, ")


def colour(name: str) -> str:
    """Returns the colour of a setting: of the dense model, of routing at random, of the others."""
    return DENSE if is_dense(name) else RANDOM if "random" in name else SPARSE


PLOTS = {
    "importance_load": importance_load,
    "causal_routers": losses,
    "gate_gradient": losses,
    "efficiency": efficiency,
    "digits": digits,
}


def draw(results: Path, picture: Path) -> None:
    """Writes the picture of one file of results; which one it is, its name says."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    figure = PLOTS[results.stem](rows)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100, metadata={"Software": None})
    plt.close(figure)
    print(f"written: {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results and of the pictures")
    out = parser.parse_args().out
    for name in PLOTS:
        if (out / f"{name}.json").exists():
            draw(out / f"{name}.json", out / f"{name}.png")


if __name__ == "__main__":
    main()
