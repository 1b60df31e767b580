"""The three parts of an encoder-decoder's generation: `Encode` reads inputs, `Begin` the first tokens of the answers,
and `Continue` goes on by one token a call.

They read the layers of a Seq2Seq and have no arithmetic on shapes, see models.generation; so they share its way through
a feed-forward.

Legend: B batch, S tokens of an input, P first tokens of an answer, N = B * S or B * P rows, D width, V vocabulary, L
layers of the decoder, H heads, h head size, T cache length, M longest sequence, b rows of a block.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.distributed.expert_shard import ExpertShard
from switchyard.models.decode import Decode
from switchyard.models.generation import CacheWriter, PlainNorm, Prefill, _Half, block_plans, chooses_tokens
from switchyard.models.seq2seq import Seq2Seq, Stack
from switchyard.nn.layers import MASKED
from switchyard.nn.relative import RelativeBias
from switchyard.nn.softmax import Softmax

INPUTS = ("attention_norm", "cross_attention_norm", "feed_forward_norm")  # norms of a layer in the order of their use


class _Part(nn.Cell):
    """Holds what the parts share: a stack's norms and relative positions, attention, the feed-forward.

    Args:
        model: whose layers are read.
        stack: its encoder or its decoder.
        max_length: M.
    """

    feed, decide = _Half.feed, _Half.decide

    def __init__(self, model: Seq2Seq, stack: Stack, max_length: int):
        super().__init__()
        self.model, self.stack, self.dtype, self.last_place = model, stack, model.dtype, max_length - 1
        attention = stack.layers[0].attention
        self.heads, self.size = attention.heads, attention.head_size
        self.width = model.embedding.table.shape[1]  # D
        kinds = [kind for kind in INPUTS if hasattr(stack.layers[0], kind)]
        self.norms_each = len(kinds)
        found = [getattr(layer, kind) for layer in stack.layers for kind in kinds]
        self.norms = nn.CellList([PlainNorm(norm) for norm in (*found, stack.norm)])
        self.choice = Tensor(distance_choice(attention.bias, max_length))  # [2 M - 1, R]
        self.by_choice = chooses_tokens(model)
        self.nothing = Tensor(np.zeros((1, 1, 1), np.float32))
        self.take, self.product, self.prefix = ops.Gather(), ops.MatMul(), ops.CumSum()
        self.scores, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.transpose, self.softmax = ops.Transpose(), Softmax()  # Softmax: see models.generation
        self.split = ops.Split(2, 2)
        self.first_row = ops.StridedSlice(end_mask=0b10)
        self.first_place = ops.StridedSlice(end_mask=0b01000)
        self.smallest, self.largest = ops.ReduceMin(), ops.ReduceMax(keep_dims=True)
        self.fill, self.zero = ops.MaskedFill(), Tensor(0.0, mstype.float32)

    def distances(self, key: Tensor, query: Tensor) -> Tensor:
        """Returns the rows of `choice` for places of keys and of queries, int32, broadcast."""
        return ops.clamp(key - query + self.last_place, 0, 2 * self.last_place)

    def biases(self) -> Tensor:
        """Returns the bias of every distance: [2 M - 1, H]."""
        return self.product(self.choice, self.stack.relative_bias)

    def count(self, tokens: Tensor) -> tuple:
        """Numbers tokens [B, S]: (place in its sequence, number of its row), [B, S] int32 each."""
        ones = ops.ones_like(tokens)
        places = self.prefix(ones, 1) - 1
        return places, (self.prefix(ones, 0) - 1) * (self.largest(places) + 1) + places

    def places_of(self, cache: Tensor) -> Tensor:
        """Returns the places of a cache [L, B, H, T, h]: [1, T] int32."""
        one = self.first_place(cache, (0, 0, 0, 0, 0), (1, 1, 1, 0, 1), (1, 1, 1, 1, 1))  # [1, 1, 1, T, 1]
        return self.prefix(ops.ones_like(one).astype(mstype.float32), 3).reshape(1, -1).astype(mstype.int32) - 1

    def hidden(self, places: Tensor, length: Tensor) -> Tensor:
        """Returns what is added to scores of keys at places [B, T] or [1, T], of lengths [B]: [B, 1, 1, T]."""
        behind = (places >= ops.expand_dims(length, 1)).astype(mstype.float32)  # [B, T]
        return ops.expand_dims(ops.expand_dims(behind, 1), 1) * MASKED

    def queries(self, attention: nn.Cell, x: Tensor, number: Tensor) -> Tensor:
        """Rows [N, D], numbered [B, S] -> queries [B, H, S, h]."""
        found = attention.q(x).reshape(-1, self.heads, self.size)  # [N, H, h]
        return self.transpose(self.take(found, number, 0), (0, 2, 1, 3))

    def keys_values(self, attention: nn.Cell, x: Tensor, number: Tensor) -> tuple:
        """Rows [N, D], numbered [B, S] -> keys and values [B, H, S, h]."""
        found = attention.kv(x).reshape(-1, self.heads, 2, self.size)  # [N, H, 2, h]
        key, value = self.split(self.transpose(self.take(found, number, 0), (0, 2, 3, 1, 4)))  # of [B, H, 2, S, h]
        return key.squeeze(2), value.squeeze(2)

    def attend(self, attention: nn.Cell, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Queries [B, H, S, h], keys and values [B, H, T, h], mask to [B, H, S, T] -> [N, D]."""
        scores = self.scores(query, key).astype(mstype.float32) + mask
        mixed = self.mix(self.softmax(scores).astype(self.dtype), value)  # [B, H, S, h]
        rows = self.transpose(mixed, (0, 2, 1, 3)).reshape(-1, self.heads * self.size)  # [N, H * h]
        return attention.out(rows).astype(mstype.float32)

    def whole(self, tokens: Tensor, length: Tensor) -> tuple:
        """Returns of tokens [B, S] of real lengths [B]: row numbers [B, S], valid [1, N], bias [1, H, S, S]."""
        places, number = self.count(tokens)
        row = self.first_row(places, (0, 0), (1, 0), (1, 1))  # [1, S]
        index = self.distances(row.reshape(1, -1), row.reshape(-1, 1))  # [S, S]
        bias = ops.expand_dims(self.transpose(self.take(self.biases(), index, 0), (2, 0, 1)), 0)
        valid = (places < ops.expand_dims(length, 1)).astype(mstype.float32).reshape(1, -1)
        return number, valid, bias


class Encode(_Part):
    """Reads inputs: tokens [B, S], right-padded, of real lengths [B] -> keys and values [L, B, H, S, h] that the layers
    of the decoder see.

    Args:
        model: whose layers are read.
        max_length: M.
        block: b, rows of an expert's block (see dispatch.BlockPlan); S must be a multiple of it.
        shard: the experts that this process of a job holds; None: all.
    """

    work = Prefill.work

    def __init__(self, model: Seq2Seq, max_length: int, block: int = 1, shard: ExpertShard | None = None):
        super().__init__(model, model.encoder, max_length)
        self.plans, self.block, self.expert_shard = block_plans(model, block, shard), block, shard
        self.experts = nn.CellList([])

    def construct(self, tokens: Tensor, length: Tensor):
        number, valid, bias = self.whole(tokens, length)
        mask = bias + self.hidden(self.count(tokens)[0], length)  # [B, H, S, S]
        x = self.take(self.model.embedding.table, tokens.reshape(-1), 0)  # [N, D]
        for index, layer in enumerate(self.stack.layers):
            seen = self.norms[2 * index](x)
            key, value = self.keys_values(layer.attention, seen, number)
            x = x + self.attend(layer.attention, self.queries(layer.attention, seen, number), key, value, mask)
            x = x + self.feed(layer, self.norms[2 * index + 1](x), tokens.reshape(1, -1), valid)
        memory, keys, values = self.norms[-1](x), (), ()
        for layer in self.model.decoder.layers:
            key, value = self.keys_values(layer.cross_attention, memory, number)
            keys, values = (*keys, key), (*values, value)
        return ops.stack(keys, 0), ops.stack(values, 0)


class _Answer(_Part):
    """Holds what both parts of the decoder share."""

    def __init__(self, model: Seq2Seq, max_length: int):
        super().__init__(model, model.decoder, max_length)
        self.unstack = ops.Unstack(0, len(model.decoder.layers))

    def logits(self, x: Tensor) -> Tensor:
        """Projects [B, D] on the vocabulary: [B, V] float32."""
        model, x = self.model, self.norms[-1](x)
        if model.tied:
            table = model.embedding.table.astype(self.dtype)
            return model.tied_product((x * model.scale).astype(self.dtype), table).astype(mstype.float32)
        return model.head(x).astype(mstype.float32)


class Begin(_Answer):
    """Reads the first tokens of answers: [B, P], right-padded, of real lengths [B], and what `Encode` gave of inputs of
    lengths [B] -> (logits [B, V] after each last token, 2 L caches [B, H, P, h]: keys, then values).

    Args:
        model, max_length, block, shard: see Encode.
    """

    work = Prefill.work

    def __init__(self, model: Seq2Seq, max_length: int, block: int = 1, shard: ExpertShard | None = None):
        super().__init__(model, max_length)
        self.plans, self.block, self.expert_shard = block_plans(model, block, shard), block, shard
        self.experts = nn.CellList([])

    def construct(self, tokens: Tensor, length: Tensor, memory_keys: Tensor, memory_values: Tensor, memory: Tensor):
        number, valid, bias = self.whole(tokens, length)
        row = self.first_row(self.count(tokens)[0], (0, 0), (1, 0), (1, 1)).astype(mstype.float32)  # [1, P]
        mask = bias + (row.reshape(1, 1, 1, -1) > row.reshape(1, 1, -1, 1)).astype(mstype.float32) * MASKED
        cross = self.hidden(self.places_of(memory_keys), memory)  # [B, 1, 1, S]
        cross_keys, cross_values = self.unstack(memory_keys), self.unstack(memory_values)
        x, keys, values = self.take(self.model.embedding.table, tokens.reshape(-1), 0), (), ()  # [N, D]
        for index, layer in enumerate(self.stack.layers):
            seen = self.norms[3 * index](x)
            key, value = self.keys_values(layer.attention, seen, number)
            keys, values = (*keys, key), (*values, value)
            x = x + self.attend(layer.attention, self.queries(layer.attention, seen, number), key, value, mask)
            query = self.queries(layer.cross_attention, self.norms[3 * index + 1](x), number)
            x = x + self.attend(layer.cross_attention, query, cross_keys[index], cross_values[index], cross)
            x = x + self.feed(layer, self.norms[3 * index + 2](x), tokens.reshape(1, -1), valid)
        last = self.smallest(number, 1) + length - 1  # [B]
        return self.logits(self.take(x, last, 0)), *keys, *values


class Continue(_Answer):
    """Decodes one token an answer: tokens [B], positions [B], what `Encode` gave of inputs of lengths [B], and the 2 L
    caches [B, H, T, h] of `Begin`, which are written in place -> logits [B, V].

    Args:
        model, max_length, shard: see Encode.
    """

    work = Decode.work

    def __init__(self, model: Seq2Seq, max_length: int, shard: ExpertShard | None = None):
        super().__init__(model, max_length)
        self.expert_shard = shard
        self.write = CacheWriter(self.heads)

    def construct(self, tokens, position, memory_keys, memory_values, memory: Tensor, *caches: Tensor):
        places, here = self.places_of(ops.expand_dims(caches[0], 0)), ops.expand_dims(position, 1)  # [1, T], [B, 1]
        bias = self.take(self.biases(), self.distances(places, here), 0)  # [B, T, H]
        bias = ops.expand_dims(self.transpose(bias, (0, 2, 1)), 2)  # [B, H, 1, T]
        mask = bias + self.hidden(places, position + 1)
        cross = self.hidden(self.places_of(memory_keys), memory)  # [B, 1, 1, S]
        cross_keys, cross_values = self.unstack(memory_keys), self.unstack(memory_values)
        at, values = self.write.index(position), len(self.stack.layers)  # [B, H, 1, 3], the first cache of values
        valid = ops.ones_like(tokens).astype(mstype.float32).reshape(1, -1)  # [1, B]
        x = self.take(self.model.embedding.table, tokens, 0)  # [B, D]
        for index, layer in enumerate(self.stack.layers):
            seen = self.norms[3 * index](x)
            key, value = self.split(layer.attention.kv(seen).reshape(-1, self.heads, 2, self.size))  # [B, H, 1, h]
            key, value = self.write(caches[index], at, key), self.write(caches[values + index], at, value)
            x = x + self.attend(layer.attention, self.query(layer.attention, seen), key, value, mask)
            query = self.query(layer.cross_attention, self.norms[3 * index + 1](x))
            x = x + self.attend(layer.cross_attention, query, cross_keys[index], cross_values[index], cross)
            x = x + self.feed(layer, self.norms[3 * index + 2](x), tokens.reshape(1, -1), valid)
        return self.logits(x)

    def query(self, attention: nn.Cell, x: Tensor) -> Tensor:
        """Rows [B, D] -> queries [B, H, 1, h]."""
        return attention.q(x).reshape(-1, self.heads, 1, self.size)


def distance_choice(bias: RelativeBias, max_length: int) -> np.ndarray:
    """Returns which bucket each distance - (M - 1), ..., M - 1 of a key from its query has: [2 M - 1, R] of 0 and 1."""
    choice, length = bias.choice.asnumpy(), bias.length
    return choice[np.arange(1 - max_length, max_length) % (2 * length)]
