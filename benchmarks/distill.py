"""Distillation of a mixture of experts into a dense model: the share of the teacher's gain that a student keeps.

    python benchmarks/distill.py [--short] [--data tinyshakespeare.txt]

The student is config/shakespeare_char_dense_cpu.yaml at half its sizes. The teacher has the same active FLOPs: 2 of 16
experts of half the width, which are ahead of the dense model after fewer steps than one of 8 (docs/routing.md). Each
student is trained for as many steps as the dense model from scratch (Switch Transformer, arXiv 2101.03961, table 6). A
student that begins with weights of the teacher has their training besides, so the dense model that begins with its own
weights and is trained again stands beside it. Results go to results/distill.json; the table is printed.
"""

import json

import tuning

from switchyard.checkpoint import store as checkpoint
from switchyard.interop.distill import make_student, with_teacher

TEACHER = {"router": "top_k", "expert_num": 16, "num_experts_chosen": 2, "moe_intermediate_size": 128}
TEACHER |= {"capacity_factor": 2.0}
CASES = {  # name -> (run whose weights the student begins with, weight of the soft targets)
    "soft targets (0.25) alone": (None, 0.25),
    "soft targets (0.25) and the weights": ("teacher", 0.25),
    "weights outside the experts": ("teacher", 0.0),
    "dense, trained again": ("dense", 0.0),
    "soft targets (0.75) alone": (None, 0.75),
}


def measure(args, name: str, number: int) -> dict:
    """Trains one student; returns its figures."""
    taken, soft = CASES[name]
    config = tuning.recipe(args, f"student-{number}", args.steps)
    if soft:
        config = with_teacher(config, str(args.runs / "teacher"), soft, 1.0)
    run = args.runs / config.train.name
    if not (run / "result.json").exists():
        if taken:
            config, _ = make_student(checkpoint.read(args.runs / taken, with_optimizer=False), config, run)
        tuning.train(config, resume=taken is not None)
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    kept = {key: found[key] for key in ("parameters", "seconds", "loss_ci95")}
    return {"name": name, "loss": found["validation_loss"], **kept, "curve": tuning.curve(run)}


def share(row: dict, dense: dict, teacher: dict) -> float:
    """The part of the teacher's gain over the dense model that a student has."""
    return (dense["loss"] - row["loss"]) / (dense["loss"] - teacher["loss"])


def report(content: dict) -> str:
    """The table of the document."""
    dense, teacher, *students = content["rows"]
    rows = []
    for row in content["rows"]:
        part = f"{100 * share(row, dense, teacher):.0f} %" if row in students else ""
        low, high = row["loss_ci95"]
        rows.append([row["name"], f"{row['parameters']:,}", f"{row['loss']:.4f}", f"{low:.3f} to {high:.3f}", part])
    table = tuning.table(["Model", "Parameters", "Loss", "95 % interval", "Share of the gain"], rows)
    return f"Every model is trained for {content['steps']:,} steps.\n\n{table}"


def main() -> None:
    args = tuning.arguments(__doc__)
    content = {"steps": args.steps, "rows": []}
    for name, run, moe in (("teacher: 16 experts, 2 chosen", "teacher", TEACHER), ("dense from scratch", "dense", {})):
        found = tuning.trained(tuning.recipe(args, run, args.steps, moe))
        kept = {key: found[key] for key in ("parameters", "seconds", "loss_ci95")}
        content["rows"].insert(0, {"name": name, "loss": found["validation_loss"], **kept})
    for number, name in enumerate(CASES):
        content["rows"].append(measure(args, name, number))
        dense, teacher = content["rows"][:2]
        print(f"{name}: share of the gain {share(content['rows'][-1], dense, teacher):.2f}", flush=True)
        tuning.save(args, "distill", content)
    tuning.show(args, "distill", report(content))


if __name__ == "__main__":
    main()
