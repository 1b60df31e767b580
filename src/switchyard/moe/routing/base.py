"""What a router is, what it returns, and how its YAML name finds it.

Legend: G groups that route for themselves, N rows of a group, E experts, K choices of a row, D width.
"""

from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import MoEConfig
from switchyard.distributed.mesh import Mesh
from switchyard.errors import UserError
from switchyard.forms import changed, changes_alone
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.masks import keep_where
from switchyard.nn.noise import NoiseSlices
from switchyard.trust import import_class, is_own


class Routing(TypedDict):
    """What a router decided, before any capacity (a dict: compiled graphs keep its gradients).

    Every form has, float32 [G, N, E]:
        probabilities   the router's distribution over the experts
        logits          what the z-loss keeps small; zeros where a router has none
        importance      what counts as importance: the probabilities, or the gates alone where the paper says so
        expert_mask     1 where a real row works with an expert
    and `smooth_load` [G, N, E] where the router estimates it, `own_loss` scalar where it brings one. The layer adds
    `priority` [G, N], a draw of U(0, 1), where moe.drop_order is `random` in training.
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
    """What a router may look at besides the rows. The layer hands it padded rows as zeros, whatever they held.

    valid [G, N] float32: 1 for a real row, 0 for padding. noise [.., G * N, D] float32 of U(0, 1), read in training
    only. token_ids, task_ids [G, N] int32, None where the network has none. replay [G, N, K] int32: choices that are
    forced, -1 where the router's own stand (see switchyard.moe.routing.replay); there only in a run that replays.
    """

    valid: Tensor
    noise: Tensor
    token_ids: Tensor
    task_ids: Tensor
    replay: Tensor


@dataclass(frozen=True)
class RouterSetting:
    """What a router is built from.

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


_ROUTERS: dict[str, type] = {}
# What one device calls, and what a compiled cluster calls in its place
PARTNERS = (("construct", "decide"), ("logits", "score_flat"), ("score", "score_flat"))


def register(name: str):
    """Class decorator: makes a Router known under its YAML name."""

    def add(cls):
        cls.name = name
        _ROUTERS[name] = cls
        return cls

    return add


def known_routers() -> dict[str, type]:
    """Name -> class of every registered router."""
    return dict(sorted(_ROUTERS.items()))


def find_router(name: str) -> type:
    """The class of a YAML name, or of `module.Class` in a file of the user's own (UserError if there is none)."""
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
    """The router that `moe.router` names; a network with a vocabulary has sequences of model.seq_length.

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
    setting = RouterSetting(config.moe, width, random, slices, vocab_size, has_tasks, length)
    if config.moe.copies == 1:
        return router(setting)
    if router.form != "token_choice" or router.eval_form:
        raise UserError(f"moe.copies: {config.moe.copies}; router {name!r} does not choose experts row by row")
    return Copies(router, setting)


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
    """Rows in, Routing out. Arithmetic is float32 whatever the model computes in (arXiv 2101.03961, section 2.4).

    A subclass states what it is in the class attributes and implements `construct(rows, context) -> Routing`.

    name: in YAML. paper: where it is from. unit: what it decides for: row (of the layer), token (by its id) or task.
    form: of its Routing; eval_form: of the one at evaluation, where it differs. learnable: has weights. causal: a row's
    routing at evaluation does not look at later rows. batch_independent: the same row gets the same experts and gates
    whatever batch it stands in. cuts: the compiler can cut it over devices, where its scores are x W, from
    `score_flat(rows [N, D])`, and `decide(logits [G, N, E], context)` makes the Routing of them and reads no parameter.
    A subclass that changes `construct`, `logits` or `score` and not those two is no longer cut, see `why_not_cut`.
    refuses: may give a real row no expert, E, at evaluation. needs: entries of the Context it cannot do without.
    losses: names in `moe.losses` that it can give; `switch` and `z` also by aux_loss_factor and z_loss_factor.
    """

    name, paper, unit = "", "", "row"
    form, eval_form = "token_choice", None
    learnable, causal, batch_independent = True, True, True
    cuts, refuses = False, False
    needs: tuple = ()
    losses: tuple = ("switch", "z", "importance", "sequence", "mutual_information")
    _says_it_cuts, _cuts_from = False, None  # what the nearest class says of `cuts`, and the first that says True

    def __init_subclass__(cls, **options):
        """Clears `cuts` where the class has not the methods that a compiled cluster calls."""
        super().__init_subclass__(**options)
        cls._says_it_cuts = cls.__dict__.get("cuts", cls._says_it_cuts)
        if cls._says_it_cuts and cls._cuts_from is None:
            cls._cuts_from = cls
        cls.cuts = cls._says_it_cuts and not _missing(cls)

    def __init__(self, setting: RouterSetting):
        super().__init__()
        self.expert_num, self.choices = setting.moe.expert_num, setting.moe.num_experts_chosen

    def construct(self, rows: Tensor, context: dict) -> dict:
        """Rows [G, N, D] float32 and a Context -> Routing."""
        raise NotImplementedError


def why_not_cut(router: type) -> str | None:
    """Why MindSpore's compiler does not cut a router over devices, one line; None where it does."""
    if router.cuts:
        return None
    missing = _missing(router) if router._says_it_cuts else ""
    if missing:
        return f"{router.__name__} {missing}"
    cut = ", ".join(name for name, known in known_routers().items() if known.cuts)
    return f"cannot be cut over devices; one of {cut}"


def _missing(router: type) -> str:
    """What a router that says it can be cut has not for a compiled cluster; empty where it has all."""
    root, instead = router._cuts_from, "which a compiled cluster calls in its place"
    for method, partner in PARTNERS:
        if changes_alone(router, method, (partner,), root):
            return f"changes `{method}` and not `{partner}`, {instead}: define `{partner}` too"
    if changed(router, "score_flat", root) and not any(changed(router, method, root) for method, _ in PARTNERS):
        return "changes `score_flat` and not `logits`, which one device calls in its place: define `logits` too"
    lacks = [name for name in ("decide", "score_flat", "shard") if not changed(router, name, nn.Cell)]
    if lacks:
        return f"has no `{lacks[0]}`, which a compiled cluster calls: define it"
    if router.form != "token_choice" or router.eval_form:
        return "does not choose experts row by row, which a compiled cluster asks for"
    if router.needs:
        return f"needs {', '.join(router.needs)}, which a compiled cluster does not hand out"
    return ""


class Copies(nn.Cell):
    """Redundancy: r = `moe.copies` groups of E / r experts get a copy of every row, and each has a router of its own.

    The Routing is that of one router over E experts with r * K choices, those of the first group first; its
    distribution is the mean of the groups'.
    """

    def __init__(self, router: type, setting: RouterSetting):
        super().__init__()
        moe, self.copies = setting.moe, setting.moe.copies
        self.name, self.form, self.eval_form, self.losses = router.name, router.form, router.eval_form, router.losses
        self.expert_num, self.size, self.each = moe.expert_num, moe.expert_num // self.copies, moe.num_experts_chosen
        part = replace(setting, moe=moe.model_copy(update={"expert_num": self.size, "copies": 1}))
        self.routers = nn.CellList([router(part) for _ in range(self.copies)])
        self.causal, self.batch_independent = router.causal, router.batch_independent
        self.refuses, self.cuts = self.routers[0].refuses, False

    def construct(self, rows: Tensor, context: dict) -> dict:
        """Rows [G, N, D] and a Context -> the Routing of all copies together."""
        parts = ()
        for index, router in enumerate(self.routers):
            parts = (*parts, router(rows, self.view(context, index)))
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
            routing["own_loss"] = ops.stack([part["own_loss"] for part in parts], 0).sum()
        return routing

    def view(self, context: dict, index: int) -> dict:
        """The context as group `index` sees it: forced choices are those of its own experts, counted from 0."""
        if "replay" not in context:
            return context
        own = context["replay"][..., index * self.each : (index + 1) * self.each] - index * self.size  # [G, N, K]
        unset = ops.full_like(own, -1)
        mine = ops.logical_and(own >= 0, own < self.size)
        return {
            "valid": context["valid"],
            "noise": context["noise"],
            "token_ids": context["token_ids"],
            "task_ids": context["task_ids"],
            "replay": ops.where(mine, own, unset),
        }


def router_weight(width: int, experts: int, random: InitialWeights, name: str = "weight") -> Parameter:
    """The gate's matrix [D, E], small so that no expert starts ahead (arXiv 2101.03961, section 2.4: scale 0.1)."""
    scale = 0.1 / np.sqrt(width)
    return random.normal(scale, (width, experts), name)


class LinearRouter(Router):
    """A router that scores experts by x W, in float32; W [D, E], or of other columns."""

    def __init__(self, setting: RouterSetting, columns: int | None = None):
        super().__init__(setting)
        self.weight = router_weight(setting.width, columns or self.expert_num, setting.random)
        self.product = ops.MatMul()

    def score(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows [G, N, D] times a matrix [D, X] -> [G, N, X]."""
        groups, count, width = rows.shape
        scores = self.product(rows.reshape(groups * count, width).astype(mstype.float32), weight)  # [G * N, X]
        return scores.reshape(groups, count, -1)

    def score_flat(self, rows: Tensor) -> Tensor:
        """Rows [N, D] float32, where they are cut over devices -> [N, E]."""
        return self.product(rows, self.weight)

    def shard(self, mesh: Mesh) -> None:
        """Rows are cut, the matrix is whole everywhere."""
        self.product.shard((mesh.cut("data", None), mesh.cut(None, None)), (mesh.cut("data", None),))


def by_rows(experts: Tensor, gates: Tensor, chosen: Tensor, probabilities: Tensor, logits: Tensor) -> dict:
    """The Routing of form "token_choice" whose importance is the probabilities: entries as they are named there."""
    return {
        "expert_index": experts,
        "gates": gates,
        "probabilities": probabilities,
        "logits": logits,
        "importance": probabilities,
        "expert_mask": chosen,
    }


def shares(logits: Tensor, valid: Tensor) -> Tensor:
    """Gates that sum to 1: the softmax of the chosen experts' logits [G, N, K]; 0 for a padded row, valid [G, N].

    For probabilities p = exp(logits) / Z that is p / sum of the chosen p, and it stays that where all of them are too
    small for float32, which a quotient with a floor does not.
    """
    return keep_where(ops.Softmax(-1)(logits), valid)


class TopChoices(nn.Cell):
    """The K largest of E, best first: scores [G, N, E] -> (experts [G, N, K] int32, one-hot of each, K x [G, N, E]).

    K passes of argmax: 1.2 to 5 times faster than TopK on CPU and GPU for the small K of routing.
    """

    def __init__(self, experts: int, choices: int):
        super().__init__()
        self.experts, self.choices = experts, choices
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, scores: Tensor):
        """No gradient reaches the scores."""
        scores = ops.stop_gradient(scores)
        experts, masks = (), ()
        for _ in range(self.choices):
            expert = self.argmax(scores)  # [G, N]
            mask = self.one_hot(expert, self.experts, self.on, self.off)  # [G, N, E]
            scores = scores - mask * 1e30
            experts, masks = (*experts, expert), (*masks, mask)
        return ops.stack(experts, -1), masks


class Choosing(nn.Cell):
    """The K best-scored experts of each row; their gates are their probabilities."""

    def __init__(self, experts: int, choices: int):
        super().__init__()
        self.expert_num = experts
        self.top = TopChoices(experts, choices)
        self.sum = ops.ReduceSum()

    def construct(self, scores: Tensor, probabilities: Tensor, context: dict):
        """[G, N, E] twice and a Context -> (experts [G, N, K], gates [G, N, K], chosen [G, N, E]).

        The gates are the second input's values of the chosen experts, 0 for a padded row: probabilities, or logits of
        which `shares` makes gates that sum to 1.
        """
        experts, masks = self.top(scores)  # [G, N, K]
        return self.weigh(experts, masks, probabilities, context)

    def weigh(self, experts: Tensor, masks: tuple, probabilities: Tensor, context: dict):
        """The same of choices that are made: experts [G, N, K] and the one-hot of each, K x [G, N, E]."""
        experts, masks = self.replayed(experts, masks, context)
        valid = ops.expand_dims(context["valid"], -1)  # [G, N, 1]
        gates, chosen = (), masks[0]
        for mask in masks:
            gates = (*gates, self.sum(keep_where(probabilities, mask), -1))  # [G, N]
        for mask in masks[1:]:
            chosen = chosen + mask
        experts = ops.where(valid > 0, experts, ops.full_like(experts, self.expert_num))
        return experts, keep_where(ops.stack(gates, -1), context["valid"]), chosen * valid

    def replayed(self, experts: Tensor, masks: tuple, context: dict):
        """Choices and the one-hot of each, those of the context's `replay` in the place of the router's own."""
        if "replay" not in context:
            return experts, masks
        experts, forced = replay_choices(experts, context["replay"], self.expert_num), ()
        for k in range(len(masks)):
            mask = self.top.one_hot(experts[..., k], self.expert_num, self.top.on, self.top.off)  # [G, N, E]
            forced = (*forced, mask)
        return experts, forced


def replay_choices(experts: Tensor, replay: Tensor, expert_num: int) -> Tensor:
    """Choices [G, N, K], or where all K entries of `replay` [G, N, K] name an expert, those."""
    named = ops.logical_and(replay >= 0, replay < expert_num).astype(mstype.float32)
    named = named.sum(-1, keepdims=True) == replay.shape[-1]  # [G, N, 1]
    return ops.where(named, replay, experts)
