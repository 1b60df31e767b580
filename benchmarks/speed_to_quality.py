"""How long does a conditional model take to the quality of its dense twin, at equal active FLOPs a token?

    python benchmarks/speed_to_quality.py --corpus FOLDER [--seconds 600] [--short] [--only NAME ...]
                                          [--devices 0 1 ... [--turn 30]] [--runs FOLDER [--compare]]
                                          [--json FILE] [--picture FILE] [section.key=value ...]

Trains the dense model of speed_to_quality.yaml and its conditional twins, each for --seconds of training, with the
learning rate of the dense one. The folder is made by `python -m switchyard.data.prepare`. Reports steps and seconds of
training until the last validation loss of the dense model is reached, interpolated between two evaluations; a dash:
not reached. Seconds are steps times the median time of a step: compiling, evaluations and pauses are not counted.

The cases are dealt out to --devices. Those of a device train one after another, or in turn: with --turn 30 each has the
device to itself for 30 seconds while the others are stopped by a signal, so that a run that ends early leaves a curve
of each. --compare trains nothing and reads what such a run has left in --runs. --short: a small model on CPU, a minute
each.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from workers import record

from switchyard.cli import cleans_up
from switchyard.report.records import Records, read_records

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "dense": {},
    "2 experts, 1 chosen": {"expert_num": 2, "router": "switch"},
    "8 experts, 1 chosen": {"expert_num": 8, "router": "switch"},
    "32 experts, 1 chosen": {"expert_num": 32, "router": "switch"},
    "128 experts, 1 chosen": {"expert_num": 128, "router": "switch"},
    "4 experts of half the width, 2 chosen": {"expert_num": 4, "num_experts_chosen": 2, "router": "top_k"},
    "16 experts of half the width, 2 chosen": {"expert_num": 16, "num_experts_chosen": 2, "router": "top_k"},
    "16 halves, 2 chosen, capacity factor 1.25": {
        "expert_num": 16,
        "num_experts_chosen": 2,
        "router": "top_k",
        "capacity_factor": 1.25,
    },
    "64 experts of half the width, 2 chosen": {"expert_num": 64, "num_experts_chosen": 2, "router": "top_k"},
    "8 experts in layer 0, 1 chosen": {"expert_num": 8, "router": "switch", "layers": [0]},
    "32 experts in layer 0, 1 chosen": {"expert_num": 32, "router": "switch", "layers": [0]},
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
CONFIG = ROOT / "benchmarks" / "speed_to_quality.yaml"
SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "n_kv_heads": 2,
    "intermediate_size": 128,
    "seq_length": 64,
}
SHORT = [f"model.{key}={value}" for key, value in SMALL.items()]
SHORT += [
    "model.compute_dtype=float32",
    "context.device_target=CPU",
    "train.eval_every=100",
    "train.eval_batches=64",
    "data.batch_size=8",
]


@dataclass
class Case:
    """A case that trains in a process of its own.

    Attributes:
        name: of CASES.
        command: that trains it.
        runs: folder of its run folder.
        device: number of its GPU; None: the one that MindSpore takes.
        process: None before its first turn.
        end: time.monotonic() at which its turn is over.
    """

    name: str
    command: list
    runs: Path
    device: str | None
    process: subprocess.Popen | None = None
    end: float = math.inf

    @property
    def log(self) -> Path:
        """Returns the file of its output."""
        return self.runs / f"{folder(self.name)}.log"

    def last_line(self) -> str:
        """Returns the last line of its output, which says how it ended."""
        lines = self.log.read_text(encoding="utf-8").split("\n")
        return next(filter(None, reversed(lines)), "no output")

    def resume(self, turn: float) -> None:
        """Starts the case, or goes on with it, for a turn of seconds."""
        self.end = time.monotonic() + turn
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            return
        chosen = {} if self.device is None else {"CUDA_VISIBLE_DEVICES": self.device}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **chosen}
            )

    def is_over(self, seconds: float) -> bool:
        """Returns whether it has trained for so many seconds, or has ended."""
        return self.process.poll() is not None or trained_seconds(self.runs / folder(self.name)) >= seconds

    def finish(self) -> None:
        """Ends the case, which evaluates and writes what is left; without effect before its first turn."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGCONT)
            self.process.wait()


def command_of(name: str, args, runs: Path) -> list:
    """Returns the command that trains a case."""
    moe = dict(CASES[name])
    visited = moe.get("num_experts_chosen", 1) + moe.get("shared_expert_num", 0)
    if visited > 1:
        moe["moe_intermediate_size"] = dense_width(args.short) // visited
    chosen = [f"moe.{key}={value}" for key, value in moe.items()]
    places = [f"data.path={args.corpus}", f"data.tokenizer={args.corpus}/tokenizer.json", f"train.output_dir={runs}"]
    command = [sys.executable, ROOT / "train.py", "--config", CONFIG, *places]
    return [*command, f"train.name={folder(name)}", *(SHORT if args.short else []), *chosen, *args.overrides]


def dense_width(short: bool) -> int:
    """Returns the hidden width of the feed-forward of the dense model."""
    model = SMALL if short else yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]
    return model["intermediate_size"]


def train(cases: list[Case], seconds: float, turn: float) -> None:
    """Trains cases until each has so many seconds; those of a device take turns."""
    devices = dict.fromkeys(case.device for case in cases)
    queues = [deque(case for case in cases if case.device == device) for device in devices]
    try:
        with cleans_up():  # SIGTERM would leave the cases running
            for queue in queues:
                queue[0].resume(turn)
            while any(queues):
                time.sleep(min(2.0, turn))  # a look reads the whole record of the run
                for queue in filter(None, queues):
                    next_turn(queue, seconds, turn)
    finally:
        for case in cases:
            case.finish()


def next_turn(queue: deque[Case], seconds: float, turn: float) -> None:
    """Ends the case at the head of a device's queue, or its turn, if it is time; goes on with the next one."""
    case = queue[0]
    if case.is_over(seconds):
        case.finish()
        print(f"{case.name}: {case.last_line()}", flush=True)
        queue.popleft()
    elif time.monotonic() >= case.end and len(queue) > 1:
        case.process.send_signal(signal.SIGSTOP)
        queue.rotate(-1)
    else:
        return
    if queue:
        queue[0].resume(turn)


def folder(name: str) -> str:
    """Returns the name of a case's run folder."""
    return "-".join(name.replace(",", "").split())


def tokens_of_step(records: Records) -> int:
    """Returns the tokens of a step of a run."""
    return records.config.micro_batches * records.config.predictions


def speed(records: Records) -> float | None:
    """Returns the median tokens a second of a run; None before it has a figure."""
    rates = [rate for rate in records.series("train", "tokens_per_second")[1] if rate]
    return float(np.median(rates)) if rates else None


def trained_seconds(run: Path) -> float:
    """Returns the seconds of training of a run so far."""
    return seconds_of(read_records(run)) if (run / "metrics.jsonl").exists() else 0.0


def seconds_of(records: Records) -> float:
    """Returns the seconds of training of a run; 0 before it has a speed."""
    rate = speed(records)
    return 0.0 if rate is None else records.series("train", "loss")[0][-1] * tokens_of_step(records) / rate


def figures(name: str, runs: Path) -> dict:
    """Returns what a case's run has measured: its curve as [step, seconds, validation loss]."""
    records = read_records(runs / folder(name))
    rate, tokens = speed(records), tokens_of_step(records)
    places, losses = records.series("evaluation", "loss")
    curve = [[int(step), int(step) * tokens / rate, loss] for step, loss in zip(places, losses.tolist())]
    found = {"name": name, "tokens_of_step": tokens, "tokens_per_second": rate}
    return found | {"seconds": seconds_of(records), "curve": curve}


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
    low, goal = min(case["curve"][-1][2] for case in found), found[0]["curve"][-1][2]
    axes[0].set_ylim(low - 0.03, goal + 0.4)  # the end, where the models differ
    axes[0].set_ylabel("validation loss, nats a token")
    axes[0].legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder of python -m switchyard.data.prepare")
    parser.add_argument("--seconds", type=float, help="of training of each case (600, with --short 60)")
    parser.add_argument("--short", action="store_true", help="a small model, on CPU")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), metavar="NAME", help="cases besides the dense one")
    parser.add_argument("--devices", nargs="+", metavar="NUMBER", help="GPUs that the cases are dealt out to")
    parser.add_argument("--turn", type=float, default=math.inf, help="seconds of a turn on a device (whole runs)")
    parser.add_argument("--runs", type=Path, help="folder of the run folders (a temporary one)")
    parser.add_argument("--compare", action="store_true", help="train nothing, read what is in --runs")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--picture", help="draw the curves to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.compare and args.runs is None:
        parser.error("--compare: needs --runs, the folder of the runs that are there")
    args.seconds = args.seconds or (60 if args.short else 600)
    return args


def measure(args: argparse.Namespace, runs: Path) -> list[dict]:
    """Trains the cases that the arguments name, and returns their figures, which a stop does not lose."""
    names = ["dense", *(name for name in CASES if name != "dense" and name in (args.only or CASES))]
    devices = args.devices or [None]
    dealt = [devices[place % len(devices)] for place in range(len(names))]
    cases = [Case(name, command_of(name, args, runs), runs, device) for name, device in zip(names, dealt)]
    runs.mkdir(parents=True, exist_ok=True)
    try:
        if not args.compare:
            train(cases, args.seconds, args.turn)
    finally:
        found = [figures(name, runs) for name in names if trained_seconds(runs / folder(name))]
        found = [case for case in found if case["curve"]]  # those that were evaluated
        if found and found[0]["name"] == "dense":
            compare(found)
        if args.json:
            record(args.json, "training to the quality of a dense model", "speed_to_quality.py", found)
    return found


def main() -> None:
    """Measures what the command line asks for."""
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(args, args.runs or Path(temporary))
    if not found or found[0]["name"] != "dense":
        sys.exit("dense: has not trained, so there is nothing to compare with")
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
