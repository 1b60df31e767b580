"""Balance: small pure functions of a Routing. Legend: G groups, N rows of a group, E experts, K choices.

Every mean is over the real rows (`valid` [G, N] is 1 there) of all groups. What is defined for a group as a whole, such
as the balance loss, is averaged over the groups weighted by their real rows, so a group of padding counts nothing and
one that is half padding counts half. Padded values are left out by selection, so not even NaN in one counts.
"""

from mindspore import Tensor, nn, ops

from switchyard.errors import UserError
from switchyard.nn.masks import keep_where


def rows_of(valid: Tensor) -> Tensor:
    """Real rows of each group, at least 1: [G, N] -> [G]."""
    return ops.maximum(valid.sum(1), 1.0)


def mean_over_rows(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of a value of each row over the real rows of all groups: [G, N] twice -> scalar."""
    return keep_where(values, valid).sum() / ops.maximum(valid.sum(), 1.0)


def mean_over_groups(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of a value of each group, weighted by its real rows: [G] and valid [G, N] -> scalar."""
    rows = valid.sum(1)  # [G]
    return (keep_where(values, rows) * rows).sum() / ops.maximum(rows.sum(), 1.0)


def importance(mass: Tensor, valid: Tensor) -> Tensor:
    """What each expert gets of the router's mass (arXiv 1701.06538, eq. 6): [G, N, E] -> [G, E]."""
    return keep_where(mass, valid).sum(1)


def load(chosen: Tensor) -> Tensor:
    """Choices that each expert gets, before any is dropped: [G, N, E] -> [G, E]."""
    return chosen.sum(1)


def switch_balance(chosen: Tensor, probabilities: Tensor, valid: Tensor, choices: int) -> Tensor:
    """E * sum over experts of f * P (arXiv 2101.03961, eq. 4 without its alpha); 1 when balanced. Scalar.

    f: share of the choices that an expert got (eq. 5); P: its mean probability (eq. 6). Only P carries a gradient.
    Mean over the groups, weighted by their real rows.
    """
    rows = ops.expand_dims(rows_of(valid), -1)  # [G, 1]
    share = ops.stop_gradient(load(chosen)) / (rows * choices)  # f, [G, E]
    mean = importance(probabilities, valid) / rows  # P, [G, E]
    return mean_over_groups((share * mean).sum(-1), valid) * chosen.shape[-1]


def log_partition(logits: Tensor, axis: int = -1) -> Tensor:
    """log of the sum of exponentials over the experts, or another axis: [G, N, E] -> [G, N]."""
    top = ops.stop_gradient(ops.ReduceMax(keep_dims=True)(logits, axis))  # [G, N, 1]
    return ops.log(ops.exp(logits - top).sum(axis)) + top.squeeze(axis)


def z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean squared log-partition (ST-MoE, arXiv 2202.08906, eq. 5): keeps router logits small. Scalar."""
    return mean_over_rows(log_partition(logits) ** 2, valid)


def entropy_of(probabilities: Tensor) -> Tensor:
    """Entropy in nats of distributions over the last axis: [..., E] -> [...]."""
    return -(probabilities * ops.log(ops.maximum(probabilities, 1e-20))).sum(-1)


def entropy(probabilities: Tensor, valid: Tensor) -> Tensor:
    """Mean entropy of the router's distribution in nats: 0 when certain, log E when uniform. Scalar."""
    return mean_over_rows(entropy_of(probabilities), valid)


def max_violation(loads: Tensor) -> Tensor:
    """MaxVio = largest load / mean load - 1 (arXiv 2408.15664, eq. 4): [.., E] -> [..]."""
    return ops.amax(loads, -1) / ops.maximum(loads.mean(-1), 1e-9) - 1.0


def squared_variation(amounts: Tensor, valid: Tensor) -> Tensor:
    """Squared coefficient of variation over the experts (arXiv 1701.06538, eq. 7 and 11): [G, E] -> scalar.

    Mean over the groups, weighted by their real rows.
    """
    mean = amounts.mean(-1, keep_dims=True)  # [G, 1]
    variance = ((amounts - mean) ** 2).mean(-1)  # [G]
    return mean_over_groups(variance / (mean.squeeze(-1) ** 2 + 1e-10), valid)


def by_sequence(values: Tensor, length: int) -> Tensor:
    """Groups of whole sequences as one sequence each: [G, N, ...] -> [G * N / S, S, ...]."""
    return values.reshape(-1, length, *values.shape[2:])


def importance_loss(routing: dict, valid: Tensor, choices: int, length: int) -> Tensor:
    """CV^2 of the experts' importance (arXiv 1701.06538, eq. 6 and 7). Scalar."""
    return squared_variation(importance(routing["importance"], valid), valid)


def load_loss(routing: dict, valid: Tensor, choices: int, length: int) -> Tensor:
    """CV^2 of the experts' smooth load (arXiv 1701.06538, eq. 8 to 11). Scalar."""
    return squared_variation(importance(routing["smooth_load"], valid), valid)


def mutual_information_loss(routing: dict, valid: Tensor, choices: int, length: int) -> Tensor:
    """Minus the information that a row gives about its expert (Mod-Squad, arXiv 2212.08066): H(E|X) - H(E).

    Small when rows are sure of their experts and the experts of a group together are used evenly. Scalar.
    """
    mean = importance(routing["probabilities"], valid) / ops.expand_dims(rows_of(valid), -1)  # p(e), [G, E]
    marginal = mean_over_groups(entropy_of(mean), valid)
    return entropy(routing["probabilities"], valid) - marginal


def sequence_loss(routing: dict, valid: Tensor, choices: int, length: int) -> Tensor:
    """The balance loss of each sequence by itself (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20, without its alpha).

    Eq. 18 is f, eq. 20 is P, over the S rows of one sequence instead of all: a router that is balanced only on average
    over the sequences is not enough. Mean over the sequences, weighted by their real rows; a scalar.
    """
    chosen, probabilities = by_sequence(routing["expert_mask"], length), by_sequence(routing["probabilities"], length)
    return switch_balance(chosen, probabilities, by_sequence(valid, length), choices)


# name in moe.losses -> function of (Routing, valid, K, length S of a sequence) that gives a scalar;
# `switch` and `z` have factors of their own
LOSSES = {
    "importance": importance_loss,
    "load": load_loss,
    "mutual_information": mutual_information_loss,
    "sequence": sequence_loss,
}


class WeightedLosses(nn.Cell):
    """(balance loss, z-loss, weighted sum of `moe.losses`) of a Routing and valid [G, N]: three scalars.

    Args:
        moe: whose `losses` name the extra ones.
        router: whose `losses` say what it can give.
        length: rows S of a sequence; a group holds whole sequences in training, when further losses are computed.

    Raises:
        UserError: a loss that is unknown or that this router cannot give.
    """

    def __init__(self, moe, router: nn.Cell, length: int):
        super().__init__()
        self.choices, self.length = moe.choices, length
        self.switch, self.z = "switch" in router.losses, "z" in router.losses
        self.extra = tuple((name, weight) for name, weight in moe.losses.items() if weight > 0)
        for name, _ in self.extra:
            able = [known for known in LOSSES if known in router.losses]
            if name not in able:
                reason = f"router '{moe.router}' gives {', '.join(able) or 'none'}"
                raise UserError(f"moe.losses.{name}: {'unknown' if name not in LOSSES else 'not available'}; {reason}")

    def construct(self, routing: dict, valid: Tensor):
        """A Routing and valid [G, N] -> three scalars."""
        nothing = ops.zeros_like(valid).sum()
        balance_loss, router_z, extra = nothing, nothing, nothing
        if self.switch:
            balance_loss = switch_balance(routing["expert_mask"], routing["probabilities"], valid, self.choices)
        if self.z:
            router_z = z_loss(routing["logits"], valid)
        if self.training:
            for name, weight in self.extra:
                extra = extra + weight * LOSSES[name](routing, valid, self.choices, self.length)
        if "own_loss" in routing:
            extra = extra + routing["own_loss"]
        return balance_loss, router_z, extra
