"""Balanced assignment: in training rows and experts are matched so that every expert gets its share.

Legend: G groups, N rows of a group, E experts, K choices of a row, D width.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config.router_options import OneChoice, SinkhornOptions
from switchyard.moe.dispatch.plan import ChoiceOrder
from switchyard.moe.routing.base import Choosing, LinearRouter, RouterSetting, by_rows, register
from switchyard.moe.routing.losses import log_partition, rows_of
from switchyard.moe.routing.softmax import NormalisedRouter
from switchyard.nn.masks import keep_where

FAR = 1e30  # beyond every score


@register("sinkhorn")
class Sinkhorn(NormalisedRouter):
    """Chooses the K largest of a balanced matrix (arXiv 2202.01169: S-BASE).

    In training `sinkhorn_iterations` passes scale exp(x W) until each row sums to 1 and each expert's column to its
    share of the rows, in logarithms: an expert that all want has its price raised. The choice is made by the scaled
    matrix, which carries no gradient; the gates are the softmax's, as in top_k. At evaluation a row cannot look at the
    others: plain top-k.
    """

    paper = "arXiv 2202.01169"
    Options = SinkhornOptions

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.iterations = setting.options.sinkhorn_iterations

    def rank(self, logits: Tensor, valid: Tensor) -> Tensor:
        """Returns in training the logits plus what the balancing adds to each expert; at evaluation the logits."""
        if not self.training:
            return logits
        # a row's own factor does not change its order
        return logits + scaling(*matched(logits, valid), self.iterations)


def matched(scores: Tensor, valid: Tensor):
    """(scores [G, N, E] without a gradient, valid [G, N]), both 0 for padded rows and for rows with NaN or Inf.

    A row that holds such a value would set every expert's price, and so the choices of all others.
    """
    scores = ops.stop_gradient(scores)
    whole = ops.IsFinite()(scores).astype(mstype.float32).sum(-1) == scores.shape[-1]  # [G, N]
    valid = valid * whole.astype(mstype.float32)
    return keep_where(scores, valid), valid


def scaling(logits: Tensor, valid: Tensor, iterations: int) -> Tensor:
    """Returns the logarithm of each expert's factor in Sinkhorn's scaling: logits [G, N, E], valid [G, N] -> [G, 1, E].

    Rows and columns in turn are scaled until a real row sums to 1 and a column to real rows / E.
    """
    share = ops.log(rows_of(valid) / logits.shape[-1]).reshape(-1, 1, 1)  # [G, 1, 1]
    away = (1.0 - ops.expand_dims(valid, -1)) * FAR  # padding counts in no column, [G, N, 1]
    of_expert = share * 0.0
    for _ in range(iterations):
        of_row = -ops.expand_dims(log_partition(logits + of_expert), -1) - away  # [G, N, 1]
        of_expert = share - ops.expand_dims(log_partition(logits + of_row, 1), 1)  # [G, 1, E]
    return of_expert


@register("base")
class Base(LinearRouter):
    """BASE layer (arXiv 2103.16716): in training a linear assignment gives every expert as many rows.

    The assignment maximises the sum of the scores x w_e by an auction. Without padding and with E a divisor of
    N an expert gets exactly N / E rows, else at most ceil(N / E); so there is no balance loss to weigh, and a capacity
    factor of 1 drops nothing. At evaluation a row goes to its best expert. The gate is sigmoid(x w_e).
    The probabilities, of which the entropy of the metrics is made, are the softmax of the scores.
    """

    paper = "arXiv 2103.16716"
    Options = OneChoice

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.auction = Auction(self.expert_num)
        self.choose = Choosing(self.expert_num, 1)
        self.softmax, self.sigmoid = ops.Softmax(-1), ops.Sigmoid()

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        logits = scores[0]  # [G, N, E]
        affinity, probabilities = self.sigmoid(logits), self.softmax(logits)
        if self.training:
            expert = self.auction(logits, context["valid"])  # [G, N]
            experts, gates, chosen = self.choose.weigh(ops.expand_dims(expert, -1), affinity, context)
        else:
            experts, gates, chosen = self.choose(logits, affinity, context)
        return by_rows(experts, gates, chosen, probabilities, logits)


class Auction(nn.Cell):
    """Seats each real row with an expert, at most ceil(real rows / E) with one, by nearly the largest sum of scores.

    Bertsekas' auction for identical seats: a row without a seat bids for the expert with the best score minus price as
    much as leaves it no worse off than its second best, plus a step; an expert keeps its highest bids, and once it is
    full its price is the lowest of them. Prices start where Sinkhorn's scaling at the temperature of the step, 1 / 50
    of the scores' range, puts them: then six rounds seat all but a few rows, which get the free seats in turn, and
    the sum is within 0.1 % of the range, a row, of the largest (768 rows, 8 or 64 experts), where an auction from zero
    needs 67 to 258 rounds. Everything is static and without a gradient.
    """

    rounds, passes, fraction = 6, 8, 0.02

    def __init__(self, experts: int):
        super().__init__()
        self.expert_num = experts
        self.order = ChoiceOrder(experts, 1, "probability")
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        self.highest, self.lowest = ops.ReduceMax(), ops.ReduceMin()
        self.prefix, self.before = ops.CumSum(), ops.CumSum(exclusive=True)

    def construct(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Seats rows by scores [G, N, E]: expert [G, N] int32, E for a padded row and for one with NaN or Inf."""
        scores, valid = matched(scores, valid)
        real = valid > 0  # [G, N]
        count = valid.sum(1, keepdims=True).astype(mstype.int32)  # [G, 1]
        seats = (count + (self.expert_num - 1)) // self.expert_num
        spread = self.range(scores, valid)  # [G]
        step = ops.expand_dims(ops.maximum(self.fraction * spread, 1e-6), -1)  # [G, 1]
        heat = ops.expand_dims(step, -1)  # [G, 1, 1]
        price = (-heat * scaling(scores / heat, valid, self.passes)).squeeze(1)  # [G, E]
        expert = ops.zeros_like(valid).astype(mstype.int32) + self.expert_num  # [G, N]
        bid = ops.zeros_like(valid)
        for _ in range(self.rounds):
            waiting = self.waiting(expert, real)
            asked, offer = self.offers(scores, price, step)
            expert, bid = ops.where(waiting > 0, asked, expert), ops.where(waiting > 0, offer, bid)
            expert, price = self.settle(expert, bid, price, seats)
        return self.fill(expert, self.waiting(expert, real), seats)

    def range(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Returns the largest less the smallest score of each group's real rows: [G, N, E], valid [G, N] -> [G]."""
        real, far = ops.expand_dims(valid, -1) > 0, ops.full_like(scores, FAR)
        return self.highest(ops.where(real, scores, -far), (1, 2)) - self.lowest(ops.where(real, scores, far), (1, 2))

    def waiting(self, expert: Tensor, real: Tensor) -> Tensor:
        """Returns 1 where a real row has no seat: [G, N]."""
        return ops.logical_and(expert == self.expert_num, real).astype(mstype.float32)

    def offers(self, scores: Tensor, price: Tensor, step: Tensor):
        """Returns the expert that each row bids for and its bid: scores [G, N, E], price [G, E] -> [G, N] twice."""
        value = scores - ops.expand_dims(price, 1)  # [G, N, E]
        asked = self.argmax(value)
        mask = self.one_hot(asked, self.expert_num, self.on, self.off)  # [G, N, E]
        second = self.highest(value - mask * FAR, -1)  # [G, N]
        return asked, (scores * mask).sum(-1) - second + step

    def settle(self, expert: Tensor, bid: Tensor, price: Tensor, seats: Tensor):
        """Keeps the highest bids of each expert: -> (expert [G, N], those who lost at E, price [G, E])."""
        _, position, count, _ = self.order(expert, bid)
        expert = ops.where(position < seats, expert, ops.full_like(expert, self.expert_num))
        mask = self.one_hot(expert, self.expert_num, self.on, self.off)  # [G, N, E]
        lowest = self.lowest(ops.expand_dims(bid, -1) * mask + (1.0 - mask) * FAR, 1)  # [G, E]
        return expert, ops.where(count >= seats, lowest, price)

    def fill(self, expert: Tensor, waiting: Tensor, seats: Tensor) -> Tensor:
        """Gives the rows still waiting [G, N] the free seats, expert by expert."""
        held = self.one_hot(expert, self.expert_num, self.on, self.off).sum(1)  # [G, E]
        last = self.prefix(seats.astype(mstype.float32) - held, 1)  # free seats up to here, [G, E]
        number = self.before(waiting, 1)  # of a waiting row among them, [G, N]
        found = (ops.expand_dims(last, 1) <= ops.expand_dims(number, 2)).astype(mstype.float32).sum(2)  # [G, N]
        return ops.where(waiting > 0, found.astype(mstype.int32), expert)
