"""What a run goes on from: its newest whole checkpoint, and which keys may differ from those it was trained with."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.parallel.placement import Degrees
from switchyard.parallel.processes import Processes, is_first, own_rank
from switchyard.training import checkpoint
from switchyard.training.checkpoint import Checkpoint
from switchyard.training.layout import keep_groups

RESULT = "result.json"

# keys that a resumed run may change: they do not touch the sequence of losses (schedule.total_steps=null follows steps)
FREE_ON_RESUME = (
    "train.name",
    "train.output_dir",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.replica_check_every",
    "moe.record",
    "moe.eval_capacity_factor",
    "moe.dropless_block_size",
    "cascade.threshold",
    "data.path",
    "context.device_target",
    "context.device_id",
    "context.mode",
    "context.launch_blocking",
    "export.max_length",
    "export.key_file",
)


def find_start(run: Path, config: Config, resume: bool) -> Checkpoint | None:
    """The checkpoint that training goes on from, None to begin anew (UserError as in `loop.train`)."""
    if not resume:
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise UserError(
                f"train.name: {config.train.name}; the run '{run}' exists: choose another name, or go on with --resume"
            )
        return None
    held = newest(run, config)
    if held is None and checkpoint.listed(run):
        raise UserError(f"--resume: no checkpoint of '{run}' is whole; train again under another train.name")
    if held is None:
        print(f"resume: '{run}' holds no checkpoint yet: starting from step 0", flush=True)
        return None
    check_resumable(held.config, keep_groups(held.config, config))
    if held.step > config.train.steps:
        raise UserError(f"train.steps: {config.train.steps}; the run '{run}' is at step {held.step} already: raise it")
    return held


def newest(run: Path, config: Config, limit: float = math.inf) -> Checkpoint | None:
    """Returns the newest good checkpoint of at most `limit` steps, what this rank reads of it; None if none is good."""
    for path in reversed(checkpoint.listed(run)):
        if checkpoint.step_of(path) > limit:
            continue
        try:
            return checkpoint.read(path, degrees=Degrees.of(config.parallel), rank=own_rank())
        except checkpoint.DamagedError as error:
            print(f"warning: {error}", flush=True)
    return None


def agreed(held: Checkpoint | None, run: Path, config: Config, processes: Processes) -> Checkpoint | None:
    """Returns the checkpoint that all processes start from, and puts newer ones, which are damaged, out of the way.

    Each process reads its own slices, so one may find damage that the others do not see: all take the oldest choice.
    A damaged one must neither be counted nor be read as the newest.

    Raises:
        UserError: some processes see a checkpoint, others none.
    """
    while processes.size > 1:
        steps = processes.gather(np.array([held.step if held else -1], np.int64)).reshape(-1)
        if steps.min() == steps.max():
            break
        if steps.min() < 0:
            raise UserError(f"--resume: not all processes find a good checkpoint in '{run}'; see their logs")
        if held.step > steps.min():
            held = newest(run, config, int(steps.min()))
    for path in checkpoint.listed(run) if held and processes.is_first else ():
        if checkpoint.step_of(path) > held.step:
            path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
    return held


def resumed(old: Config, new: Config) -> Config:
    """The configuration that a run goes on with: `new`, with the routing groups that it had, where that can be.

    Prints what the change of layout means: weights and moments are the same numbers, cut otherwise.
    """
    kept = keep_groups(old, new)
    if old.parallel != new.parallel and is_first():
        before, now = (changed_degrees(config) for config in (old, new))
        print(f"resume: the checkpoint is re-cut from {before} to {now}", flush=True)
    if kept.moe_layers and kept.groups != old.groups and new.moe.groups is None and is_first():
        print(
            f"resume: {kept.groups} routing groups from here on, not {old.groups}: each has a capacity of its own",
            flush=True,
        )
    return kept


def changed_degrees(config: Config) -> str:
    """The keys of the section `parallel` that differ from one device."""
    usual = type(config.parallel)()
    parts = [f"{key} {value}" for key, value in config.parallel if value != getattr(usual, key)]
    return ", ".join(parts) or "one device"


def finished(run: Path, config: Config) -> dict[str, Any] | None:
    """result.json, if it is that of train.steps steps."""
    try:
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
        steps, loss = result["steps"], result["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_result = loss is None or (isinstance(loss, float) and math.isfinite(loss))  # None of a pipeline
    return result if steps == config.train.steps and is_result else None


def check_resumable(old: Config, new: Config) -> None:
    """Refuses changes that would give another model or another sequence of losses (UserError names the key)."""
    before, now = old.model_dump(), new.model_dump()
    before.pop("parallel"), now.pop("parallel")  # free; so are routing groups that follow data_parallel, see `resumed`
    for config, tree in ((old, before), (new, now)):  # a pipeline's micro-batches are a device's, one after the other
        tree["train"]["gradient_accumulation_steps"] = config.micro_batches
    if old.data.val_path and new.data.val_path:  # the file may have moved, as that of data.path may
        before["data"]["val_path"] = new.data.val_path
    if new.moe_layers:
        before["moe"]["groups"], now["moe"]["groups"] = old.groups, new.moe.groups or old.groups
    held_total = before["schedule"]["total_steps"] or before["train"]["steps"]
    total = now["schedule"]["total_steps"]
    if total in (None, held_total):  # nothing that the user has asked to change
        before["schedule"]["total_steps"] = total
        if total is None and new.train.steps != held_total:
            print(
                f"resume: the learning-rate curve ends at step {new.train.steps} now, not {held_total}; "
                f"schedule.total_steps={held_total} keeps it",
                flush=True,
            )
    idle = configuration.unread_keys(old) & configuration.unread_keys(new)  # what neither reads may differ
    for section, part in now.items():
        for name, value in part.items():
            key, held = f"{section}.{name}", before[section][name]
            if value != held and key not in FREE_ON_RESUME and key not in idle:
                raise UserError(
                    f"{key}: {value}; the run was trained with {held}: keep it, or choose another train.name"
                )
