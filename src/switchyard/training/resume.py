"""Finds the checkpoint that a run resumes from, and checks which keys may differ from the earlier training."""

import difflib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from switchyard import config as configuration
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.layout import keep_groups
from switchyard.checkpoint.store import Checkpoint
from switchyard.config import Config
from switchyard.data import Data, fingerprint
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import Processes, is_first, own_rank
from switchyard.errors import UserError
from switchyard.training.lock import contents
from switchyard.training.randomness import NOISE_RULE

RESULT = "result.json"
INIT = "init"  # in a state: the checkpoint that the run has its first weights from
KEPT = (INIT, "huggingface", "texts")  # what later states take over from the first; others: see training.companions
MOST_NAMES = 5  # of other runs, in a message

# keys that a resumed run may change: they do not touch the sequence of losses (schedule.total_steps=null follows steps)
FREE_ON_RESUME = (
    "train.name",
    "train.output_dir",
    "train.steps",
    "train.loggers",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.save_best",
    "train.keep_every_steps",
    "train.keep_every_hours",
    "train.async_checkpoint",
    "train.on_save_error",
    "train.max_bad_losses",
    "train.stall_seconds",
    "train.peak_tflops",
    "train.replica_check_every",
    "moe.record",
    "moe.eval_capacity_factor",
    "moe.dropless_block_size",
    "cascade.threshold",
    "data.path",
    "data.on_error",
    "data.accept_changed",
    "context.device_target",
    "context.device_id",
    "context.mode",
    "context.launch_blocking",
    "context.compile_cache",
    "export.max_length",
    "export.key_file",
)

# keys that change the losses to come but not what weights and moments mean: allowed, and said
ANNOUNCED_ON_RESUME = (
    "model.dropout", "moe.dispatch", "moe.capacity_factor", "moe.drop_order", "moe.min_capacity", "moe.reroute",
    "moe.aux_loss_factor", "moe.z_loss_factor", "moe.losses", "moe.router.consistency_loss_factor",
    "moe.router.topk_bias_update_rate", "moe.jitter", "moe.router_warmup_steps", "moe.router_freeze_step",
    "data.batch_size", "optimizer.weight_decay", "optimizer.clip_grad", "schedule.type",
    "schedule.learning_rate", "schedule.lr_end", "schedule.warmup_steps", "schedule.total_steps",
    "train.gradient_accumulation_steps", "train.on_bad_loss", "train.spike_factor", "train.spike_window",
)  # fmt: skip


def find_start(run: Path, config: Config, resume: bool, existed: bool = True) -> Checkpoint | None:
    """Returns the checkpoint to resume from, None to start at step 0 (UserError as in `loop.train`).

    `existed`: whether the run folder was there before this process has locked it."""
    if not resume:
        if run.exists() and (not run.is_dir() or contents(run)):
            raise UserError(
                f"train.name: {config.train.name}; the run '{run}' already exists; choose another "
                "name, or continue with --resume"
            )
        return None
    if not existed:
        raise UserError(f"--resume: train.name: {config.train.name}; {no_run(run)}; leave --resume out to start it")
    loaded = newest(run, config)
    if loaded is None and checkpoint.listed(run):
        raise UserError(f"--resume: no checkpoint of '{run}' is complete; train again under another train.name")
    if loaded is None:
        print(f"resume: '{run}' contains no checkpoint yet; starting from step 0", flush=True)
        return None
    if not loaded.optimizer:
        raise UserError(
            f"--resume: '{loaded.path}' holds no state of an optimizer (imported, or merged adapters): start a run "
            f"of another train.name from it with --init {run}"
        )
    check_resumable(loaded.config, keep_groups(loaded.config, with_own_tokenizer(loaded, config)))
    if loaded.step > config.train.steps:
        raise UserError(
            f"train.steps: {config.train.steps}; the run '{run}' is already at step {loaded.step}; increase it"
        )
    say_noise(loaded.state)
    return loaded


def with_own_tokenizer(loaded: Checkpoint, config: Config) -> Config:
    """Returns the configuration with the data.tokenizer of a run that has taken over the tokenizer of its source."""
    if INIT not in loaded.state:
        return config
    return config.model_copy(
        update={"data": config.data.model_copy(update={"tokenizer": loaded.config.data.tokenizer})}
    )


def say_noise(state: dict[str, Any]) -> None:
    """Says that dropout, jitter and random priorities have other numbers than so far, if the rule of noise differs."""
    rule = state.get("noise_rule")
    if rule and rule != NOISE_RULE and is_first():
        print(
            f"resume: noise (dropout, jitter, random priorities) has other numbers from here on: {NOISE_RULE}; "
            f"so far {rule}",
            flush=True,
        )


def newest(run: Path, config: Config, limit: float = math.inf) -> Checkpoint | None:
    """Returns the newest good checkpoint of at most `limit` steps, what this rank reads of it; None if none is good."""
    for path in reversed(checkpoint.listed(run)):
        if checkpoint.step_of(path) > limit:
            continue
        try:
            return checkpoint.read(path, degrees=ParallelDims.of(config.parallel), rank=own_rank())
        except checkpoint.DamagedError as error:
            print(f"warning: {error}", flush=True)
    return None


def agreed(loaded: Checkpoint | None, run: Path, config: Config, processes: Processes) -> Checkpoint | None:
    """Returns the checkpoint that all processes start from, and puts newer ones, which are damaged, out of the way.

    Each process reads its own shards, so one may find damage that the others do not see: all take the oldest choice.
    A damaged one must neither be counted nor be read as the newest.

    Raises:
        UserError: some processes see a checkpoint, others none.
    """
    while processes.size > 1:
        steps = processes.gather(np.array([loaded.step if loaded else -1], np.int64)).reshape(-1)
        if steps.min() == steps.max():
            break
        if steps.min() < 0:
            raise UserError(f"--resume: not all processes find a good checkpoint in '{run}'; see their logs")
        if loaded.step > steps.min():
            loaded = newest(run, config, int(steps.min()))
    for path in checkpoint.listed(run) if loaded and processes.is_first else ():
        if checkpoint.step_of(path) > loaded.step:
            path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
    return loaded


def no_run(run: Path) -> str:
    """Says that a run folder is not there, and which ones are: those with like names first."""
    try:
        names = [path.name for path in run.parent.iterdir() if path.is_dir() and contents(path)]
    except OSError:
        names = []
    near = difflib.get_close_matches(run.name, names, MOST_NAMES, cutoff=0.5)
    shown = (near + sorted(set(names) - set(near)))[:MOST_NAMES]
    further = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    known = f"its runs are {', '.join(shown)}{further}" if shown else "it holds no run"
    return f"no such run in '{run.parent}': {known}"


def resumed(old: Config, new: Config) -> Config:
    """Returns the configuration of the resumed run: `new`, with the routing groups of `old` where possible.

    Prints what was changed, and what a change of layout means: the shards of weights and moments change.
    """
    kept = keep_groups(old, new)
    if is_first():
        for key, (before, now) in changed_keys(old, kept).items():
            print(f"resume: {key}: {word(before)} -> {word(now)}", flush=True)
        total = old.schedule.total_steps or old.train.steps
        if new.schedule.total_steps is None and new.train.steps != total:
            print(
                f"resume: the learning-rate curve now ends at step {new.train.steps} instead of {total}; "
                f"set schedule.total_steps={total} to keep it",
                flush=True,
            )
    if old.parallel != new.parallel and is_first():
        usual, layouts = type(new.parallel)(), []
        for config in (old, new):
            parts = [f"{key} {value}" for key, value in config.parallel if value != getattr(usual, key)]
            layouts.append(", ".join(parts) or "one device")
        before, now = layouts
        print(f"resume: the checkpoint is resharded from {before} to {now}", flush=True)
    if kept.moe_layers and kept.groups != old.groups and new.moe.groups is None and is_first():
        print(
            f"resume: {kept.groups} routing groups from now on instead of {old.groups}; "
            "each group has its own capacity",
            flush=True,
        )
    return kept


def finished(run: Path, config: Config) -> dict[str, Any] | None:
    """Returns result.json if it belongs to train.steps steps."""
    try:
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
        steps, loss = result["steps"], result["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_result = loss is None or (isinstance(loss, float) and math.isfinite(loss))  # None of a pipeline
    return result if steps == config.train.steps and is_result else None


def check_resumable(old: Config, new: Config) -> None:
    """Refuses changes that would give another model, or other meanings to its moments (UserError names the key)."""
    for key, (before, now) in differences(old, new).items():
        if key not in FREE_ON_RESUME and key not in ANNOUNCED_ON_RESUME:
            raise UserError(f"{key}: {now}; the run was trained with {before}: keep it, or choose another train.name")


def changed_keys(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns key -> (value before, value now) for the changes that affect the losses."""
    return {key: pair for key, pair in differences(old, new).items() if key in ANNOUNCED_ON_RESUME}


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns key -> (value before, value now), where the meaning differs."""
    before, now = old.model_dump(), new.model_dump()
    before.pop("parallel"), now.pop("parallel")  # free; so are routing groups that follow data_parallel, see `resumed`
    for config, tree in ((old, before), (new, now)):  # a pipeline's micro-batches are a device's, one after the other
        options = {f"router.{name}": value for name, value in config.moe.router.given().items()}
        tree["moe"] |= {"router": str(config.moe.router), **options}
        tree["train"]["gradient_accumulation_steps"] = config.micro_batches
    if old.data.val_path and new.data.val_path:  # the file may have moved, as that of data.path may
        before["data"]["val_path"] = new.data.val_path
    if new.moe_layers:
        before["moe"]["groups"], now["moe"]["groups"] = old.groups, new.moe.groups or old.groups
    total = now["schedule"]["total_steps"]
    if total in (None, before["schedule"]["total_steps"] or before["train"]["steps"]):
        before["schedule"]["total_steps"] = total  # nothing that the user has asked to change
    idle = configuration.unread_keys(old) & configuration.unread_keys(new)  # what neither reads may differ
    pairs = {
        f"{section}.{name}": (before[section].get(name), value)
        for section in now
        for name, value in now[section].items()
    }
    if "moe.router" in idle:
        idle |= {key for key in pairs if key.startswith("moe.router.")}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in idle}


def word(value: Any) -> str:
    """Returns a value as text, as written in a configuration."""
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)


def check_corpus(loaded: Checkpoint | None, marks: dict[str, Any], config: Config, processes: Processes) -> str | None:
    """Compares the data with those of the run and describes the difference, None where there is none; `marks` are the
    fingerprints of the data.

    A checkpoint without a fingerprint, of an earlier version, is not compared.

    Raises:
        UserError: they differ, and data.accept_changed is off; or processes of one job read different data.
    """
    digest = "".join(marks[name]["sha256"] for name in ("train", "validation"))
    read = processes.gather(np.frombuffer(bytes.fromhex(digest), np.uint8))  # [processes, bytes]
    for rank in np.flatnonzero((read != read[0]).any(1))[:1]:
        raise UserError(
            f"data.path: {config.data.path}; rank {rank} reads different data from rank 0; "
            "copy the same files to all hosts"
        )
    before = loaded.state.get("corpus") if loaded else None
    found = fingerprint.difference(before, marks) if before else None
    if found and not config.data.accept_changed:
        raise UserError(
            f"data.path: {config.data.path}; not the data that the run was trained on: {found}; restore it, or set "
            "data.accept_changed=true to continue with the new data"
        )
    if found and is_first():
        print(f"resume: data.accept_changed: continues with the new data, from a new epoch: {found}", flush=True)
    return found


def start_reading(loaded: Checkpoint, data: Data, changed: bool) -> None:
    """Lets the batches begin where the checkpoint's run has stopped to read.

    With another batch size that is the same sequence of the same epoch, see data.batches.Course; other data begin with
    a new epoch.
    """
    state, size = loaded.state, loaded.config.data.batch_size
    index, epoch, window = state["data_index"], state.get("data_epoch"), state.get("data_window")
    if epoch is None:  # of an earlier version
        each = max(1, data.train.course.windows // size)
        epoch, window = index // each, index % each * size
    data.train.start_at(index, *((epoch + 1, 0) if changed else (epoch, window)))
