"""The conditional layer: router, plan, dispatch, experts, combine, and the audit of what happened.

Legend: G groups that route for themselves, N rows of a group, E experts, C capacity, K choices of a row, M slots of a
group, P blocks, b rows of a block, D width. On one device G is 1; on a cluster G is the number of data-parallel slices,
and the transpose [G, E, C, D] <-> [E, G * C, D] is the only thing that crosses devices.
"""

from typing import TypedDict

from mindspore import Tensor, nn, ops

from switchyard.config import Config
from switchyard.dispatch import EXACT_FLOAT, BlockPlan, CapacityPlan
from switchyard.errors import UserError
from switchyard.experts import FeedForwardExperts
from switchyard.kernels.noise import NoiseSlices
from switchyard.kernels.rows import Combine, Dispatch
from switchyard.routing import balance, create_router


class Audit(TypedDict):
    """Figures of one layer, float32; no gradient flows through them.

    load [E]: choices per expert before dropping. importance [E]: gate mass per expert. dropped: share of the choices
    that got no slot. entropy: of the router, nats. max_violation: largest load / mean load - 1. z: mean squared
    log-partition.
    """

    load: Tensor
    importance: Tensor
    dropped: Tensor
    entropy: Tensor
    max_violation: Tensor
    z: Tensor


class MoELayer(nn.Cell):
    """Rows [G, N, D] -> (rows [G, N, D], losses, Audit). A row without a slot comes back as zero.

    losses: (balance loss, z-loss), unweighted scalars, the ones that carry a gradient.

    In training an expert has ceil(N * K * capacity_factor / E) slots of each group. At evaluation
    `eval_capacity_factor` rules, and null, the default, drops nothing: a row's output does not depend on its batch.

    Args:
        config: the whole configuration.
        std: (first, last) initial standard deviation of the experts' matrices.
        random: numpy generator of the initial weights.
        dtype: of the experts' matrix products.
        slices: hands out the slice of noise that jitter reads.
    """

    def __init__(self, config: Config, std: tuple[float, float], random, dtype, slices: NoiseSlices):
        super().__init__()
        moe, width = config.moe, config.model.hidden_size
        self.expert_num, self.choices, self.jitter = moe.expert_num, moe.num_experts_chosen, moe.jitter
        self.slice = slices.take(self.jitter > 0)
        self.router = create_router(config, random)
        hidden, activation = config.expert_width, config.model.activation
        self.experts = FeedForwardExperts(moe.expert_num, width, hidden, activation, std, random, dtype)
        self.shared = None
        if moe.shared_expert_num:
            self.shared = FeedForwardExperts(1, width, hidden * moe.shared_expert_num, activation, std, random, dtype)
        self.train_plan = CapacityPlan(moe.expert_num, self.choices, moe.capacity_factor, moe.drop_order)
        self.dropless = moe.eval_capacity_factor is None
        if self.dropless:
            self.eval_plan = BlockPlan(moe.expert_num, self.choices, moe.dropless_block_size)
        else:
            self.eval_plan = CapacityPlan(moe.expert_num, self.choices, moe.eval_capacity_factor, moe.drop_order)
        self.dispatch = Dispatch(self.choices)
        self.combine = Combine(self.choices)
        self.to_experts, self.to_groups = ops.Transpose(), ops.Transpose()

    def construct(self, rows: Tensor, valid: Tensor, noise: Tensor):
        """Rows [G, N, D], valid [G, N] (1 = real, 0 = padding), noise [.., G * N, D] of U(0, 1)."""
        routed = rows
        if self.training and self.jitter > 0:
            factor = 1.0 - self.jitter + 2.0 * self.jitter * noise[self.slice]  # arXiv 2101.03961, section 2.4
            routed = rows * factor.reshape(rows.shape)
        routing = self.router(routed, {"valid": valid})
        plan = self.train_plan if self.training else self.eval_plan
        plan = plan(routing["experts"], routing["gates"])
        out = self.work(rows, routing["gates"], plan)
        if self.shared is not None:
            groups, count, width = rows.shape
            shared = self.shared(rows.reshape(1, groups * count, width))  # [1, G * N, D]
            out = out + shared.reshape(groups, count, width)
        probabilities, chosen, logits = routing["probabilities"], routing["chosen"], routing["logits"]
        balance_loss = balance.switch_balance(chosen, probabilities, valid, self.choices)
        return out, (balance_loss, balance.z_loss(logits, valid)), audit(routing, plan, valid)

    def work(self, rows: Tensor, gates: Tensor, plan: dict) -> Tensor:
        """Dispatch, experts, combine: rows [G, N, D], gates [G, N, K], Plan -> [G, N, D]."""
        groups, _, width = rows.shape
        choice_of, slot_of, kept = plan["choice_of"], plan["slot_of"], plan["kept"]
        slots = self.dispatch(rows, choice_of, slot_of, kept)  # [G, M, D]
        if "block_expert" in plan:
            block_expert = plan["block_expert"].reshape(-1)  # [G * P]
            slots = self.experts.blocks(slots.reshape(block_expert.shape[0], -1, width), block_expert)  # [G * P, b, D]
        else:
            slots = slots.reshape(groups, self.expert_num, -1, width)  # [G, E, C, D]
            slots = self.to_experts(slots, (1, 0, 2, 3)).reshape(self.expert_num, -1, width)  # [E, G * C, D]
            slots = self.experts(slots).reshape(self.expert_num, groups, -1, width)  # [E, G, C, D]
            slots = self.to_groups(slots, (1, 0, 2, 3))  # [G, E, C, D]
        slots = slots.reshape(groups, -1, width)  # [G, M, D]
        gates = gates.reshape(groups, -1)  # [G, N * K]
        return self.combine(slots, gates, choice_of, slot_of, plan["filled"], kept)


def audit(routing: dict, plan: dict, valid: Tensor) -> dict:
    """The figures of one pass: a pure function of Routing, Plan and valid [G, N]."""
    probabilities, loads = routing["probabilities"], balance.load(routing["chosen"]).sum(0)  # [E]
    stop = ops.stop_gradient
    return {
        "load": stop(loads),
        "importance": stop(balance.importance(probabilities, valid).sum(0)),
        "dropped": stop((loads.sum() - plan["kept"].sum()) / ops.maximum(loads.sum(), 1.0)),
        "entropy": stop(balance.entropy(probabilities, valid)),
        "max_violation": stop(balance.max_violation(loads)),
        "z": stop(balance.z_loss(routing["logits"], valid)),
    }


def check_sort_keys(config: Config) -> None:
    """Refuses batches whose sort keys float32 cannot hold exactly (UserError)."""
    rows = config.data.batch_size * config.model.seq_length // config.groups
    key = (config.moe.expert_num + 1) * rows * config.moe.num_experts_chosen
    if config.moe_layers and key >= EXACT_FLOAT:
        raise UserError(
            f"data.batch_size: {config.data.batch_size}; (experts + 1) * rows of a group * choices is {key}, "
            f"must be below {EXACT_FLOAT}: lower it and raise train.gradient_accumulation_steps, or raise moe.groups"
        )
