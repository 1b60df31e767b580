"""HOW rows move, in the one-hot form: dispatch and combine as dense matrices (GShard, arXiv 2006.16668, algorithm 1).

The oracle of `plan.py`: another plan, found without sorting, and another way to move rows. Its cost grows with
the square of N, so models use it only where the weights are not 0 or 1, as in a soft mixture.

Legend: G groups, N rows of a group, E experts, C capacity, K choices of a row, D width. A choice is numbered n * K + k.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.moe.dispatch.capacity import capacity


class OneHotPlan(nn.Cell):
    """Experts [G, N, K] (E = nowhere) and gates [G, N, K] -> (dispatch [G, N, E, C] of 0 and 1, combine [G, N, E, C]).

    A choice's position is the number of choices of the same expert that come before it, counted pair by pair.
    `combine` is `dispatch` weighted by the gates and carries their gradient.
    """

    def __init__(self, experts: int, choices: int, factor: float, order: str):
        super().__init__()
        self.experts, self.choices, self.factor, self.by_probability = experts, choices, factor, order == "probability"
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, experts: Tensor, gates: Tensor):
        groups, rows, choices = experts.shape
        slots = capacity(rows, self.experts, choices, self.factor)
        own = self.one_hot(experts.reshape(groups, -1), self.experts, self.on, self.off)  # [G, N * K, E]
        before = self._before(gates.reshape(groups, -1))  # [G, N * K, N * K]
        position = (ops.bmm(before, own) * own).sum(-1)  # [G, N * K]
        slot = self.one_hot(position.astype(mstype.int32), slots, self.on, self.off)  # [G, N * K, C], 0 beyond C
        seats = ops.expand_dims(own, 3) * ops.expand_dims(slot, 2)  # [G, N * K, E, C]
        seats = ops.stop_gradient(seats.reshape(groups, rows, choices, self.experts, slots))
        return seats.sum(2), (seats * gates.reshape(groups, rows, choices, 1, 1)).sum(2)

    def _before(self, gates: Tensor) -> Tensor:
        """Returns 1 where choice j comes before choice i: gates [G, N * K] -> [G, i, j]."""
        total = gates.shape[1]
        index = ops.arange(total)
        if self.by_probability:
            mine, other = ops.expand_dims(gates, 2), ops.expand_dims(gates, 1)
            tie = ops.logical_and(other == mine, ops.expand_dims(index, 0) < ops.expand_dims(index, 1))
            return ops.logical_or(other > mine, tie).astype(mstype.float32)
        place = index % self.choices * (total // self.choices) + index // self.choices  # first choices first
        before = (ops.expand_dims(place, 0) < ops.expand_dims(place, 1)).astype(mstype.float32)
        return ops.expand_dims(before, 0) + ops.zeros((gates.shape[0], 1, 1), mstype.float32)


class OneHotDispatch(nn.Cell):
    """Rows [G, N, D], dispatch weights [G, N, E, C] -> slots [G, E, C, D]: each slot a weighted sum of rows."""

    def __init__(self):
        super().__init__()
        self.product = ops.BatchMatMul(transpose_a=True)

    def construct(self, rows: Tensor, dispatch: Tensor) -> Tensor:
        groups, count, experts, slots = dispatch.shape
        out = self.product(dispatch.reshape(groups, count, -1), rows)  # [G, E * C, D]
        return out.reshape(groups, experts, slots, -1)


class OneHotCombine(nn.Cell):
    """Outputs [G, E, C, D], combine weights [G, N, E, C] -> rows [G, N, D]: each row a weighted sum of slots."""

    def __init__(self):
        super().__init__()
        self.product = ops.BatchMatMul()

    def construct(self, outputs: Tensor, combine: Tensor) -> Tensor:
        groups, count, _, _ = combine.shape
        return self.product(combine.reshape(groups, count, -1), outputs.reshape(groups, -1, outputs.shape[-1]))
