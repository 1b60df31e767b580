"""Parts of a Transformer: embedding, rotary positions, attention, dropout.

Legend: B batch, S sequence, N = B * S tokens, D width, H query heads, J key/value heads, R = H / J query heads of one
key/value head, h head size.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import FlashAttentionScore

from switchyard.config import ModelConfig
from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.distributed.placement import axes_of
from switchyard.nn.cast import Cast
from switchyard.nn.float_attention import FloatAttention
from switchyard.nn.fused import NONE
from switchyard.nn.half_attention import HalfAttention, flat_mask
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlice, NoiseSlices
from switchyard.nn.query_key_norm import create_query_key_norm
from switchyard.nn.rotary import Rotary, SplitAndRotate, rotation_tables
from switchyard.nn.softmax import Softmax

MASKED = -1e9  # added to the score of a position that must not be seen


class Embedding(nn.Cell):
    """Table [V, D]; tokens [...] -> [N, D]."""

    def __init__(self, entries: int, width: int, std: float, random: InitialWeights):
        super().__init__()
        self.table = random.normal(std, (entries, width), "table")
        self.take = ops.Gather()
        self.local = self.look_up

    def construct(self, tokens: Tensor) -> Tensor:
        return self.local(self.table, tokens)

    def look_up(self, table: Tensor, tokens: Tensor) -> Tensor:
        """Table [V, D], tokens [...] -> [N, D]."""
        return self.take(table, tokens.reshape(-1), 0)

    def shard(self, mesh: CompiledMesh) -> None:
        """Tokens [B, S] are sharded along B, the rows too; the table as `axes_of` says."""
        layouts = (mesh.layout(*axes_of(self.table.name, 2)), mesh.layout("data", None))
        self.local = mesh.local(self.look_up, layouts, (mesh.layout("data", None),), row_shape, first)


def row_shape(table, tokens):
    """Shape of the rows [N, D] of a table [V, D] at tokens [B, S]."""
    return [tokens[0] * tokens[1], table[1]]


class Linear(nn.Cell):
    """x W, or x W + b with a bias, which begins as zeros: [N, I] -> [N, O] in `dtype`."""

    def __init__(self, size_in: int, size_out: int, std: float, random: InitialWeights, dtype, bias: bool = False):
        super().__init__()
        self.dtype = dtype
        self.weight = random.normal(std, (size_in, size_out), "weight")
        self.bias = Parameter(Tensor(np.zeros(size_out, np.float32)), name="bias") if bias else None
        self.product = ops.MatMul()
        self.cast_x, self.cast_weight = Cast(dtype), Cast(dtype)
        self.local = self.add_bias
        self.lora = None  # see models.adapters

    def construct(self, x: Tensor) -> Tensor:
        x = self.cast_x(x)
        out = self.product(x, self.cast_weight(self.weight))
        if self.lora is not None:
            out = self.lora(x, out)
        return out if self.bias is None else self.local(out, self.bias)

    def add_bias(self, out: Tensor, bias: Tensor) -> Tensor:
        """Adds a bias [O] to rows [N, O]."""
        return out + bias.astype(out.dtype)

    def shard(self, mesh: CompiledMesh, out: str = "data") -> None:
        """The weight [I, O] is sharded as `axes_of` says, x by rows and as I, the result by `out` and as O.

        Where I is sharded the result is a sum over the model shards: AllReduce, or ReduceScatter where `out` is "rows".
        """
        size_in, size_out = axes_of(self.weight.name, 2)
        layouts = (mesh.layout("data", size_in), mesh.layout(size_in, size_out))
        self.product.shard(layouts, (mesh.layout(out, size_out),))
        self.cast_x.shard(mesh, "data", size_in)
        self.cast_weight.shard(mesh, size_in, size_out)
        if self.bias is not None:
            rows, bias = mesh.layout(out, size_out), mesh.layout(*axes_of(self.bias.name, 1))
            self.local = mesh.local(self.add_bias, (rows, bias), (rows,), first, first)


class Dropout(nn.Cell):
    """Zeroes a share `rate` of the values and scales the rest by 1 / (1 - rate): [N, D], noise [.., N, D] of U(0, 1).

    The noise is an input, so a resumed run draws what the uninterrupted one would have.
    """

    def __init__(self, rate: float, slices: NoiseSlices):
        super().__init__()
        self.rate, self.slice = rate, NoiseSlice(slices, rate > 0)
        self.local = self.drop

    def construct(self, x: Tensor, noise: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        return self.local(x, noise)

    def drop(self, x: Tensor, noise: Tensor) -> Tensor:
        """Returns what is left of x."""
        return x * ((self.slice(noise) >= self.rate).astype(mstype.float32) * (1.0 / (1.0 - self.rate)))

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards rows, and the noise with them."""
        rows = mesh.layout("rows", None)
        self.local = mesh.local(self.drop, (rows, mesh.layout(None, "rows", None)), (rows,), first, first)


def hidden(length: int, window: int | None = None) -> np.ndarray:
    """Returns where a position must not look, bool [S, S]: behind itself, and before its `window` last tokens."""
    seen = np.tri(length, dtype=bool)
    return ~seen if window is None else ~seen | np.tri(length, k=-window, dtype=bool)


def causal_mask(length: int, window: int | None = None) -> Tensor:
    """Returns what is added to scores [S, S]: 0 where a position may look, MASKED where it may not."""
    return Tensor(np.where(hidden(length, window), np.float32(MASKED), np.float32(0)))


def hidden_mask(length: int, window: int | None = None) -> Tensor:
    """Returns the same for FlashAttentionScore, uint8 [S, S]: 0 where a position may look, 1 where it may not."""
    return Tensor(hidden(length, window).astype(np.uint8))


class Attention(nn.Cell):
    """Causal multi-head (arXiv 1706.03762, eq. 1) or grouped-query (arXiv 2305.13245) attention: [N, D] -> [N, D].

    One matrix makes queries, keys and values, ordered key/value head by key/value head ([D, J * (R + 2) * h]), so that
    a slice of it by heads is whole.

    Args:
        model: its section of the configuration, which may ask for biases, for query/key norms, for heads of a size of
            their own, and for rotation of a part of a head.
        causal: `causal_mask` of the longest sequence, `hidden_mask` where attention is fused; the layers share one.
        std_out: initial standard deviation of the last matrix.
        random: hands out the initial weights.
        dtype: of the matrix products.
        fused: operators of the device, see nn.fused. HalfAttention serves sequences of model.seq_length.
            FlashAttentionScore makes scores, softmax and what they bring
            together in one, and keeps no [S, S] matrix for the backward pass.
        window: tokens that a position sees (Longformer, arXiv 2004.05150; Mistral, arXiv 2310.06825); None = all. The
            mask `causal` has it too.
    """

    def __init__(
        self,
        model: ModelConfig,
        causal: Tensor,
        std_out: float,
        random: InitialWeights,
        dtype,
        fused: frozenset[str] = NONE,
        window: int | None = None,
    ):
        super().__init__()
        self.kv_heads, self.head_size, self.window = model.kv_heads, model.size_of_head, window
        self.repeat = model.num_heads // self.kv_heads
        self.scale = self.head_size**-0.5
        width, mixed, bias = (
            self.kv_heads * (self.repeat + 2) * self.head_size,
            model.num_heads * self.head_size,
            model.attention_bias,
        )
        self.qkv = Linear(model.hidden_size, width, model.init_method_std, random, dtype, bias is not None)
        self.out = Linear(mixed, model.hidden_size, std_out, random, dtype, bias == "all")
        self.qk_norm = create_query_key_norm(model, fused)
        self.rotary = Rotary(causal.shape[0], model) if model.position == "rotary" else None
        self.split = ops.Split(2, 3)
        self.transpose = ops.Transpose()
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.hide = ops.BiasAdd()  # of a mask to the rows of a matrix: half the time of a broadcasting sum on CPU
        self.softmax = Softmax()
        self.mix = ops.BatchMatMul()
        self.causal = causal
        self.widen = Cast(mstype.float32)
        self.local = self.mix_heads
        self.fused = self._fused() if "FlashAttentionScore" in fused else None
        self.half, self.float, self.length = None, None, model.seq_length
        if "HalfAttention" in fused:
            self.half = HalfAttention(flat_mask(self.length, self.repeat, dtype, window), self.head_size)
            tables = rotation_tables(self.rotary, self.length, self.repeat, self.head_size, self.scale)
            self.rotate = SplitAndRotate(tables, self.repeat, self.head_size, dtype, model.rotary_size)
        if "FloatAttention" in fused:
            mask = flat_mask(self.length, 1, dtype, window)
            self.float = FloatAttention(mask, self.length, self.kv_heads, self.repeat, self.head_size, self.rotary)

    def construct(self, x: Tensor, batch: int, segments: Tensor = None) -> Tensor:
        """Every position sees itself and those before it, within its window and within its segment.

        `segments` [B, S] numbers the documents of a sequence; None lets a position see all of them. A cluster that the
        compiler shards refuses segments, see models.Decoder.
        """
        qkv, norms = self.qkv(x), ()
        if self.qk_norm is not None:
            norms = self.qk_norm.inputs(qkv)
        if segments is None:
            return self.widen(self.out(self.local(qkv, batch, *norms)))
        return self.widen(self.out(self.mix_heads(qkv, batch, *norms, segments=segments)))

    def mix_heads(
        self, qkv: Tensor, batch: int, one: Tensor = None, other: Tensor = None, segments: Tensor = None
    ) -> Tensor:
        """Projections [N, J * (R + 2) * h] -> what the heads bring together [N, J * R * h].

        `one` and `other` are the inputs of `qk_norm`, where there is one.
        """
        if self.qk_norm is not None:
            qkv = self.qk_norm.work(qkv, one, other)
        if self.half is not None and segments is None and qkv.shape[0] == batch * self.length:
            return self._attend_half(qkv, batch)
        if self.float is not None and segments is None and qkv.shape[0] == batch * self.length:
            return self.float(qkv, batch)
        query, key, value = self._split_heads(qkv, batch)
        length = query.shape[3]
        if self.rotary is not None:
            positions = ops.arange(length)
            cos, sin = self.rotary.tables(positions)  # [S, h / 2]
            query, key = self.rotary(query, cos, sin), self.rotary(key, cos, sin)
        mask, apart = self._mask(length), None
        if segments is not None:
            apart = ops.expand_dims(segments, 2) != ops.expand_dims(segments, 1)  # [B, S, S]
        if self.fused is not None:
            if apart is not None:
                mask = ops.expand_dims(ops.maximum(mask, apart.astype(mstype.uint8)), 1)  # [B, 1, S, S]
            return self._attend_fused(query, key, value, mask)
        return self._attend(query, key, value, mask, apart)

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards heads over the model shards, sequences over the data shards (arXiv 1909.08053, section 3)."""
        self.qkv.shard(mesh)
        self.out.shard(mesh, "rows")
        self.widen.shard(mesh, "rows", None)
        self.kv_heads = self.kv_heads // mesh.degrees.model_parallel
        self.fused = None if self.fused is None else self._fused()
        heads, repeat, length = mesh.layout("data", axes_of(self.qkv.weight.name, 2)[1]), self.repeat, mesh.length

        def shape(qkv, *norms):
            return [qkv[0], qkv[1] * repeat // (repeat + 2)]

        def of_slice(qkv):
            return self.mix_heads(qkv, qkv.shape[0] // length)

        def of_slice_with_norms(qkv, one, other):
            return self.mix_heads(qkv, qkv.shape[0] // length, one, other)

        work, inputs = of_slice, (heads,)
        if self.qk_norm is not None:
            work, inputs = of_slice_with_norms, (heads, *self.qk_norm.shard(mesh))
        mixed = mesh.local(work, inputs, (heads,), shape, first)

        def local(qkv, batch, *norms):  # of all devices, of which a device holds a part
            return mixed(qkv, *norms)

        self.local = local

    def _mask(self, length: int) -> Tensor:
        """Returns what hides from queries [S] the keys [S] after them."""
        return self.causal if length == self.causal.shape[0] else self.causal[:length, :length]

    def _split_heads(self, qkv: Tensor, batch: int):
        """Queries [B, J, R, S, h], keys [B, J, S, h], values [B, J, S, h]."""
        qkv = qkv.reshape(batch, -1, self.kv_heads, self.repeat + 2, self.head_size)  # [B, S, J, R + 2, h]
        qkv = self.transpose(qkv, (0, 2, 3, 1, 4))  # [B, J, R + 2, S, h]
        if self.repeat == 1:
            query, key, value = self.split(qkv)
        else:
            query, key, value = ops.split(qkv, [self.repeat, 1, 1], 2)
        return query, key.squeeze(2), value.squeeze(2)

    def _attend(self, query, key, value, mask, apart=None):
        """Queries [B, J, R, S, h], keys and values [B, J, T, h], mask [S, T] -> [B * S, J * R * h].

        `apart` [B, S, T] is true where a position must not look, besides the mask; None where there is no such place.
        """
        batch, heads, repeat, length, size = query.shape
        keys = key.shape[2]
        query = (query * self.scale).reshape(batch * heads, repeat * length, size)  # [B * J, R * S, h]
        scores = self.scores(query, key.reshape(batch * heads, keys, size))  # [B * J, R * S, T]
        scores = self.hide(scores.astype(mstype.float32).reshape(-1, length * keys), mask.reshape(-1))
        if apart is not None:
            hidden_from = (apart.astype(mstype.float32) * MASKED).reshape(batch, 1, length * keys)
            scores = scores.reshape(batch, heads * repeat, length * keys) + hidden_from  # [B, J * R, S * T]
        weights = self.softmax(scores.reshape(-1, keys)).astype(query.dtype)  # [B * J * R * S, T]
        weights = weights.reshape(batch * heads, repeat * length, keys)
        mixed = self.mix(weights, value.reshape(batch * heads, keys, size))  # [B * J, R * S, h]
        return self._join_heads(mixed.reshape(batch, heads * repeat, length, size))

    def _fused(self) -> FlashAttentionScore:
        """The operator for the heads of a device; keys outside the window are neither seen nor computed."""
        heads, before = self.kv_heads * self.repeat, {} if self.window is None else {"pre_tokens": self.window - 1}
        layout = {"input_layout": "BNSD", "sparse_mode": 0}
        return FlashAttentionScore(heads, scale_value=self.scale, next_tokens=0, **before, **layout)

    def _attend_fused(self, query, key, value, mask):
        """`_attend` by one operator: queries [B, J, R, S, h], keys and values [B, J, S, h], mask uint8 [S, S] or
        [B, 1, S, S]."""
        batch, heads, repeat, length, size = query.shape
        query = query.reshape(batch, heads * repeat, length, size)  # [B, H, S, h]
        return self._join_heads(self.fused(query, key, value, None, None, None, mask, None, None, None)[3])

    def _attend_half(self, qkv, batch):
        """`mix_heads` by operators that are fast on a GPU: projections [N, J * (R + 2) * h] -> [N, J * R * h].

        One transpose brings the heads before the positions, before queries, keys and values are apart, and one back.
        """
        heads, size = batch * self.kv_heads, self.head_size
        rows = self.transpose(qkv.reshape(batch, self.length, self.kv_heads, -1), (0, 2, 1, 3))  # [B, J, S, (R + 2) h]
        query, key, value = self.rotate(rows.reshape(heads * self.length, -1))  # [B * J * S, R * h], [.., h] twice
        query, key = query.reshape(heads, -1, size), key.reshape(heads, -1, size)  # [B * J, S * R, h], [B * J, S, h]
        mixed = self.half(query, key, value.reshape(heads, -1, size))  # [B * J, S * R, h]
        mixed = mixed.reshape(batch, self.kv_heads, self.length, -1)  # [B, J, S, R * h]
        return self.transpose(mixed, (0, 2, 1, 3)).reshape(batch * self.length, -1)

    def _join_heads(self, mixed):
        """[B, H, S, h] -> [B * S, H * h]."""
        batch, _, length, _ = mixed.shape
        return self.transpose(mixed, (0, 2, 1, 3)).reshape(batch * length, -1)
