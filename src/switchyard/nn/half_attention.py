"""Causal attention in half precision of operators that are fast on a GPU, where no fused operator exists.

Legend: P = B * J key/value heads of all sequences, R query heads of each, S sequence, h head size.
"""

from functools import lru_cache

import numpy as np
from mindspore import Tensor, nn, ops

HIDDEN = -3e4  # added to a score that must not be seen: exp of it is 0, and float16 holds it


@lru_cache(2)  # the layers share one, or two where some have a window
def flat_mask(length: int, repeat: int, dtype, window: int | None = None) -> Tensor:
    """Returns what is added to the scores of one key/value head: [S * S * R], 0 or HIDDEN."""
    hidden = np.triu(np.full((length, length), HIDDEN, np.float32), 1)
    if window is not None:
        hidden += np.tril(np.full((length, length), HIDDEN, np.float32), -window)
    return Tensor(np.repeat(hidden, repeat, 0).reshape(-1), dtype)


class HalfAttention(nn.Cell):
    """softmax(Q K^T + mask) V (arXiv 1706.03762, eq. 1): queries [P, S * R, h], keys, values [P, S, h] -> as queries.

    Scores and probabilities stay in the type of the queries. The gradient, with A = softmax(..) and the sums of rows
    d = sum(dO * O):
        dS = A * (dO V^T - d),  dQ = dS K,  dK = dS^T Q,  dV = A^T dO.
    `- d` is one more column of the product dO V^T, and the mask has the shape of the scores, because a broadcasting
    operator takes four times as long on a GPU as one of equal shapes. The plain twin is `nn.layers.Attention._attend`.

    Args:
        mask: `flat_mask` of S and R; all layers share one.
        head_size: h.
        columns: of the product that adds `- d`; on a GPU a product wants rows of 16 bytes.
    """

    def __init__(self, mask: Tensor, head_size: int, columns: int = 8):
        super().__init__()
        self.mask = mask
        self.product, self.product_t = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
        self.t_product, self.row_sums = ops.BatchMatMul(transpose_a=True), ops.MatMul()
        self.tile, self.softmax, self.join = ops.Tile(), ops.Softmax(-1), ops.Concat(-1)
        self.ones, self.columns = Tensor(np.ones((head_size, columns)), mask.dtype), columns
        self.first, self.fill = Tensor(np.eye(1, columns), mask.dtype), ops.Ones()

    def construct(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.product(self.probabilities(query, key), value)  # [P, S * R, h]

    def probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        """Queries [P, S * R, h], keys [P, S, h] -> [P, S * R, S]."""
        scores = self.product_t(query, key)  # [P, S * R, S]
        shape = scores.shape
        mask = self.tile(self.mask.reshape(1, shape[1], shape[2]), (shape[0], 1, 1))  # once a step: all layers share it
        return self.softmax(scores + mask)

    def bprop(self, query, key, value, out, d_out):
        weights = self.probabilities(query, key)  # [P, S * R, S]
        heads, rows, size = out.shape
        sums = self.row_sums((d_out * out).reshape(-1, size), self.ones)  # in each column the same
        sums = sums.reshape(heads, rows, self.columns)
        column = self.row_sums(self.fill((heads * key.shape[1], 1), out.dtype), self.first)  # 1, 0, 0, .. a row
        column = column.reshape(heads, key.shape[1], self.columns)
        d_scores = weights * self.product_t(self.join((d_out, -sums)), self.join((value, column)))  # [P, S * R, S]
        return self.product(d_scores, key), self.t_product(d_scores, query), self.t_product(weights, d_out)
