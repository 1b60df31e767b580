"""Where a choice goes that finds its expert full: to the row's next best expert with free room.

Legend: G groups, N rows of a group, E experts, C capacity, K choices of a row. A choice is numbered n * K + k.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.moe.dispatch.capacity import capacity
from switchyard.moe.dispatch.plan import ChoiceOrder

FAR = 1e30  # taken from a probability, it is never the largest


class Reroute(nn.Cell):
    """Rounds in which refused choices ask again (no token left behind, arXiv 2101.03961, appendix B).

    In each round every choice without a slot asks, of the experts with free slots, the one that its row finds most
    probable and does not go to yet; an expert admits those who ask in the drop order as far as it has room. Choices
    that were admitted before keep their slots. A choice that moved is weighted by its new expert's probability.

    Args:
        experts, choices, factor, order, least: as of CapacityPlan, which then drops nobody that this one seated.
        rounds: at most so many experts are asked.
    """

    def __init__(self, experts: int, choices: int, factor: float, order: str, least: int, rounds: int):
        super().__init__()
        self.experts, self.choices, self.factor, self.least, self.rounds = experts, choices, factor, least, rounds
        self.order = ChoiceOrder(experts, choices, order)
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.largest = ops.ReduceMax()
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, experts: Tensor, gates: Tensor, probabilities: Tensor, lot: Tensor = None):
        """Experts (E = nowhere) and gates [G, N, K], probabilities [G, N, E] -> the first two, E and 0 without slot."""
        groups, rows, _ = experts.shape
        slots = capacity(rows, self.experts, self.choices, self.factor, self.least)
        flat_gates = ops.stop_gradient(gates).reshape(groups, -1)  # [G, N * K]
        room = ops.zeros((groups, self.experts), mstype.int32) + slots  # [G, E]
        held = self.admitted(experts, flat_gates, lot, room)  # [G, N, K]
        for _ in range(self.rounds):
            taken = self.marks(held.reshape(groups, -1)).sum(1).astype(mstype.int32)  # [G, E]
            asked = self.asked(experts, held, ops.stop_gradient(probabilities), slots - taken)
            seated = self.admitted(asked, flat_gates, lot, slots - taken)
            held = ops.where(seated < self.experts, seated, held)
        fresh = ()
        for k in range(self.choices):
            fresh = (*fresh, (probabilities * self.marks(held[..., k])).sum(-1))  # [G, N]
        return held, ops.where(held == experts, gates, ops.stack(fresh, -1))

    def marks(self, experts: Tensor) -> Tensor:
        """Returns the one-hot of experts, nothing for E: [...] -> [..., E]."""
        return self.one_hot(experts, self.experts, self.on, self.off)

    def admitted(self, experts: Tensor, gates: Tensor, lot: Tensor, room: Tensor) -> Tensor:
        """Admits experts asked [G, N, K] by gates [G, N * K] to free slots [G, E]; E for those who get none."""
        flat = experts.reshape(gates.shape)  # [G, N * K]
        _, position, _, _ = self.order(flat, gates, lot)
        own_room = ops.gather_elements(room, 1, ops.minimum(flat, self.experts - 1))  # [G, N * K]
        seated = ops.logical_and(position < own_room, flat < self.experts)
        return ops.where(seated, flat, ops.full_like(flat, self.experts)).reshape(experts.shape)

    def asked(self, experts: Tensor, held: Tensor, probabilities: Tensor, room: Tensor) -> Tensor:
        """Returns the expert that each choice without a slot asks next, E for the others: [G, N, K]."""
        barred = ops.expand_dims((room <= 0).astype(mstype.float32), 1)  # full, [G, 1, E]
        for k in range(self.choices):
            barred = barred + self.marks(held[..., k])  # [G, N, E]
        asked = ()
        for k in range(self.choices):
            score = probabilities - barred * FAR
            lost = ops.logical_and(held[..., k] == self.experts, experts[..., k] < self.experts)  # [G, N]
            lost = ops.logical_and(lost, self.largest(score, -1) > -0.5 * FAR)
            best = ops.where(lost, self.argmax(score), ops.full_like(held[..., k], self.experts))
            asked, barred = (*asked, best), barred + self.marks(best)
        return ops.stack(asked, -1)
