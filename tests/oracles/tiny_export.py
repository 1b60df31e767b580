"""Small untrained checkpoints, with weights large enough that every logit shows what is wrong, and their exports."""

from pathlib import Path

import numpy as np
from oracles.tiny_run import run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.config import Config
from switchyard.data import load_data
from switchyard.inference.export import export
from switchyard.models import create_model

MODEL = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_length": 16, "init_method_std": 0.2}
EXPERTS = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2}


def save_run(folder: Path, model=None, moe=None, tokenizer="char", **sections) -> tuple[Path, Config]:
    """(run folder, configuration) of a checkpoint at step 1 on the text of `tiny_run`."""
    write_text(folder)
    moe = EXPERTS if moe is None else moe
    data = {"tokenizer": tokenizer, "batch_size": 4}
    config = run_config(folder, model=MODEL | (model or {}), moe=moe, data=data, **sections)
    read = load_data(config)
    decoder = create_model(config, read.tokenizer.vocab_size)
    weights = {parameter.name: parameter.asnumpy() for parameter in decoder.get_parameters()}
    for name in weights:
        if name.endswith("attention.qkv.bias"):  # zeros would not be seen
            weights[name] = np.linspace(-1, 1, weights[name].size, dtype=np.float32)
    run = folder / "runs" / "tiny"
    state = {"step": 1, "data_index": 1, "train_seed": 1, "noise_rule": "", "best_loss": None, "seconds": 0.0}
    checkpoint.save(run, config, read.tokenizer.to_json(), weights, {"a": np.zeros(1, np.float32)}, state)
    return run, config


def save_export(folder: Path, overrides=("export.max_length=24",), **changes) -> Path:
    """The directory that an export of `save_run` makes."""
    run, _ = save_run(folder, **changes)
    export(run, folder / "out", list(overrides), say=quiet)
    return folder / "out"


def quiet(line: str) -> None:
    """A `say` that says nothing."""
