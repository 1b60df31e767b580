"""Importance against load: table 6 of arXiv 1701.06538 in miniature, on text.

    python benchmarks/experiments/importance_load.py [--short]

Noisy top-k with 16 experts, two chosen; the weights of the two losses vary. The paper's shape: no loss, collapse; the
importance loss alone balances importance better than load, the load loss alone the reverse, both balance both.
"""

from common import arguments, end, run_cases, save, sections

TITLE = "Importance against load"
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
    args, cases = arguments(__doc__), {}
    for importance, load in WEIGHTS:
        moe = {**MOE, "losses": {"importance": importance, "load": load}}
        name = f"w_importance {importance}, w_load {load}"
        cases[name] = lambda seed, moe=moe: sections(moe=moe, steps=args.steps, seed=seed)
    rows = run_cases(args, "importance_load", TITLE, cases)
    for row, (importance, load) in zip(rows, WEIGHTS):
        row.update(w_importance=importance, w_load=load)
    save(args, "importance_load", TITLE, rows)
    end(args, "importance_load")


if __name__ == "__main__":
    main()
