"""Handwritten digits: accuracy and FLOPs by unit of routing and by router; the cascade's curve, and its time.

    python benchmarks/experiments/digits.py [--short]

Classifiers of three convolutional layers, the last two conditional with 4 experts; a cascade of three stages. The
cascade is timed where its stages skip the samples that have left: FLOPs that are not spent must be time that is not.
"""

import time

import mindspore as ms
import numpy as np
from common import arguments, end, run_cases, save

from switchyard.config import Config, build
from switchyard.data import load_data
from switchyard.models import create_model
from switchyard.models.cascade import EarlyExit, curve, flops_to
from switchyard.training.evaluate import create_evaluator
from switchyard.training.randomness import draw_noise
from switchyard.training.schedule import learning_rate
from switchyard.training.step import TrainStep

TITLE = "Digits: units of routing, routers, the cascade"
BATCH = 32
REGION = {"granularity": "region", "router": "switch"}
OWN_GROUP = {"groups": BATCH}  # routers that look at all rows of a group: an image each
CASES = {
    "dense": ({"expert_num": 1}, {}),
    "sample, switch": ({"granularity": "sample"}, {}),
    "region 2 x 2, switch": (REGION, {}),
    "region 4 x 4, switch": (REGION, {"regions": 4}),
    "channel groups, switch": ({"granularity": "channel"}, {}),
    "region 2 x 2, top_k (2)": ({**REGION, "router": "top_k", "num_experts_chosen": 2}, {}),
    "region 2 x 2, tree": ({**REGION, "router": "tree"}, {}),
    "region 2 x 2, lsh": ({**REGION, "router": "lsh"}, {}),
    "region 4 x 4, expert_choice": (
        {**REGION, "router": "expert_choice", "capacity_factor": 1.0} | OWN_GROUP,
        {"regions": 4},
    ),
    "region 4 x 4, soft": ({**REGION, "router": {"name": "soft", "slots_per_expert": 4}} | OWN_GROUP, {"regions": 4}),
    "region 2 x 2, merged": ({**REGION, "router": "merged"} | OWN_GROUP, {}),
    "region 2 x 2, dense mixture": ({**REGION, "router": "dense"}, {}),
}
THRESHOLDS = (0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.1)  # above 1: nobody leaves early
REPEATS, COPIES = 7, 8  # timings, of so many copies of the validation images


def settings(kind: str, steps: int, seed: int, moe: dict, vision: dict) -> Config:
    """The experiments' configuration."""
    if kind == "vision":
        moe = {"expert_num": 4, "layers": [1, 2]} | moe
    return build(
        {
            "model": {"type": kind, "num_layers": 3, "hidden_size": 16, "intermediate_size": 32},
            "moe": moe,
            "vision": vision,
            "data": {"batch_size": BATCH, "val_fraction": 0.2},
            "schedule": {"learning_rate": 5e-3, "lr_end": 2e-4, "warmup_steps": 20},
            "train": {"steps": steps, "seed": seed},
        }
    )


def train(config: Config):
    """(model, data, median milliseconds of a step)."""
    ms.set_context(mode=ms.GRAPH_MODE)
    data = load_data(config)
    model = create_model(config, data.tokenizer.vocab_size)
    step, seconds = TrainStep(model, config), []
    for number in range(config.train.steps):
        batch = data.train.at(number)
        noise = draw_noise(
            config.train.seed, number, 1, model.noise_slices, range(1), config.rows, config.model.hidden_size
        )
        start = time.perf_counter()
        step(*(part[None] for part in batch), noise, learning_rate(config, number + 1))  # waits for the step
        seconds.append(time.perf_counter() - start)
    return model, data, float(np.median(seconds[5:] or seconds)) * 1e3


def image_flops(config: Config) -> int:
    """FLOPs of one image: two for each multiply-add of convolutions, summaries, routers and heads."""
    model, moe, vision = config.model, config.moe, config.vision
    width, places = model.hidden_size, vision.image_size**2
    total = 16 * width * vision.classes  # the head sees 4 x 4 squares
    for layer in range(model.num_layers):
        channels = width if layer else vision.channels
        if layer not in config.moe_layers:
            total += places * config.dense_width * (9 * channels + width)
            continue
        units, hidden = config.units, config.expert_width
        split = units if config.granularity == "channel" else 1
        row = places * split // units * hidden * (9 * channels + width) // split
        slots = moe.expert_num * moe.router.given().get("slots_per_expert", 1)
        visits = {"dense": moe.expert_num, "merged": 1, "soft": slots / units}
        visited = visits.get(moe.router, moe.choices) * units * row
        summary = units * 4 * channels // split * width
        if moe.router == "merged":
            visited += moe.expert_num * hidden * (9 * channels + width)  # the experts' mean
        if moe.router == "soft":
            visited += 2 * slots * units * (places // units) * channels
        total += visited + summary + units * width * moe.expert_num
    return int(2 * total)


def measure(config: Config) -> dict:
    """Trains a classifier and evaluates it: accuracy, loss (nats), max_violation, step_ms, parameters, flops."""
    model, data, milliseconds = train(config)
    found = create_evaluator(model, config, 1.0)(data.validation())
    return {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "max_violation": float(np.mean([layer["max_violation"] for layer in found.layers])) if found.layers else 0.0,
        "step_ms": milliseconds,
        "parameters": int(sum(parameter.size for parameter in model.trainable_params())),
        "flops": image_flops(config),
    }


def cascade(args) -> list[dict]:
    """A row for each threshold of one trained cascade: accuracy, mean FLOPs, exits, microseconds an image."""
    config = settings("cascade", args.steps, args.seeds[0], {}, {})
    model, data, _ = train(config)
    batches = list(data.validation())
    real = np.concatenate([batch.valid[:, 0] for batch in batches]) > 0
    images = np.concatenate([batch.images for batch in batches])[real]
    labels = np.concatenate([batch.labels[:, 0] for batch in batches])[real]
    model.set_train(False)
    logits = np.stack([exit_logits.asnumpy() for exit_logits in model.all_exits(ms.Tensor(images))])
    many, rows = np.tile(images, (COPIES, 1, 1, 1)), []
    for point in curve(logits, labels, flops_to(model.stages), THRESHOLDS):
        runner, seconds = EarlyExit(model, point.threshold), []
        for _ in range(REPEATS):
            start = time.perf_counter()
            runner(many)
            seconds.append(time.perf_counter() - start)
        figures = {
            "accuracy": point.accuracy,
            "flops": point.mean_flops,
            "us_per_image": float(np.median(seconds[2:])) / len(many) * 1e6,
        }
        name = f"cascade, threshold {point.threshold}"
        rows.append(
            {"name": name, "mean": figures, "threshold": point.threshold, "exits": point.exits, "runs": [figures]}
        )
        print(f"{name:44} " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
    return rows


def main() -> None:
    args = arguments(__doc__)
    cases = {
        name: lambda seed, moe=moe, vision=vision: settings("vision", args.steps, seed, moe, vision)
        for name, (moe, vision) in CASES.items()
    }
    rows = run_cases(args, "digits", TITLE, cases, measure)
    save(args, "digits", TITLE, [*rows, *cascade(args)])
    end(args, "digits")


if __name__ == "__main__":
    main()
