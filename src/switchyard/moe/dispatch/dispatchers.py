"""Brings tokens to the experts that a Routing names, and back: one dispatcher for each form of a Routing.

A layer asks two things, and does not know which dispatcher it holds:
    send(tokens, routing)   local to one device: a tuple, of which the first is what travels to the experts
    apply(experts, sent)    the experts, all that crosses devices before and after them, and the way back to tokens
and `num_kept(routing, sent)`, which counts the choices that got a slot.

Legend: G routing groups, N tokens of a group, E experts, C capacity, K choices of a token, M slots of a group,
P blocks, b rows of a block, D width, F = G * N tokens of all groups.
"""

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config, MoEConfig
from switchyard.distributed.mesh import CompiledMesh, LocalMesh
from switchyard.errors import UserError
from switchyard.forms import changed, keeps
from switchyard.moe.dispatch.alltoallv import AlltoAllV
from switchyard.moe.dispatch.capacity import capacity
from switchyard.moe.dispatch.onehot import OneHotCombine, OneHotDispatch
from switchyard.moe.dispatch.plan import BlockPlan, CapacityPlan
from switchyard.moe.dispatch.reroute import Reroute
from switchyard.moe.own_classes import are_matrices, require_stacked
from switchyard.moe.registry import classes_of
from switchyard.nn.fused import NONE
from switchyard.nn.gather import Combine, Dispatch, TakeSlicedRows, index_or_zero_row, with_zero_row
from switchyard.nn.masks import keep_where


class Crossing(nn.Cell):
    """Turns slots by group into rows by expert, and back: the only transpose that crosses devices.

    A compiler makes one AlltoAll of each direction, within an expert-parallel group.
    """

    def __init__(self, experts: int):
        super().__init__()
        self.expert_num = experts
        self.turn_there, self.turn_back = ops.Transpose(), ops.Transpose()
        self.exchange_there, self.exchange_back, self.sharded = None, None, False

    def there(self, slots: Tensor) -> Tensor:
        """Turns slots [G, E, C, D] into rows [E, G * C, D].

        Where processes shard the experts, the rows are those of all processes for the experts of this one.
        """
        if self.sharded or slots.shape[0] != 1:  # else a copy for nothing
            slots = self.turn_there(slots, (1, 0, 2, 3))  # [E, G, C, D]
        rows = slots.reshape(self.expert_num, -1, slots.shape[3])
        return rows if self.exchange_there is None else self.exchange_there(rows)

    def back(self, outputs: Tensor, groups: int) -> Tensor:
        """Turns outputs [E, G * C, D] into [G, E, C, D]."""
        rows = outputs if self.exchange_back is None else self.exchange_back(outputs)
        if not self.sharded and groups == 1:
            return rows.reshape(1, self.expert_num, -1, rows.shape[-1])  # [G, E, C, D]
        rows = rows.reshape(self.expert_num, groups, -1, rows.shape[-1])  # [E, G, C, D]
        return self.turn_back(rows, (1, 0, 2, 3))

    def exchange_over(self, there: nn.Cell, back: nn.Cell) -> None:
        """Gives processes that shard the experts the way to each other, see distributed.collectives."""
        self.exchange_there, self.exchange_back = there, back

    def shard(self, mesh: CompiledMesh) -> None:
        """Declares the layouts: a transpose changes what is sharded, groups or experts."""
        self.sharded = True
        groups, experts = mesh.layout("data", None, None, None), mesh.layout(None, "data", None, None)
        self.turn_there.shard((groups,), (experts,))
        self.turn_back.shard((experts,), (groups,))


class Dispatcher(nn.Cell):
    """Moves slots [G, E, C, D] to the experts, and makes tokens [F, D] of what comes back. The base class.

    A new dispatcher defines `send` and `receive`, both local to one device, and for a cluster `shapes`, `types` and
    `received`, which say what the compiler cannot know. Where no slots travel it defines `apply` in place of `receive`.
    moe.dispatcher names a dispatcher of one's own; a layer makes two of it, for training and for evaluation.

    Args:
        moe: the section of the configuration.

    Attributes:
        runs_experts: whether the experts' cell computes; else the dispatcher reads their parameters.
        form: of the Routing that the dispatcher reads, where moe.dispatcher names it.

    Examples:
        >>> from switchyard.config import build
        >>> dispatcher = SlotDispatcher(build({"moe": {"router": "switch", "expert_num": 2}}).moe, factor=None)
        >>> routing = {"expert_index": Tensor([[[1], [0], [1]]], mstype.int32)}  # [G, N, K]
        >>> routing["gates"] = Tensor([[[0.5], [1.0], [2.0]]], mstype.float32)
        >>> sent = dispatcher.send(ops.ones((1, 3, 1)), routing)
        >>> dispatcher.apply(lambda rows: 10 * rows, sent).asnumpy().ravel().tolist()
        [5.0, 10.0, 20.0]
    """

    runs_experts, form = True, "token_choice"

    def __init__(self, moe: MoEConfig):
        super().__init__()
        self.expert_num, self.choices = moe.expert_num, moe.choices
        self.crossing = Crossing(moe.expert_num)
        self.local_receive = self.receive

    def send(self, tokens: Tensor, routing: dict) -> tuple:
        """Fills slots: tokens [G, N, D] and a Routing -> (slots [G, E, C, D], what `receive` needs besides...)."""
        raise NotImplementedError

    def receive(self, outputs: Tensor, *plan) -> Tensor:
        """Returns tokens [F, D], of outputs [G, E, C, D] and the rest of what `send` returned."""
        raise NotImplementedError

    def apply(self, experts: nn.Cell, sent: tuple) -> Tensor:
        """Runs the experts: what `send` returned -> tokens [F, D]."""
        outputs = self.crossing.back(experts(self.crossing.there(sent[0])), sent[0].shape[0])  # [G, E, C, D]
        return self.local_receive(outputs, *sent[1:])

    def num_kept(self, routing: dict, sent: tuple) -> Tensor:
        """Returns the number of choices that got a slot, [G]: all of them, unless a dispatcher says otherwise."""
        return routing["expert_mask"].sum((1, 2))

    def shapes(self, groups: int, tokens: int, width: int) -> list:
        """Returns the full shapes of what `send` returns, of F tokens [F, width] in all groups."""
        raise NotImplementedError

    def types(self, float_type) -> tuple:
        """Returns the types of what `send` returns."""
        return (float_type,) * len(self.shapes(1, 1, 1))

    def shard(self, mesh: CompiledMesh) -> None:
        """Declares the layouts: groups are sharded by data shards.

        Raises:
            UserError: a dispatcher of one's own that does not say what the compiler cannot know.
        """
        for method in ("shapes", "received"):
            if not changed(type(self), method, Dispatcher):
                raise UserError(
                    f"moe.dispatcher: {type(self).__name__}; has no `{method}`, which a compiled cluster asks for: "
                    f"define it, or train on one device"
                )
        self.crossing.shard(mesh)
        layouts = tuple(mesh.layout("data", *(None,) * (len(shape) - 1)) for shape in self.shapes(1, 1, 1))

        def tokens(outputs, *plan):
            return self.received(outputs, *plan)

        def type_of_gates(outputs, gates, *plan):
            return gates

        self.local_receive = mesh.local(self.receive, layouts, (mesh.layout("data", None),), tokens, type_of_gates)

    def received(self, outputs: list, *plan: list) -> list:
        """Returns the full shape of what `receive` returns, of the full shapes of its arguments."""
        raise NotImplementedError


class SlotDispatcher(Dispatcher):
    """Sends every token to the K experts it chose, as far as they have slots: C of each group for each expert.

    Args:
        moe: drop policy, rerouting.
        factor: capacity factor; None: as many slots as tokens, so nothing is dropped.
        dtype: of the experts.
        fused: operators of the device, see nn.fused.
    """

    def __init__(self, moe: MoEConfig, factor: float | None, dtype=mstype.float32, fused: frozenset[str] = NONE):
        super().__init__(moe)
        self.dtype = dtype if "HalfRows" in fused else None
        self.factor, self.least = factor, moe.min_capacity
        rules = (moe.expert_num, self.choices, factor, moe.drop_order, moe.min_capacity)
        self.plan = CapacityPlan(*rules, counts="CountedOrder" in fused)
        self.reroute = Reroute(*rules, moe.reroute) if moe.reroute and factor is not None else None
        self.to_slots, self.to_tokens = Dispatch(self.choices), Combine(self.choices, self.dtype is not None)

    def send(self, tokens: Tensor, routing: dict) -> tuple:
        """Returns (slots [G, E, C, D], gates [G, N * K], dispatch_index, combine_index, kept_mask)."""
        index, gates, priority = routing["expert_index"], routing["gates"], None
        if "priority" in routing:  # the layer puts it there
            priority = routing["priority"]
        if self.reroute is not None:
            index, gates = self.reroute(index, gates, routing["probabilities"], priority)
        plan = self.plan(index, gates, priority)
        groups, _, width = tokens.shape
        parts = (plan["dispatch_index"], plan["combine_index"])
        tokens = tokens if self.dtype is None else tokens.astype(self.dtype)
        slots = self.to_slots(tokens, *parts).reshape(groups, self.expert_num, -1, width)  # [G, E, C, D]
        return (slots, gates.reshape(groups, -1), *parts, plan["kept_mask"])

    def receive(self, outputs: Tensor, gates, dispatch_index, combine_index, kept_mask) -> Tensor:
        """Returns tokens [F, D]: y = sum over k of gates * outputs [G, E, C, D]."""
        slots, width = outputs.reshape(gates.shape[0], -1, outputs.shape[-1]), outputs.shape[-1]  # [G, M, D]
        tokens = self.to_tokens(slots, gates, dispatch_index, combine_index)
        return tokens.reshape(-1, width).astype(gates.dtype)

    def num_kept(self, routing: dict, sent: tuple) -> Tensor:
        """Returns the number of choices that got a slot, [G]."""
        return sent[4].sum(1)

    def shapes(self, groups: int, tokens: int, width: int) -> list:
        """See Dispatcher."""
        each = tokens // groups
        slots = capacity(each, self.expert_num, self.choices, self.factor, self.least)
        chosen, held = [groups, each * self.choices], [groups, self.expert_num * slots]
        return [[groups, self.expert_num, slots, width], chosen, held, chosen, chosen]

    def types(self, float_type) -> tuple:
        """See Dispatcher."""
        return self.dtype or float_type, float_type, mstype.int32, mstype.int32, float_type

    def received(self, outputs: list, *plan: list) -> list:
        """See Dispatcher."""
        return [plan[0][0] * plan[0][1] // self.choices, outputs[-1]]

    def shard(self, mesh: CompiledMesh) -> None:
        """See Dispatcher."""
        super().shard(mesh)
        self.to_slots.shard(mesh)
        self.to_tokens.shard(mesh)


class BlockDispatcher(Dispatcher):
    """Drops nothing, where one device holds all experts: blocks [P, b, D] of rows of one expert each.

    Experts without `blocks` of their own do E times the work: all see every block, and one's result is kept.
    """

    def __init__(self, moe: MoEConfig, has_blocks: bool):
        super().__init__(moe)
        self.has_blocks = has_blocks
        self.plan = BlockPlan(moe.expert_num, self.choices, moe.dropless_block_size)
        self.to_slots, self.to_tokens = Dispatch(self.choices), Combine(self.choices)
        self.numbers = Tensor(np.arange(moe.expert_num, dtype=np.int32).reshape(-1, 1, 1, 1))  # [E, 1, 1, 1]

    def send(self, tokens: Tensor, routing: dict) -> tuple:
        """Returns (blocks [G * P, b, D], block_expert [G * P], gates, the parts of the plan as of SlotDispatcher)."""
        gates = routing["gates"]
        plan = self.plan(routing["expert_index"], gates)
        groups, _, width = tokens.shape
        parts = (plan["dispatch_index"], plan["combine_index"])
        blocks = self.to_slots(tokens, *parts)  # [G, P * b, D]
        blocks = blocks.reshape(groups * plan["block_expert"].shape[1], -1, width)
        return (blocks, plan["block_expert"].reshape(-1), gates.reshape(groups, -1), *parts, plan["kept_mask"])

    def apply(self, experts: nn.Cell, sent: tuple) -> Tensor:
        """See Dispatcher."""
        outputs, groups = self.through(experts, sent[0], sent[1]), sent[2].shape[0]
        width = outputs.shape[-1]
        return self.to_tokens(outputs.reshape(groups, -1, width), *sent[2:5]).reshape(-1, width).astype(sent[2].dtype)

    def through(self, experts: nn.Cell, blocks: Tensor, block_expert: Tensor) -> Tensor:
        """Runs the experts on blocks [P, b, D], of which block p belongs to expert `block_expert` [P]."""
        if self.has_blocks:
            return experts.blocks(blocks, block_expert)
        size, width = blocks.shape[1], blocks.shape[2]
        out = experts(ops.tile(blocks.reshape(1, -1, width), (self.expert_num, 1, 1)))  # [E, P * b, D]
        out = out.reshape(self.expert_num, -1, size, out.shape[-1])  # [E, P, b, D]
        own = ops.equal(block_expert.reshape(1, -1, 1, 1), self.numbers)  # [E, P, 1, 1]
        return ops.select(ops.broadcast_to(own, out.shape), out, ops.zeros_like(out)).sum(0)  # [P, b, D]

    def num_kept(self, routing: dict, sent: tuple) -> Tensor:
        """Returns the number of all choices, [G]."""
        return sent[5].sum(1)


class AlltoAllVDispatcher(Dispatcher):
    """Drops nothing, over devices: each chosen row travels to the device that holds its expert, and back.

    Args:
        config: the whole configuration.
        static: by buffers of a fixed size, whatever moe.dispatch says.
        dtype, fused: see alltoallv.AlltoAllV.
    """

    runs_experts = False

    def __init__(self, config: Config, static: bool, dtype, fused: frozenset[str]):
        super().__init__(config.moe)
        self.config, self.static, self.dtype, self.fused = config, static, dtype, fused
        self.exchange = None

    def send(self, tokens: Tensor, routing: dict) -> tuple:
        """Returns (tokens [F, D], expert_index [G, N * K], gates [G, N * K])."""
        groups, _, width = tokens.shape
        index = ops.stop_gradient(routing["expert_index"]).reshape(groups, -1)
        return tokens.reshape(-1, width), index, routing["gates"].reshape(groups, -1)

    def apply(self, experts: nn.Cell, sent: tuple) -> Tensor:
        """See Dispatcher."""
        return self.exchange(*sent, *experts.matrices())

    def shapes(self, groups: int, tokens: int, width: int) -> list:
        """See Dispatcher."""
        chosen = [groups, tokens // groups * self.choices]
        return [[tokens, width], chosen, chosen]

    def types(self, float_type) -> tuple:
        """See Dispatcher."""
        return float_type, mstype.int32, float_type

    def shard(self, mesh: CompiledMesh) -> None:
        """See AlltoAllV."""
        self.exchange = AlltoAllV(self.config, mesh, self.dtype, self.fused, self.static)


class ExpertChoiceDispatcher(Dispatcher):
    """Sends each expert the tokens that it took (arXiv 2202.09368): a gather, and a sum of segments back.

    The gradient of the gather is the sum, and of the sum the gather. A slot that nobody fills holds a token of zeros.

    Args:
        moe: the section of the configuration.
        slots: N -> C, the router's own rule.
    """

    def __init__(self, moe: MoEConfig, slots: Callable[[int], int]):
        super().__init__(moe)
        self.slots, self.take = slots, TakeSlicedRows()

    def send(self, tokens: Tensor, routing: dict) -> tuple:
        """Returns (slots [G, E, C, D], gates [G, E * C], index [G, E * C] int32, N for nobody, mask [G, N])."""
        groups, count, width = tokens.shape
        index = routing["token_index"].reshape(groups, -1)  # [G, E * C]
        if "slot_mask" in routing:
            index = index_or_zero_row(index, routing["slot_mask"].reshape(groups, -1), count)
        index = ops.stop_gradient(index.astype(mstype.int32))
        slots = self.take(with_zero_row(tokens), index).reshape(groups, self.expert_num, -1, width)
        return slots, routing["gates"].reshape(groups, -1), index, routing["expert_mask"][:, :, 0]

    def receive(self, outputs: Tensor, gates: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        """Returns tokens [F, D]: y = sum of gates * outputs [G, E, C, D] over the slots that hold the token."""
        (groups, count), width = mask.shape, outputs.shape[-1]
        weighted = outputs.reshape(groups, -1, width) * ops.expand_dims(gates, -1)  # [G, E * C, D]
        place = index + (ops.arange(groups) * (count + 1)).astype(mstype.int32).reshape(-1, 1)  # in [G * (N + 1)]
        rows = ops.unsorted_segment_sum(weighted.reshape(-1, width), place.reshape(-1), groups * (count + 1))
        return rows.reshape(groups, count + 1, width)[:, :count].reshape(-1, width)

    def shapes(self, groups: int, tokens: int, width: int) -> list:
        """See Dispatcher."""
        each = tokens // groups
        slots = self.slots(each)
        taken = [groups, self.expert_num * slots]
        return [[groups, self.expert_num, slots, width], taken, taken, [groups, each]]

    def types(self, float_type) -> tuple:
        """See Dispatcher."""
        return float_type, float_type, mstype.int32, float_type

    def received(self, outputs: list, *plan: list) -> list:
        """See Dispatcher."""
        return [plan[2][0] * plan[2][1], outputs[3]]


class DenseDispatcher(Dispatcher):
    """Sends all tokens to every expert; the outputs are summed, weighted by the gates."""

    def send(self, tokens: Tensor, routing: dict) -> tuple:
        """Returns (slots [G, E, N, D], gates [G, N, E])."""
        return ops.tile(ops.expand_dims(tokens, 1), (1, self.expert_num, 1, 1)), routing["gates"]

    def receive(self, outputs: Tensor, gates: Tensor) -> Tensor:
        """Returns tokens [F, D], of outputs [G, E, N, D]."""
        gates = ops.expand_dims(ops.transpose(gates, (0, 2, 1)), -1)  # [G, E, N, 1]
        return (outputs * gates).sum(1).reshape(-1, outputs.shape[-1])

    def shapes(self, groups: int, tokens: int, width: int) -> list:
        """See Dispatcher."""
        each = tokens // groups
        return [[groups, self.expert_num, each, width], [groups, each, self.expert_num]]

    def received(self, outputs: list, *plan: list) -> list:
        """See Dispatcher."""
        return [outputs[0] * outputs[2], outputs[3]]


class SoftDispatcher(Dispatcher):
    """Fills slots with mixtures of tokens, and makes tokens of mixtures of slots (arXiv 2308.00951)."""

    def __init__(self, moe: MoEConfig):
        super().__init__(moe)
        self.to_slots, self.to_tokens = OneHotDispatch(), OneHotCombine()

    def send(self, tokens: Tensor, routing: dict) -> tuple:
        """Returns (slots [G, E, C, D], combine [G, N, E, C])."""
        return self.to_slots(tokens, routing["dispatch"]), routing["combine"]

    def receive(self, outputs: Tensor, combine: Tensor) -> Tensor:
        """Returns tokens [F, D], of outputs [G, E, C, D]."""
        return self.to_tokens(outputs, combine).reshape(-1, outputs.shape[-1])


class MergedDispatcher(Dispatcher):
    """Sends a group's tokens through one expert, whose parameters are the experts' mean weighted by the gates."""

    def send(self, tokens: Tensor, routing: dict) -> tuple:
        """Returns (tokens [G, N, D], gates [G, E], mask [G, N, 1])."""
        return tokens, routing["gates"], routing["expert_mask"][:, :, :1]

    def apply(self, experts: nn.Cell, sent: tuple) -> Tensor:
        """Runs the merged expert; padding comes back as zero."""
        out = keep_where(experts.merged(sent[0], sent[1]), sent[2])  # [G, N, D]
        return out.reshape(-1, out.shape[-1])


DISPATCHERS = classes_of("moe.dispatcher", Dispatcher)  # of users' own
FORMS = {"dense": DenseDispatcher, "soft": SoftDispatcher, "merged": MergedDispatcher}


def create_dispatcher(
    router: nn.Cell, config: Config, training: bool, experts: nn.Cell, fused: frozenset[str], mesh: LocalMesh
) -> Dispatcher:
    """Returns the dispatcher of a router's form.

    With `_token_choice` it is the one place that looks up `moe.dispatch`.

    Args:
        router: of the layer.
        config: dispatch, capacities.
        training: whether the capacity of training or that of evaluation counts; without one nothing is dropped.
        experts: of the layer.
        fused: operators of the device, see nn.fused.
        mesh: how choices travel where nothing is dropped.

    Raises:
        UserError: a form that has no dispatcher, or experts that cannot do what it asks.
    """
    moe, form = config.moe, router.form if training else router.eval_form or router.form
    if mesh.degrees.expert_parallel > 1:
        require_stacked(experts, moe.expert_num)
    if moe.dispatcher is not None:
        return _own_dispatcher(moe, form)
    if form == "merged" and not keeps(type(experts), "construct", "merged"):
        name = type(experts).__name__
        raise UserError(f"moe.router: {moe.router}; {name} has no `merged(rows, gates)` of its own: define it")
    if form in FORMS:
        return FORMS[form](moe)
    if form == "expert_choice":
        return ExpertChoiceDispatcher(moe, router.train_slots if training else router.eval_slots)
    if form == "token_choice":
        return _token_choice(config, training, experts, fused, mesh)
    known = ", ".join(("token_choice", "expert_choice", *FORMS))
    raise UserError(f"moe.router: {moe.router}; its form {form!r} has no dispatcher; one of {known}")


def _own_dispatcher(moe: MoEConfig, form: str) -> Dispatcher:
    """Returns a dispatcher of the class that moe.dispatcher names (UserError: none, or of another form)."""
    kind = DISPATCHERS.find(moe.dispatcher)
    if kind.form != form:
        raise UserError(
            f"moe.dispatcher: {moe.dispatcher}; reads a Routing of form {kind.form!r}, and moe.router {moe.router!r} "
            f"makes {form!r}: take another router, or set `form` of the class"
        )
    return kind(moe)


def _token_choice(config: Config, training: bool, experts: nn.Cell, fused: frozenset[str], mesh: LocalMesh):
    """Returns the dispatcher of tokens that choose: by slots where there is a capacity, else as the mesh can."""
    moe = config.moe
    trained = moe.capacity_factor if moe.dispatch == "capacity" else None
    factor = trained if training else moe.eval_capacity_factor
    by_slots = mesh.dropless == "slots" or (
        mesh.dropless == "alltoallv" and moe.dispatch == "capacity" and not are_matrices(experts)
    )
    if factor is not None or by_slots:
        return SlotDispatcher(moe, factor, getattr(experts, "dtype", mstype.float32), fused)
    if mesh.dropless == "alltoallv":
        static = moe.dispatch != "dropless"
        return AlltoAllVDispatcher(config, static, getattr(experts, "dtype", mstype.float32), fused)
    return BlockDispatcher(moe, keeps(type(experts), "construct", "blocks"))
