"""The two halves of generation: `Prefill` reads prompts, `models.decode.Decode` goes on by one token a call.

Both read the layers of a Decoder. No shape of theirs is a constant but the sizes of
the model: batch, prompt length and cache length may change from call to call. They have no arithmetic on shapes
either: a reshape has one open axis, ranges are prefix sums, an axis is split by a gather with an index of two axes. A
graph that was loaded from MindIR becomes wholly static so, for the shapes it is called with; one with shapes to be
worked out at run time costs ten times as much a token on CPU.

Legend: B batch, S prompt length, N = B * S, D width, V vocabulary, L layers, H query heads, J key/value heads,
R = H / J, h head size, W = J * (R + 2) * h, T cache length or keys that a part of the queries sees, M longest
sequence, E experts, K choices of a row, b rows of a block, P blocks.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.distributed.expert_shard import ExpertShard
from switchyard.models.decoder import Decoder
from switchyard.models.single_experts import EachExpert, separates
from switchyard.moe.dispatch.dispatchers import BlockDispatcher
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.layer import MoELayer
from switchyard.moe.routing.base import make_context
from switchyard.nn.layers import MASKED, Linear
from switchyard.nn.rotary import halves_swapped, rotation_tables
from switchyard.nn.softmax import Softmax


class _Half(nn.Cell):
    """Holds what both halves share: embedding, projections turned to their places, the head."""

    def __init__(self, decoder: Decoder, max_length: int):
        super().__init__()
        self.decoder, self.dtype, self.last_place = decoder, decoder.dtype, max_length - 1
        attention = decoder.layers[0].attention
        self.heads, self.repeat, self.size = attention.kv_heads, attention.repeat, attention.head_size
        self.width = decoder.embedding.table.shape[1]  # D
        windows = [layer.attention.window or 0 for layer in decoder.layers]  # 0: all before it
        self.windows = tuple(sorted(set(windows)))
        self.mask_of = tuple(self.windows.index(window) for window in windows)
        self.turns = attention.rotary is not None
        cos, sin = rotation_tables(attention.rotary, max_length, self.repeat, self.size, attention.scale)
        self.cos, self.sin = Tensor(cos), Tensor(sin)
        self.swap = Tensor(halves_swapped(self.size, attention.rotary.size if self.turns else None))
        self.norms = nn.CellList([PlainNorm(norm) for norm in _norms(decoder)])
        self.by_choice = chooses_tokens(decoder)
        self.nothing = Tensor(np.zeros((1, 1, 1), np.float32))
        self.take, self.product, self.prefix = ops.Gather(), ops.MatMul(), ops.CumSum()
        self.scores, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.split = ops.Split(2, 3)
        # That of evaluation: another one differs by up to 4e-6, which sharp attention multiplies
        self.softmax = Softmax()

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens and positions [N] -> [N, D]."""
        x = self.take(self.decoder.embedding.table, tokens, 0)
        if self.decoder.position is not None:
            x = x + self.take(self.decoder.position.table, position, 0)
        return x

    def turn(self, position: Tensor) -> tuple:
        """Returns what projections at positions [N] are multiplied by: two [N, W]."""
        cos, sin = self.take(self.cos, position, 0), self.take(self.sin, position, 0)  # [N, (R + 2) * h]
        return ops.tile(cos, (1, self.heads)), ops.tile(sin, (1, self.heads))

    def project(self, attention: nn.Cell, x: Tensor, turn: tuple) -> Tensor:
        """[N, D] -> [N, J, R + 2, h]: queries, scaled, and a key, both turned to their places, and a value."""
        qkv = attention.qkv(x).astype(mstype.float32)  # [N, W]
        if attention.qk_norm is not None:
            qkv = attention.qk_norm(qkv)
        if self.turns:
            swapped = self.product(qkv.reshape(-1, self.size), self.swap)  # [N * J * (R + 2), h]
            qkv = qkv * turn[0] + swapped.reshape(-1, self.heads * (self.repeat + 2) * self.size) * turn[1]
        else:
            qkv = qkv * turn[0]
        return qkv.astype(self.dtype).reshape(-1, self.heads, self.repeat + 2, self.size)

    @staticmethod
    def mask(distance: Tensor, window: int) -> Tensor:
        """Returns what is added to scores: 0 where the key is seen, MASKED elsewhere.

        Args:
            distance: from a key to the query; below 0 the key stands behind the query.
            window: one of `self.windows`.
        """
        unseen = (distance < 0).astype(mstype.float32)
        if window > 0:
            unseen = unseen + (distance >= window).astype(mstype.float32)
        return unseen * MASKED

    def parts(self, qkv: Tensor):
        """[., J, R + 2, ...] -> queries [., J, R, ...], a key and a value [., J, 1, ...]."""
        if self.repeat == 1:
            return self.split(qkv)
        return ops.split(qkv, [self.repeat, 1, 1], 2)

    def feed(self, layer: nn.Cell, x: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """Applies the feed-forward to normed rows [N, D] of tokens [1, N], valid [1, N] -> [N, D]."""
        rows = ops.expand_dims(x, 0)  # [1, N, D]
        if not layer.conditional:
            return layer.feed_forward(rows).reshape(-1, self.width)
        moe = layer.feed_forward
        if not self.by_choice:
            return moe(rows, valid, self.nothing, tokens)[0].reshape(-1, self.width)
        routing = self.decide(moe.router, x, rows, tokens, valid)
        out = self.work(moe, x, routing["expert_index"].reshape(-1), routing["gates"].reshape(-1, moe.choices))
        if moe.shared is not None:
            out = out + moe.shared(rows).reshape(-1, self.width)
        return out

    def decide(self, router: nn.Cell, x: Tensor, rows: Tensor, tokens: Tensor, valid: Tensor) -> dict:
        """Routes rows [N, D], the same [1, N, D], of tokens and valid [1, N], as one group."""
        context, scores = make_context(valid, self.nothing, tokens, None, router.state(), None), ()
        if router.overrides_construct:
            return router(rows, context)
        for part in router.scores(x, tokens.reshape(-1), None):
            scores = (*scores, ops.expand_dims(part, 0))  # [1, N, X]
        return router.route(scores, context)

    def logits(self, x: Tensor) -> Tensor:
        """Projects [B, D] on the vocabulary: [B, V] float32."""
        decoder, x = self.decoder, self.norms[-1](x)
        if decoder.tied:
            table = decoder.embedding.table.astype(self.dtype)
            return decoder.tied_product(x.astype(self.dtype), table).astype(mstype.float32)
        return decoder.head(x).astype(mstype.float32)


class Prefill(_Half):
    """Reads whole prompts: tokens [B, S], right-padded, of real lengths [B] -> (logits [B, V], 2 L caches).

    The logits are those after each prompt's last token. Caches [B, J, S, h] are those of the keys, layer by layer, then
    those of the values, in the compute dtype. What they hold behind a prompt's end is overwritten by `Decode` before it
    is seen.

    Queries are read in `parts`, each with the keys up to its last one: what is not seen is hardly computed, and scores
    are small enough to stay in a core's cache. On one CPU core, 1,024 tokens, 4 heads of 32: 7.1 ms in 4 parts against
    11.6 in one; a mask that is broadcast to the heads brought that to 18.3.

    Args:
        decoder: whose layers are read.
        max_length: M, the longest sequence.
        block: b, rows of an expert's block (see dispatch.BlockPlan); S must be a multiple of it.
        shard: the experts that this process of a job holds; None: all.
        parts: A, of the queries of a sequence; S must be a multiple of it.
        copies: whether the experts' weights may be copied, see models.single_experts; False: every weight is one of
            the decoder's.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_length: int,
        block: int = 1,
        shard: ExpertShard | None = None,
        parts: int = 1,
        copies: bool = True,
    ):
        super().__init__(decoder, max_length)
        self.plans, self.expert_shard = block_plans(decoder, block, shard), shard
        self.block, self.transpose = block, ops.Transpose()
        self.count, self.cut, self.cut_row = parts, ops.Split(3, parts), ops.Split(1, parts)
        self.join_keys, self.join_scores, self.join_places = ops.Concat(3), ops.Concat(4), ops.Concat(1)
        self.spread_mask = Tensor(np.zeros((1, self.heads, self.repeat, 1, 1), np.float32))
        layers = conditional_layers(decoder) if copies and shard is None and has_separate_experts(decoder) else []
        self.experts = nn.CellList([EachExpert(moe.experts) for moe in layers])
        self.first_row = ops.StridedSlice(end_mask=0b10)
        self.smallest, self.largest = ops.ReduceMin(), ops.ReduceMax(keep_dims=True)
        self.fill, self.zero = ops.MaskedFill(), Tensor(0.0, mstype.float32)

    def construct(self, tokens: Tensor, length: Tensor):
        ones = ops.ones_like(tokens)  # [B, S]
        places = self.prefix(ones, 1) - 1
        number = (self.prefix(ones, 0) - 1) * (self.largest(places) + 1) + places  # [B, S]: which of the N rows
        valid = (places < ops.expand_dims(length, 1)).astype(mstype.float32).reshape(1, -1)  # [1, N]
        row = self.first_row(places, (0, 0), (1, 0), (1, 1)).astype(mstype.float32)  # [1, S]
        masks = self.masks(row, length)
        position = ops.minimum(places, self.last_place).reshape(-1)  # [N]; padding may lie behind the last place
        x, turn = self.embed(tokens.reshape(-1), position), self.turn(position)  # [N, D]
        keys, values = (), ()
        for index, layer in enumerate(self.decoder.layers):
            qkv = self.project(layer.attention, self.norms[2 * index](x), turn)  # [N, J, R + 2, h]
            qkv = self.transpose(self.take(qkv, number, 0), (0, 2, 3, 1, 4))  # [B, J, R + 2, S, h]
            query, key, value = self.parts(qkv)  # [B, J, R, S, h], [B, J, 1, S, h] twice
            mixed = self.attend(query, key, value, masks[self.mask_of[index]])  # [N, H * h]
            x = x + layer.attention.out(mixed).astype(mstype.float32)
            x = x + self.feed(layer, self.norms[2 * index + 1](x), tokens.reshape(1, -1), valid)
            keys, values = (*keys, key.squeeze(2)), (*values, value.squeeze(2))  # [B, J, S, h]
        last = self.smallest(number, 1) + length - 1  # [B]
        return self.logits(self.take(x, last, 0)), *keys, *values

    def masks(self, row: Tensor, length: Tensor) -> tuple:
        """Returns for each of `self.windows` the masks of the parts of the queries, of the shape of the scores: a sum
        of equal shapes takes half the time of one that broadcasts.

        With a window there is a mask of all keys for each part. Without one, a part sees all keys before it, and a mask
        is that of its own keys; the parts share one.

        Args:
            row: places [1, S].
            length: of the prompts, [B].
        """
        spread = ops.zeros_like(length).astype(mstype.float32).reshape(-1, 1, 1, 1, 1) + self.spread_mask
        rows, masks = self.cut_row(row), ()  # A times [1, S / A]
        for window in self.windows:
            found = ()
            for part in range(self.count if window > 0 else 1):
                keys = joined(rows[: part + 1], self.join_places)  # [1, T]
                distance = rows[part].reshape(1, 1, 1, -1, 1) - keys.reshape(1, 1, 1, 1, -1)  # [1, 1, 1, S / A, T]
                found = (*found, self.mask(distance, window) + spread)  # [B, J, R, S / A, T]
            masks = (*masks, found)
        return masks

    def attend(self, query: Tensor, key: Tensor, value: Tensor, masks: tuple) -> Tensor:
        """Queries [B, J, R, S, h], keys and values [B, J, 1, S, h], masks: see `masks` -> [N, H * h]."""
        if self.repeat > 1:
            key, value = (ops.tile(part, (1, 1, self.repeat, 1, 1)) for part in (key, value))  # [B, J, R, S, h]
        keys, values, found = self.cut(key), self.cut(value), ()  # A times [B, J, R, S / A, h]
        for part, rows in enumerate(self.cut(query)):
            scores = self.scores_of(rows, keys, part, masks)  # [B, J, R, S / A, T]
            seen = joined(values[: part + 1], self.join_keys)  # [B, J, R, T, h]
            found = (*found, self.mix(self.softmax(scores).astype(self.dtype), seen))  # [B, J, R, S / A, h]
        mixed = joined(found, self.join_keys)  # [B, J, R, S, h]
        return self.transpose(mixed, (0, 3, 1, 2, 4)).reshape(-1, self.heads * self.repeat * self.size)  # [N, H * h]

    def scores_of(self, rows: Tensor, keys: tuple, part: int, masks: tuple) -> Tensor:
        """Queries of a part [B, J, R, S / A, h], A keys of that shape -> scores up to its keys [B, J, R, S / A, T]."""
        if len(masks) == self.count:
            seen = joined(keys[: part + 1], self.join_keys)  # [B, J, R, T, h]
            return self.scores(rows, seen).astype(mstype.float32) + masks[part]
        own = self.scores(rows, keys[part]).astype(mstype.float32) + masks[0]  # [B, J, R, S / A, S / A]
        if part == 0:
            return own
        before = joined(keys[:part], self.join_keys)  # [B, J, R, T - S / A, h]
        return self.join_scores((self.scores(rows, before).astype(mstype.float32), own))

    def work(self, moe: nn.Cell, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """Rows [N, D], experts [N * K], gates [N, K] -> [N, D], by blocks of one expert each."""
        if len(self.experts) > 0:
            return self.experts[moe.place](x, experts.reshape(-1, moe.choices), gates)
        if self.expert_shard is not None:
            experts = self.expert_shard.own(experts)
        dispatch_index, combine_index, block_expert = self.plans[0](experts)
        slots = self.take(x, dispatch_index // moe.choices, 0).reshape(-1, self.block, self.width)  # [P, b, D]
        slots = moe.eval_dispatcher.through(moe.experts, slots, block_expert).reshape(-1, self.width)  # [P * b, D]
        out = self.take(slots, combine_index, 0)  # [N * K, D]; padding reads a slot of another prompt's row
        out = self.fill(out, experts.reshape(-1, 1) >= self.plans[0].experts, self.zero) * gates.reshape(-1, 1)
        if moe.choices > 1:
            out = out.reshape(-1, moe.choices, self.width).sum(1)  # [N, D]
        return out if self.expert_shard is None else self.expert_shard.total(out)


def joined(parts: tuple, concat) -> Tensor:
    """Returns parts of a sequence joined by `concat`; one part alone as it is, without a copy."""
    return parts[0] if len(parts) == 1 else concat(parts)


class CacheWriter(nn.Cell):
    """Writes one token of each sequence into a cache [B, J, T, h], in place, and returns the cache.

    The cache may be an input of the graph, which then is what the caller gave: no step copies a cache.
    """

    def __init__(self, heads: int):
        super().__init__()
        axis = np.eye(3, dtype=np.int32)
        self.heads_index = Tensor(axis[1] * np.arange(heads, dtype=np.int32).reshape(1, -1, 1, 1))  # [1, J, 1, 3]
        self.batch_axis, self.place_axis = Tensor(axis[0]), Tensor(axis[2])
        self.prefix, self.write = ops.CumSum(), ops.ScatterNdUpdate()

    def index(self, position: Tensor) -> Tensor:
        """Returns which rows of a cache the positions [B] are: [B, J, 1, 3]."""
        row = (self.prefix(ops.ones_like(position), 0) - 1).reshape(-1, 1, 1, 1)
        return row * self.batch_axis + self.heads_index + position.reshape(-1, 1, 1, 1) * self.place_axis

    def construct(self, cache: Tensor, index: Tensor, new: Tensor) -> Tensor:
        """Writes `new` [B, J, 1, h]."""
        return self.write(cache, index, new)


class OpenBlockPlan(nn.Cell):
    """dispatch.BlockPlan of one group without arithmetic on shapes: C choices, a multiple of b, P = C / b + E blocks.

    Of P * b slots at least E stay empty, the last among them; a choice of no expert (E) is given that one.
    """

    def __init__(self, experts: int, block: int):
        super().__init__()
        self.experts, self.block = experts, block
        self.spare = Tensor(np.zeros(experts * block, np.int32))
        self.each = Tensor(np.arange(experts, dtype=np.float32).reshape(1, -1))
        self.prefix, self.sum = ops.CumSum(), ops.ReduceSum()
        self.write = ops.TensorScatterElements(axis=0)
        self.largest = ops.ReduceMax()

    def construct(self, experts: Tensor):
        """Experts [C] int32 -> (dispatch_index [P * b], combine_index [C], block_expert [P]), int32."""
        mine = (experts.astype(mstype.float32).reshape(-1, 1) == self.each).astype(mstype.float32)  # [C, E]
        count = self.sum(mine, 0)  # [E]
        last = self.prefix(ops.ceil(count / self.block), 0)  # [E]: the block behind an expert's last
        first = (last - ops.ceil(count / self.block)) * self.block  # [E]: its first slot
        combine_index = self.sum((self.prefix(mine, 0) - 1.0 + first.reshape(1, -1)) * mine, 1).astype(
            mstype.int32
        )  # [C]
        number = self.prefix(ops.ones_like(experts), 0) - 1  # [C]
        empty = ops.concat((ops.zeros_like(experts), self.spare))  # [P * b]
        end = self.prefix(ops.ones_like(empty), 0) - 1  # [P * b]
        combine_index = ops.select(
            experts < self.experts, combine_index, self.largest(end) + ops.zeros_like(combine_index)
        )
        dispatch_index = self.write(empty, combine_index, number)
        starts = end.reshape(-1, self.block)[:, :1].astype(mstype.float32) / self.block  # [P, 1]
        block_expert = self.sum((starts >= last.reshape(1, -1)).astype(mstype.float32), 1).astype(mstype.int32)  # [P]
        return dispatch_index, combine_index, ops.minimum(block_expert, self.experts - 1)


def block_plans(model: nn.Cell, block: int, shard: ExpertShard | None = None) -> nn.CellList:
    """Returns the plan of blocks of b rows, where a layer is conditional; of this process's experts alone."""
    experts = [layer.feed_forward.expert_num for layer in model.layers if layer.conditional]
    if shard is not None:
        experts = [shard.count]
    return nn.CellList([OpenBlockPlan(count, block) for count in experts[:1]])


class PlainNorm(nn.Cell):
    """The plain twin of a norm of `switchyard.nn.norm`: half its operators where no gradient is asked for."""

    def __init__(self, norm: nn.Cell):
        super().__init__()
        self.norm, self.centred = norm, hasattr(norm, "bias")
        self.mean, self.rsqrt = ops.ReduceMean(keep_dims=True), ops.Rsqrt()

    def construct(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        if self.centred:
            x = x - self.mean(x, -1)
        x = x * self.rsqrt(self.mean(x * x, -1) + self.norm.eps) * self.norm.gain.reshape(1, -1)
        if self.centred:
            x = x + self.norm.bias.reshape(1, -1)
        return x


def chooses_tokens(decoder: Decoder) -> bool:
    """Returns whether every conditional layer is the shipped one and its tokens choose experts without drops."""
    layers = conditional_layers(decoder)
    return all(type(one) is MoELayer and isinstance(one.eval_dispatcher, BlockDispatcher) for one in layers)


def conditional_layers(decoder: Decoder) -> list:
    """Returns the conditional feed-forwards in the order of the layers."""
    return [layer.feed_forward for layer in decoder.layers if layer.conditional]


def has_separate_experts(decoder: Decoder) -> bool:
    """Returns whether `Prefill` gives each expert operators of its own, see models.single_experts."""
    layers = conditional_layers(decoder)
    return len(layers) > 0 and chooses_tokens(decoder) and all(separates(moe.experts) for moe in layers)


def cast_products(decoder: Decoder) -> None:
    """Keeps the weights of matrix products in the compute dtype: what each product would cast them to anyway."""
    for _, cell in decoder.cells_and_names():
        if isinstance(cell, (Linear, FeedForwardExperts)):
            for parameter in cell.get_parameters():
                parameter.set_dtype(cell.dtype)


def _norms(decoder: Decoder) -> list:
    """Returns the norms in the order of their use."""
    found = []
    for layer in decoder.layers:
        found += [layer.attention_norm, layer.feed_forward_norm]
    return [*found, decoder.norm]
