"""HOW rows move: a Routing becomes a Plan of slots, and rows go there and back by gathers.

Legend: G groups, N rows of a group, E experts, C capacity, K choices of a row, M slots of a group, D width,
P blocks, b rows of a block. A choice is numbered c = n * K + k.

A Plan is a dict of
    dispatch_index [G, M] int32      the choice that fills a slot, N * K where none does
    combine_index  [G, N * K] int32  the slot of a choice, M where it has none
    kept_mask      [G, N * K] float32  1 where a choice got a slot
    block_expert   [G, P] int32      dropless only: the expert of each block of slots
`dispatch_index` and `combine_index` are inverse of each other wherever they name something, so dispatch and combine
are gathers forward and backward. The index behind the last names a row of zeros, see nn.gather. (A dict, because a
NamedTuple made inside a compiled graph stops the gradient.)
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import constexpr

from switchyard.moe.dispatch.capacity import EXACT_FLOAT, capacity
from switchyard.moe.dispatch.counted_order import CountedOrder, countable
from switchyard.nn.gather import index_or_zero_row

LAST = -1e30  # the gate of a choice that comes behind all others


def block_size(rows: int, experts: int, choices: int) -> int:
    """Returns the rows of a dropless block: about a quarter of an expert's fair share, a power of two from 8 to 128.

    With no more choices than experts a block is one row: only the chosen experts' weights are read.
    """
    if rows * choices <= experts:
        return 1
    quarter = max(1, rows * choices // (4 * experts))
    return min(128, max(8, 1 << (quarter.bit_length() - 1)))


def key_type(end: int):
    """Returns the type of sort keys below `end`: float32 where it holds every integer, else int32."""
    return mstype.float32 if end <= EXACT_FLOAT else mstype.int32


class ChoiceOrder(nn.Cell):
    """Sorts the choices of each group by expert and, within an expert, by who comes first.

    Order "position": all first choices before any second, each by row. "token": row by row, all choices of a row before
    those of the next (MindFormers calls it sdrop). "probability": the largest gate first.
    "batch_priority": all first choices before any second, each by the row's largest gate (V-MoE, arXiv
    2106.05974). "random": the same by lot, and by row where none is drawn.
    Choices of padded rows (expert = E) come last and are counted nowhere. A gate that is NaN or Inf counts as the
    smallest: in a sort it would put the choices of other rows out of order.
    """

    def __init__(self, experts: int, choices: int, order: str):
        super().__init__()
        self.experts, self.choices, self.kind = experts, choices, order
        self.largest, self.is_finite = ops.ReduceMax(), ops.IsFinite()
        self.sort = ops.Sort(axis=1)
        self.one_hot = ops.OneHot()
        self.prefix = ops.CumSum(exclusive=True)
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, experts: Tensor, gates: Tensor, lot: Tensor = None):
        """Sorts experts and gates [G, N * K], lot [G, N] where one is drawn -> (order, position, count, start).

        order [G, N * K]: the choice at each rank; position [G, N * K]: the place of a choice among its expert's;
        count [G, E]: choices of each expert; start [G, E]: the rank of an expert's first. All int32.
        """
        total = experts.shape[1]
        place = self._place(gates, lot)
        order = self._argsort((experts * total + place).astype(key_type((self.experts + 1) * total)))
        rank = self._inverse(order)
        count = self.one_hot(experts, self.experts, self.on, self.off).sum(1)  # [G, E]
        start = self.prefix(count, 1).astype(mstype.int32)
        own_start = ops.gather_elements(start, 1, ops.minimum(experts, self.experts - 1))  # [G, N * K]
        return order, rank - own_start, count.astype(mstype.int32), start

    def _place(self, gates, lot):
        """Ranks all choices, from 0 on: gates [G, N * K] -> [G, N * K], or [1, N * K] for all groups."""
        if self.kind in ("probability", "batch_priority"):
            gates = ops.where(self.is_finite(gates), gates, ops.full_like(gates, LAST))
        if self.kind == "probability":
            return self._inverse(self._argsort(-gates))
        groups, total = gates.shape
        if self.kind == "token":
            return ops.expand_dims(ops.arange(total), 0)  # [1, N * K]
        rows = total // self.choices
        rank = ops.expand_dims(ops.arange(rows), 0)  # [1, N]
        if self.kind == "batch_priority":
            rank = self._inverse(self._argsort(-self.largest(gates.reshape(groups, rows, self.choices), -1)))  # [G, N]
        elif self.kind == "random" and lot is not None:
            rank = self._inverse(self._argsort(lot))  # [G, N]
        return (ops.expand_dims(rank, 2) + ops.arange(self.choices) * rows).reshape(-1, total)  # k * N + rank

    def _argsort(self, keys):
        return self.sort(keys)[1]

    def _inverse(self, permutation):
        return self.sort(permutation.astype(key_type(permutation.shape[1])))[1]


class CapacityPlan(nn.Cell):
    """Gives every expert C slots, M = E * C; drops the choices beyond an expert's C.

    C is room in memory, so it is that of all N rows of a group, padded ones included: padding takes no slot and leaves
    the real rows more room. `counts`: the order "position" is found by counting, see counted_order.
    """

    def __init__(
        self, experts: int, choices: int, factor: float | None, order: str, least: int = 1, counts: bool = False
    ):
        super().__init__()
        self.experts, self.choices, self.factor, self.least = experts, choices, factor, least
        self.order = ChoiceOrder(experts, choices, order)
        self.counted = CountedOrder(experts, choices) if counts and order == "position" else None
        self.write = ops.ScatterNd()

    def construct(self, experts: Tensor, gates: Tensor, lot: Tensor = None) -> dict:
        """Makes a Plan of experts [G, N, K] (E = nowhere), gates [G, N, K] and the lot of ChoiceOrder."""
        groups, rows, choices = experts.shape
        total, room = rows * choices, capacity(rows, self.experts, choices, self.factor, self.least)
        experts, slots = experts.reshape(groups, total), self.experts * room  # [G, N * K]; M
        if self.counted is not None and countable(total):
            position = self.counted(experts)  # [G, N * K]
            kept = position < room
        else:
            position = self.order(experts, gates.reshape(groups, total), lot)[1]
            kept = ops.logical_and(position < room, experts < self.experts)
        slot = experts * room + position.astype(mstype.int32)
        slot = ops.select(kept, slot, ops.full_like(slot, slots))
        return _plan(self.fillers(slot, slots), slot, kept.astype(mstype.float32))

    def fillers(self, slot: Tensor, slots: int) -> Tensor:
        """Turns the slot of each choice [G, N * K], M for none, into the choice of each slot [G, M], N * K for none."""
        groups, total = slot.shape
        place = slot if groups == 1 else slot + steps(groups, slots + 1)  # of all groups' tables, one behind another
        written = self.write(place.reshape(-1, 1), numbers(groups, total), (groups * (slots + 1),))
        return written.reshape(groups, slots + 1)[:, :slots] + total  # the table is zeros where nothing is written


@constexpr
def numbers(groups: int, total: int) -> Tensor:
    """Returns n - T for the choices n of each group: [G * T] int32."""
    return Tensor(np.tile(np.arange(total, dtype=np.int32) - total, groups))


@constexpr
def steps(groups: int, size: int) -> Tensor:
    """Returns where each group's table starts: [G, 1] int32."""
    return Tensor(np.arange(groups, dtype=np.int32).reshape(-1, 1) * size)


class BlockPlan(nn.Cell):
    """Drops no choice: sorts rows by expert, pads each expert's to blocks of b rows.

    P = ceil(N * K / b) + E blocks serve any imbalance, M = P * b (the block layout of MegaBlocks, arXiv 2211.15841,
    with a static number of blocks). With b = 1 a block is a choice and nothing is sorted or padded.
    """

    def __init__(self, experts: int, choices: int, block: int | None):
        super().__init__()
        self.experts, self.choices, self.block = experts, choices, block
        self.order = ChoiceOrder(experts, choices, "position")
        self.prefix = ops.CumSum()

    def construct(self, experts: Tensor, gates: Tensor, lot: Tensor = None) -> dict:
        """Makes a Plan with `block_expert` of experts [G, N, K] (E = nowhere) and gates [G, N, K]; reads no lot."""
        groups, rows, choices = experts.shape
        total = rows * choices
        block = self.block or block_size(rows, self.experts, choices)
        experts = experts.reshape(groups, total)  # [G, N * K]
        kept = (experts < self.experts).astype(mstype.float32)
        safe = ops.minimum(experts, self.experts - 1)
        if block == 1:
            index = ops.expand_dims(ops.arange(total), 0) + ops.zeros_like(experts)
            index = index_or_zero_row(index, kept, total)
            return _plan(index, index, kept, safe)
        order, position, count, start = self.order(experts, gates.reshape(groups, total))
        blocks = (count + (block - 1)) // block  # [G, E]
        last = self.prefix(blocks.astype(mstype.float32), 1).astype(mstype.int32)  # [G, E], exclusive end
        first = last - blocks
        number = ops.expand_dims(ops.arange(-(-total // block) + self.experts), 0)  # [1, P]
        before = (ops.expand_dims(last, 1) <= ops.expand_dims(number, 2)).astype(mstype.float32)  # [G, P, E]
        block_expert = ops.minimum(before.sum(2).astype(mstype.int32), self.experts - 1)  # [G, P]
        place = (number - ops.gather_elements(first, 1, block_expert)) * block  # [G, P], within the expert
        place = (ops.expand_dims(place, 2) + ops.arange(block)).reshape(groups, -1)  # [G, P * b]
        own = ops.expand_dims(block_expert, 2) + ops.zeros((1, 1, block), block_expert.dtype)  # [G, P, b]
        own = own.reshape(groups, -1)  # [G, P * b]
        filled = (place < ops.gather_elements(count, 1, own)).astype(mstype.float32)
        rank = ops.minimum(ops.gather_elements(start, 1, own) + place, total - 1)
        dispatch_index = index_or_zero_row(ops.gather_elements(order, 1, rank), filled, total)  # [G, P * b]
        slot = ops.gather_elements(first, 1, safe) * block + position
        return _plan(dispatch_index, index_or_zero_row(slot, kept, own.shape[1]), kept, block_expert)


def _plan(dispatch_index, combine_index, kept, block_expert=None) -> dict:
    """Returns a Plan; no gradient flows through any part of it."""
    plan = {
        "dispatch_index": ops.stop_gradient(dispatch_index.astype(mstype.int32)),
        "combine_index": ops.stop_gradient(combine_index.astype(mstype.int32)),
        "kept_mask": ops.stop_gradient(kept),
    }
    if block_expert is not None:
        plan["block_expert"] = ops.stop_gradient(block_expert)
    return plan
