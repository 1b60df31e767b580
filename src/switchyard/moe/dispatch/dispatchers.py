"""From a Routing to the experts and back: one path for each form that a Routing can take.

A path is asked three things: `plan(routing)`, `dispatch(rows, plan)` and `combine(outputs, plan)`. What dispatch
returns goes through the experts: [E, S, D] through all of them or, where the plan has a `block_expert`, blocks
[P, b, D] through the chosen ones or, where it has `merged` gates, [G, N, D] through one mixture of them a group.
`served(routing, plan)` counts the choices that got a place.

Legend: G groups, N rows of a group, E experts, C capacity, K choices of a row, M slots of a group, P blocks, b rows of
a block, D width.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import MoEConfig
from switchyard.distributed.mesh import Mesh
from switchyard.errors import UserError
from switchyard.moe.dispatch.onehot import OneHotCombine, OneHotDispatch
from switchyard.moe.dispatch.plan import BlockPlan, CapacityPlan
from switchyard.moe.dispatch.reroute import Reroute
from switchyard.nn.gather import Combine, Dispatch
from switchyard.nn.masks import keep_where


class TokenChoicePath(nn.Cell):
    """Every row goes to the K experts it chose, as far as they have room.

    All the way at evaluation, by default, and in training where `moe.dispatch` is a dropless one.

    Args:
        moe: dispatch, capacities, drop order, block size.
        training: whether the capacity of training or that of evaluation rules.
    """

    def __init__(self, moe: MoEConfig, training: bool):
        super().__init__()
        self.expert_num, self.choices = moe.expert_num, moe.choices
        trained = moe.capacity_factor if moe.dispatch == "capacity" else None
        factor, self.reroute = trained if training else moe.eval_capacity_factor, None
        if factor is None:
            self.planner = BlockPlan(moe.expert_num, self.choices, moe.dropless_block_size)
        else:
            rules = (moe.expert_num, self.choices, factor, moe.drop_order, moe.min_capacity)
            self.planner = CapacityPlan(*rules)
            self.reroute = Reroute(*rules, moe.reroute) if moe.reroute else None
        self.to_slots, self.to_rows = Dispatch(self.choices), Combine(self.choices)
        self.to_experts, self.to_groups = ops.Transpose(), ops.Transpose()

    def plan(self, routing: dict) -> dict:
        """Plan of `moe/dispatch/plan.py` with the gates [G, N * K] in it."""
        experts, gates = routing["expert_index"], routing["gates"]
        lot = None
        if "priority" in routing:  # the layer puts it there
            lot = routing["priority"]
        if self.reroute is not None:
            experts, gates = self.reroute(experts, gates, routing["probabilities"], lot)
        plan = self.planner(experts, gates, lot)
        plan["gates"] = gates.reshape(gates.shape[0], -1)  # [G, N * K]
        return plan

    def dispatch(self, rows: Tensor, plan: dict) -> Tensor:
        """Rows [G, N, D] -> [E, G * C, D], or blocks [G * P, b, D]."""
        groups, _, width = rows.shape
        slots = self.fill(rows, plan)  # [G, M, D]
        if "block_expert" in plan:
            blocks = plan["block_expert"].shape[1]
            return slots.reshape(groups * blocks, -1, width)  # [G * P, b, D]
        return self.send(slots.reshape(groups, self.expert_num, -1, width))

    def fill(self, rows: Tensor, plan: dict) -> Tensor:
        """Rows [G, N, D] -> slots [G, M, D]."""
        return self.to_slots(rows, plan["dispatch_index"], plan["combine_index"], plan["slot_mask"], plan["kept_mask"])

    def send(self, slots: Tensor) -> Tensor:
        """Slots from their groups to their experts: [G, E, C, D] -> [E, G * C, D]."""
        return self.to_experts(slots, (1, 0, 2, 3)).reshape(self.expert_num, -1, slots.shape[3])

    def send_back(self, outputs: Tensor, groups: int) -> Tensor:
        """Outputs from the experts to their groups: [E, G * C, D] -> [G, E, C, D]."""
        outputs = outputs.reshape(self.expert_num, groups, -1, outputs.shape[-1])  # [E, G, C, D]
        return self.to_groups(outputs, (1, 0, 2, 3))

    def combine(self, outputs: Tensor, plan: dict) -> Tensor:
        """What `dispatch` returned, worked on -> [G, N, D]."""
        groups, width = plan["gates"].shape[0], outputs.shape[-1]
        if "block_expert" not in plan:
            outputs = self.send_back(outputs, groups)  # [G, E, C, D]
        return self.join(outputs.reshape(groups, -1, width), plan)

    def join(self, outputs: Tensor, plan: dict) -> Tensor:
        """Slots [G, M, D] -> rows [G, N, D]."""
        filled, kept = plan["slot_mask"], plan["kept_mask"]
        return self.to_rows(outputs, plan["gates"], plan["dispatch_index"], plan["combine_index"], filled, kept)

    def served(self, routing: dict, plan: dict) -> Tensor:
        """Choices that got a slot: scalar."""
        return plan["kept_mask"].sum()

    def shard(self, mesh: Mesh) -> None:
        """Both transposes change what is cut, groups or experts: one AlltoAll each within an expert-parallel group."""
        self.to_slots.shard(mesh)
        self.to_rows.shard(mesh)
        groups, turned = mesh.cut("data", None, None, None), mesh.cut(None, "data", None, None)
        self.to_experts.shard((groups,), (turned,))
        self.to_groups.shard((turned,), (groups,))


class OpenPath(nn.Cell):
    """Base of the paths on which nothing is dropped: every choice is served."""

    def __init__(self, moe: MoEConfig, training: bool):
        super().__init__()
        self.expert_num = moe.expert_num

    def served(self, routing: dict, plan: dict) -> Tensor:
        """All choices: scalar."""
        return routing["expert_mask"].sum()


class ExpertChoicePath(OpenPath):
    """Each expert gets the rows that it took (arXiv 2202.09368): a gather, and a sum of segments back.

    The gradient of the one is the other. The index runs over the rows of all groups and a row of zeros behind them,
    which a slot that nobody fills holds.
    """

    def __init__(self, moe: MoEConfig, training: bool):
        super().__init__(moe, training)
        self.take, self.turn = ops.Gather(), ops.Transpose()

    def plan(self, routing: dict) -> dict:
        """{index [E, G * C] int32 into all rows, G * N for nobody, gates [E, G * C], chosen [G, N, E]}."""
        groups, count, experts = routing["expert_mask"].shape
        first = (ops.arange(groups) * count).astype(mstype.int32).reshape(groups, 1, 1)
        index = routing["token_index"] + first  # [G, E, C]
        if "slot_mask" in routing:
            index = ops.where(routing["slot_mask"] > 0, index, ops.full_like(index, groups * count))
        index = self.turn(index, (1, 0, 2)).reshape(experts, -1)  # [E, G * C]
        gates = self.turn(routing["gates"], (1, 0, 2)).reshape(experts, -1)  # [E, G * C]
        return {"index": ops.stop_gradient(index), "gates": gates, "expert_mask": routing["expert_mask"]}

    def dispatch(self, rows: Tensor, plan: dict) -> Tensor:
        """Rows [G, N, D] -> [E, G * C, D]."""
        rows = rows.reshape(-1, rows.shape[-1])  # [G * N, D]
        return self.take(ops.concat((rows, ops.zeros_like(rows[:1])), 0), plan["index"], 0)

    def combine(self, outputs: Tensor, plan: dict) -> Tensor:
        """[E, G * C, D] -> [G, N, D]: y = sum of gates * outputs over the slots that hold the row."""
        groups, count, _ = plan["expert_mask"].shape
        width = outputs.shape[-1]
        weighted = (outputs * ops.expand_dims(plan["gates"], -1)).reshape(-1, width)  # [E * G * C, D]
        rows = ops.unsorted_segment_sum(weighted, plan["index"].reshape(-1), groups * count + 1)  # [G * N + 1, D]
        return rows[:-1].reshape(groups, count, width)


class DensePath(OpenPath):
    """Every expert gets all rows; the outputs are summed, weighted by the gates."""

    def __init__(self, moe: MoEConfig, training: bool):
        super().__init__(moe, training)
        self.turn = ops.Transpose()

    def plan(self, routing: dict) -> dict:
        """{gates [G, N, E]}."""
        return {"gates": routing["gates"]}

    def dispatch(self, rows: Tensor, plan: dict) -> Tensor:
        """Rows [G, N, D] -> [E, G * N, D]."""
        rows = rows.reshape(1, -1, rows.shape[-1])
        return ops.tile(rows, (self.expert_num, 1, 1))

    def combine(self, outputs: Tensor, plan: dict) -> Tensor:
        """[E, G * N, D] -> [G, N, D]."""
        groups, count, experts = plan["gates"].shape
        gates = self.turn(plan["gates"].reshape(-1, experts), (1, 0))  # [E, G * N]
        return (outputs * ops.expand_dims(gates, -1)).sum(0).reshape(groups, count, -1)


class SoftPath(OpenPath):
    """Slots are mixtures of rows, rows are mixtures of slots (arXiv 2308.00951)."""

    def __init__(self, moe: MoEConfig, training: bool):
        super().__init__(moe, training)
        self.to_slots, self.to_rows = OneHotDispatch(), OneHotCombine()
        self.to_experts, self.to_groups = ops.Transpose(), ops.Transpose()

    def plan(self, routing: dict) -> dict:
        """{dispatch, combine [G, N, E, C]}."""
        return {"dispatch": routing["dispatch"], "combine": routing["combine"]}

    def dispatch(self, rows: Tensor, plan: dict) -> Tensor:
        """Rows [G, N, D] -> [E, G * C, D]."""
        slots = self.to_slots(rows, plan["dispatch"])  # [G, E, C, D]
        return self.to_experts(slots, (1, 0, 2, 3)).reshape(self.expert_num, -1, rows.shape[-1])

    def combine(self, outputs: Tensor, plan: dict) -> Tensor:
        """[E, G * C, D] -> [G, N, D]."""
        groups, _, _, slots = plan["combine"].shape
        outputs = outputs.reshape(self.expert_num, groups, slots, -1)  # [E, G, C, D]
        return self.to_rows(self.to_groups(outputs, (1, 0, 2, 3)), plan["combine"])


class MergedPath(OpenPath):
    """All rows of a group go through one expert, whose parameters are the experts' mean weighted by the gates."""

    def plan(self, routing: dict) -> dict:
        """{merged [G, E], real [G, N, 1]}."""
        return {"merged": routing["gates"], "real": routing["expert_mask"][:, :, :1]}

    def dispatch(self, rows: Tensor, plan: dict) -> Tensor:
        """[G, N, D], as they are."""
        return rows

    def combine(self, outputs: Tensor, plan: dict) -> Tensor:
        """[G, N, D]; padded rows come back as zero."""
        return keep_where(outputs, plan["real"])


PATHS = {
    "token_choice": TokenChoicePath,
    "expert_choice": ExpertChoicePath,
    "dense": DensePath,
    "soft": SoftPath,
    "merged": MergedPath,
}


def create_path(form: str, moe: MoEConfig, training: bool) -> nn.Cell:
    """The path of a router's form (UserError: there is none of that name)."""
    if form not in PATHS:
        raise UserError(f"moe.router: {moe.router}; its form {form!r} has no path; one of {', '.join(PATHS)}")
    return PATHS[form](moe, training)
