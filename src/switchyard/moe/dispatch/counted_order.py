"""Places choices by counting: what plan.ChoiceOrder finds by two sorts, for a GPU, where a sort is slow.

Legend: G groups, N rows of a group, E experts, K choices of a row, T = N * K choices of a group, b choices of a block,
Q = T / b blocks, X = E + 1 experts and "nowhere".
"""

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import constexpr

from switchyard.moe.dispatch.capacity import EXACT_FLOAT

BLOCK = 128  # most choices of a block: a matrix of this size is small, and few blocks are left


def countable(choices: int) -> bool:
    """Returns whether T choices of a group divide into blocks of which few are left."""
    return math.gcd(choices, BLOCK) >= 32


class CountedOrder(nn.Cell):
    """Finds the place of each choice among its expert's: first choices before second ones, each by row.

    The place of a choice is the number of choices before it: a prefix sum, in two products with triangular matrices of
    ones. Counts are exact in float32 below 2^24. On an H200 the two sorts of 16,384 choices take 1.5 ms. The plain twin
    is `plan.ChoiceOrder` with order "position".
    """

    def __init__(self, experts: int, choices: int):
        super().__init__()
        self.experts, self.choices = experts, choices
        self.one_hot, self.product = ops.OneHot(axis=0), ops.MatMul()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        weights = np.ones((1, experts + 1), np.float32)
        weights[0, experts] = EXACT_FLOAT
        self.weights = Tensor(weights)

    def construct(self, experts: Tensor) -> Tensor:
        """Places, from 0 on, of experts [G, T]: [G, T] float32; at least 2^24 - 1 where the expert is E, nowhere."""
        groups, total = experts.shape
        if self.choices > 1:
            experts = ops.transpose(experts.reshape(groups, -1, self.choices), (0, 2, 1))  # first choices first
        masks = self.one_hot(experts.reshape(-1), self.experts + 1, self.on, self.off)  # [X, G * T]
        numbers = self.counts(masks.reshape(-1, total)).reshape(masks.shape)  # from 1 on
        position = self.product(self.weights, masks * numbers).reshape(groups, total) - 1.0
        if self.choices == 1:
            return position
        return ops.transpose(position.reshape(groups, self.choices, -1), (0, 2, 1)).reshape(groups, total)

    def counts(self, masks: Tensor) -> Tensor:
        """Counts ones up to each place, the place included: [X * G, T] -> [X * G, T]."""
        rows, total = masks.shape
        block = math.gcd(total, BLOCK)
        blocks = total // block
        within = self.product(masks.reshape(-1, block), upper(block, 0)).reshape(rows, blocks, block)  # [X * G, Q, b]
        before = self.product(within[:, :, -1], upper(blocks, 1))  # [X * G, Q]: ones in the blocks before
        return (within + ops.expand_dims(before, 2)).reshape(rows, total)


@constexpr
def upper(size: int, start: int) -> Tensor:
    """Returns ones on and above the diagonal, or with `start` 1 above it alone: [size, size]."""
    return Tensor(np.triu(np.ones((size, size), np.float32), start))
