"""Lists what several devices do not train here, and why. No MindSpore in here.

Training, the planner, the simulated compile, the cluster emulation and the launch scripts' --dry-run all read the list
(`check_mesh`, `require_trainable`). What MindSpore's compiler does not shard, and processes can do with explicit
collectives, `train.py` lets them do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from switchyard.config import Config
from switchyard.device import COMPUTE_DTYPES
from switchyard.errors import UserError
from switchyard.moe.dispatch.capacity import check_dropless, check_sort_keys

UNSHARDED_ROUTERS = ("merged", "soft", "tree")  # that override `construct`; see moe.routing.base.why_not_sharded
NEED_A_COMPILER = (
    "model_parallel", "pipeline_stage", "micro_batch_num", "optimizer_shard", "sequence_parallel",
    "recompute",
)  # fmt: skip
LAUNCH = "bash scripts/run_distribute_train_ascend.sh --devices {count} starts them, with DEVICE=cpu on this machine"


@dataclass(frozen=True)
class Refusal:
    """Names a key whose value the compiler does not shard.

    Attributes:
        key, value: of the configuration.
        allowed: what the compiler shards, or what to do.
        by_processes: whether processes with explicit collectives do it.
    """

    key: str
    value: Any
    allowed: str
    by_processes: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.value}; {self.allowed}"


def refusals(config: Config, target: str = "Ascend") -> Iterator[Refusal]:
    """Yields all that stands against compiling a configuration for devices of a kind, first what processes can do."""
    moe = config.moe
    if not config.reads_text:
        reason = "only networks that read text are sharded over devices"
        yield Refusal("model.type", config.model.type, reason, True)
    if target == "GPU" and config.moe_layers and moe.dispatch != "capacity":
        yield Refusal("moe.dispatch", moe.dispatch, "the compiler shards it for Ascend", True)
    if config.moe_layers and (reason := why_not_sharded(moe.router)):
        yield Refusal("moe.router", moe.router, reason, True)
    if config.train.lora is not None:
        yield Refusal("train.lora", f"rank {config.train.lora.rank}", "the compiler does not shard adapters", True)
    if config.train.spike_factor is not None and config.train.on_bad_loss == "skip":
        reason = "with train.on_bad_loss 'skip' a step reads its loss, which a compiled one must not: use 'rewind'"
        yield Refusal("train.spike_factor", config.train.spike_factor, reason, True)
    yield from _of_pipelines(config, target)


def _of_pipelines(config: Config, target: str) -> Iterator[Refusal]:
    """Yields what does not go with several stages."""
    stages, moe = config.parallel.pipeline_stage, config.moe
    if stages == 1:
        return
    beside = f"with parallel.pipeline_stage ({stages})"
    if target == "GPU" and config.devices > stages:
        why = "on GPU a stage is one device, for MindSpore's backend there 'does not support the lazy_inline feature'"
        yield Refusal("parallel.pipeline_stage", stages, f"{why}: set the other degrees to 1, or pipeline_stage", False)
    if config.parallel.optimizer_shard == 3:  # what is not sharded further gets no gradient
        yield Refusal("parallel.optimizer_shard", 3, f"0 or 1 {beside}", False)
    if config.model.tie_word_embeddings:  # the compiler cannot hand a sharded table to another stage
        yield Refusal("model.tie_word_embeddings", True, f"False {beside}", False)
    if config.train.freeze:  # a stage without a trained parameter has no gradient to send on
        yield Refusal("train.freeze", config.train.freeze, f"[] {beside}", False)
    for key, usual in (("record", "null"), ("replay", "null"), ("router_warmup_steps", 0)):
        if value := getattr(moe, key):  # choices do not travel between stages
            yield Refusal(f"moe.{key}", value, f"{usual} {beside}", False)
    if moe.router == "random" and moe.consistency_loss_factor:
        yield Refusal("moe.router.consistency_loss_factor", moe.consistency_loss_factor, f"0 {beside}", False)


def why_not_sharded(router: str) -> str | None:
    """Says why a compiled cluster cannot run a router, by its YAML name (UserError: there is no such); None: it can."""
    if "." not in router:
        why = "overrides `construct`, which a compiled cluster does not call: take another router"
        return why if router in UNSHARDED_ROUTERS else None
    from switchyard.moe.routing.base import find_router
    from switchyard.moe.routing.base import why_not_sharded as why_class_is_not

    return why_class_is_not(find_router(router))


def of_evaluation(config: Config) -> Iterator[Refusal]:
    """Yields what stands against evaluation while a compiled step trains."""
    stages, every = config.parallel.pipeline_stage, config.train.eval_every
    if stages > 1 and every:
        beside = f"0 with parallel.pipeline_stage ({stages}): eval.py scores its checkpoints"
        yield Refusal("train.eval_every", every, beside, False)


def of_processes(config: Config, why: str = "") -> Iterator[Refusal]:
    """Yields what processes with explicit collectives do not train.

    `why`: what the compiler cannot shard, where it would be asked otherwise.
    """
    parallel, moe = config.parallel, config.moe
    only = "training in processes shards data_parallel and expert_parallel only"
    for name in NEED_A_COMPILER:
        value = getattr(parallel, name)
        if value != type(parallel).model_fields[name].default:
            rest = f"; leave it at its default{f' ({why})' if why else ''}"
            yield Refusal(f"parallel.{name}", value, only + rest, False)
    if parallel.expert_parallel > 1 and moe.router == "merged":
        reason = "merged experts need all their parameters in one place; set it to 1"
        yield Refusal("parallel.expert_parallel", parallel.expert_parallel, reason, False)


def of_several(config: Config) -> Iterator[Refusal]:
    """Yields what several processes do not train, whether the compiler shards the step or not."""
    count, moe = config.parallel.data_parallel, config.moe
    if config.groups % count:
        reason = f"must be a multiple of parallel.data_parallel ({count}), or null for as many"
        yield Refusal("moe.groups", moe.groups, reason, False)
    if config.train.distill is not None:
        reason = "a teacher and its student are on one device: set the degrees of parallel to 1"
        yield Refusal("train.distill", config.train.distill.teacher, reason, False)


def of_sizes(config: Config, target: str) -> Iterator[Refusal]:
    """Yields what a device does not compute, whatever the degrees (UserError: sizes that sorting cannot hold)."""
    dtype = config.model.compute_dtype
    if dtype not in COMPUTE_DTYPES[target]:
        allowed = " or ".join(COMPUTE_DTYPES[target])
        yield Refusal("model.compute_dtype", dtype, f"MindSpore cannot train with it on {target}; {allowed}", False)
    check_sort_keys(config)
    if config.devices > 1 and target == "Ascend":
        check_dropless(config)


def why_not_compiled(config: Config, target: str) -> str | None:
    """Says why the compiler does not shard the step of this configuration, and processes do it with explicit
    collectives; None where the compiler does, or nothing can."""
    reasons = (
        (target == "CPU", "MindSpore's compiler shards graphs for Ascend and GPU only"),
        (config.context.mode != "graph", f"context.mode: {config.context.mode}; the compiler shards graphs"),
        *((refusal.by_processes, str(refusal)) for refusal in refusals(config, target)),
    )
    return next((reason for holds, reason in reasons if holds), None)


def check_mesh(config: Config, count: int, target: str) -> str | None:
    """Refuses what `count` processes do not train on devices of a kind (UserError); returns `why_not_compiled`."""
    by_processes = why_not_compiled(config, target if count > 1 else "CPU")
    check_degrees(config, count, by_processes is None, by_processes if count > 1 and target != "CPU" else "")
    if count > 1:
        refuse(of_sizes(config, target))
    if by_processes is None:
        refuse(refusals(config, target))
        refuse(of_evaluation(config))
    return by_processes


def check_degrees(config: Config, count: int, compiled: bool = False, why: str = "") -> None:
    """Refuses degrees that `count` processes cannot carry out (UserError, one line).

    Args:
        config: the degrees.
        count: of processes.
        compiled: whether MindSpore's compiler shards the step (Ascend, GPU).
        why: see `of_processes`.
    """
    by_processes = () if compiled else list(of_processes(config, why))
    refuse(refusal for refusal in by_processes if refusal.key.removeprefix("parallel.") in NEED_A_COMPILER)
    if config.devices != count:
        what = "process runs" if count == 1 else "processes run"
        data, key = config.parallel.data_parallel, "parallel.data_parallel"
        remedy = LAUNCH.format(count=config.devices) if config.devices > count else f"set {key}={count}"
        raise UserError(f"{key}: {data}; the degrees need {config.devices} processes, {count} {what}: {remedy}")
    if count > 1:
        refuse(of_several(config))
        refuse(by_processes)


def require_trainable(config: Config, target: str = "Ascend") -> None:
    """Refuses degrees that the compiler does not shard for devices of a kind (UserError, one line): what is planned,
    compiled or emulated is what train.py would run. On one device nothing is sharded."""
    if config.devices > 1:
        refuse(of_several(config))
        refuse(refusals(config, target))
        refuse(of_evaluation(config))
    refuse(of_sizes(config, target))


def refuse(found: Iterator[Refusal] | list[Refusal] | tuple) -> None:
    """Raises the first of some refusals (UserError)."""
    for refusal in found:
        raise UserError(str(refusal))


def with_defaults(config: Config, target: str) -> Config:
    """Returns the configuration as it runs on several devices: on GPU ZeRO level 1 unless the user has written one."""
    written = "optimizer_shard" in config.parallel.model_fields_set
    if target != "GPU" or written or config.parallel.data_parallel == 1:
        return config
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"optimizer_shard": 1})})
