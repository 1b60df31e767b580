"""Makes router statistics: the one tensor in which a layer tells what its router did. See moe.metrics for its columns.

Legend: G routing groups, N tokens of a group, E experts.
"""

from mindspore import Tensor, ops

from switchyard.moe.routing.losses import entropy_sums, importance, load


def statistics(routing: dict, losses: tuple, num_kept: Tensor, valid: Tensor) -> Tensor:
    """Returns the statistics of one layer: [G, 6 + 2 E] float32.

    Args:
        routing: the router's decision.
        losses: (balance, z, auxiliary) [G] each, of `losses.WeightedLosses`.
        num_kept: choices that got a slot, [G].
        valid: 1 for a real token, 0 for padding, [G, N].
    """
    balance, z, auxiliary = losses
    entropies = entropy_sums(routing["probabilities"], valid)  # [G]
    stop = ops.stop_gradient
    scalars = ops.stack((balance, z, auxiliary, stop(entropies), stop(num_kept), stop(valid.sum(1))), 1)  # [G, 6]
    loads, mass = load(routing["expert_mask"]), importance(routing["importance"], valid)  # [G, E] each
    return ops.concat((scalars, stop(loads), stop(mass)), 1)
