"""Rotary positions (RoFormer, arXiv 2104.09864, eq. 34), halves of a head paired, in two compositions.

Legend: B batch, S sequence, N = B * S tokens, J key/value heads, R query heads of each, h head size,
r columns of a head that rotate, W = J * (R + 2) * h columns of the projections, M longest sequence.
"""

import numpy as np
from mindspore import Tensor, nn, ops

from switchyard.config import ModelConfig
from switchyard.nn.rotary_scaling import attention_factor, frequencies


class Rotary(nn.Cell):
    """Rotary positions (RoFormer, arXiv 2104.09864, eq. 34), halves paired: [..., S, h] with tables [S, r / 2].

    The first r columns of a head rotate, `model.partial_rotary` of them; the others stay. `model.rotary_scaling`
    changes the frequencies, and multiplies cosines and sines.

    Args:
        length: M, the longest sequence.
        model: its section of the configuration.
    """

    def __init__(self, length: int, model: ModelConfig):
        super().__init__()
        self.size, self.rest = model.rotary_size, model.size_of_head - model.rotary_size
        angles = np.outer(np.arange(length), frequencies(self.size, model.theta, model.rotary_scaling))
        factor = attention_factor(model.rotary_scaling)
        self.cos_table = Tensor((np.cos(angles) * factor).astype(np.float32))
        self.sin_table = Tensor((np.sin(angles) * factor).astype(np.float32))
        self.split = ops.Split(-1, 2)
        self.join = ops.Concat(-1)
        self.take = ops.Gather()

    def tables(self, positions: Tensor):
        """Cosines and sines of positions [...]: two tensors [..., r / 2]."""
        return self.take(self.cos_table, positions, 0), self.take(self.sin_table, positions, 0)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.rest == 0:
            return self.turn(x, cos, sin)
        turning, rest = ops.split(x, [self.size, self.rest], -1)  # [..., S, r], [..., S, h - r]
        return self.join((self.turn(turning, cos, sin), rest))

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates x [..., S, r] by tables [S, r / 2]."""
        first, second = self.split(x)  # [..., S, r / 2]
        cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
        return self.join((first * cos - second * sin, second * cos + first * sin))


class SplitAndRotate(nn.Cell):
    """Splits projections [B * J * S, (R + 2) * h] into queries [B * J * S, R * h], keys and values [B * J * S, h].

    Queries and keys are rotated, and queries scaled. Rows are those of a key/value head of a sequence, in the order of
    the sequence.

    A product with a constant matrix of zeros and ones picks the columns of a part, and those of the part with its
    halves swapped: on a GPU that takes a tenth of the time of a slice, and its values are exact. Every other operator
    has inputs of equal shapes: a broadcasting product takes four times as long. The plain twin is a split and `Rotary`.

    Args:
        tables: see `rotation_tables`, for sequences of S.
        repeat: R.
        head_size: h.
        dtype: of the projections.
        rotary_size: r, the first columns of a head, which rotate.
    """

    def __init__(
        self,
        tables: tuple[np.ndarray, np.ndarray],
        repeat: int,
        head_size: int,
        dtype,
        rotary_size: int | None = None,
    ):
        super().__init__()
        self.length, self.group = len(tables[0]), (repeat + 2) * head_size
        query, key = repeat * head_size, head_size
        both = query + key  # columns that rotate
        self.cos, self.sin = (Tensor(table[:, :both], dtype) for table in tables)  # [S, (R + 1) * h]
        same = np.eye(self.group, dtype=np.float32)
        swap = np.kron(np.eye(repeat + 2, dtype=np.float32), halves_swapped(head_size, rotary_size))
        self.same, self.swap = Tensor(same[:, :both], dtype), Tensor(swap[:, :both], dtype)
        self.values = Tensor(same[:, both:], dtype)
        picked = np.concatenate((same[:, :both], swap[:, :both], same[:, both:]), 1)  # [(R + 2) * h, (2 R + 3) * h]
        self.back = Tensor(picked.T.copy(), dtype)
        self.queries, self.keys = Tensor(np.eye(both, query), dtype), Tensor(np.eye(both, key, -query), dtype)
        self.product, self.product_t, self.join = ops.MatMul(), ops.MatMul(transpose_b=True), ops.Concat(1)
        self.tile = ops.Tile()  # functions fail in a compiled `bprop`

    def construct(self, rows: Tensor):
        cos, sin = self.factors(rows)
        turned = self.product(rows, self.same) * cos + self.product(rows, self.swap) * sin  # [B * J * S, (R + 1) * h]
        return self.product(turned, self.queries), self.product(turned, self.keys), self.product(rows, self.values)

    def factors(self, rows: Tensor) -> tuple:
        """Returns both tables for the rows of all sequences and key/value heads: [B * J * S, (R + 1) * h] each."""
        repeats = (rows.shape[0] // self.length, 1)
        return self.tile(self.cos, repeats), self.tile(self.sin, repeats)

    def bprop(self, rows, out, d_out):
        d_query, d_key, d_value = d_out
        cos, sin = self.factors(d_query)
        d_turned = self.product_t(d_query, self.queries) + self.product_t(d_key, self.keys)  # [B * J * S, (R + 1) * h]
        joined = self.join((d_turned * cos, d_turned * sin, d_value))  # [B * J * S, (2 R + 3) * h]
        return (self.product(joined, self.back),)


def halves_swapped(size: int, turning: int | None = None) -> np.ndarray:
    """Returns the matrix that swaps the halves of the first `turning` columns of a head, all where None: [h, h]."""
    turning, matrix = turning or size, np.eye(size, dtype=np.float32)
    matrix[:turning] = np.roll(matrix[:turning], turning // 2, 0)
    return matrix


def rotation_tables(rotary: Rotary | None, length: int, repeat: int, size: int, scale: float):
    """Returns the factors of one head group [R + 2, h] of (queries, key, value) at each place: two [M, (R + 2) * h].

    x * cos + swapped(x) * sin is the rotation, halves swapped. The queries' factors contain the scale of the scores,
    and those of values are 1 and 0.
    """
    cos = np.ones((length, repeat + 2, size), np.float32)
    sin = np.zeros((length, repeat + 2, size), np.float32)
    if rotary is not None:
        cosine, sine = (table.asnumpy()[:length, None] for table in (rotary.cos_table, rotary.sin_table))  # [M, 1, r/2]
        cos[:, : repeat + 1, : rotary.size] = np.concatenate((cosine, cosine), -1)
        sin[:, : repeat + 1, : rotary.size] = np.concatenate((-sine, sine), -1)
    cos[:, :repeat] *= scale
    sin[:, :repeat] *= scale
    return cos.reshape(length, -1), sin.reshape(length, -1)
