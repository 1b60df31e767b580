"""Balance: small pure functions of a Routing. Legend: G groups, N rows of a group, E experts, K choices.

Every mean is over real rows of a group (`valid` [G, N] is 1 there), then over the groups.
"""

from mindspore import Tensor, ops


def rows_of(valid: Tensor) -> Tensor:
    """Real rows of each group, at least 1: [G, N] -> [G]."""
    return ops.maximum(valid.sum(1), 1.0)


def importance(probabilities: Tensor, valid: Tensor) -> Tensor:
    """Gate mass that each expert gets (arXiv 1701.06538, eq. 6): [G, N, E] -> [G, E]."""
    return (probabilities * ops.expand_dims(valid, -1)).sum(1)


def load(chosen: Tensor) -> Tensor:
    """Choices that each expert gets, before any is dropped: [G, N, E] -> [G, E]."""
    return chosen.sum(1)


def switch_balance(chosen: Tensor, probabilities: Tensor, valid: Tensor, choices: int) -> Tensor:
    """E * sum over experts of f * P (arXiv 2101.03961, eq. 4 without its alpha); 1 when balanced. Scalar.

    f: share of the choices that an expert got (eq. 5); P: its mean probability (eq. 6). Only P carries a gradient.
    """
    rows = ops.expand_dims(rows_of(valid), -1)  # [G, 1]
    share = ops.stop_gradient(load(chosen)) / (rows * choices)  # f, [G, E]
    mean = importance(probabilities, valid) / rows  # P, [G, E]
    return (share * mean).sum(-1).mean() * chosen.shape[-1]


def log_partition(logits: Tensor) -> Tensor:
    """log of the sum of exponentials over the experts: [G, N, E] -> [G, N]."""
    top = ops.stop_gradient(ops.ReduceMax(keep_dims=True)(logits, -1))  # [G, N, 1]
    return ops.log(ops.exp(logits - top).sum(-1)) + top.squeeze(-1)


def z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean squared log-partition (ST-MoE, arXiv 2202.08906, eq. 5): keeps router logits small. Scalar."""
    squares = log_partition(logits) ** 2 * valid  # [G, N]
    return (squares.sum(1) / rows_of(valid)).mean()


def entropy(probabilities: Tensor, valid: Tensor) -> Tensor:
    """Mean entropy of the router's distribution in nats: 0 when certain, log E when uniform. Scalar."""
    terms = -(probabilities * ops.log(ops.maximum(probabilities, 1e-20))).sum(-1) * valid  # [G, N]
    return (terms.sum(1) / rows_of(valid)).mean()


def max_violation(loads: Tensor) -> Tensor:
    """MaxVio = largest load / mean load - 1 (arXiv 2408.15664, section 4.1): [E] -> scalar."""
    return loads.max() / ops.maximum(loads.mean(), 1e-9) - 1.0
