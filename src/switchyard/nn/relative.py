"""Attention with the relative positions of T5 (arXiv 1910.10683, section 2.1), over itself or over an encoder.

Legend: B batch, S queries of a sequence, T keys of a sequence, D width, H heads, h head size, R buckets, L longest
sequence.
"""

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.distributed.placement import axes_of
from switchyard.nn.cast import Cast
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.layers import MASKED, Linear, causal_mask
from switchyard.nn.softmax import Softmax


def relative_buckets(distance: np.ndarray, causal: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each distance: place of the key - place of the query, [...] int -> [...] int64.

    Half of the buckets hold one distance each; the others grow with its logarithm up to `max_distance`, from which on
    there is one. An encoder has half of all for keys behind the query; a causal decoder sees no such keys.
    """
    distance, ahead = np.asarray(distance, np.int64), 0
    if not causal:
        buckets //= 2
        ahead = np.where(distance > 0, buckets, 0)
    size = np.maximum(-distance, 0) if causal else np.abs(distance)
    exact = buckets // 2
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = np.minimum(exact + (ratio * np.float32(buckets - exact)).astype(np.int64), buckets - 1)
    return np.where(size < exact, size, far) + ahead


class RelativeBias(nn.Cell):
    """Makes the bias of attention's scores: table [R, H] -> [H, S, T] float32, `MASKED` where a causal key is later.

    Made of a small product, a tile and reshapes: their gradients are cheap, that of a gather of S * T rows is not.

    Args:
        config: of the stack: relative positions; model.seq_length.
        causal: whether a query sees no later keys.
        length: L.
    """

    def __init__(self, config: Config, causal: bool, length: int):
        super().__init__()
        own, self.length = config.seq2seq, length
        self.buckets = own.relative_attention_num_buckets
        distances = np.concatenate((np.arange(length), np.arange(-length, 0)))  # at d mod 2 L
        found = relative_buckets(distances, causal, self.buckets, own.relative_attention_max_distance)
        self.choice = Tensor(np.eye(self.buckets, dtype=np.float32)[found])  # [2 L, R]
        self.causal = causal_mask(length) if causal else None
        self.product, self.turn = ops.MatMul(), ops.Transpose()

    def construct(self, table: Tensor, queries: int, keys: int) -> Tensor:
        """Takes the table [R, H] and S and T, at most L: [H, S, T]."""
        size = max(queries, keys)
        choice = self.choice
        if size < self.length:
            choice = ops.concat((choice[:size], choice[2 * self.length - size :]))  # [2 * size, R]
        row = self.turn(self.product(choice, table), (1, 0))  # [H, 2 * size]; the bias of d at d mod 2 * size
        rows = ops.tile(row, (1, queries))[:, : queries * (2 * size - 1)]  # query i begins at -i mod 2 * size
        bias = rows.reshape(-1, queries, 2 * size - 1)[:, :, :keys]  # [H, S, T]
        if self.causal is not None:
            bias = bias + self.causal[:queries, :keys]
        return bias


class RelativeAttention(nn.Cell):
    """Lets queries [B * S, D] look at memory [B * T, D]: their own rows, or those of an encoder; [B * S, D] -> same.

    As in T5 scores are not scaled, the initial standard deviation of the queries' matrix is smaller instead. Keys and
    values come of one matrix, head by head, so that a slice of it by heads is whole.

    Args:
        config: of the stack.
        random: hands out the initial weights.
        dtype: of the matrix products.
        bias: makes the bias of relative positions; None: cross-attention, which has none.
    """

    def __init__(self, config: Config, random: InitialWeights, dtype, bias: RelativeBias | None):
        super().__init__()
        width, self.heads, factor = config.model.hidden_size, config.model.num_heads, config.seq2seq.initializer_factor
        self.head_size = config.model.size_of_head
        inner = self.heads * self.head_size
        self.q = Linear(width, inner, factor * (width * self.head_size) ** -0.5, random, dtype)
        self.kv = Linear(width, 2 * inner, factor * width**-0.5, random, dtype)
        self.out = Linear(inner, width, factor * inner**-0.5, random, dtype)
        self.bias, self.dtype = bias, dtype
        self.hides = bias is None or bias.causal is None  # keys of padding; a causal query sees none
        self.scores, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.transpose, self.split, self.softmax = ops.Transpose(), ops.Split(0, 2), Softmax()
        self.widen = Cast(mstype.float32)
        self.local_cross, self.local_self = self.mix_cross, self.mix_self

    def construct(self, x: Tensor, memory: Tensor, keep: Tensor, table: Tensor) -> Tensor:
        """keep [B, T]: 1 = a real key, 0 = padding; table [R, H] of relative positions, not read without a bias."""
        query, kv = self.q(x), self.kv(memory)  # [B * S, H * h], [B * T, H * 2 * h]
        mixed = self.local_cross(query, kv, keep) if self.bias is None else self.local_self(query, kv, keep, table)
        return self.widen(self.out(mixed))

    # ---- local to one device
    def mix_cross(self, query: Tensor, kv: Tensor, keep: Tensor) -> Tensor:
        """Queries [B * S, H * h], keys and values [B * T, H * 2 * h], keep [B, T] -> [B * S, H * h]."""
        query, key, value = self.split_heads(query, kv, keep.shape[0])
        return self.attend(query, key, value, self.hide(self.product(query, key, keep), keep))

    def mix_self(self, query: Tensor, kv: Tensor, keep: Tensor, table: Tensor) -> Tensor:
        """Does `mix_cross` with the bias of relative positions, of a table [R, H]."""
        query, key, value = self.split_heads(query, kv, keep.shape[0])
        scores = self.product(query, key, keep)  # [B, H, S, T]
        scores = scores + self.bias(table, scores.shape[2], scores.shape[3])
        return self.attend(query, key, value, self.hide(scores, keep))

    def split_heads(self, query: Tensor, kv: Tensor, batch: int) -> tuple:
        """Returns queries [B * H, S, h], keys and values [B * H, T, h]."""
        size = self.head_size
        heads = query.shape[1] // size  # of this device
        query = self.transpose(query.reshape(batch, -1, heads, size), (0, 2, 1, 3))  # [B, H, S, h]
        kv = self.transpose(kv.reshape(batch, -1, heads, 2, size), (3, 0, 2, 1, 4))  # [2, B, H, T, h]
        key, value = self.split(kv)
        length, keys = query.shape[2], kv.shape[3]
        return (
            query.reshape(batch * heads, length, size),
            key.reshape(batch * heads, keys, size),
            value.reshape(batch * heads, keys, size),
        )

    def product(self, query: Tensor, key: Tensor, keep: Tensor) -> Tensor:
        """Computes the scores of queries [B * H, S, h] and keys [B * H, T, h]: [B, H, S, T] float32."""
        scores = self.scores(query, key).astype(mstype.float32)  # [B * H, S, T]
        return scores.reshape(keep.shape[0], -1, scores.shape[1], scores.shape[2])

    def hide(self, scores: Tensor, keep: Tensor) -> Tensor:
        """Adds MASKED to scores [B, H, S, T] of padding, where it could be seen."""
        if not self.hides:
            return scores
        return scores + ((1.0 - keep) * MASKED).reshape(keep.shape[0], 1, 1, -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        """Mixes values [B * H, T, h] by scores [B, H, S, T]: [B * S, H * h]."""
        batch, heads, length, keys = scores.shape
        weights = self.softmax(scores).astype(self.dtype).reshape(batch * heads, length, keys)
        mixed = self.mix(weights, value).reshape(batch, heads, length, -1)  # [B * H, S, h] -> [B, H, S, h]
        return self.transpose(mixed, (0, 2, 1, 3)).reshape(batch * length, -1)

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards heads over the model shards, sequences over the data shards."""
        self.q.shard(mesh)
        self.kv.shard(mesh)
        self.out.shard(mesh, "rows")
        self.widen.shard(mesh, "rows", None)
        heads, pair = mesh.layout("data", axes_of(self.q.weight.name, 2)[1]), mesh.layout("data", None)
        inputs = (heads, heads, pair)
        self.local_cross = mesh.local(self.mix_cross, inputs, (heads,), first, first)
        table = mesh.layout(*axes_of("relative_bias", 2))
        self.local_self = mesh.local(self.mix_self, (*inputs, table), (heads,), first, first)
