"""What MindSpore's compiler does not cut over devices here, in one list. No MindSpore in here.

The training step refuses it and the planner leaves it out; what processes can do by exchanging by hand, `train.py` lets
them do. Which routers can be cut, each router says (`Router.cuts`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from switchyard.config import Config
from switchyard.errors import UserError

ACCUMULATION = "train.gradient_accumulation_steps"


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


def check_offered(config: Config, target: str = "Ascend") -> None:
    """Refuses what the compiler does not cut for a device (UserError, one line)."""
    for refusal in refusals(config, target):
        raise UserError(str(refusal))
