"""What the routing experiments share: one short training on real text, its figures, and files of results.

Every experiment is one command. `--short` ends in minutes on two cores; results go to `--out` (results/NAME.json), the
picture beside it. `docs/routing.md` is made of those files by `tables.py`; no figure there is typed.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # MindSpore's kernels have a pool of their own
os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from plots import RESULTS, draw

from switchyard.config import Config, build
from switchyard.data import load_data
from switchyard.json_text import to_json
from switchyard.models import create_model
from switchyard.moe.routing.fixed import balance_tables
from switchyard.training.evaluate import create_evaluator
from switchyard.training.randomness import draw_noise
from switchyard.training.schedule import learning_rate
from switchyard.training.step import TrainStep

MODEL = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "seq_length": 64, "intermediate_size": 256}
DATA = {"batch_size": 16, "val_fraction": 0.02}
SCHEDULE = {"learning_rate": 3e-3, "lr_end": 3e-4, "warmup_steps": 30}
EVAL_BATCHES = 40


def sections(model: dict | None = None, moe: dict | None = None, steps: int = 400, seed: int = 1) -> dict:
    """The experiments' configuration: a two-layer byte model of the standard library, changed by `model` and `moe`."""
    return {
        "model": {**MODEL, **(model or {})},
        "moe": moe or {},
        "data": DATA,
        "schedule": SCHEDULE,
        "train": {"steps": steps, "seed": seed},
    }


def measure(tree: dict) -> dict:
    """Trains a configuration and evaluates it: name -> figure.

    loss: of the validation batches, nats a byte. cv_importance, cv_load, max_over_mean, max_violation, unused: of the
    validation load and importance, means over the conditional layers. dropped: share of the choices of the last tenth
    of training. entropy: of the router, nats. step_ms: median. parameters: count. active_flops: see `active_flops`.
    """
    config = build(tree)
    ms.set_context(mode=ms.GRAPH_MODE)
    data = load_data(config)
    model = create_model(config, data.tokenizer.vocab_size)
    balance_tables(model, data.token_counts)
    step, seconds, dropped = TrainStep(model, config), [], []
    rows, width = config.data.batch_size * config.model.seq_length, config.model.hidden_size
    for number in range(config.train.steps):
        batch = data.train.at(number)
        noise = draw_noise(config.train.seed, number, 1, model.noise_slices, range(1), rows, width)
        start = time.perf_counter()
        parts = [part[None] for part in batch]
        figures = step(*parts, noise, learning_rate(config, number + 1))  # waits for the step
        seconds.append(time.perf_counter() - start)
        if figures["routers"] and number >= 0.9 * config.train.steps:
            dropped.append(float(figures["routers"]["dropped"].mean()))
    result = evaluate(model, config, data)
    result["dropped"] = statistics.mean(dropped) if dropped else 0.0
    result["step_ms"] = statistics.median(seconds[5:] or seconds) * 1e3
    result["parameters"] = int(sum(parameter.size for parameter in model.trainable_params()))
    result["active_flops"] = active_flops(config)
    return result


def evaluate(model, config: Config, data) -> dict:
    """Loss and balance over evenly spaced validation batches."""
    batches = data.validation()
    places = np.unique(np.linspace(0, len(batches) - 1, EVAL_BATCHES).astype(int))
    found = create_evaluator(model, config, 1.0)(batches.at(int(place)) for place in places)
    result = {"loss": found.loss}
    if found.layers:
        load, importance = (np.array([layer[name] for layer in found.layers]) for name in ("load", "importance"))
        entropy = statistics.mean(layer["entropy"] for layer in found.layers)
        result.update(balance(load, importance), entropy=entropy)
    return result


def balance(load: np.ndarray, importance: np.ndarray) -> dict:
    """Figures of load and importance [M, E], means over the layers."""

    def variation(amounts):
        return float((amounts.std(-1) / np.maximum(amounts.mean(-1), 1e-9)).mean())

    mean = np.maximum(load.mean(-1, keepdims=True), 1e-9)
    return {
        "cv_importance": variation(importance),
        "cv_load": variation(load),
        "max_over_mean": float((load / mean).max(-1).mean()),
        "max_violation": float((load / mean).max(-1).mean() - 1),
        "unused": float((load < 0.01 * mean).mean()),
    }


def active_flops(config: Config) -> int:
    """FLOPs (multiplications and additions) of the matrices that a token visits forward; attention itself left out."""
    model, moe = config.model, config.moe
    width, head = model.hidden_size, model.size_of_head
    matrices = 3 if model.activation == "swiglu" else 2
    attention = width * (2 * model.num_heads + 2 * model.kv_heads) * head
    conditional = len(config.moe_layers)
    dense = (model.num_layers - conditional) * matrices * width * config.dense_width
    chosen = {"dense": moe.expert_num, "mixture_of_depths": moe.capacity_factor}.get(moe.router, moe.num_experts_chosen)
    visited = chosen * config.expert_width + config.shared_width
    routed = conditional * (visited * matrices * width + width * moe.expert_num)
    return round(2 * (model.num_layers * attention + dense + routed + width * 256))


def run_cases(args: argparse.Namespace, name: str, title: str, cases: dict, run=None) -> list[dict]:
    """Runs every case with every seed and writes results/NAME.json after each, so that what is done is not lost.

    A row: the case's name, mean and (sample) standard deviation of each figure over the seeds, and the runs themselves.

    Args:
        cases: name -> function of a seed that gives what `run` takes.
        run: -> figures of one run, `measure` where None.
    """
    done = finished(args, name) if args.resume else {}
    rows = []
    for case, of_seed in cases.items():
        rows.append(done.get(case) or repeat(case, of_seed, args.seeds, run or measure))
        save(args, name, title, rows)
    return rows


def finished(args: argparse.Namespace, name: str) -> dict[str, dict]:
    """Rows of an earlier results/NAME.json of as many steps and seeds, by name; none where there is no such file."""
    try:
        content = json.loads((args.out / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    same = content["steps"] == args.steps and content["seeds"] == len(args.seeds)
    return {row["name"]: row for row in content["rows"]} if same else {}


def repeat(name: str, of_seed, seeds, run) -> dict:
    """The runs of several seeds and, by figure, their mean and standard deviation."""
    runs = []
    for seed in seeds:
        runs.append(run(of_seed(seed)))
        print(f"{name:44} seed {seed}: " + "  ".join(f"{k} {v:.4g}" for k, v in runs[-1].items()), flush=True)
    summary = {key: statistics.mean(found[key] for found in runs) for key in runs[0]}
    spread = {key: statistics.stdev(found[key] for found in runs) if len(runs) > 1 else 0.0 for key in runs[0]}
    return {"name": name, "mean": summary, "deviation": spread, "runs": runs}


def arguments(description: str) -> argparse.Namespace:
    """--short, --steps, --seeds, --resume, --out of an experiment; seeds as a range from 1."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one seed and a quarter of the steps")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, help="runs of each setting")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of a stopped run of as many steps and seeds"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the picture")
    args = parser.parse_args()
    args.steps = args.steps or (150 if args.short else 600)
    args.seeds = range(1, 1 + (args.seeds or (1 if args.short else 3)))
    return args


def save(args: argparse.Namespace, name: str, title: str, rows: list[dict]) -> None:
    """results/NAME.json: what was run and what came out; replaced as a whole."""
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "steps": args.steps, "seeds": len(args.seeds), "rows": rows}
    partial = args.out / f".{name}.json.partial"
    partial.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, args.out / f"{name}.json")


def end(args: argparse.Namespace, name: str) -> None:
    """The picture beside the results."""
    draw(args.out / f"{name}.json", args.out / f"{name}.png")
