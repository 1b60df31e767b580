"""Sparse upcycling against continued training and against experts from scratch, at the same added cost.

    python benchmarks/upcycle.py [--short] [--data tinyshakespeare.txt]

A dense model is trained. Then, for half as many FLOPs again, it is trained on; or made sparse and trained; and a sparse
model of the same kind is trained from random weights. The learning rate begins anew for all of them. Results go to
results/upcycle.json, the picture to --picture; the table is printed.
"""

from pathlib import Path

import tuning
from tuning import ROOT

from switchyard.checkpoint import store as checkpoint
from switchyard.interop.upcycle import upcycle
from switchyard.json_text import to_json

PICTURE = ROOT / "docs" / "images" / "upcycling.png"
WIDE = {"router": "top_k", "expert_num": 8, "num_experts_chosen": 2, "dispatch": "dropless", "layers": 2}
FINE = WIDE | {"expert_num": 16, "moe_intermediate_size": 128, "layers": "all"}  # 256 / 2: FLOPs of the dense model
CASES = {  # name -> (experts, what it starts from)
    "dense, trained on": ({}, "dense"),
    "upcycled: 8 experts, 2 chosen, every second layer": (WIDE, "upcycled"),
    "upcycled: 16 experts of half the width, 2 chosen": (FINE, "upcycled"),
    "from scratch: 8 experts, 2 chosen, every second layer": (WIDE, None),
}


def measure(args, name: str, number: int, budget: float) -> dict:
    """Trains one case for a budget of FLOPs a token and step; returns its figures."""
    moe, start = CASES[name]
    dense = args.runs / "dense"
    flops = tuning.active_flops(tuning.recipe(args, "x", 1, moe))
    steps = round(budget / flops)
    config, source = tuning.recipe(args, f"case-{number}", steps, moe), None
    if start == "dense":
        source = dense
    elif start == "upcycled":
        source = args.runs / f"case-{number}-start"
        if not source.exists():
            held = checkpoint.read(dense, with_optimizer=False)
            _, reasons = upcycle(held, config, source, moments="fresh")
            print(f"{name}: {reasons or 'the first loss is that of the dense model'}", flush=True)
    first = tuning.first_loss(source) if source else None
    found = tuning.trained(config, source)
    points = tuning.curve(args.runs / config.train.name)
    return {
        "name": name,
        "steps": steps,
        "flops_per_token": flops,
        "parameters": found["parameters"],
        "first_loss": first,
        "loss": found["validation_loss"],
        "loss_ci95": found["loss_ci95"],
        "seconds": found["seconds"],
        "curve": [[step * flops / budget, loss] for step, loss in points],  # share of the added cost
    }


def draw(content: dict, picture: Path) -> None:
    """Draws the validation loss of each case over the added cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    axes.axhline(content["dense"]["loss"], color="tab:gray", linestyle=":", label="the dense model at the start")
    for row, colour in zip(content["rows"], ("tab:orange", "tab:blue", "tab:green", "tab:red")):
        points = ([[0.0, row["first_loss"]]] if row["first_loss"] else []) + row["curve"]
        shares, losses = zip(*points)
        axes.plot([50 * share for share in shares], losses, "o-", color=colour, markersize=4, label=row["name"])
    axes.set(xlabel="added training FLOPs, % of those of the dense model", ylabel="validation loss (nats / character)")
    axes.set_ylim(None, max(content["dense"]["loss"] + 0.35, 0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(picture, dpi=100, metadata={"Software": None})
    plt.close(figure)
    print(f"written: {picture}", flush=True)


def report(content: dict) -> str:
    """The table of the document."""
    head = ["Model", "Parameters", "Steps", "First loss", "Loss", "95 % interval"]
    rows = []
    for row in content["rows"]:
        first = "" if row["first_loss"] is None else f"{row['first_loss']:.4f}"
        low, high = row["loss_ci95"]
        figures = [
            f"{row['parameters']:,}",
            f"{row['steps']:,}",
            first,
            f"{row['loss']:.4f}",
            f"{low:.3f} to {high:.3f}",
        ]
        rows.append([row["name"], *figures])
    dense = content["dense"]["loss"]
    words = (
        f"The dense model is trained for {content['steps']:,} steps, to {dense:.4f} nats a character; then each model "
    )
    words += "gets half as many FLOPs again."
    return f"{words}\n\n{tuning.table(head, rows)}\n\n![upcycling](images/{PICTURE.name})"


def main() -> None:
    args = tuning.arguments(__doc__)
    config = tuning.recipe(args, "dense", args.steps)
    dense, flops = tuning.trained(config), tuning.active_flops(config)
    content = {"steps": args.steps, "dense": {"loss": dense["validation_loss"], "flops_per_token": flops}, "rows": []}
    for number, name in enumerate(CASES):
        content["rows"].append(measure(args, name, number, flops * args.steps / 2))
        print(to_json({key: value for key, value in content["rows"][-1].items() if key != "curve"}), flush=True)
        path = tuning.save(args, "upcycle", content)
    draw(content, PICTURE if not args.short else path.with_suffix(".png"))
    tuning.show(args, "upcycle", report(content))


if __name__ == "__main__":
    main()
