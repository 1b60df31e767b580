"""Makes router statistics: the one tensor in which a layer tells what its router did. See moe.metrics for its columns.

Legend: G routing groups, N tokens of a group, E experts.
"""

from mindspore import Tensor, nn, ops

from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.moe.metrics import AUXILIARY, BALANCE, ENTROPY, Z
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


def weighted_losses(stats: Tensor, count: Tensor, balance_factor: float, z_factor: float) -> Tensor:
    """Weighs the losses that statistics carry: what a network adds to its loss, [].

    Args:
        stats: of M layers, summed over groups, [M, 6 + 2 E].
        count: real tokens of all groups, []; where layers have different tokens, [M, 1].
        balance_factor: moe.aux_loss_factor.
        z_factor: moe.z_loss_factor.
    """
    means = stats[:, :ENTROPY] / ops.maximum(count, 1.0)  # [M, 3]
    balance, z = means[:, BALANCE].sum(), means[:, Z].sum()
    return balance_factor * balance + z_factor * z + means[:, AUXILIARY].sum()


class Beside(nn.Cell):
    """Puts what M conditional layers return side by side: statistics [G, X] or choices [N, K] of each; () of none."""

    def __init__(self):
        super().__init__()
        self.local_join = self.join

    def construct(self, parts: tuple):
        """Joins M tensors [G, X]: [G, M * X]."""
        if len(parts) == 0:
            return ()
        joined = parts[0]
        for more in parts[1:]:
            joined = self.local_join(joined, more)
        return joined

    def join(self, left: Tensor, right: Tensor) -> Tensor:
        """Joins [G, X] and [G, Y]: [G, X + Y]."""
        return ops.concat((left, right), 1)

    def shard(self, mesh: CompiledMesh) -> None:
        """Declares the layouts: groups and tokens are sharded by data shards."""
        pair = mesh.layout("data", None)

        def joined(left, right):
            return [left[0], left[1] + right[1]]

        self.local_join = mesh.local(self.join, (pair, pair), (pair,), joined, first)
