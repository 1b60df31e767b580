"""From a Routing to the experts and back: one path for each form that a Routing can take.

A path is asked three things: `plan(routing)`, `dispatch(rows, plan)` and `combine(outputs, plan)`. What dispatch
returns goes through the experts: [E, S, D] through all of them or, where the plan has a `block_expert`, blocks
[P, b, D] through the chosen ones. `served(routing, plan)` counts the choices that got a place.

Legend: G groups, N rows of a group, E experts, C capacity, K choices of a row, M slots of a group, P blocks, b rows of
a block, D width.
"""

from mindspore import Tensor, nn, ops

from switchyard.config import MoEConfig
from switchyard.dispatch import BlockPlan, CapacityPlan
from switchyard.kernels.rows import Combine, Dispatch


class TokenChoicePath(nn.Cell):
    """Every row goes to the K experts it chose, as far as they have room; at evaluation, by default, all the way.

    Args:
        moe: capacities, drop order, block size.
        training: whether the capacity of training or that of evaluation rules.
    """

    def __init__(self, moe: MoEConfig, training: bool):
        super().__init__()
        self.expert_num, self.choices = moe.expert_num, moe.num_experts_chosen
        factor = moe.capacity_factor if training else moe.eval_capacity_factor
        if factor is None:
            self.planner = BlockPlan(moe.expert_num, self.choices, moe.dropless_block_size)
        else:
            self.planner = CapacityPlan(moe.expert_num, self.choices, factor, moe.drop_order)
        self.to_slots, self.to_rows = Dispatch(self.choices), Combine(self.choices)
        self.to_experts, self.to_groups = ops.Transpose(), ops.Transpose()

    def plan(self, routing: dict) -> dict:
        """Plan of `dispatch.py` with the gates [G, N * K] in it."""
        plan = self.planner(routing["experts"], routing["gates"])
        plan["gates"] = routing["gates"].reshape(routing["gates"].shape[0], -1)  # [G, N * K]
        return plan

    def dispatch(self, rows: Tensor, plan: dict) -> Tensor:
        """Rows [G, N, D] -> [E, G * C, D], or blocks [G * P, b, D]."""
        groups, _, width = rows.shape
        slots = self.to_slots(rows, plan["choice_of"], plan["slot_of"], plan["kept"])  # [G, M, D]
        if "block_expert" in plan:
            blocks = plan["block_expert"].shape[1]
            return slots.reshape(groups * blocks, -1, width)  # [G * P, b, D]
        slots = slots.reshape(groups, self.expert_num, -1, width)  # [G, E, C, D]
        return self.to_experts(slots, (1, 0, 2, 3)).reshape(self.expert_num, -1, width)  # [E, G * C, D]

    def combine(self, outputs: Tensor, plan: dict) -> Tensor:
        """What `dispatch` returned, worked on -> [G, N, D]."""
        groups, width = plan["gates"].shape[0], outputs.shape[-1]
        if "block_expert" not in plan:
            outputs = outputs.reshape(self.expert_num, groups, -1, width)  # [E, G, C, D]
            outputs = self.to_groups(outputs, (1, 0, 2, 3))  # [G, E, C, D]
        outputs = outputs.reshape(groups, -1, width)  # [G, M, D]
        filled, kept = plan["filled"], plan["kept"]
        return self.to_rows(outputs, plan["gates"], plan["choice_of"], plan["slot_of"], filled, kept)

    def served(self, routing: dict, plan: dict) -> Tensor:
        """Choices that got a slot: scalar."""
        return plan["kept"].sum()


PATHS = {"token_choice": TokenChoicePath}


def create_path(form: str, moe: MoEConfig, training: bool) -> nn.Cell:
    """The path of a router's form."""
    return PATHS[form](moe, training)
