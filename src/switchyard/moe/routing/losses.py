"""Balance: small pure functions of a Routing. Legend: G groups, N rows of a group, E experts, K choices.

What a layer hands on is a sum over the real rows of each group, [G] (functions named `.._sums`): added up over groups
and devices and divided by all real rows it is the mean. The other functions are those means of one Routing.

Every mean is over the real rows (`valid` [G, N] is 1 there) of all groups. What is defined for a group as a whole, such
as the balance loss, is averaged over the groups weighted by their real rows, so a group of padding counts nothing and
one that is half padding counts half. Padded values are left out by selection, so not even NaN in one counts.
"""

from mindspore import Tensor, nn, ops

from switchyard.errors import UserError
from switchyard.moe.registry import Registry
from switchyard.nn.masks import keep_where
from switchyard.trust import is_own


def rows_of(valid: Tensor) -> Tensor:
    """Counts the real rows of each group, at least 1: [G, N] -> [G]."""
    return ops.maximum(valid.sum(1), 1.0)


def sum_over_rows(values: Tensor, valid: Tensor) -> Tensor:
    """Sums a value of each row over the real rows of each group: [G, N] twice -> [G].

    ReduceSum over all axes adds in another order than over one, and faster; one group is summed that way.
    """
    kept = keep_where(values, valid)
    return kept.sum().reshape(1) if kept.shape[0] == 1 else kept.sum(1)


def times_rows(values: Tensor, valid: Tensor) -> Tensor:
    """Multiplies a value of each group by its real rows, 0 for a group of padding: [G] and valid [G, N] -> [G]."""
    rows = valid.sum(1)  # [G]
    return keep_where(values, rows) * rows


def mean(sums: Tensor, valid: Tensor) -> Tensor:
    """Returns the mean over all real rows of what each group has summed: [G] and valid [G, N] -> scalar."""
    return sums.sum() / ops.maximum(valid.sum(), 1.0)


def importance(mass: Tensor, valid: Tensor) -> Tensor:
    """Returns what each expert gets of the router's mass (arXiv 1701.06538, eq. 6): [G, N, E] -> [G, E]."""
    return keep_where(mass, valid).sum(1)


def load(chosen: Tensor) -> Tensor:
    """Counts the choices that each expert gets, before any is dropped: [G, N, E] -> [G, E]."""
    return chosen.sum(1)


def balance_sums(chosen: Tensor, probabilities: Tensor, valid: Tensor, choices: int) -> Tensor:
    """Returns E * sum over experts of f * P (arXiv 2101.03961, eq. 4 without its alpha), times the real rows: [G].

    f: share of the choices that an expert got (eq. 5); P: its mean probability (eq. 6). Only P carries a gradient.
    """
    rows = ops.expand_dims(rows_of(valid), -1)  # [G, 1]
    share = ops.stop_gradient(load(chosen)) / (rows * choices)  # f, [G, E]
    average = importance(probabilities, valid) / rows  # P, [G, E]
    return times_rows((share * average).sum(-1), valid) * chosen.shape[-1]


def switch_balance(chosen: Tensor, probabilities: Tensor, valid: Tensor, choices: int) -> Tensor:
    """Returns the balance loss, 1 when balanced: mean over the groups, weighted by their real rows. Scalar."""
    return mean(balance_sums(chosen, probabilities, valid, choices), valid)


def log_partition(logits: Tensor, axis: int = -1) -> Tensor:
    """Returns the log of the sum of exponentials over the experts, or another axis: [G, N, E] -> [G, N]."""
    top = ops.stop_gradient(ops.ReduceMax(keep_dims=True)(logits, axis))  # [G, N, 1]
    return ops.log(ops.exp(logits - top).sum(axis)) + top.squeeze(axis)


def z_sums(logits: Tensor, valid: Tensor) -> Tensor:
    """Returns the squared log-partition (ST-MoE, arXiv 2202.08906, eq. 5), which keeps router logits small: [G]."""
    return sum_over_rows(log_partition(logits) ** 2, valid)


def z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Returns the mean squared log-partition over the real rows. Scalar."""
    return mean(z_sums(logits, valid), valid)


def entropy_of(probabilities: Tensor) -> Tensor:
    """Returns the entropy in nats of distributions over the last axis: [..., E] -> [...]."""
    return -(probabilities * ops.log(ops.maximum(probabilities, 1e-20))).sum(-1)


def entropy_sums(probabilities: Tensor, valid: Tensor) -> Tensor:
    """Returns the entropy of the router's distribution in nats: [G]."""
    return sum_over_rows(entropy_of(probabilities), valid)


def entropy(probabilities: Tensor, valid: Tensor) -> Tensor:
    """Returns the mean entropy over the real rows: 0 when certain, log E when uniform. Scalar."""
    return mean(entropy_sums(probabilities, valid), valid)


def squared_variation(amounts: Tensor, valid: Tensor) -> Tensor:
    """Returns the squared coefficient of variation (arXiv 1701.06538, eq. 7 and 11), times rows: [G, E] -> [G]."""
    average = amounts.mean(-1, keep_dims=True)  # [G, 1]
    variance = ((amounts - average) ** 2).mean(-1)  # [G]
    return times_rows(variance / (average.squeeze(-1) ** 2 + 1e-10), valid)


def by_sequence(values: Tensor, length: int) -> Tensor:
    """Groups of whole sequences as one sequence each: [G, N, ...] -> [G * N / S, S, ...]."""
    return values.reshape(-1, length, *values.shape[2:])


def importance_sums(routing: dict, valid: Tensor, choices: int, length: int) -> Tensor:
    """Returns CV^2 of the experts' importance (arXiv 1701.06538, eq. 6 and 7): [G]."""
    return squared_variation(importance(routing["importance"], valid), valid)


def load_sums(routing: dict, valid: Tensor, choices: int, length: int) -> Tensor:
    """Returns CV^2 of the experts' smooth load (arXiv 1701.06538, eq. 8 to 11): [G]."""
    return squared_variation(importance(routing["smooth_load"], valid), valid)


def mutual_information_sums(routing: dict, valid: Tensor, choices: int, length: int) -> Tensor:
    """Minus the information that a row gives about its expert (Mod-Squad, arXiv 2212.08066): H(E|X) - H(E).

    Small when rows are sure of their experts and the experts of a group together are used evenly: [G].
    """
    average = importance(routing["probabilities"], valid) / ops.expand_dims(rows_of(valid), -1)  # p(e), [G, E]
    return entropy_sums(routing["probabilities"], valid) - times_rows(entropy_of(average), valid)


def sequence_sums(routing: dict, valid: Tensor, choices: int, length: int) -> Tensor:
    """Returns the balance loss of each sequence by itself (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20, without alpha).

    Eq. 18 is f, eq. 20 is P, over the S rows of one sequence instead of all: a router that is balanced only on average
    over the sequences is not enough. Each counts by its real rows: [G].
    """
    chosen, probabilities = by_sequence(routing["expert_mask"], length), by_sequence(routing["probabilities"], length)
    of_sequences = balance_sums(chosen, probabilities, by_sequence(valid, length), choices)  # [G * N / S]
    return of_sequences.reshape(valid.shape[0], -1).sum(-1)


# name in moe.losses -> function of (Routing, valid, K, length S of a sequence) that gives a sum of each group [G];
# `switch` and `z` have factors of their own
LOSSES = {
    "importance": importance_sums,
    "load": load_sums,
    "mutual_information": mutual_information_sums,
    "sequence": sequence_sums,
}


OWN_LOSSES = Registry("moe.losses", "a function of a Routing, valid, choices and length", callable)  # of users' own


def add_loss(name: str) -> None:
    """Makes a loss of a user's own, registered or `module.function`, one of LOSSES (UserError: there is none)."""
    LOSSES[name] = OWN_LOSSES.find(name)


class AuxiliaryLosses(nn.Cell):
    """Computes the weighted sum of the auxiliary losses of a Routing: [G].

    Each is a sum over the real rows of a group, see `mean`.

    Args:
        moe: whose `losses` name the auxiliary ones.
        router: whose `losses` say what it can give.
        length: rows S of a sequence; a group holds whole sequences in training, when auxiliary losses are computed.

    Raises:
        UserError: a loss that is unknown or that this router cannot give.
    """

    def __init__(self, moe, router: nn.Cell, length: int):
        super().__init__()
        self.choices, self.length = moe.choices, length
        self.auxiliary = tuple((name, weight) for name, weight in moe.losses.items() if weight > 0)
        for name, _ in self.auxiliary:
            if name in OWN_LOSSES.known or is_own(name):
                add_loss(name)
                continue
            able = [known for known in LOSSES if known in router.losses]
            if name not in able:
                reason = f"router '{moe.router}' gives {', '.join(able) or 'none'}"
                raise UserError(f"moe.losses.{name}: {'unknown' if name not in LOSSES else 'not available'}; {reason}")
        # those alone: a compiler reads the source of all that a table holds, and one typed into a terminal has none
        self.functions = {name: LOSSES[name] for name, _ in self.auxiliary}

    def construct(self, routing: dict, valid: Tensor) -> Tensor:
        """Takes a Routing and valid [G, N], returns [G]."""
        auxiliary = ops.zeros((valid.shape[0],), valid.dtype)
        if self.training:
            for name, weight in self.auxiliary:
                auxiliary = auxiliary + weight * self.functions[name](routing, valid, self.choices, self.length)
        if "own_loss" in routing:
            auxiliary = auxiliary + routing["own_loss"]
        return auxiliary
