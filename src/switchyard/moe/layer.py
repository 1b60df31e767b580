"""The conditional layer: router, plan, dispatch, experts, combine, and the audit of what happened.

Legend: G groups that route for themselves, N rows of a group, E experts, C capacity, K choices of a row, M slots of a
group, P blocks, b rows of a block, D width. On one device G is 1; on a cluster G is the number of data-parallel slices,
and the transpose [G, E, C, D] <-> [E, G * C, D] is the only thing that crosses devices.
"""

from collections.abc import Callable
from typing import TypedDict

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config, MoEConfig
from switchyard.distributed.mesh import Mesh, first
from switchyard.distributed.own_classes import require_cut_experts, require_cut_router, require_partners
from switchyard.errors import UserError
from switchyard.forms import keeps
from switchyard.moe.dispatch.alltoallv import Dropless
from switchyard.moe.dispatch.capacity import slot_shape
from switchyard.moe.dispatch.dispatchers import TokenChoicePath, create_path
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.routing import create_router
from switchyard.moe.routing import losses as balance
from switchyard.moe.routing.base import require_choices, require_learnable
from switchyard.nn.fused import NONE
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.masks import keep_where
from switchyard.nn.noise import NoiseSlices, UniformRows

TALLY = 6  # figures of a layer besides load and importance, see MoELayer.tally
ROW_MEANS = (0, 1, 2, 3, 5)  # those of them that are means over real rows


class Audit(TypedDict):
    """Figures of one layer, float32; no gradient flows through them.

    load [E]: choices per expert before dropping. importance [E]: gate mass per expert. dropped: share of the choices
    that got no slot. entropy: of the router, nats. max_violation: largest load / mean load - 1. z: mean squared
    log-partition. experts [G * N, K] int32: the choices themselves, only where moe.record asks for them.
    """

    load: Tensor
    importance: Tensor
    dropped: Tensor
    entropy: Tensor
    max_violation: Tensor
    z: Tensor
    experts: Tensor


class MoELayer(nn.Cell):
    """Rows [G, N, D] -> (rows [G, N, D], losses, Audit). A row without a slot comes back as zero, a padded row too.

    Router, experts and shared experts see zeros in the place of padded rows, whose contents reach nothing: no output,
    no loss, no gradient.

    losses: three scalars, the ones that carry a gradient: the balance loss and the z-loss, unweighted, and the weighted
    sum of those of `moe.losses`.

    In training an expert has ceil(N * K * capacity_factor / E) slots of each group, or room for all (`moe.dispatch`).
    At evaluation `eval_capacity_factor` rules, and null, the default, drops nothing: a row's output does not depend on
    its batch.

    Args:
        config: the whole configuration.
        std: (first, last) initial standard deviation of the experts' matrices.
        random: draws the initial weights.
        dtype: of the experts' matrix products.
        slices: hands out the slices of noise that jitter and the router read.
        vocab_size: of the tokens whose ids come along, for routers that choose by token.
        has_tasks: whether task ids come along, for routers that choose by task.
        make_experts: (experts E, hidden width F) -> the experts' cell, [E, S, D] -> [E, S, D], where they are not
            feed-forward on D. It may have `blocks`, which spares work where nothing is dropped (see `in_blocks`).
        fused: operators of the device, see nn.fused.
    """

    def __init__(
        self,
        config: Config,
        std: tuple[float, float],
        random: InitialWeights,
        dtype,
        slices: NoiseSlices,
        vocab_size: int | None = None,
        has_tasks: bool = False,
        make_experts: Callable[[int, int], nn.Cell] | None = None,
        fused: frozenset[str] = NONE,
    ):
        super().__init__()
        moe, width = config.moe, config.model.hidden_size
        self.expert_num, self.choices, self.jitter = moe.expert_num, moe.choices, moe.jitter
        self.slice = slices.take(self.jitter > 0)
        self.lot = UniformRows(slices, width, 1) if moe.drop_order == "random" else None
        self.router = create_router(config, random, slices, vocab_size, has_tasks)
        hidden, activation = config.expert_width, config.model.activation
        if make_experts is None:
            self.experts = FeedForwardExperts(
                moe.expert_num, width, hidden, activation, std, random, dtype, fused=fused
            )
        else:
            self.experts = make_experts(moe.expert_num, hidden)
        self.has_blocks = keeps(type(self.experts), "construct", "blocks")
        self.numbers = Tensor(np.arange(moe.expert_num, dtype=np.int32).reshape(-1, 1, 1, 1))  # [E, 1, 1, 1]
        self._require_merged(moe)
        self.to_experts, self.to_rows = (
            None,
            None,
        )  # given by distributed.collectives.cut_model
        self.shared = None
        if moe.shared_expert_num and make_experts is None:
            self.shared = SharedExperts(config, std, random, dtype, fused)
        elif moe.shared_expert_num:
            self.shared = make_experts(1, hidden * moe.shared_expert_num)
        self.balanced = InTurn(moe) if moe.force_balance else None
        self.train_path = create_path(self.router.form, moe, True)
        self.eval_path = create_path(self.router.eval_form or self.router.form, moe, False)
        self.records = moe.record is not None
        asked = self.records or moe.replay is not None or moe.force_balance or moe.router_warmup_steps
        if asked or moe.dispatch != "capacity":
            require_choices(moe)
        require_learnable(moe)
        self.losses = balance.WeightedLosses(moe, self.router, config.model.seq_length // config.row_tokens)
        self.slot_shape = slot_shape(config)
        self.groups, self.groups_here, self.local_jitter, self.local_hide = config.groups, config.groups, None, None
        self.local_fill, self.local_join, self.local_choose, self.dropless = None, None, None, None
        self.config, self.fused = config, fused

    def _require_merged(self, moe: MoEConfig) -> None:
        """Refuses experts that cannot be merged where the router merges them (UserError)."""
        forms = (self.router.form, self.router.eval_form)
        if "merged" in forms and not keeps(type(self.experts), "construct", "merged"):
            name = type(self.experts).__name__
            raise UserError(f"moe.router: {moe.router}; {name} has no `merged(rows, gates)` of its own: define it")

    def construct(
        self,
        rows: Tensor,
        valid: Tensor,
        noise: Tensor,
        token_ids: Tensor = None,
        task_ids: Tensor = None,
        replay: Tensor = None,
        view: Tensor = None,
    ):
        """Rows [G, N, D], valid [G, N] (1 = real, 0 = padding), noise [.., G * N, D] of U(0, 1); ids [G, N] int32;
        choices to force [G, N, K] int32, -1 where the router's own stand; view [G, N, D], what the router sees where it
        is not the rows themselves, which may then be of any width."""
        rows = keep_where(rows, valid)
        routed = rows if view is None else keep_where(view, valid)
        if self.training and self.jitter > 0:
            factor = 1.0 - self.jitter + 2.0 * self.jitter * noise[self.slice]  # arXiv 2101.03961, appendix C
            routed = routed * factor.reshape(routed.shape)
        context = {"valid": valid, "noise": noise, "token_ids": token_ids, "task_ids": task_ids}
        if self.balanced is not None:
            context["replay"] = self.balanced(valid)
        elif replay is not None:
            context["replay"] = replay
        routing = self.router(routed, context)
        if self.training and self.lot is not None:
            routing["priority"] = self.lot(noise).reshape(valid.shape)  # [G, N]
        if self.training:
            out, served = self.work(self.train_path, rows, routing)
        else:
            out, served = self.work(self.eval_path, rows, routing)
        if self.shared is not None:
            groups, count, width = rows.shape
            shared = self.shared(rows.reshape(1, groups * count, width))  # [1, G * N, D]
            out = out + shared.reshape(groups, count, -1)
        figures = audit(routing, served, valid)
        if self.records:
            figures["experts"] = ops.stop_gradient(routing["expert_index"]).reshape(-1, self.choices)  # [G * N, K]
        return out, self.losses(routing, valid), figures

    def spread(self, rows: Tensor, valid: Tensor, noise: Tensor):
        """`construct` on several devices: rows [N, D], valid [B, S], noise [J, N, D] -> (rows [N, D], tally).

        Tally [data_parallel, TALLY + 2 E]: one row for each data slice, see `tally`.
        """
        rows = self.local_hide(rows, valid)
        routed = rows if self.local_jitter is None else self.local_jitter(rows, noise)
        logits = self.router.score_flat(routed)  # [N, E]
        if self.dropless is None:
            slots, gates, dispatch_index, combine_index, filled, kept, tally = self.local_fill(
                rows, logits, valid, noise
            )
            outputs = self.experts(self.train_path.send(slots))  # [E, G * C, D]
            outputs = self.train_path.send_back(outputs, self.groups)  # [G, E, C, D]
            out = self.local_join(outputs, gates, dispatch_index, combine_index, filled, kept)  # [N, D]
        else:
            chosen, gates, tally = self.local_choose(logits, valid, noise)
            experts = self.experts
            out = self.dropless(rows, chosen, gates, experts.w_in, experts.w_out, experts.w_gate)  # [N, D]
        if self.shared is not None:
            shared = self.shared(self.shared.lift(rows, 0))  # [1, N, D]
            out = self.shared.add(out, shared.reshape(rows.shape))
        return out, tally

    def hide_padding(self, rows: Tensor, valid: Tensor) -> Tensor:
        """Rows [N, D] of a data slice, zeros where valid [B, S] is 0."""
        return keep_where(rows, valid.reshape(-1))

    def jitter_rows(self, rows: Tensor, noise: Tensor) -> Tensor:
        """What the router of a data slice sees: rows [N, D]."""
        return rows * (1.0 - self.jitter + 2.0 * self.jitter * noise[self.slice])

    def fill_slots(self, rows: Tensor, logits: Tensor, valid: Tensor, noise: Tensor):
        """Routing and plan of a data slice: (slots [G, E, C, D], the Plan's parts, tally [1, ..])."""
        width = rows.shape[-1]
        rows, valid = rows.reshape(self.groups_here, -1, width), valid.reshape(self.groups_here, -1)
        routing = self.decide(logits, valid, noise)
        if self.lot is not None:
            routing["priority"] = self.lot(noise).reshape(valid.shape)  # [G, N]
        plan = self.train_path.plan(routing)
        slots = self.train_path.fill(rows, plan).reshape(self.groups_here, self.expert_num, -1, width)
        tally = self.tally(routing, self.train_path.served(routing, plan), valid)
        return (
            slots,
            plan["gates"],
            plan["dispatch_index"],
            plan["combine_index"],
            plan["slot_mask"],
            plan["kept_mask"],
            tally,
        )

    def choose(self, logits: Tensor, valid: Tensor, noise: Tensor):
        """Routing of a data slice where nothing is dropped: (experts [G, N * K], gates [G, N * K], tally [1, ..])."""
        valid = valid.reshape(self.groups_here, -1)
        routing = self.decide(logits, valid, noise)
        experts = ops.stop_gradient(routing["expert_index"]).reshape(self.groups_here, -1)
        served = (experts < self.expert_num).astype(mstype.float32).sum()
        gates = routing["gates"].reshape(self.groups_here, -1)
        return experts, gates, self.tally(routing, served, valid)

    def decide(self, logits: Tensor, valid: Tensor, noise: Tensor) -> dict:
        """The Routing of a data slice: logits [N, E], valid [G, N]."""
        context = {"valid": valid, "noise": noise, "token_ids": None, "task_ids": None}
        if self.balanced is not None:
            context["replay"] = self.balanced(valid)
        return self.router.decide(logits.reshape(self.groups_here, -1, self.expert_num), context)

    def tally(self, routing: dict, served: Tensor, valid: Tensor) -> Tensor:
        """[1, TALLY + 2 E]: balance loss, z-loss, further losses, entropy, choices served, z, load [E], importance [E].

        The first three carry a gradient. A row is what is summed over the devices, once a step; so means are multiplied
        by the real rows that they are of (ROW_MEANS), and divided by all of them behind the sum.
        """
        figures, real = audit(routing, served, valid), valid.sum()
        balance_loss, router_z, further = self.losses(routing, valid)
        means = (balance_loss * real, router_z * real, further * real, figures["entropy"] * real)
        scalars = ops.stack((*means, ops.stop_gradient(served), figures["z"] * real))
        return ops.expand_dims(ops.concat((scalars, figures["load"], figures["importance"])), 0)

    def join_slots(self, outputs: Tensor, gates, dispatch_index, combine_index, filled, kept) -> Tensor:
        """What comes back to a data slice: outputs [G, E, C, D] and the Plan's parts -> rows [N, D]."""
        width = outputs.shape[-1]
        plan = {
            "gates": gates,
            "dispatch_index": dispatch_index,
            "combine_index": combine_index,
            "slot_mask": filled,
            "kept_mask": kept,
        }
        return self.train_path.join(outputs.reshape(self.groups_here, -1, width), plan).reshape(-1, width)

    def shard(self, mesh: Mesh) -> None:
        """Rows and groups are cut by data slices, experts by expert slices, see `moe.dispatch` for the way between.

        Raises:
            UserError: a router or a layer that cannot be cut.
        """
        self._require_cut(mesh)
        self.groups_here = self.groups // mesh.degrees.data_parallel
        self.router.shard(mesh)
        if self.shared is not None:
            self.shared.shard(mesh)
        pair = mesh.cut("data", None)
        self.local_hide = mesh.local(self.hide_padding, (pair, pair), (pair,), first, first)
        if self.jitter > 0:
            self.local_jitter = mesh.local(self.jitter_rows, (pair, mesh.noise), (pair,), first, first)
        if self.config.moe.dispatch == "capacity":
            self._shard_slots(mesh)
        else:
            self._shard_choices(mesh)

    def _require_cut(self, mesh: Mesh) -> None:
        """Refuses what `spread` would not ask as `construct` does (UserError)."""
        moe = self.config.moe
        require_partners(self, MoELayer, {"construct": ("spread",), "work": ("spread",)})
        if moe.copies > 1:
            raise UserError(f"moe.copies: {moe.copies}; 1 where parallel degrees cut the model")
        require_cut_router(self.router, moe.router)
        require_partners(self.train_path, TokenChoicePath, {"dispatch": ("fill",), "combine": ("join",)})
        require_cut_experts(self.experts, self.expert_num, None if moe.dispatch == "capacity" else moe.dispatch)
        if self.shared is not None and not isinstance(self.shared, SharedExperts):
            raise UserError(
                f"moe.shared_expert_num: {moe.shared_expert_num}; shared experts of one's own are not cut: 0"
            )

    def _shard_slots(self, mesh: Mesh) -> None:
        """Capacity: slots are cut by data slices before the AlltoAll, by experts behind it."""
        self.train_path.shard(mesh)
        self.experts.shard(mesh)
        pair, whole = mesh.cut("data", None), self.slot_shape  # the layout of [N, D], [N, E], [B, S], [G, M], ...
        slots, slices = mesh.cut("data", None, None, None), mesh.degrees.data_parallel
        groups, experts, capacity, width = whole
        choices, columns = self.choices, TALLY + 2 * self.expert_num

        def shapes(rows, logits, valid, noise):
            each, held = [groups, rows[0] // groups * choices], [groups, experts * capacity]
            return list(whole), each, held, each, held, each, [slices, columns]

        def types(rows, logits, valid, noise):
            return rows, rows, mstype.int32, mstype.int32, rows, rows, rows

        def joined(outputs, gates, *plan):
            return [gates[0] * gates[1] // choices, width]

        inputs, outputs = (pair, pair, pair, mesh.noise), (slots, *(pair,) * 6)
        self.local_fill = mesh.local(self.fill_slots, inputs, outputs, shapes, types)
        self.local_join = mesh.local(self.join_slots, (slots, *(pair,) * 5), (pair,), joined, first)

    def _shard_choices(self, mesh: Mesh) -> None:
        """Dropless: choices are cut by data slices; what becomes of them is one operator."""
        pair, groups, slices = mesh.cut("data", None), self.groups, mesh.degrees.data_parallel
        choices, columns = self.choices, TALLY + 2 * self.expert_num

        def shapes(logits, valid, noise):
            each = [groups, logits[0] // groups * choices]
            return each, each, [slices, columns]

        def types(logits, valid, noise):
            return mstype.int32, logits, logits

        self.local_choose = mesh.local(self.choose, (pair, pair, mesh.noise), (pair,) * 3, shapes, types)
        self.dropless = Dropless(self.config, mesh, self.experts.dtype, self.fused)

    def work(self, path: nn.Cell, rows: Tensor, routing: dict):
        """Plan, dispatch, experts, combine: rows [G, N, D] and a Routing -> (rows [G, N, D], choices served)."""
        plan = path.plan(routing)
        slots = path.dispatch(rows, plan)  # [E, S, D] or [P, b, D]
        if "block_expert" in plan:
            slots = self.in_blocks(slots, plan["block_expert"].reshape(-1))
        elif "merged" in plan:
            slots = self.experts.merged(slots, plan["merged"])  # [G, N, D]
        elif self.to_experts is not None:
            slots = self.to_rows(self.experts(self.to_experts(slots)))  # [E, S, D] -> [e, g * S, D] and back
        else:
            slots = self.experts(slots)
        return path.combine(slots, plan), path.served(routing, plan)

    def in_blocks(self, rows: Tensor, block_expert: Tensor) -> Tensor:
        """Rows [P, b, D], those of block p all of expert `block_expert` [P], through the experts.

        Experts without `blocks` of their own do E times the work: all see every block, and one's result is kept.
        """
        if self.has_blocks:
            return self.experts.blocks(rows, block_expert)
        size, width = rows.shape[1], rows.shape[2]
        out = self.experts(ops.tile(rows.reshape(1, -1, width), (self.expert_num, 1, 1)))  # [E, P * b, D]
        out = out.reshape(self.expert_num, -1, size, out.shape[-1])  # [E, P, b, D]
        mine = ops.equal(block_expert.reshape(1, -1, 1, 1), self.numbers)  # [E, P, 1, 1]
        return ops.select(ops.broadcast_to(mine, out.shape), out, ops.zeros_like(out)).sum(0)  # [P, b, D]


class SharedExperts(FeedForwardExperts):
    """What every row visits besides: [1, N, D] -> [1, N, D].

    `moe.shared_expert_num` experts that all rows go to are one expert of as many times the width. With
    `moe.use_shared_expert_gating` its output is weighted by sigmoid(x w) (Qwen2-MoE, arXiv 2407.10671).
    """

    def __init__(
        self, config: Config, std: tuple[float, float], random: InitialWeights, dtype, fused: frozenset[str] = NONE
    ):
        moe, width = config.moe, config.model.hidden_size
        hidden = config.expert_width * moe.shared_expert_num
        super().__init__(1, width, hidden, config.model.activation, std, random, dtype, fused=fused)
        self.gate = None
        if moe.use_shared_expert_gating:
            self.gate = random.normal(std[0], (1, width, 1), "gate")
        self.product, self.sigmoid = ops.BatchMatMul(), ops.Sigmoid()
        self.lift, self.add, self.local_weigh = ops.ExpandDims(), ops.Add(), None

    def construct(self, rows: Tensor) -> Tensor:
        """Rows [1, N, D] -> [1, N, D]."""
        out = self._work(rows, self.w_in, self.w_gate, self.w_out)
        if self.gate is not None:
            scores = self.product(rows.astype(mstype.float32), self.gate)  # [1, N, 1]
            out = self.weigh(out, scores) if self.local_weigh is None else self.local_weigh(out, scores)
        return out

    def weigh(self, out: Tensor, scores: Tensor) -> Tensor:
        """Out [1, N, D] weighted by the gate of each row."""
        return out * self.sigmoid(scores)

    def shard(self, mesh: Mesh) -> None:
        """Rows are cut by data slices, the hidden width by model slices."""
        super().shard(mesh, None, "data")
        data, rows = mesh.degrees.data_parallel, mesh.cut(None, "data", None)
        self.lift.shard(((data, 1),))
        self.add.shard(((data, 1), (data, 1)))
        self.product.shard((rows, mesh.cut(None, None, None)), (rows,))
        self.local_weigh = mesh.local(self.weigh, (rows, rows), (rows,), first, first)


class InTurn(nn.Cell):
    """Choices that balance perfectly, to time what the best router could give: valid [G, N] -> experts [G, N, K] int32.

    Choice k of row n is expert n * K + k, modulo E; of each copy where there are several.
    """

    def __init__(self, moe: MoEConfig):
        super().__init__()
        self.each, self.copies, self.size = moe.num_experts_chosen, moe.copies, moe.expert_num // moe.copies

    def construct(self, valid: Tensor) -> Tensor:
        """valid [G, N] -> experts [G, N, K] int32."""
        rows = ops.arange(valid.shape[1]) * self.each  # [N]
        experts = ()
        for choice in range(self.each * self.copies):
            turn = (rows + choice % self.each) % self.size + choice // self.each * self.size
            experts = (*experts, turn.astype(mstype.int32))
        in_turn = ops.stack(experts, -1)  # [N, K]
        return ops.tile(ops.expand_dims(in_turn, 0), (valid.shape[0], 1, 1))


def audit(routing: dict, served: Tensor, valid: Tensor) -> dict:
    """The figures of one pass: a pure function of a Routing, the choices served and valid [G, N]."""
    probabilities, loads = routing["probabilities"], balance.load(routing["expert_mask"]).sum(0)  # [E]
    stop = ops.stop_gradient
    return {
        "load": stop(loads),
        "importance": stop(balance.importance(routing["importance"], valid).sum(0)),
        "dropped": stop((loads.sum() - served) / ops.maximum(loads.sum(), 1.0)),
        "entropy": stop(balance.entropy(probabilities, valid)),
        "max_violation": stop(balance.max_violation(loads)),
        "z": stop(balance.z_loss(routing["logits"], valid)),
    }
