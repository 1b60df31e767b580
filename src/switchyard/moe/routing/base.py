"""What a router is, what it returns, and how its YAML name finds it.

Legend: G groups that route for themselves, N rows of a group, E experts, K choices of a row, D width.
"""

from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import MoEConfig
from switchyard.config.router_options import RouterChoice, RouterOptions, typed
from switchyard.distributed.mesh import CompiledMesh
from switchyard.errors import UserError, shortened
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.masks import Selection
from switchyard.nn.noise import NoiseSlices
from switchyard.trust import import_class, is_own


class Routing(TypedDict):
    """Holds what a router decided, before any capacity (a dict: compiled graphs keep its gradients).

    Every form has, float32 [G, N, E]:
        probabilities   the router's distribution over the experts
        logits          what the z-loss keeps small; zeros where a router has none
        importance      what counts as importance: the probabilities, or the gates alone where the paper says so
        expert_mask     1 where a real row works with an expert
    and `smooth_load` [G, N, E] where the router estimates it, `own_loss` [G] where it brings a loss of its own: a sum
    over the real rows of each group. The layer adds `priority` [G, N], a draw of U(0, 1), where moe.drop_order is
    `random` in training.
    Form "token_choice":
        expert_index [G, N, K] int32: the choices, best first; E, which is no expert, for a padded row
        gates [G, N, K] float32: what a choice's output is multiplied by; 0 for a padded row
    Form "expert_choice": token_index [G, E, C] int32 and gates [G, E, C] float32, 0 for a slot that nobody fills;
    slot_mask [G, E, C], 1 and 0, says which those are.
    Form "soft": dispatch and combine [G, N, E, C] float32 weights. Form "dense": gates [G, N, E] float32. Form
    "merged": gates [G, E] float32, one mixture of the experts' parameters for a group.
    """

    probabilities: Tensor
    logits: Tensor
    importance: Tensor
    expert_mask: Tensor
    smooth_load: Tensor
    own_loss: Tensor
    expert_index: Tensor
    gates: Tensor
    token_index: Tensor
    slot_mask: Tensor
    dispatch: Tensor
    combine: Tensor
    priority: Tensor


class Context(TypedDict):
    """Holds what a router may look at besides the rows. The layer hands it padded rows as zeros, whatever they held.

    valid [G, N] float32: 1 for a real row, 0 for padding. noise [.., G * N, D] float32 of U(0, 1), read in training
    only. token_ids, task_ids [G, N] int32, None where the network has none. replay [G, N, K] int32: choices that are
    forced, -1 where the router's own stand (see switchyard.moe.routing.replay); there only in a run that replays.
    state: what `Router.state` returns, as values; there only where the router has such parameters.
    """

    valid: Tensor
    noise: Tensor
    token_ids: Tensor
    task_ids: Tensor
    replay: Tensor
    state: tuple


@dataclass(frozen=True)
class RouterSetting:
    """Holds what a router is built from.

    moe: its section of the configuration. width: D. random: draws initial weights and tables. slices: hands out the
    slices of noise. vocab_size: of the token ids in the context, None where there are none. has_tasks: whether task ids
    come along. length: rows of a sequence, None where rows are no sequence.
    """

    moe: MoEConfig
    width: int
    random: InitialWeights
    slices: NoiseSlices
    vocab_size: int | None = None
    has_tasks: bool = False
    length: int | None = None

    @property
    def options(self) -> Any:
        """Returns the options of the router, of the class that it names as `Options`."""
        return self.moe.router.options


_ROUTERS: dict[str, type] = {}


def register(name: str):
    """Class decorator: makes a Router known under its YAML name."""

    def add(cls):
        cls.name = name
        _ROUTERS[name] = cls
        return cls

    return add


def known_routers() -> dict[str, type]:
    """Returns every registered router: name -> class."""
    return dict(sorted(_ROUTERS.items()))


def find_router(name: str) -> type:
    """Returns the class of a YAML name, or of `module.Class` in a user's own file (UserError if there is none)."""
    if name in _ROUTERS:
        return _ROUTERS[name]
    if not is_own(name):
        raise UserError(f"moe.router: {name!r}; known routers: {', '.join(known_routers())}")
    found = import_class(name)
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise UserError(f"moe.router: {name!r}; must be a class that extends switchyard.moe.routing.Router")
    return found


def create_router(
    config, random: InitialWeights, slices=None, vocab_size: int | None = None, has_tasks: bool = False
) -> nn.Cell:
    """Returns the router that `moe.router` names; a network with a vocabulary has sequences of model.seq_length.

    Raises:
        UserError: no router has that name, or it needs what the network does not give.
    """
    router, name = find_router(config.moe.router), config.moe.router
    if "token_ids" in router.needs and vocab_size is None:
        raise UserError(f"moe.router: {name!r}; chooses by token id, which this network does not have")
    if "task_ids" in router.needs and not has_tasks:
        raise UserError(f"moe.router: {name!r}; chooses by task id, which this network does not have")
    length = None if vocab_size is None else config.model.seq_length // config.row_tokens
    width, slices = config.model.hidden_size, slices or NoiseSlices()
    setting = RouterSetting(with_options(config.moe), width, random, slices, vocab_size, has_tasks, length)
    if config.moe.copies == 1:
        return router(setting)
    if router.form != "token_choice" or router.eval_form:
        raise UserError(f"moe.copies: {config.moe.copies}; router {name!r} does not choose experts row by row")
    return ReplicaGroups(router, setting)


def with_options(moe: MoEConfig) -> MoEConfig:
    """Returns the section with options as the router's class types them; a shipped router's are typed already.

    Raises:
        UserError: no router has that name, or an option is unknown, of another type, out of range or against a law.
    """
    router, choice = find_router(moe.router), moe.router
    if not isinstance(choice.options, dict):
        return moe
    options = typed(choice, router.Options, choice.options)
    for holds, key, value, allowed in getattr(options, "laws", lambda moe: ())(moe):
        if not holds:
            raise UserError(f"{key}: {shortened(value)}; {allowed}")
    return moe.model_copy(update={"router": RouterChoice(choice, options, choice.moved)})


def require_causal(moe: MoEConfig) -> None:
    """Refuses a router that looks at later rows (UserError): a causal model must not see what it is to predict."""
    if find_router(moe.router).causal:
        return
    causal = ", ".join(name for name, router in known_routers().items() if router.causal)
    raise UserError(
        f"moe.router: {moe.router!r}; looks at the whole sequence, later tokens too, which a causal model must not: "
        f"take one of {causal}"
    )


def require_choices(moe: MoEConfig) -> None:
    """Refuses what needs choices where rows do not choose K experts, always or at evaluation (UserError)."""
    router, asked = find_router(moe.router), {"record": moe.record, "replay": moe.replay}
    if moe.dispatch != "capacity":
        asked["dispatch"] = moe.dispatch
    if moe.force_balance:
        asked["force_balance"] = True
    if moe.router_warmup_steps:
        asked["router_warmup_steps"] = moe.router_warmup_steps
    if router.form != "token_choice" or router.eval_form:
        key = next(name for name, value in asked.items() if value is not None)
        reason = f"router {moe.router!r} does not choose experts row by row; take one that does"
        raise UserError(f"moe.{key}: {asked[key]}; {reason}")


def require_learnable(moe: MoEConfig) -> None:
    """Refuses warm-up and freezing of a router that has no weights (UserError)."""
    if find_router(moe.router).learnable:
        return
    for key, value in (
        ("router_warmup_steps", moe.router_warmup_steps or None),
        ("router_freeze_step", moe.router_freeze_step),
    ):
        if value is not None:
            raise UserError(f"moe.{key}: {value}; router {moe.router!r} does not learn: take one that does")


class Router(nn.Cell):
    """Maps tokens to a Routing. Arithmetic is float32 whatever the model computes in (arXiv 2101.03961, section 2.4).

    A subclass states what it is in the class attributes and implements `scores` and `route`: such a router works on
    every mesh. A subclass that implements `construct` instead works on one device and on CPU processes, and a compiled
    cluster refuses it by name (see `why_not_sharded`).

    name: in YAML. Options: class of its options, a pydantic model or a dataclass, which extends that of the parent.
    paper: where it is from. unit: what it decides for: row (of the layer), token (by its id) or task.
    form: of its Routing; eval_form: of the one at evaluation, where it differs. learnable: has weights. causal: a row's
    routing at evaluation does not look at later rows. batch_independent: the same row gets the same experts and gates
    whatever batch it stands in. may_skip_tokens: may give a real row no expert, E, at evaluation. needs: entries of the
    Context it cannot do without. score_num: tensors that `scores` returns. losses: names in `moe.losses` that it can
    give; `switch` and `z` also by aux_loss_factor and z_loss_factor.

    overrides_construct: set here: whether the class has a `construct` of its own.

    Args:
        setting: what the router is built from; `create_router` makes it.

    Examples:
        >>> from switchyard.config import build
        >>> config = build({"model": {"hidden_size": 8, "num_heads": 2}, "moe": {"router": "top_k", "expert_num": 4}})
        >>> router = create_router(config, InitialWeights(0)).set_train(False)
        >>> routing = router(ops.ones((1, 6, 8)), {"valid": ops.ones((1, 6))})
        >>> routing["expert_index"].shape, routing["gates"].shape, routing["probabilities"].shape
        ((1, 6, 1), (1, 6, 1), (1, 6, 4))
    """

    name, paper, unit = "", "", "row"
    Options: type = RouterOptions
    form, eval_form = "token_choice", None
    learnable, causal, batch_independent = True, True, True
    may_skip_tokens, overrides_construct = False, False
    needs: tuple = ()
    score_num = 1
    losses: tuple = ("switch", "z", "importance", "sequence", "mutual_information")

    def __init_subclass__(cls, **options):
        """Notes whether the class, or a parent of it, replaces the `construct` of Router."""
        super().__init_subclass__(**options)
        cls.overrides_construct = cls.construct is not Router.construct

    def __init__(self, setting: RouterSetting):
        super().__init__()
        self.expert_num, self.choices = setting.moe.expert_num, setting.moe.num_experts_chosen

    def construct(self, tokens: Tensor, context: dict) -> dict:
        """Routes tokens [G, N, D] by a Context: `scores` of all tokens, then `route` in each group."""
        groups, count, width = tokens.shape
        token_ids, task_ids = flat_ids(context, "token_ids"), flat_ids(context, "task_ids")
        grouped = ()
        for part in self.scores(tokens.reshape(groups * count, width), token_ids, task_ids):
            grouped = (*grouped, part.reshape(groups, count, -1))
        state = self.state()
        return self.route(grouped, with_state(context, state, context.get("replay")) if state else context)

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """Computes all that reads a parameter: tokens [N, D], ids [N] or None -> a tuple of `score_num` times [N, X].

        On a cluster the tokens are sharded over devices. So a matrix product here needs a layout (see
        LinearRouter.shard); other arithmetic that reads a parameter belongs into one `mesh.local`.
        """
        raise NotImplementedError

    def route(self, scores: tuple, context: dict) -> dict:
        """Decides in each group: what `scores` returned, each [G, N, X], and a Context -> Routing. Reads no Parameter.

        On a cluster it runs on the groups of one device.
        """
        raise NotImplementedError

    def state(self) -> tuple:
        """Returns the parameters that `route` gets as context["state"]."""
        return ()

    def update(self, load: np.ndarray) -> None:
        """Adapts the state on the host after a training step; load [E]: choices that each expert got on all devices.

        Where ZeRO shards the state, the entries that other devices hold are zeros here: an entry may depend on the load
        and on itself only. Write by ops.assign: a compiled mindspore.value_and_grad does not see what set_data sets.
        """

    def shard(self, mesh: CompiledMesh) -> None:
        """Declares the layouts of what `scores` computes; nothing where it has no operator of its own."""


def make_context(valid: Tensor, noise: Tensor, token_ids: Tensor, task_ids: Tensor, state: tuple, replay: Tensor):
    """Returns a Context, with forced choices where `replay` is not None.

    A literal: a compiled graph loses the types of a dict that is copied key by key.
    """
    context = {"valid": valid, "noise": noise, "token_ids": token_ids, "task_ids": task_ids, "state": state}
    if replay is not None:
        context["replay"] = replay
    return context


def with_state(context: dict, state: tuple, replay: Tensor) -> dict:
    """Returns a Context with a state and forced choices of its own in the place of another's."""
    ids = context.get("token_ids"), context.get("task_ids")
    return make_context(context["valid"], context.get("noise"), *ids, state, replay)


def flat_ids(context: dict, name: str):
    """Returns the ids [G * N] of a Context, None where it has none."""
    ids = context.get(name)
    return None if ids is None else ids.reshape(-1)


def why_not_sharded(router: type) -> str | None:
    """Says in one line why a compiled cluster cannot run a router class; None where it can."""
    if not router.overrides_construct:
        return None
    return (
        f"{router.__name__} overrides `construct`, which a compiled cluster does not call: "
        f"define `scores` and `route` instead, take another router, or train on one device"
    )


class ReplicaGroups(Router):
    """Sends a copy of every row to r = `moe.copies` groups of E / r experts, each with a router of its own.

    The Routing is that of one router over E experts with r * K choices, those of the first group first; its
    distribution is the mean of the groups'. Scores and state are those of the first group's router, then those of the
    next.
    """

    def __init__(self, router: type, setting: RouterSetting):
        super().__init__(setting)
        moe, self.copies, self.router_class = setting.moe, setting.moe.copies, router
        self.name, self.form, self.eval_form, self.losses = router.name, router.form, router.eval_form, router.losses
        self.size, self.each = moe.expert_num // self.copies, moe.num_experts_chosen
        part = replace(setting, moe=moe.model_copy(update={"expert_num": self.size, "copies": 1}))
        self.routers = nn.CellList([router(part) for _ in range(self.copies)])
        self.causal, self.batch_independent, self.needs = router.causal, router.batch_independent, router.needs
        self.may_skip_tokens = self.routers[0].may_skip_tokens
        self.overrides_construct, self.part_num = router.overrides_construct, router.score_num
        self.score_num, self.state_num = self.copies * router.score_num, len(self.routers[0].state())

    def construct(self, tokens: Tensor, context: dict) -> dict:
        """Routes tokens [G, N, D] by a Context in all groups of experts together."""
        parts = ()
        for index, router in enumerate(self.routers):
            parts = (*parts, router(tokens, self.view(context, index)))
        return self.merge(parts)

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores."""
        scores = ()
        for router in self.routers:
            scores = (*scores, *router.scores(tokens, token_ids, task_ids))
        return scores

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        parts = ()
        for index, router in enumerate(self.routers):
            own = scores[index * self.part_num : (index + 1) * self.part_num]
            parts = (*parts, router.route(own, self.view(context, index)))
        return self.merge(parts)

    def state(self) -> tuple:
        """See Router.state."""
        state = ()
        for router in self.routers:
            state = (*state, *router.state())
        return state

    def update(self, load: np.ndarray) -> None:
        """See Router.update; load [E]."""
        for index, router in enumerate(self.routers):
            router.update(load[index * self.size : (index + 1) * self.size])

    def shard(self, mesh: CompiledMesh) -> None:
        """See Router.shard."""
        for router in self.routers:
            router.shard(mesh)

    def merge(self, parts: tuple) -> dict:
        """Merges the Routings of the groups into that of one router over all E experts."""
        experts = ()
        for index, part in enumerate(parts):
            own = part["expert_index"]  # [G, N, K], E / r for nowhere
            moved = own + index * self.size
            experts = (*experts, ops.where(own < self.size, moved, ops.full_like(own, self.expert_num)))
        share = 1.0 / self.copies
        routing = {
            "expert_index": ops.concat(experts, -1),  # [G, N, r * K]
            "gates": ops.concat([part["gates"] for part in parts], -1),
            "probabilities": ops.concat([part["probabilities"] for part in parts], -1) * share,  # [G, N, E]
            "logits": ops.concat([part["logits"] for part in parts], -1),
            "importance": ops.concat([part["importance"] for part in parts], -1) * share,
            "expert_mask": ops.concat([part["expert_mask"] for part in parts], -1),
        }
        if "smooth_load" in parts[0]:
            routing["smooth_load"] = ops.concat([part["smooth_load"] for part in parts], -1)
        if "own_loss" in parts[0]:
            routing["own_loss"] = ops.stack([part["own_loss"] for part in parts], 0).sum(0)  # [G]
        return routing

    def view(self, context: dict, index: int) -> dict:
        """Returns the context of group `index`: its own state, and forced choices of its own experts, from 0 on."""
        state, replay = (), context.get("replay")
        if "state" in context:
            state = context["state"][index * self.state_num : (index + 1) * self.state_num]
        if replay is not None:
            own = replay[..., index * self.each : (index + 1) * self.each] - index * self.size  # [G, N, K]
            mine = ops.logical_and(own >= 0, own < self.size)
            replay = ops.where(mine, own, ops.full_like(own, -1))
        return with_state(context, state, replay)


def router_weight(width: int, experts: int, random: InitialWeights, name: str = "weight") -> Parameter:
    """Draws the gate's matrix [D, E], small so that no expert starts ahead (arXiv 2101.03961, section 2.4)."""
    scale = 0.1 / np.sqrt(width)
    return random.normal(scale, (width, experts), name)


def to_float32(tokens: Tensor) -> Tensor:
    """Returns tokens in float32, untouched where they are: an operator more would want a layout on a cluster."""
    return tokens if tokens.dtype == mstype.float32 else tokens.astype(mstype.float32)


class LinearRouter(Router):
    """Scores experts by x W, in float32; W [D, E], or of other columns.

    A subclass may override the hook `logits(tokens)`; what depends on no parameter belongs into `route`.
    """

    def __init__(self, setting: RouterSetting, columns: int | None = None):
        super().__init__(setting)
        self.weight = router_weight(setting.width, columns or self.expert_num, setting.random)
        self.product = ops.MatMul()

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores: one tensor [N, E]."""
        return (self.logits(tokens),)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores tokens [N, D] for each expert: [N, E]."""
        return self.score(tokens, self.weight)

    def score(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Multiplies tokens [N, D] or [G, N, D] by a matrix [D, X]: [N, X] or [G, N, X]."""
        if tokens.ndim == 2:
            return self.product(to_float32(tokens), weight)
        groups, count, width = tokens.shape
        scores = self.product(to_float32(tokens).reshape(groups * count, width), weight)  # [G * N, X]
        return scores.reshape(groups, count, -1)

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards tokens, leaves the matrix full everywhere."""
        self.product.shard((mesh.layout("data", None), mesh.layout(None, None)), (mesh.layout("data", None),))


def by_rows(experts: Tensor, gates: Tensor, chosen: Tensor, probabilities: Tensor, logits: Tensor) -> dict:
    """Returns a Routing of form "token_choice" whose importance is the probabilities."""
    return {
        "expert_index": experts,
        "gates": gates,
        "probabilities": probabilities,
        "logits": logits,
        "importance": probabilities,
        "expert_mask": chosen,
    }


def shares(logits: Tensor, valid: Tensor) -> Tensor:
    """Returns gates that sum to 1: the softmax of the chosen experts' logits [G, N, K]; 0 for a padded row.

    `Choosing` gives a padded row finite logits.

    For probabilities p = exp(logits) / Z that is p / sum of the chosen p, and it stays that where all of them are too
    small for float32, which a quotient with a floor does not.
    """
    return ops.Softmax(-1)(logits) * ops.expand_dims(valid, -1)


def scaled(gates: Tensor, factor: float) -> Tensor:
    """Multiplies gates of any shape by a factor; by 1 no operator is made, which a GPU's host would have to issue."""
    return gates if factor == 1.0 else gates * factor


class TopChoices(nn.Cell):
    """Finds the K largest, best first: scores [G, N, E] -> (experts [G, N, K] int32, one-hot of each, K x [G, N, E]).

    K passes of argmax: 1.2 to 5 times faster than TopK on CPU and GPU for the small K of routing.
    """

    def __init__(self, experts: int, choices: int):
        super().__init__()
        self.experts, self.choices = experts, choices
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, scores: Tensor):
        """Lets no gradient reach the scores."""
        scores = ops.stop_gradient(scores)
        experts, masks = (), ()
        for _ in range(self.choices):
            expert = self.argmax(scores)  # [G, N]
            mask = self.one_hot(expert, self.experts, self.on, self.off)  # [G, N, E]
            scores = scores - mask * 1e30
            experts, masks = (*experts, expert), (*masks, mask)
        return ops.expand_dims(experts[0], -1) if self.choices == 1 else ops.stack(experts, -1), masks


class ChosenValues(nn.Cell):
    """Picks the values of the chosen experts by selection: [G, N, E], one-hot choices [G, N, K, E] -> [G, N, K].

    0 where nothing is chosen, whatever the values. The gradient is one product, for K > 1 a product and a sum.
    """

    def __init__(self, choices: int):
        super().__init__()
        self.choices, self.sum, self.select = choices, ops.ReduceSum(), Selection()

    def construct(self, values: Tensor, masks: Tensor) -> Tensor:
        """Takes values and masks as the class says."""
        return self.sum(self.select(ops.expand_dims(values, 2), masks, masks.shape), -1)

    def bprop(self, values, masks, out, d_out):
        d_values = masks * ops.expand_dims(d_out, 3)  # [G, N, K, E]
        d_values = d_values.reshape(values.shape) if self.choices == 1 else self.sum(d_values, 2)
        return d_values, ops.zeros_like(masks)


class Choosing(nn.Cell):
    """Chooses the K best-scored experts of each row; their gates are their probabilities."""

    def __init__(self, experts: int, choices: int):
        super().__init__()
        self.expert_num, self.choices = experts, choices
        self.top = TopChoices(experts, choices)
        self.values = ChosenValues(choices)
        self.sum = ops.ReduceSum()

    def construct(self, scores: Tensor, probabilities: Tensor, context: dict):
        """Takes [G, N, E] twice and a Context -> (experts [G, N, K], gates [G, N, K], chosen [G, N, E]).

        The gates are the second input's values of the chosen experts, 0 for a padded row: probabilities, or logits of
        which `shares` makes gates that sum to 1.
        """
        return self.weigh(self.top(scores)[0], probabilities, context)

    def weigh(self, experts: Tensor, probabilities: Tensor, context: dict):
        """Does the same of choices that are made: experts [G, N, K]."""
        experts = self.replayed(experts, context)
        valid = ops.expand_dims(context["valid"], -1)  # [G, N, 1]
        experts = ops.where(valid > 0, experts, ops.full_like(experts, self.expert_num))
        masks = self.marks(experts)  # [G, N, K, E]
        chosen = masks.reshape(probabilities.shape) if self.choices == 1 else self.sum(masks, 2)
        return experts, self.values(probabilities, masks), chosen

    def marks(self, experts: Tensor) -> Tensor:
        """Returns the one-hot of experts, nothing for E: [...] -> [..., E]."""
        return self.top.one_hot(experts, self.expert_num, self.top.on, self.top.off)

    def replayed(self, experts: Tensor, context: dict) -> Tensor:
        """Returns choices [G, N, K], those of the context's `replay` in the place of the router's own."""
        if "replay" not in context:
            return experts
        return replay_choices(experts, context["replay"], self.expert_num)


def replay_choices(experts: Tensor, replay: Tensor, expert_num: int) -> Tensor:
    """Returns choices [G, N, K], or where all K entries of `replay` [G, N, K] name an expert, those."""
    named = ops.logical_and(replay >= 0, replay < expert_num).astype(mstype.float32)
    named = named.sum(-1, keepdims=True) == replay.shape[-1]  # [G, N, 1]
    return ops.where(named, replay, experts)
