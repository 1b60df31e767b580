"""Makes router statistics: the one tensor in which a layer tells what its router did. See moe.metrics for its columns.

Legend: G routing groups, N tokens of a group, E experts.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr
from mindspore.ops.auto_generate import SplitWithSize

from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.moe.metrics import AUXILIARY, BALANCE, ENTROPY, Z
from switchyard.nn.masks import Selection


class Statistics(nn.Cell):
    """Makes the statistics of one layer: [G, 6 + 2 E] float32.

    Args:
        choices: K.
        router: whose `losses` say which of the balance loss and the z-loss it can give; z is a metric all the same.
    """

    def __init__(self, choices: int, router: nn.Cell):
        super().__init__()
        self.summed = Summed(choices, "switch" in router.losses, "z" in router.losses)

    def construct(self, routing: dict, auxiliary: Tensor, num_kept: Tensor, valid: Tensor) -> Tensor:
        """Sums up a Routing.

        Args:
            routing: the router's decision.
            auxiliary: weighted sum of the auxiliary losses, [G], see `losses.AuxiliaryLosses`.
            num_kept: choices that got a slot, [G].
            valid: 1 for a real token, 0 for padding, [G, N].
        """
        of_rows = (routing["logits"], routing["probabilities"], routing["expert_mask"], routing["importance"])
        return self.summed(*of_rows, valid, num_kept, auxiliary)[0]


class Summed(nn.Cell):
    """Computes the statistics with a gradient of its own; the plain twin is the functions of routing.losses.

    Autodiff makes seventy small operators of those functions, and on a GPU the host takes longer to issue one than the
    GPU to run it. Here what is summed over tokens stands side by side, is hidden behind `valid` once and summed once.

    With f = load / (tokens * K) and P = sum of p / tokens the balance loss is E * sum of f * P, times the tokens
    (arXiv 2101.03961, eq. 4): its gradient for a token's p is E * f. That of the z-loss, log(Z)^2, for its logits is
    2 * log(Z) * softmax(logits).
    """

    def __init__(self, choices: int, switch: bool, z: bool):
        super().__init__()
        self.choices, self.switch, self.z = choices, switch, z
        self.log_softmax, self.largest = ops.LogSoftmax(-1), ops.ReduceMax(keep_dims=True)
        self.exp, self.log = ops.Exp(), ops.Log()
        self.at_least, self.divide, self.concat = ops.Maximum(), ops.DivNoNan(), ops.Concat(-1)
        self.select, self.product, self.of_groups = Selection(), ops.MatMul(), ops.BatchMatMul()
        self.ones, self.split = ops.Ones(), SplitWithSize()

    def construct(self, logits, probabilities, chosen, mass, valid, num_kept, auxiliary) -> tuple:
        """Sums up a Routing.

        Args:
            logits, probabilities, chosen, mass: [G, N, E] each; the last is what counts as importance.
            valid: [G, N].
            num_kept, auxiliary: [G] each.

        Returns:
            Statistics [G, 6 + 2 E]. For the gradient: E * f [G, E], log(Z) [G, N, 1], log(softmax(logits)) [G, N, E].
        """
        groups, count, experts = logits.shape
        log_shares = self.log_softmax(logits)  # [G, N, E]
        partition = self.largest(logits, -1) - self.largest(log_shares, -1)  # log(Z), [G, N, 1]
        information = probabilities * self.log(self.at_least(probabilities, 1e-20))  # [G, N, E]
        entropy = self.product(information.reshape(-1, experts), self.ones((experts, 1), logits.dtype) * -1.0)
        real = valid.reshape(groups, count, 1)
        columns = (probabilities, partition * partition, entropy.reshape(real.shape), real, chosen, mass)
        rows = self.select(self.concat(columns), real, (groups, count, 3 * experts + 3))
        sums = self.of_groups(valid.reshape(groups, 1, count), rows).reshape(groups, -1)  # [G, 3 E + 3]
        mean, z, entropy, tokens, load, mass = self.split(sums, (experts, 1, 1, 1, experts, experts), 1)
        share = self.divide(load, tokens) * (experts / self.choices)  # E * f, [G, E]
        scalars = (self.balance(share, mean), z, auxiliary.reshape(groups, 1), entropy, num_kept.reshape(groups, 1))
        return self.concat((*scalars, tokens, load, mass)), share, partition, log_shares

    def balance(self, share, mean):
        """E * f and the sum of p, [G, E] each -> [G, 1]; 0 where the router gives no balance loss."""
        groups, experts = share.shape
        if not self.switch:
            return ops.zeros((groups, 1), share.dtype)
        return self.of_groups(share.reshape(groups, 1, experts), mean.reshape(groups, experts, 1)).reshape(groups, 1)

    def bprop(self, logits, probabilities, chosen, mass, valid, num_kept, auxiliary, out, d_out):
        groups, count, experts = logits.shape
        nothing = ops.zeros_like
        _, share, partition, log_shares = out
        d_stats = d_out[0]
        real = valid.reshape(groups, count, 1)
        d_probabilities, d_logits = nothing(probabilities), nothing(logits)
        if self.switch:
            of_expert = share * d_stats[:, BALANCE : BALANCE + 1]
            d_probabilities = real * of_expert.reshape(groups, 1, experts)
        if self.z:
            scale = (2.0 * d_stats[:, Z : Z + 1]).reshape(groups, 1, 1)
            d_logits = self.select(self.exp(log_shares) * (partition * scale), real, logits.shape)
        rest = (nothing(chosen), nothing(mass), nothing(valid), nothing(num_kept))
        return (d_logits, d_probabilities, *rest, d_stats[:, AUXILIARY])


def weighted_losses(stats: Tensor, count: Tensor, balance_factor: float, z_factor: float) -> Tensor:
    """Weighs the losses that statistics carry: what a network adds to its loss, [].

    Args:
        stats: of M layers, summed over groups, [M, 6 + 2 E].
        count: real tokens of all groups, []; where layers have different tokens, [M, 1].
        balance_factor: moe.aux_loss_factor.
        z_factor: moe.z_loss_factor.
    """
    weighed = stats[:, :ENTROPY] * weights(balance_factor, z_factor)  # [M, 3]
    return (weighed / ops.maximum(count, 1.0)).sum()


@constexpr
def weights(balance_factor: float, z_factor: float) -> Tensor:
    """Returns what the losses that statistics carry are multiplied by: [1, 3]."""
    found = np.ones((1, ENTROPY), np.float32)
    found[0, BALANCE], found[0, Z] = balance_factor, z_factor
    return Tensor(found)


class Beside(nn.Cell):
    """Puts what M conditional layers return side by side: statistics [G, X] or choices [N, K] of each; () of none."""

    def __init__(self):
        super().__init__()
        self.local_join, self.sharded = self.join, False

    def construct(self, parts: tuple):
        """Joins M tensors [G, X]: [G, M * X]."""
        if len(parts) == 0:
            return ()
        if not self.sharded and len(parts) > 1:
            return ops.concat(parts, 1)  # one operator, with one for the gradient
        joined = parts[0]
        for more in parts[1:]:
            joined = self.local_join(joined, more)
        return joined

    def join(self, left: Tensor, right: Tensor) -> Tensor:
        """Joins [G, X] and [G, Y]: [G, X + Y]."""
        return ops.concat((left, right), 1)

    def shard(self, mesh: CompiledMesh) -> None:
        """Declares the layouts: groups and tokens are sharded by data shards."""
        pair, self.sharded = mesh.layout("data", None), True

        def joined(left, right):
            return [left[0], left[1] + right[1]]

        self.local_join = mesh.local(self.join, (pair, pair), (pair,), joined, first)
