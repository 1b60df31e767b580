"""What several devices do not train here, in one list. No MindSpore in here.

Training, the planner, the simulated compile, the virtual cluster and the launch scripts' --dry-run all read it
(`check_way`, `require_trainable`). What MindSpore's compiler does not cut, and processes can do by exchanging by hand,
`train.py` lets them do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from switchyard.config import Config
from switchyard.device import COMPUTE_DTYPES
from switchyard.errors import UserError
from switchyard.moe.dispatch.capacity import check_sort_keys, check_sorted_rows

ACCUMULATION = "train.gradient_accumulation_steps"
WHOLE_ROUTERS = ("merged", "soft", "tree")  # that override `construct`; see moe.routing.base.why_not_sharded
NEED_A_COMPILER = (
    "model_parallel",
    "pipeline_stage",
    "micro_batch_num",
    "optimizer_shard",
    "sequence_parallel",
    "recompute",
)
LAUNCH = "bash scripts/run_distribute_train_ascend.sh --devices {count} starts them, with DEVICE=cpu on this machine"


@dataclass(frozen=True)
class Refusal:
    """A key whose value the compiler does not cut.

    Attributes:
        key, value: of the configuration.
        allowed: what it cuts, or what to do.
        by_hand: whether processes that exchange by hand may do it.
    """

    key: str
    value: Any
    allowed: str
    by_hand: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.value}; {self.allowed}"


def refusals(config: Config, target: str = "Ascend") -> Iterator[Refusal]:
    """All that stands against cutting a configuration for devices of a kind, first what processes can do by hand."""
    moe, usual = config.moe, "leave it at its default where parallel degrees cut the model"
    if config.model.type != "decoder":
        yield Refusal("model.type", config.model.type, "only a decoder is cut over devices", True)
    if config.moe_layers and config.granularity != "token":
        yield Refusal("moe.granularity", config.granularity, "the compiler cuts 'token'", True)
    if config.moe_layers and moe.copies > 1:
        yield Refusal("moe.copies", moe.copies, "1 where parallel degrees cut the model", True)
    if moe.router_warmup_steps:
        yield Refusal("moe.router_warmup_steps", moe.router_warmup_steps, usual, True)
    if moe.router_freeze_step is not None:
        yield Refusal("moe.router_freeze_step", moe.router_freeze_step, usual, True)
    if target == "GPU" and config.moe_layers and moe.dispatch != "capacity":
        yield Refusal("moe.dispatch", moe.dispatch, "the compiler cuts it for Ascend", True)
    if config.moe_layers and (reason := why_not_sharded(moe.router)):
        yield Refusal("moe.router", moe.router, reason, True)
    yield from _of_pipelines(config, target)
    level, count = config.parallel.optimizer_shard, config.train.gradient_accumulation_steps
    if count > 1 and level:  # the compiler gathers a cut parameter for the first micro-batch only
        yield Refusal(ACCUMULATION, count, f"1 with parallel.optimizer_shard ({level})", False)


def _of_pipelines(config: Config, target: str) -> Iterator[Refusal]:
    """What does not go with several stages."""
    stages, count = config.parallel.pipeline_stage, config.train.gradient_accumulation_steps
    if stages == 1:
        return
    if target == "GPU" and config.devices > stages:
        why = "on GPU a stage is one device, for MindSpore's backend there 'does not support the lazy_inline feature'"
        yield Refusal("parallel.pipeline_stage", stages, f"{why}: set the other degrees to 1, or pipeline_stage", False)
    beside = f"with parallel.pipeline_stage ({stages})"
    if count > 1:
        yield Refusal(ACCUMULATION, count, f"1 {beside}: raise parallel.micro_batch_num", False)
    if config.parallel.optimizer_shard == 3:  # what is not cut further gets no gradient
        yield Refusal("parallel.optimizer_shard", 3, f"0 or 1 {beside}", False)
    if config.model.tie_word_embeddings:  # the compiler cannot hand a table that is cut to another stage
        yield Refusal("model.tie_word_embeddings", True, f"False {beside}", False)


def why_not_sharded(router: str) -> str | None:
    """Says why a compiled cluster cannot run a router, by its YAML name (UserError: there is no such); None: it can."""
    if "." not in router:
        return (
            "overrides `construct`, which a compiled cluster does not call: take another router"
            if router in WHOLE_ROUTERS
            else None
        )
    from switchyard.moe.routing.base import find_router
    from switchyard.moe.routing.base import why_not_sharded as why_class_is_not

    return why_class_is_not(find_router(router))


def of_evaluation(config: Config) -> Iterator[Refusal]:
    """What stands against evaluation while a compiled step trains."""
    stages, every = config.parallel.pipeline_stage, config.train.eval_every
    if stages > 1 and every:
        beside = f"0 with parallel.pipeline_stage ({stages}): eval.py scores its checkpoints"
        yield Refusal("train.eval_every", every, beside, False)


def of_processes(config: Config, why: str = "") -> Iterator[Refusal]:
    """What processes that exchange by hand do not train.

    `why`: what the compiler cannot cut, where it would be asked otherwise.
    """
    cut, moe, only = config.parallel, config.moe, "training in processes cuts data_parallel and expert_parallel only"
    for name in NEED_A_COMPILER:
        value = getattr(cut, name)
        if value != type(cut).model_fields[name].default:
            rest = f"; leave it at its default{f' ({why})' if why else ''}"
            yield Refusal(f"parallel.{name}", value, only + rest, False)
    if cut.expert_parallel > 1 and moe.dispatch != "capacity":
        yield Refusal("moe.dispatch", moe.dispatch, "'capacity' where processes on CPU or GPU cut the experts", False)
    if cut.expert_parallel > 1 and moe.router == "merged":
        reason = "merged experts need all their parameters in one place; set it to 1"
        yield Refusal("parallel.expert_parallel", cut.expert_parallel, reason, False)


def of_several(config: Config) -> Iterator[Refusal]:
    """What several processes do not train, by the compiler's cut or by hand."""
    count, moe = config.parallel.data_parallel, config.moe
    if config.groups % count:
        reason = f"must be a multiple of parallel.data_parallel ({count}), or null for as many"
        yield Refusal("moe.groups", moe.groups, reason, False)
    for key, file in (("moe.record", moe.record), ("moe.replay", moe.replay)):
        if file is not None:
            yield Refusal(key, file, "choices are recorded and replayed by one process: leave it null", False)
    if moe.router_warmup_steps:
        steps = moe.router_warmup_steps
        yield Refusal("moe.router_warmup_steps", steps, "one process forces choices: set it to 0", False)


def of_sizes(config: Config, target: str) -> Iterator[Refusal]:
    """What a device does not compute, whatever the degrees (UserError: sizes that sorting cannot hold)."""
    dtype = config.model.compute_dtype
    if dtype not in COMPUTE_DTYPES[target]:
        allowed = " or ".join(COMPUTE_DTYPES[target])
        yield Refusal("model.compute_dtype", dtype, f"MindSpore cannot train with it on {target}; {allowed}", False)
    check_sort_keys(config)
    if config.moe_layers and config.moe.dispatch != "capacity" and config.devices > 1 and target == "Ascend":
        check_sorted_rows(config)


def why_by_hand(config: Config, target: str) -> str | None:
    """Why the compiler does not cut the step of this configuration, and processes can do it by hand; None where it
    does, or nobody can."""
    reasons = (
        (target == "CPU", "MindSpore's compiler cuts graphs for Ascend and GPU only"),
        (config.context.mode != "graph", f"context.mode: {config.context.mode}; the compiler cuts graphs"),
        *((refusal.by_hand, str(refusal)) for refusal in refusals(config, target)),
    )
    return next((reason for holds, reason in reasons if holds), None)


def check_way(config: Config, count: int, target: str) -> str | None:
    """Refuses what `count` processes do not train on devices of a kind (UserError); returns `why_by_hand`.

    One process alone trains by hand what it holds, which is all of it.
    """
    by_hand = why_by_hand(config, target if count > 1 else "CPU")
    check_degrees(config, count, by_hand is None, by_hand if count > 1 and target != "CPU" else "")
    if count > 1:
        refuse(of_sizes(config, target))
    if by_hand is None:
        refuse(refusals(config, target))
        refuse(of_evaluation(config))
    return by_hand


def check_degrees(config: Config, count: int, compiled: bool = False, why: str = "") -> None:
    """Refuses degrees that `count` processes cannot carry out (UserError, one line).

    Args:
        config: the degrees.
        count: of processes.
        compiled: whether MindSpore's compiler cuts the step (Ascend, GPU), not `exchange`.
        why: see `of_processes`.
    """
    by_hand = () if compiled else list(of_processes(config, why))
    refuse(refusal for refusal in by_hand if refusal.key.removeprefix("parallel.") in NEED_A_COMPILER)
    if config.devices != count:
        what = "process runs" if count == 1 else "processes run"
        data, key = config.parallel.data_parallel, "parallel.data_parallel"
        remedy = LAUNCH.format(count=config.devices) if config.devices > count else f"set {key}={count}"
        raise UserError(f"{key}: {data}; the degrees need {config.devices} processes, {count} {what}: {remedy}")
    if count > 1:
        refuse(of_several(config))
        refuse(by_hand)


def require_trainable(config: Config, target: str = "Ascend") -> None:
    """Refuses degrees that the compiler's cut does not train on devices of a kind (UserError, one line): what is
    planned, compiled or emulated is what train.py would run. One device is not cut."""
    if config.devices > 1:
        refuse(of_several(config))
        refuse(refusals(config, target))
        refuse(of_evaluation(config))
    refuse(of_sizes(config, target))


def check_offered(config: Config, target: str = "Ascend") -> None:
    """Refuses what the compiler does not cut for a device (UserError, one line)."""
    refuse(refusals(config, target))


def refuse(found: Iterator[Refusal] | list[Refusal] | tuple) -> None:
    """Raises the first of some refusals (UserError)."""
    for refusal in found:
        raise UserError(str(refusal))


def with_defaults(config: Config, target: str) -> Config:
    """The configuration as it runs on several devices: on GPU ZeRO level 1 unless the user has written a level, or
    asks for what it does not go with."""
    if not zero_is_default(config, target) or config.train.gradient_accumulation_steps > 1:
        return config
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"optimizer_shard": 1})})


def zero_is_default(config: Config, target: str) -> bool:
    """Whether a GPU's default of ZeRO is asked for: no level is written, and there are replicas to share state out."""
    written = "optimizer_shard" in config.parallel.model_fields_set
    return target == "GPU" and not written and config.parallel.data_parallel > 1


def lost_default(config: Config, target: str) -> str | None:
    """One line where accumulation keeps several GPUs from their default of ZeRO; None where nothing is lost."""
    count = config.train.gradient_accumulation_steps
    if not zero_is_default(config, target) or count == 1:
        return None
    return (
        f"parallel: optimizer_shard stays 0, not 1 as by default on several GPUs, for {ACCUMULATION} is {count}: "
        f"slower, and each device holds the whole optimizer state. Set it to 1 and data.batch_size to {count} times "
        f"({config.data.batch_size * count}) for the same step with ZeRO"
    )
