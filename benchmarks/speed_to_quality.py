"""How long does a conditional model take to the quality of its dense twin, at equal active FLOPs a token?

    python benchmarks/speed_to_quality.py --corpus FOLDER [--seconds 600] [--short] [--only NAME ...]
                                          [--json FILE] [--picture FILE] [section.key=value ...]

Trains the dense model of speed_to_quality.yaml and its conditional twins one after another, each for --seconds of
training (compiling and evaluations not counted), with the learning rate of the dense one. The folder is made by
`python -m switchyard.data.prepare`. Reports steps and seconds of training until the last validation loss of the dense
model is reached, interpolated between two evaluations; a dash: not reached. --short: a small model on CPU, a minute
each.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from workers import record

from switchyard.report.records import Records, read_records

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "dense": {},
    "2 experts, 1 chosen": {"expert_num": 2, "router": "switch"},
    "8 experts, 1 chosen": {"expert_num": 8, "router": "switch"},
    "32 experts, 1 chosen": {"expert_num": 32, "router": "switch"},
    "128 experts, 1 chosen": {"expert_num": 128, "router": "switch"},
    "16 experts of half the width, 2 chosen": {"expert_num": 16, "num_experts_chosen": 2, "router": "top_k"},
    "8 experts, 1 chosen, gates times 8": {"expert_num": 8, "router": {"name": "switch", "routed_scaling_factor": 8}},
    "8 experts by hash": {"expert_num": 8, "router": "hash", "aux_loss_factor": 0.0, "z_loss_factor": 0.0},
    "32 experts by hash": {"expert_num": 32, "router": "hash", "aux_loss_factor": 0.0, "z_loss_factor": 0.0},
    "64 quarters in layer 0, 3 chosen, and a shared one": {  # as in config/quickstart.yaml
        "router": {"name": "top_k", "routed_scaling_factor": 6},
        "expert_num": 64,
        "num_experts_chosen": 3,
        "shared_expert_num": 1,
        "layers": [0],
        "aux_loss_factor": 0.001,
        "z_loss_factor": 0.0,
    },
}
WIDTH, SHORT_WIDTH = 1536, 128  # of the feed-forward of the dense model
SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "n_kv_heads": 2,
    "intermediate_size": SHORT_WIDTH,
    "seq_length": 64,
}
SHORT = [f"model.{key}={value}" for key, value in SMALL.items()]
SHORT += [
    "model.compute_dtype=float32",
    "context.device_target=CPU",
    "train.eval_every=20",
    "data.batch_size=8",
]


def train(name: str, args, runs: Path) -> None:
    """Trains one case until its seconds of training are over."""
    moe = dict(CASES[name])
    visited = moe.get("num_experts_chosen", 1) + moe.get("shared_expert_num", 0)
    if visited > 1:
        moe["moe_intermediate_size"] = (SHORT_WIDTH if args.short else WIDTH) // visited
    chosen = [f"moe.{key}={value}" for key, value in moe.items()]
    places = [f"data.path={args.corpus}", f"data.tokenizer={args.corpus}/tokenizer.json", f"train.output_dir={runs}"]
    command = [sys.executable, ROOT / "train.py", "--config", ROOT / "benchmarks" / "speed_to_quality.yaml"]
    command += [*places, f"train.name={folder(name)}", *chosen, *(SHORT if args.short else []), *args.overrides]
    with open(runs / f"{folder(name)}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and trained_seconds(runs / folder(name)) < args.seconds:
                time.sleep(2.0)  # a look reads the whole record of the run
        finally:
            process.send_signal(signal.SIGTERM)  # evaluates, and writes what is left
            process.wait()


def folder(name: str) -> str:
    """Returns the name of a case's run folder."""
    return "-".join(name.replace(",", "").split())


def clock(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps [T], seconds of training until then [T]) of the logged steps."""
    steps, seconds, last, total = [0], [0.0], 0, 0.0
    for line in records.kind("train"):
        if line["tokens_per_second"]:
            total += (line["step"] - last) * tokens_of_step(records) / line["tokens_per_second"]
        last = line["step"]
        steps, seconds = [*steps, line["step"]], [*seconds, total]
    return np.array(steps, float), np.array(seconds)


def tokens_of_step(records: Records) -> int:
    """Returns the tokens of a step of a run."""
    return records.config.micro_batches * records.config.predictions


def trained_seconds(run: Path) -> float:
    """Returns the seconds of training of a run so far."""
    return clock(read_records(run))[1][-1] if (run / "metrics.jsonl").exists() else 0.0


def figures(name: str, runs: Path) -> dict:
    """Returns what a case's run has measured: its curve as [step, seconds, validation loss]."""
    records = read_records(runs / folder(name))
    steps, seconds = clock(records)
    places, losses = records.series("evaluation", "loss")
    curve = [[int(step), float(np.interp(step, steps, seconds)), loss] for step, loss in zip(places, losses.tolist())]
    speed = float(np.median([rate for rate in records.series("train", "tokens_per_second")[1] if rate]))
    return {"name": name, "tokens_of_step": tokens_of_step(records), "tokens_per_second": speed, "curve": curve}


def reached(curve: list, loss: float, column: int) -> float | None:
    """Returns the steps (column 0) or seconds (1) at which a curve first is at `loss` or below; None: never."""
    for before, after in zip([None, *curve], curve):
        if after[2] <= loss:
            if before is None:
                return after[column]
            share = (before[2] - loss) / (before[2] - after[2])
            return before[column] + share * (after[column] - before[column])
    return None


def compare(found: list[dict]) -> None:
    """Adds to each case when it reached the last loss of the dense model, and prints a table."""
    goal = found[0]["curve"][-1][2]
    print(f"{'':40}{'steps':>8}{'seconds':>9}{'loss':>8}{'tokens/s':>10}   at the loss {goal:.4f} of the dense model")
    for case in found:
        case["steps_to_dense"], case["seconds_to_dense"] = (reached(case["curve"], goal, column) for column in (0, 1))
        steps, seconds = case["steps_to_dense"], case["seconds_to_dense"]
        shown = f"{steps:8.0f}{seconds:9.1f}" if steps is not None else f"{'-':>8}{'-':>9}"
        print(f"{case['name']:40}{shown}{case['curve'][-1][2]:8.4f}{case['tokens_per_second']:10,.0f}")


def draw(found: list[dict], path: str) -> None:
    """Draws the validation losses over steps, and over seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, column, label in zip(axes, (0, 1), ("optimizer steps", "seconds of training")):
        for case in found:
            curve = np.array(case["curve"])
            axis.plot(curve[:, column], curve[:, 2], label=case["name"])
        axis.axhline(found[0]["curve"][-1][2], color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    low, high = min(case["curve"][-1][2] for case in found), found[0]["curve"][0][2]
    axes[0].set_ylim(low - 0.05, low + 0.6 * (high - low))
    axes[0].set_ylabel("validation loss, nats a token")
    axes[0].legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=120)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder of python -m switchyard.data.prepare")
    parser.add_argument("--seconds", type=float, help="of training of each case (600, with --short 60)")
    parser.add_argument("--short", action="store_true", help="a small model, on CPU")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), metavar="NAME", help="cases besides the dense one")
    parser.add_argument("--runs", type=Path, help="folder of the run folders (a temporary one)")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--picture", help="draw the curves to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    args.seconds = args.seconds or (60 if args.short else 600)
    names = ["dense", *(name for name in CASES if name != "dense" and name in (args.only or CASES))]
    with tempfile.TemporaryDirectory() as temporary:
        runs = args.runs or Path(temporary)
        runs.mkdir(parents=True, exist_ok=True)
        found = []
        for name in names:
            train(name, args, runs)
            found.append(figures(name, runs))
            print(f"{name}: {found[-1]['curve'][-1]}, {found[-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
            if args.json:  # so far: a stop loses nothing
                record(args.json, "training to the quality of a dense model", "speed_to_quality.py", found)
    compare(found)
    if args.json:
        record(args.json, "training to the quality of a dense model", "speed_to_quality.py", found)
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
