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
LOSS = "validation loss, nats a byte"
DENSE, SPARSE = "tab:orange", "tab:blue"


def importance_load(rows: list[dict]):
    """CV of load against CV of importance, a point for each pair of weights."""
    figure, axes = plt.subplots(figsize=(6, 4.5))
    for row in rows:
        place = row["mean"]["cv_importance"], row["mean"]["cv_load"]
        axes.scatter(*place, s=60)
        axes.annotate(f" ({row['w_importance']}, {row['w_load']})", place, fontsize=8)
    axes.set(xlabel="CV(importance)", ylabel="CV(load)", title="weights (importance, load)", xscale="log", yscale="log")
    return figure


def losses(rows: list[dict]):
    """A bar for each setting, the best at the top; the line is the standard deviation over the seeds."""
    ordered = sorted(rows, key=lambda row: row["mean"]["loss"], reverse=True)
    values, spread = ([row[kind]["loss"] for row in ordered] for kind in ("mean", "deviation"))
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.26 * len(rows)))
    colours = [DENSE if row["name"].startswith("dense") else SPARSE for row in ordered]
    axes.barh([row["name"] for row in ordered], values, xerr=spread, color=colours)
    margin = 0.1 * (max(values) - min(values)) + max(spread)
    axes.set(xlabel=LOSS, xlim=(min(values) - 2 * margin, max(values) + margin))
    return figure


def efficiency(rows: list[dict]):
    """Loss against three prices: active FLOPs, parameters, time of a step."""
    prices = {"active_flops": "active FLOPs a token", "parameters": "parameters", "step_ms": "ms a step"}
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for axes, (key, label) in zip(panels, prices.items()):
        for row in rows:
            place = row["mean"][key], row["mean"]["loss"]
            axes.scatter(*place, color=DENSE if row["name"].startswith("dense") else SPARSE)
            axes.annotate(" " + row["name"].split(", ")[1], place, fontsize=7)
        axes.set(xlabel=label, xscale="log")
    panels[0].set(ylabel=LOSS)
    return figure


def digits(rows: list[dict]):
    """Accuracy against FLOPs of everything, and the cascade's time against its FLOPs."""
    stages = [row for row in rows if "threshold" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    for number, row in enumerate(row for row in rows if "threshold" not in row):
        place = row["mean"]["flops"], 100 * row["mean"]["accuracy"]
        left.scatter(*place, s=40, label=row["name"], color=f"C{number % 10}", marker="os"[number // 10 % 2])
    flops = [row["mean"]["flops"] for row in stages]
    left.plot(flops, [100 * row["mean"]["accuracy"] for row in stages], "k.-", label="cascade, by threshold")
    left.set(xlabel="FLOPs an image", ylabel="validation accuracy, %", xscale="log")
    left.legend(fontsize=7)
    right.plot(flops, [row["mean"]["us_per_image"] for row in stages], "k.-")
    right.set(xlabel="mean FLOPs an image", ylabel="microseconds an image", title="the cascade's time")
    right.set_ylim(bottom=0)
    return figure


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
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=80, metadata={"Software": None})
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
