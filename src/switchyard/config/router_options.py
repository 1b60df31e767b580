"""Options of the routers: a typed class for each, with the laws that tie options to the section `moe`.

The class of a router names its options class as `Options`. The classes of shipped routers stand here, below the
routers, because a configuration is checked without MindSpore.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError, WithJsonSchema

from switchyard.config.sections import NotNegative, Positive, Section, Weight, messages
from switchyard.errors import LONGEST, UserError, represented, shortened

KEY = "moe.router"
Laws = Iterator[tuple[bool, str, Any, str]]  # (holds, key, value, what is allowed)


class RouterOptions(Section):
    """Base of the options of a router; by itself it has none."""

    def laws(self, moe) -> Laws:
        """Yields what the router asks of its options and of the section `moe`."""
        yield from ()

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yields (option, reason) of options that the other options leave unread."""
        yield from ()


class OneChoice(RouterOptions):
    """Holds the options of routers that send a row to one expert."""

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        chosen = moe.num_experts_chosen
        reason = f"{KEY} '{moe.router}' chooses 1 expert; use 'top_k' for more"
        yield chosen == 1, "moe.num_experts_chosen", chosen, reason


class OneCell(OneChoice):
    """Holds the options of routers that halve the experts: lsh and tree."""

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        yield from super().laws(moe)
        experts = moe.expert_num
        yield experts & (experts - 1) == 0, "moe.expert_num", experts, f"{KEY} '{moe.router}' needs a power of two"


class Scaled(RouterOptions):
    """Holds the options of routers that multiply their gates."""

    routed_scaling_factor: Annotated[float, Field(gt=0)] = Field(1.0, description="factor of the gates")


class Normalised(RouterOptions):
    """Holds the options of routers that may divide gates by their sum."""

    norm_topk_prob: bool = Field(True, description="gates of a row sum to 1 where K >= 2")


class SwitchOptions(Scaled, OneChoice):
    """Holds the options of `switch`."""


class TopKOptions(Scaled, Normalised):
    """Holds the options of `cosine`, and those of `top_k` and `sigmoid` beside their groups."""


class SinkhornOptions(TopKOptions):
    """Holds the options of `sinkhorn`."""

    sinkhorn_iterations: Positive = Field(8, description="passes that balance rows and experts in training")


class GShardOptions(RouterOptions):
    """Holds the options of `gshard`."""

    second_expert: Literal["all", "sampling", "threshold"] = Field(
        "all", description="second choices that count: all, by lot in proportion (training), or large gates"
    )
    second_expert_threshold: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="the gate that a second choice must exceed; read where second_expert is 'threshold'"
    )

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        chosen, whole = moe.num_experts_chosen, self.second_expert == "all"
        yield chosen == 2, "moe.num_experts_chosen", chosen, f"{KEY} 'gshard' chooses 2"
        for key, file in (("moe.record", moe.record), ("moe.replay", moe.replay)):
            reason = f"a second choice may not be refused: {KEY}.second_expert 'all'"
            yield file is None or whole, key, file, reason

    def idle(self) -> Iterator[tuple[str, str]]:
        """See RouterOptions.idle."""
        if self.second_expert != "threshold":
            reason = f"{KEY}.second_expert 'threshold' reads it: choose that, or leave it out"
            yield "second_expert_threshold", reason


class PrototypeOptions(RouterOptions):
    """Holds the options of `prototype`."""

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        experts, chosen = moe.expert_num // moe.copies, moe.num_experts_chosen
        yield experts % chosen == 0, "moe.num_experts_chosen", chosen, f"prototype: must divide the experts ({experts})"


class InGroups(RouterOptions):
    """Holds the options of routers whose experts stand in groups."""

    n_group: Positive = Field(1, description="groups of experts, one beside the other")


class BestGroupOptions(InGroups):
    """Holds the options of routers that keep a row within its best groups."""

    topk_group: Positive = Field(1, description="groups that a row may choose experts from")

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        experts, chosen = moe.expert_num // moe.copies, moe.num_experts_chosen
        groups, taken = self.n_group, self.topk_group
        yield experts % groups == 0, f"{KEY}.n_group", groups, f"must divide the experts ({experts})"
        yield taken <= groups, f"{KEY}.topk_group", taken, f"at most {KEY}.n_group ({groups})"
        room = taken * (experts // groups)
        reason = f"at most the {room} experts of {KEY}.topk_group ({taken}) groups"
        yield chosen <= room, "moe.num_experts_chosen", chosen, reason


class TwoLevelOptions(BestGroupOptions, Normalised):
    """Holds the options of `two_level`."""

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        yield self.n_group > 1, f"{KEY}.n_group", self.n_group, "two_level needs 2 or more groups of experts"
        yield from super().laws(moe)


class GroupedTopKOptions(BestGroupOptions, TopKOptions):
    """Holds the options of `top_k`."""


class SigmoidOptions(BestGroupOptions, TopKOptions):
    """Holds the options of `sigmoid`."""

    topk_bias_update_rate: Weight = Field(0.001, description="step of the bias that balances the load; 0 = off")


class HashOptions(OneChoice):
    """Holds the options of `hash`."""

    hash_table: Literal["balanced", "random"] = Field(
        "balanced",
        description="ids by how often they occur in the training text, to the emptiest expert; or each at random",
    )


class RandomOptions(OneChoice):
    """Holds the options of `random`."""

    random_draw: Literal["token", "step"] = Field(
        "token", description="the expert of a token id is fixed, or drawn anew at each training step (THOR)"
    )
    consistency_loss_factor: Weight = Field(
        0.0, description="weight of THOR's loss between two passes with other random experts; 0 = one pass"
    )

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        yield from super().laws(moe)
        weight, drawn = self.consistency_loss_factor, self.random_draw == "step"
        yield drawn or not weight, f"{KEY}.consistency_loss_factor", weight, f"needs {KEY}.random_draw 'step'"


class RandomInGroupOptions(OneChoice, InGroups):
    """Holds the options of `random_in_group`."""

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        yield from super().laws(moe)
        experts, groups = moe.expert_num, self.n_group
        yield experts % groups == 0, f"{KEY}.n_group", groups, f"must divide moe.expert_num ({experts})"


class MultiGateOptions(Normalised):
    """Holds the options of `multi_gate`."""

    task_num: Positive = Field(1, description="tasks T that rows may belong to")


class TaskOptions(RouterOptions):
    """Holds the options of `task`."""

    task_num: Positive = Field(1, description="tasks T that rows may belong to")
    task_experts: list[list[NotNegative]] | None = Field(
        None, description="the K experts of each task; null = sets of K in turn"
    )

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        sets, chosen, experts, key = self.task_experts, moe.num_experts_chosen, moe.expert_num, f"{KEY}.task_experts"
        if sets is None:
            return
        count = self.task_num
        yield len(sets) == count, key, sets, f"must name a set for each of {KEY}.task_num ({count})"
        for task in sets:
            distinct = len(task) == len(set(task)) == chosen
            yield distinct, key, task, f"a set needs moe.num_experts_chosen ({chosen}) different experts"
            known = max(task, default=0) < experts
            yield known, key, task, f"experts are numbered from 0 below moe.expert_num ({experts})"


class SoftOptions(RouterOptions):
    """Holds the options of `soft`."""

    slots_per_expert: Positive = Field(1, description="slots of an expert in each group")


class DepthsOptions(OneChoice):
    """Holds the options of `mixture_of_depths`."""

    def laws(self, moe) -> Laws:
        """See RouterOptions.laws."""
        yield from super().laws(moe)
        experts, factor, name = moe.expert_num, moe.capacity_factor, "mixture_of_depths"
        reason = f"{KEY} '{name}' needs 1 expert, which a row visits or skips"
        yield experts == 1, "moe.expert_num", experts, reason
        reason = f"at most 1: {name} processes this fraction of the rows"
        yield factor <= 1, "moe.capacity_factor", factor, reason


OPTIONS: dict[str, type[RouterOptions]] = {  # of the routers that ship
    "switch": SwitchOptions,
    "top_k": GroupedTopKOptions,
    "noisy_top_k": RouterOptions,
    "gshard": GShardOptions,
    "cosine": TopKOptions,
    "prototype": PrototypeOptions,
    "sigmoid": SigmoidOptions,
    "two_level": TwoLevelOptions,
    "sinkhorn": SinkhornOptions,
    "base": OneChoice,
    "multi_gate": MultiGateOptions,
    "hash": HashOptions,
    "lsh": OneCell,
    "random": RandomOptions,
    "random_in_group": RandomInGroupOptions,
    "task": TaskOptions,
    "expert_choice": RouterOptions,
    "mixture_of_depths": DepthsOptions,
    "tree": OneCell,
    "dense": RouterOptions,
    "merged": RouterOptions,
    "soft": SoftOptions,
}


def readers(option: str) -> list[str]:
    """Returns the shipped routers that have an option of this name."""
    return [name for name, kind in OPTIONS.items() if option in kind.model_fields]


def no_such(router: str, option: str, known: list[str]) -> str:
    """Returns why a router refuses an option, and what to do."""
    others = [name for name in readers(option) if name != router]
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.8 if others else 0.5)
    if others and not near:
        return f"{KEY} '{router}' has no such option: take one of {', '.join(others)}, or leave it out"
    hint = f"did you mean '{near[0]}'?" if near else f"its options: {', '.join(known) or 'none'}"
    return f"unknown option of {KEY} '{router}'; {hint}"


def typed(router: str, kind: type, given: dict[str, Any]) -> Any:
    """Returns the options of a router as its class `kind` has them: a pydantic model, or a dataclass.

    Raises:
        UserError: `kind` is neither, or an option is unknown, of another type or out of range.
    """
    if not (isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind))):
        raise UserError(f"{KEY}: {router}; its Options must be a pydantic model or a dataclass")
    is_model = issubclass(kind, BaseModel)
    known = list(kind.model_fields) if is_model else [field.name for field in dataclasses.fields(kind) if field.init]
    for option, value in given.items():
        if option not in known:
            raise UserError(f"{KEY}.{shortened(option)}: {represented(value)}; {no_such(router, option, known)}")
    try:
        return TypeAdapter(kind).validate_python(dict(given))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        path = problems[0]["loc"][:1]
        key, value = ".".join([KEY, *map(str, path)]), represented(problems[0]["input"])
        raise UserError(f"{key}: {value}; {shortened(messages(problems, path), 4 * LONGEST)}") from None


class RouterChoice(str):
    """The name of a router, with its options: it compares and prints as the name.

    Attributes:
        options: typed, of a shipped router; a mapping as it was written, of a router in the user's own file, whose
            class alone can type it.
        moved: keys of `moe` that the user has written in the old form, see `old_keys`.
    """

    def __new__(cls, name: str, options: Any = None, moved: tuple[str, ...] = ()):
        """Makes the name, with options or none."""
        self = super().__new__(cls, name)
        self.options, self.moved = {} if options is None else options, moved
        return self

    def __eq__(self, other: object) -> bool:
        same = str.__eq__(self, other)
        return same and self.options == other.options if isinstance(other, RouterChoice) else same

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def given(self) -> dict[str, Any]:
        """Returns option -> value: all of a shipped router, those that were written of an own one."""
        options = self.options
        if isinstance(options, BaseModel):
            return options.model_dump()
        return dict(options) if isinstance(options, dict) else dataclasses.asdict(options)

    def written(self) -> str | dict[str, Any]:
        """Returns what YAML has: the name, or a mapping of the name and the options."""
        given = self.given()
        return {"name": str(self), **given} if given else str(self)


def choice_of(value: Any) -> RouterChoice:
    """Returns the choice that a name, or a mapping of `name` and options, makes (ValueError, UserError)."""
    if isinstance(value, RouterChoice):
        return value
    given = dict(value) if isinstance(value, dict) else {"name": value}
    name = given.pop("name", None)
    if not isinstance(name, str) or "\0" in name:
        raise ValueError("input should be a valid string, or a mapping such as {name: sigmoid, n_group: 4}")
    kind = OPTIONS.get(name)
    return RouterChoice(name, typed(name, kind, given) if kind else given)


RouterField = Annotated[
    RouterChoice,
    PlainValidator(choice_of),
    PlainSerializer(RouterChoice.written),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
]
