"""Starts a run from the weights of another run or of an imported model: `train.py --init`.

The weights and the tokenizer are taken over. The optimizer, the learning rate and the position in the data begin anew.
A checkpoint of step 0 holds the weights, so that --resume goes on without the source.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchyard import config as configuration
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.adapters import merged
from switchyard.checkpoint.store import Checkpoint
from switchyard.config import Config
from switchyard.data import Tokenizer
from switchyard.data.tokenizer import read_tokenizer
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import is_first, own_rank
from switchyard.errors import UserError
from switchyard.training.evaluate_keys import SHAPE_KEYS
from switchyard.training.resume import INIT, KEPT, differences, word

DENSE_TO_SPARSE = "`python -m switchyard.interop.upcycle` makes experts of a dense model"


def read_initial(path: str | Path, config: Config) -> Checkpoint:
    """Reads the weights that a new run starts from: what this rank holds of them.

    Args:
        path: a run folder (its newest checkpoint), or one checkpoint; whatever layout it was written in.
        config: of the new run.

    Returns:
        The checkpoint, without an optimizer's state.

    Raises:
        UserError: no checkpoint, a damaged one, or one of another model; names the key.
    """
    degrees = ParallelDims.of(config.parallel)
    try:
        held = checkpoint.read(path, with_optimizer=False, degrees=degrees, rank=own_rank())
    except UserError as error:
        raise UserError(f"--init: {error}") from None
    held = without_adapters(held, path, degrees.devices)
    check_fits(config, held.config, path)
    if is_first():
        say_differences(config, held)
    return held


def without_adapters(held: Checkpoint, path: str | Path, devices: int = 1) -> Checkpoint:
    """Returns a checkpoint whose adapters are merged into its weights (UserError: its tensors are shards)."""
    if held.config.train.lora is None:
        return held
    if devices > 1:
        remedy = f"merge them first: python -m switchyard.checkpoint merge {path} --out DIR"
        raise UserError(f"--init: '{path}' holds adapters (train.lora), and {devices} devices read shards; {remedy}")
    config, weights = merged(held.config, held.weights)
    return replace(held, config=config, weights=weights)


def check_fits(
    config: Config, old: Config, path: str | Path, option: str = "--init", sections: Sequence[str] = ()
) -> None:
    """Refuses a configuration whose weights have other names or shapes than those of `old` (UserError).

    Args:
        config, old: of the new run, of the weights.
        path: of the weights.
        option: that has named them.
        sections: whose keys count; () = all.
    """
    learned = config.model.position == "learned"
    unread = configuration.unread_keys(config) & configuration.unread_keys(old)
    for key in (*SHAPE_KEYS, "model.seq_length") if learned else SHAPE_KEYS:
        before, now = meaning(old, key), meaning(config, key)
        if before != now and key not in unread and (not sections or key.partition(".")[0] in sections):
            remedy = f"set {key}={word(before)}, or take the config.yaml of '{path}'"
            if not old.moe_layers and config.moe_layers:
                remedy = DENSE_TO_SPARSE
            raise UserError(f"{option}: {key}: {word(now)}; the weights of '{path}' have {word(before)}: {remedy}")


def meaning(config: Config, key: str) -> Any:
    """Returns the value of a key; where null stands for the value of another key, that value."""
    resolved = {
        "model.n_kv_heads": config.model.n_kv_heads or config.model.num_heads,
        "model.head_size": config.model.head_size or config.model.hidden_size // config.model.num_heads,
        "model.intermediate_size": config.dense_width,
        "moe.moe_intermediate_size": config.expert_width,
        "moe.shared_intermediate_size": config.shared_width,
        "moe.layers": list(config.moe_layers),
        "moe.granularity": config.granularity,
    }
    return resolved[key] if key in resolved else config.value(key)


def say_differences(config: Config, held: Checkpoint) -> None:
    """Prints the source, and the keys of the network that differ from those that its weights were trained with."""
    print(f"init: weights and tokenizer of '{held.path}' (step {held.step}); the optimizer begins anew", flush=True)
    for key, (before, now) in differences(held.config, config).items():
        if key.partition(".")[0] in ("model", "moe") and meaning(held.config, key) != meaning(config, key):
            print(f"init: {key}: {word(before)} -> {word(now)}", flush=True)


def with_tokenizer(config: Config, held: Checkpoint, run: Path) -> Config:
    """Returns the configuration with data.tokenizer as the source has it; a tokenizer.json is the run's own copy."""
    if config.model.type in ("vision", "cascade"):  # which have classes
        return config
    own, before = Tokenizer.from_json(held.tokenizer_json, "of the checkpoint"), config.data.tokenizer
    name = own.kind if own.kind in ("byte", "char") else os.fspath(run / checkpoint.TOKENIZER)
    if before not in (name, type(config.data)().tokenizer) and not is_the_same(before, own) and is_first():
        print(f"init: data.tokenizer: {before} -> {name}, taken over from '{held.path}'", flush=True)
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": name})})


def is_the_same(name: str, tokenizer: Tokenizer) -> bool:
    """Returns whether data.tokenizer names a file that gives the ids of a tokenizer."""
    try:
        return name not in ("byte", "char") and read_tokenizer(name).fingerprint == tokenizer.fingerprint
    except UserError:  # no such file
        return False


def first_state(held: Checkpoint) -> dict[str, Any]:
    """Returns the state of a new run that starts from a checkpoint; it names the checkpoint."""
    place = held.path.as_posix().encode("utf-8", "backslashreplace").decode()
    kept = {name: held.state[name] for name in KEPT if name in held.state}
    return {"step": 0, "seconds": 0.0} | kept | {INIT: {"checkpoint": place, "step": held.step}}
