"""Importance against load: table 6 of arXiv 1701.06538 in miniature, on text.

    python benchmarks/experiments/importance_load.py [--short]

Noisy top-k with 16 experts, two chosen; the weights of the two losses vary. The paper's shape: no loss, collapse; the
importance loss alone balances importance better than load, the load loss alone the reverse, both balance both.
"""

import matplotlib
from common import arguments, repeat, save, sections

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WEIGHTS = [(0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.1, 0.1), (0.01, 0.01), (1.0, 1.0)]
MOE = {
    "router": "noisy_top_k",
    "expert_num": 16,
    "num_experts_chosen": 2,
    "moe_intermediate_size": 128,
    "capacity_factor": 4.0,
    "aux_loss_factor": 0.0,
    "z_loss_factor": 0.0,
}


def main() -> None:
    args, rows = arguments(__doc__), []
    for importance, load in WEIGHTS:
        moe = {**MOE, "losses": {"importance": importance, "load": load}}
        name = f"w_importance {importance}, w_load {load}"
        rows.append(repeat(name, lambda seed, moe=moe: sections(moe=moe, steps=args.steps, seed=seed), args.seeds))
        rows[-1].update(w_importance=importance, w_load=load)
    save(args.out, "importance_load", "Importance against load", args, rows)
    figure, axes = plt.subplots(figsize=(6, 4.5))
    for row in rows:
        mean = row["mean"]
        axes.scatter(mean["cv_importance"], mean["cv_load"], s=60)
        axes.annotate(f"({row['w_importance']}, {row['w_load']})", (mean["cv_importance"], mean["cv_load"]), fontsize=8)
    axes.set(xlabel="CV(importance)", ylabel="CV(load)", title="weights (importance, load)", xscale="log", yscale="log")
    figure.tight_layout()
    figure.savefig(args.out / "importance_load.png", dpi=110)


if __name__ == "__main__":
    main()
