"""Efficiency and representation: loss against active FLOPs, against parameters and against wall time.

    python benchmarks/experiments/efficiency.py [--short]

Dense models of two hidden widths and Switch models of 2 to 64 experts of the smaller width, same text, same steps.
"Per parameter, mixture-of-experts is less efficient" is read off the middle panel.
"""

import matplotlib
from common import arguments, repeat, save, sections

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXPERTS = (2, 4, 8, 16, 32, 64)
PANELS = {"active_flops": "active FLOPs a token", "parameters": "parameters", "step_ms": "ms a step"}


def main() -> None:
    args, rows = arguments(__doc__), []
    cases = {
        "dense, width 256": ({}, {}),
        "dense, width 1024": ({"intermediate_size": 1024}, {}),
    }
    for experts in EXPERTS:
        cases[f"switch, {experts} experts"] = ({}, {"expert_num": experts})
    for name, (model, moe) in cases.items():
        rows.append(repeat(name, lambda seed, model=model, moe=moe: sections(model, moe, args.steps, seed), args.seeds))
    save(args.out, "efficiency", "Efficiency and representation", args, rows)
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axes, (key, label) in zip(panels, PANELS.items()):
        for row in rows:
            kind = "tab:orange" if row["name"].startswith("dense") else "tab:blue"
            axes.scatter(row["mean"][key], row["mean"]["loss"], color=kind)
            axes.annotate(row["name"].split(", ")[1], (row["mean"][key], row["mean"]["loss"]), fontsize=7)
        axes.set(xlabel=label, xscale="log")
    panels[0].set(ylabel="validation loss, nats a byte")
    figure.tight_layout()
    figure.savefig(args.out / "efficiency.png", dpi=110)


if __name__ == "__main__":
    main()
