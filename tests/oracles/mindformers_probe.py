"""Runs everything that needs MindFormers in one process: `python -m oracles.mindformers_probe FOLDER` in a folder.

Writes FOLDER/found.json. The test says what must stand there.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from switchyard.interop.mindformers import quiet

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARMUP, RATE = 20, 5, 4e-3
MODEL = {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "seq_length": 24}
MOE = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2, "layers": 1, "capacity_factor": 1.0}
LOSSES = {"aux_loss_factor": 0.02, "z_loss_factor": 0.002}

BIAS = (0.3, -0.1, 0.2, 0.0, -0.3, 0.15, 0.05, -0.2)
POSITIVE, NEGATIVE = tuple(0.5 + one for one in BIAS), tuple(one - 2.0 for one in BIAS)


def layers() -> dict:
    """Compares the layers, operator by operator: every case is used once."""
    import mindspore as ms
    from oracles.mindformers_layers import Case, compare, core_router, gate_of_one_choice

    ms.set_context(mode=ms.PYNATIVE_MODE, pynative_synchronize=True)
    rooms = ({}, {"room": 1.0}, {"room": 1.0, "token_by_token": True})
    cases = [Case(k, score, **room) for k in (1, 2, 4) for score in ("softmax", "sigmoid") for room in rooms]
    cases += [Case(k, "sigmoid", bias=BIAS, balance=0.0, **room) for k in (1, 2, 4) for room in rooms[::2]]
    scores = ("sigmoid", "softmax")
    cases += [Case(k, score, groups=(4, 2), **room) for score in scores for k in (2, 4) for room in rooms[::2]]
    cases += [Case(2, "sigmoid", groups=(4, 2), bias=POSITIVE, factor=2.5, balance=0.0)]
    cases += [Case(2, normalised=False), Case(2, factor=2.5, room=1.0)]
    core = [Case(k, score) for k in (1, 2, 4) for score in ("softmax", "sigmoid")]
    core += [Case(2, "sigmoid", bias=BIAS, balance=0.0), Case(4, "sigmoid", groups=(4, 2), bias=POSITIVE, balance=0.0)]
    core += [Case(4, "softmax", groups=(4, 2))]
    differ = [Case(2, "sigmoid", bias=BIAS), Case(2, "sigmoid", groups=(4, 2), bias=NEGATIVE, balance=0.0)]
    return {
        "layers": {case.name: compare(case) for case in cases},
        "core": {case.name: core_router(case) for case in core},
        "differ": {case.name: compare(case) for case in differ},
        "V1": gate_of_one_choice(),
    }


def text(path: Path) -> Path:
    """Writes some thousand words that a model can learn to spell."""
    words = ["router", "expert", "token", "gate", "slot", "layer", "capacity", "balance"]
    path.write_text(" ".join(np.random.default_rng(4).choice(words, 4000)))
    return path


def by_train_py(folder: Path, path: Path) -> list[dict]:
    """Trains as `train.py` does, and returns the lines of its log."""
    from switchyard.config import build
    from switchyard.training.loop import train

    tree = {
        "model": MODEL,
        "moe": MOE | LOSSES,
        "data": {"path": str(path), "batch_size": 4},
        "schedule": {"learning_rate": RATE, "lr_end": RATE / 10, "warmup_steps": WARMUP},
        "train": {"steps": STEPS, "output_dir": str(folder), "name": "own", "log_every": 1, "eval_every": 0, "seed": 9},
        "context": {"device_target": "CPU"},
    }
    with open(folder / "own.log", "w") as log, contextlib.redirect_stdout(log):
        train(build(tree))
    return lines(folder / "own")


def by_mindformers(folder: Path, path: Path) -> list[dict]:
    """Trains the same through MindFormers' Trainer, by the YAML file that the repository has."""
    from switchyard.interop.mindformers.launch import train

    run = folder / "theirs"
    model = {f"model.model_config.{key}": value for key, value in (MODEL | {"seed": 9}).items()}
    moe = {"model.model_config.moe": json.dumps(MOE | LOSSES)}
    data = {"path": path, "seq_length": MODEL["seq_length"], "steps": STEPS, "val_fraction": 0.1, "seed": 9}
    keys = model | moe | {f"train_dataset.data_loader.{key}": value for key, value in data.items()}
    rates = {"learning_rate": RATE, "lr_end": RATE / 10, "warmup_lr_init": RATE / WARMUP}
    rates |= {"warmup_steps": WARMUP - 1, "total_steps": STEPS - 1}
    keys |= {f"lr_schedule.{key}": value for key, value in rates.items()}
    keys |= {"runner_config.batch_size": 4, "train_dataset.batch_size": 4, "output_dir": run}
    monitor = "type: SwitchyardMonitor, auto_register: switchyard_mindformers.SwitchyardMonitor, every: 1"
    callbacks = f"[{{{monitor}}}]"
    train(
        ROOT / "config/mindformers/quickstart.yaml",
        [f"{key}={value}" for key, value in keys.items()] + [f"callbacks={callbacks}"],
    )
    return lines(run)


def lines(run: Path) -> list[dict]:
    """Returns the training lines of a run."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def refusals() -> dict[str, str]:
    """Returns what a model's configuration says to keys that this package cannot follow, by a name of the case."""
    from mindformers.modules.transformer.moe import MoEConfig
    from mindformers.modules.transformer.transformer import TransformerOpParallelConfig

    from switchyard.errors import UserError
    from switchyard.interop.mindformers.model import SwitchyardConfig

    experts = MoEConfig(expert_num=4, num_experts_chosen=2, routing_policy="TopkRouterV2")
    fast = MoEConfig(expert_num=4, num_experts_chosen=2, comp_comm_parallel=True)
    cases = {
        "unknown": {"colour": "red"},
        "two places": {"moe": {"expert_num": 4}, "moe_config": experts},
        "speed": {"moe_config": fast},
        "context": {"parallel_config": TransformerOpParallelConfig(context_parallel=2)},
        "per token": {"calculate_per_token_loss": True},
        "law": {"hidden_size": 30, "num_heads": 4},
    }
    found = {"taken": str(SwitchyardConfig(moe_config=experts).switchyard.moe.expert_num)}
    for name, keys in cases.items():
        try:
            SwitchyardConfig(**keys)
            found[name] = "taken"
        except UserError as error:
            found[name] = str(error)
    return found


def main(folder: Path) -> None:
    """Does all of it."""
    quiet.load()
    found = {"after import": os.listdir()}
    path = text(folder / "text.txt")
    found |= {"own": by_train_py(folder, path), "theirs": by_mindformers(folder, path), "after training": os.listdir()}
    found["run folder"] = os.listdir(folder / "theirs")
    found["log"] = (folder / "theirs" / "mindformers.log").read_text().splitlines()[-5:]
    found |= layers() | {"refused": refusals()}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
