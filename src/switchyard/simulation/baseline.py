"""Trains on one device, in a process of its own, what an emulated cluster is compared with.

`python -m switchyard.simulation.baseline FOLDER` reads FOLDER/job.json and FOLDER/batches.npz and writes
FOLDER/reference.npz: losses, norms of the gradients and loads of experts of each step; parameters and moments before
the first step, after each (`step1:NAME`, ...) and after the last. It runs on CPU, with the kernels of MindSpore, and
routes in as many groups as the cluster has data shards.
"""

import json
import sys
from pathlib import Path

import numpy as np

BATCHES, RESULT, BEFORE, AFTER = "batches.npz", "reference.npz", "before:", "after:"
STEP = "step{}:"  # after a step that is not the last, from 1


def main(arguments: list[str]) -> None:
    """Trains the job's steps and writes what came of them."""
    folder = Path(arguments[0])
    job = json.loads((folder / "job.json").read_text())
    from switchyard.config import build
    from switchyard.device import prepare_environment, set_context

    prepare_environment()
    config = build(one_device(job["config"]))
    set_context(config.context, config.train.seed, say=lambda line: None)
    from switchyard.models import create_model
    from switchyard.training.frozen import freeze
    from switchyard.training.step import TrainStep

    model = create_model(config, job["vocab"])
    freeze(model, config)
    step = TrainStep(model, config)
    tensors = {parameter.name: parameter for parameter in model.get_parameters()} | step.optimizer_state()
    found = {BEFORE + name: parameter.asnumpy().copy() for name, parameter in tensors.items()}
    figures = {"losses": [], "norms": [], "loads": []}
    with np.load(folder / BATCHES) as batches:
        count = len(batches["tokens"])
        for index in range(count):
            parts = [batches[name][index] for name in ("tokens", "labels", "valid", "noise")]  # [A, ...]
            replay = batches["replay"][index] if "replay" in batches else None
            made = step(*parts, float(batches["rates"][index]), replay)
            figures["losses"].append(made["loss"])
            figures["norms"].append(made["gradient_norm"])
            figures["loads"].append(made["routers"]["load"] if made["routers"] else np.zeros((0, 0)))  # [M, E]
            figures.setdefault("choices", []).append(made.get("choices", 0))  # [A, M, N, K], 0: not recorded
            mark = AFTER if index == count - 1 else STEP.format(index + 1)
            found |= {mark + name: parameter.asnumpy().copy() for name, parameter in tensors.items()}
    np.savez(folder / RESULT, **{name: np.array(values) for name, values in figures.items()}, **found)


def one_device(tree: dict) -> dict:
    """Returns a configuration as a tree without its degrees, with the same number of routing groups and
    micro-batches."""
    groups = tree["moe"]["groups"] or tree["parallel"]["data_parallel"]
    context = tree["context"] | {"device_target": "CPU", "device_id": None}
    parallel, train = tree["parallel"], tree["train"]
    if parallel["pipeline_stage"] > 1:
        each = train["gradient_accumulation_steps"]
        train = train | {"gradient_accumulation_steps": each * parallel["micro_batch_num"]}
    return {**tree, "train": train, "parallel": {}, "moe": tree["moe"] | {"groups": groups}, "context": context}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
