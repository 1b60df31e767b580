"""Causal attention in float32 of operators that are fast on CPU, with a gradient of its own.

Legend: B batch, S sequence, J key/value heads, R query heads of each, P = B * J, h head size, W = J * (R + 2) * h
columns of the projections.
"""

from functools import lru_cache

import numpy as np
from mindspore import Tensor, nn, ops

from switchyard.nn.half_attention import HalfAttention
from switchyard.nn.rotary import Rotary, halves_swapped, rotation_tables


@lru_cache(4)  # the layers share them
def places_of_heads(length: int, kv_heads: int, repeat: int) -> tuple[Tensor, ...]:
    """Returns which rows [S, J, R + 2] of h columns are queries [J, R, S], keys [J, S] and values [J, S], and the
    place of each row among all three in turn."""
    places = np.arange(length * kv_heads * (repeat + 2)).reshape(length, kv_heads, repeat + 2).transpose(1, 2, 0)
    parts = [part.reshape(-1) for part in np.split(places, [repeat, repeat + 1], 1)]  # of [J, R + 2, S]
    return tuple(Tensor(part.astype(np.int32)) for part in (*parts, np.argsort(np.concatenate(parts))))


@lru_cache(4)
def places_of_rows(length: int, heads: int) -> tuple[Tensor, Tensor]:
    """Returns which rows [H, S] come in turn as [S, H], and the inverse."""
    places = np.arange(length * heads, dtype=np.int32)
    return (
        Tensor(places.reshape(heads, length).T.reshape(-1).copy()),
        Tensor(places.reshape(length, heads).T.reshape(-1).copy()),
    )


class SplitHeads(nn.Cell):
    """Projections [B, S * J * (R + 2), h] -> queries [B, J * R * S, h], keys and values [B, J * S, h].

    Rows are copied by index: a third of the time of a transpose and a split. The plain twin is
    `nn.layers.Attention._split_heads`.
    """

    def __init__(self, length: int, kv_heads: int, repeat: int):
        super().__init__()
        self.queries, self.keys, self.values, self.back = places_of_heads(length, kv_heads, repeat)
        self.take, self.join = ops.Gather(), ops.Concat(1)

    def construct(self, rows: Tensor) -> tuple:
        return self.take(rows, self.queries, 1), self.take(rows, self.keys, 1), self.take(rows, self.values, 1)

    def bprop(self, rows, out, d_out):
        return (self.take(self.join(d_out), self.back, 1),)  # [B, J * (R + 2) * S, h] -> [B, S * J * (R + 2), h]


class JoinHeads(nn.Cell):
    """[B, H * S, h] -> [B, S * H, h]."""

    def __init__(self, length: int, heads: int):
        super().__init__()
        self.there, self.back = places_of_rows(length, heads)
        self.take = ops.Gather()

    def construct(self, mixed: Tensor) -> Tensor:
        return self.take(mixed, self.there, 1)

    def bprop(self, mixed, out, d_out):
        return (self.take(d_out, self.back, 1),)


class Rotate(nn.Cell):
    """x cos + swapped(x) sin with the halves of a head swapped by a product: [B, X * S, h], tables [S, h].

    The plain twin is `nn.rotary.Rotary`, and a product with the scale.
    """

    def __init__(self, cos: np.ndarray, sin: np.ndarray, turning: int):
        super().__init__()
        self.cos, self.sin = Tensor(cos), Tensor(sin)
        self.swap = Tensor(halves_swapped(cos.shape[1], turning))
        self.tile, self.product = ops.Tile(), ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [B * X * S, h]
        times = (rows.shape[0] // self.cos.shape[0], 1)  # once a step: all layers share them
        turned = rows * self.tile(self.cos, times) + self.product(rows, self.swap) * self.tile(self.sin, times)
        return turned.reshape(x.shape)


class MaskedAttention(HalfAttention):
    """HalfAttention with a mask [S * S] that BiasAdd adds, which takes 0.6 of the time of a broadcasting sum on CPU."""

    def __init__(self, mask: Tensor, head_size: int):
        super().__init__(mask, head_size, 1)
        self.hide = ops.BiasAdd()

    def probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        scores = self.product_t(query, key)  # [P, R * S, S]
        hidden = self.hide(scores.reshape(-1, self.mask.shape[0]), self.mask)  # [P * R, S * S]
        return self.softmax(hidden.reshape(scores.shape))


class FloatAttention(nn.Cell):
    """Brings together what the heads see: projections [B * S, W], B -> [B * S, J * R * h].

    The plain twin is `nn.layers.Attention.mix_heads`, whose softmax in training is less exact.

    Args:
        mask: `flat_mask` of S; the layers share it.
        length: S.
        kv_heads: J.
        repeat: R.
        head_size: h.
        rotary: rotates queries and keys; None = nothing does.
    """

    def __init__(self, mask: Tensor, length: int, kv_heads: int, repeat: int, head_size: int, rotary: Rotary | None):
        super().__init__()
        self.length, self.heads, self.size, self.scale = length, kv_heads, head_size, head_size**-0.5
        self.split, self.join = SplitHeads(self.length, kv_heads, repeat), JoinHeads(self.length, kv_heads * repeat)
        self.attend = MaskedAttention(mask, head_size)
        self.queries, self.keys = None, None
        if rotary is not None:
            tables = rotation_tables(rotary, self.length, 1, head_size, self.scale)  # [S, 3 * h], queries first
            of_query, of_key = ([np.split(table, 3, 1)[part] for table in tables] for part in (0, 1))
            self.queries, self.keys = Rotate(*of_query, rotary.size), Rotate(*of_key, rotary.size)

    def construct(self, qkv: Tensor, batch: int) -> Tensor:
        query, key, value = self.split(qkv.reshape(batch, -1, self.size))
        if self.queries is None:
            query = query * self.scale
        else:
            query, key = self.queries(query), self.keys(key)
        heads = batch * self.heads
        query, key = query.reshape(heads, -1, self.size), key.reshape(heads, -1, self.size)
        mixed = self.attend(query, key, value.reshape(heads, -1, self.size))  # [P, R * S, h]
        return self.join(mixed.reshape(batch, -1, self.size)).reshape(batch * self.length, -1)
