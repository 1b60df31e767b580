"""Rotary positions (RoFormer, arXiv 2104.09864, eq. 34), halves of a head paired, in two compositions.

Legend: B batch, S sequence, N = B * S tokens, J key/value heads, R query heads of each, h head size,
W = J * (R + 2) * h columns of the projections, M longest sequence.
"""

import numpy as np
from mindspore import Tensor, nn, ops


class Rotary(nn.Cell):
    """Rotary positions (RoFormer, arXiv 2104.09864, eq. 34), halves paired: [..., S, h] with tables [S, h / 2]."""

    def __init__(self, length: int, head_size: int, theta: float):
        super().__init__()
        half = head_size // 2
        angles = np.outer(np.arange(length), theta ** (-np.arange(half) / half))
        self.cos_table = Tensor(np.cos(angles).astype(np.float32))
        self.sin_table = Tensor(np.sin(angles).astype(np.float32))
        self.split = ops.Split(-1, 2)
        self.join = ops.Concat(-1)
        self.take = ops.Gather()

    def tables(self, positions: Tensor):
        """Cosines and sines of positions [...]: two tensors [..., h / 2]."""
        return self.take(self.cos_table, positions, 0), self.take(self.sin_table, positions, 0)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = self.split(x)  # [..., S, h / 2]
        cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
        return self.join((first * cos - second * sin, second * cos + first * sin))


class RotationOfAll(nn.Cell):
    """Rotates queries and keys in one pass over all projections, and scales the queries: [N, W] -> [N, W].

    Every operator has inputs of equal shapes: on a GPU a broadcasting product takes four times as long. The plain twin
    is `Rotary`.

    Args:
        tables: see `rotation_tables`, for sequences of S.
        kv_heads: J of this device.
        dtype: of the projections.
    """

    def __init__(self, tables: tuple[np.ndarray, np.ndarray], kv_heads: int, head_size: int, dtype):
        super().__init__()
        self.kv_heads, self.head_size, self.length = kv_heads, head_size, len(tables[0])
        self.cos, self.sin = Tensor(tables[0], dtype), Tensor(tables[1], dtype)  # [S, (R + 2) * h]
        self.swap, self.product = Tensor(halves_swapped(head_size), dtype), ops.MatMul()

    def construct(self, qkv: Tensor) -> Tensor:
        repeats = (qkv.shape[0] // self.length, self.kv_heads)
        swapped = self.product(qkv.reshape(-1, self.head_size), self.swap).reshape(qkv.shape)  # [N, W]
        return qkv * ops.tile(self.cos, repeats) + swapped * ops.tile(self.sin, repeats)


def halves_swapped(size: int) -> np.ndarray:
    """Returns the matrix that swaps the halves of a head: [h, h]."""
    return np.roll(np.eye(size, dtype=np.float32), size // 2, 1)


def rotation_tables(rotary: Rotary | None, length: int, repeat: int, size: int, scale: float):
    """Returns the factors of one head group [R + 2, h] of (queries, key, value) at each place: two [M, (R + 2) * h].

    x * cos + swapped(x) * sin is the rotation, halves swapped. The queries' factors contain the scale of the scores,
    and those of values are 1 and 0.
    """
    cos = np.ones((length, repeat + 2, size), np.float32)
    sin = np.zeros((length, repeat + 2, size), np.float32)
    if rotary is not None:
        cosine, sine = (table.asnumpy()[:length, None] for table in (rotary.cos_table, rotary.sin_table))  # [M, 1, h/2]
        cos[:, : repeat + 1] = np.concatenate((cosine, cosine), -1)
        sin[:, : repeat + 1] = np.concatenate((-sine, sine), -1)
    cos[:, :repeat] *= scale
    sin[:, :repeat] *= scale
    return cos.reshape(length, -1), sin.reshape(length, -1)
