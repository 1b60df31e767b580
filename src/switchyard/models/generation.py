"""The two halves of generation: `Prefill` reads prompts, `Decode` goes on by one token a call.

Both read the layers of a Decoder and hold no weights of their own. No shape of theirs is a constant but the sizes of
the model: batch, prompt length and cache length may change from call to call. `Decode` has no arithmetic on shapes
either (every reshape has one open axis, ranges come from prefix sums), so that a graph loaded from MindIR becomes
wholly static for the shapes it is called with: a dynamic one costs ten times as much a token on CPU.

Legend: B batch, S prompt length, N = B * S, D width, V vocabulary, L layers, H query heads, J key/value heads,
R = H / J, h head size, T cache length, M longest sequence, K choices of a row.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.experts import FeedForwardExperts
from switchyard.kernels.softmax import Softmax
from switchyard.models.decoder import Decoder
from switchyard.models.layers import MASKED, Linear, Rotary


class Prefill(nn.Cell):
    """Reads whole prompts: tokens [B, S], right-padded, of real lengths [B] -> (logits [B, V], keys, values).

    The logits are those after each prompt's last token; keys and values are caches [L, B, J, S, h] in the model's
    compute dtype. What they hold behind a prompt's end is overwritten by `Decode` before it is seen.
    """

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def construct(self, tokens: Tensor, length: Tensor):
        decoder = self.decoder
        batch, count = tokens.shape
        places = ops.arange(count)
        valid = (ops.expand_dims(places, 0) < ops.expand_dims(length, 1)).astype(mstype.float32).reshape(-1)  # [N]
        x = decoder.embed(tokens, places)  # [N, D]
        nothing = ops.zeros((1, 1, 1), mstype.float32)
        keys, values = (), ()
        for layer in decoder.layers:
            mixed, key, value = layer.attention.attend_causal(layer.attention_norm(x), batch)  # [N, D], [B, J, S, h]
            x, _, _ = layer.feed(x + mixed, tokens, valid, nothing, 1)
            keys, values = (*keys, key.astype(decoder.dtype)), (*values, value.astype(decoder.dtype))
        last = ops.arange(batch) * count + (length - 1)  # [B]
        logits = decoder.logits(ops.gather(x, last, 0))  # [B, V]
        return logits, ops.stack(keys, 0), ops.stack(values, 0)


class Decode(nn.Cell):
    """One token a sequence: tokens [B], positions [B], caches [L, B, J, T, h] -> (logits [B, V], keys, values).

    `positions` are the places of the new tokens, below T; what the caches hold at and behind them is not read. A row
    of a conditional layer reads the weights of its K experts alone and nothing is sorted: dropless by construction.

    Made for few operators and none that broadcasts a large tensor, the slow kind on CPU. Routing whose form is not
    token choice goes the layer's own way.

    Args:
        decoder: whose layers are read.
        max_length: M, the longest sequence.
    """

    def __init__(self, decoder: Decoder, max_length: int):
        super().__init__()
        self.decoder, self.dtype = decoder, decoder.dtype
        attention = decoder.layers[0].attention
        self.heads, self.repeat, self.size = attention.kv_heads, attention.repeat, attention.head_size
        self.width = self.heads * self.repeat * self.size
        self.rotary = attention.rotary is not None
        cos, sin = rotation_tables(attention.rotary, max_length, self.repeat, self.size, attention.scale)
        self.cos, self.sin = Tensor(cos), Tensor(sin)
        self.swap = Tensor(np.roll(np.eye(self.size, dtype=np.float32), self.size // 2, 1))
        self.spread = Tensor(np.zeros((1, self.heads, 1, self.size), np.int32))
        self.spread_mask = Tensor(np.zeros((1, self.heads, self.repeat, 1), np.float32))
        self.unstack = ops.Unstack(0, len(decoder.layers))
        self.first_row = ops.StridedSlice(end_mask=0b01000)
        self.prefix = ops.CumSum()
        self.write = ops.TensorScatterElements(axis=2)
        self.take = ops.Gather()
        self.split = ops.Split(2, 3)
        self.scores, self.mix, self.product = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul(), ops.MatMul()
        self.softmax = Softmax()  # the training graph's: ops.Softmax differs by 4e-6, which sharp attention multiplies
        self.nothing = Tensor(np.zeros((1, 1, 1), np.float32))
        self.by_choice = chooses_tokens(decoder)
        self.norms = nn.CellList([PlainNorm(norm) for norm in _norms(decoder)])

    def construct(self, tokens: Tensor, position: Tensor, keys: Tensor, values: Tensor):
        decoder = self.decoder
        x = self.take(decoder.embedding.table, tokens, 0)  # [B, D]
        if decoder.position is not None:
            x = x + self.take(decoder.position.table, position, 0)
        turn = (self._table(self.cos, position), self._table(self.sin, position))
        places = self.first_row(keys, (0, 0, 0, 0, 0), (1, 1, 1, 0, 1), (1, 1, 1, 1, 1))  # [1, 1, 1, T, 1]
        places = self.prefix(ops.ones_like(places).astype(mstype.float32), 3).reshape(1, 1, 1, -1) - 1.0
        here = position.reshape(-1, 1, 1, 1)
        mask = (places > here.astype(mstype.float32)).astype(mstype.float32) * MASKED + self.spread_mask  # [B, J, R, T]
        here = here + self.spread  # [B, J, 1, h]
        valid = ops.ones_like(tokens).astype(mstype.float32).reshape(1, -1)  # [1, B]
        new_keys, new_values = (), ()
        old_keys, old_values = self.unstack(keys), self.unstack(values)  # L x [B, J, T, h]
        for index, layer in enumerate(decoder.layers):
            query, key, value = self._project(layer.attention, self.norms[2 * index](x), turn)
            key, value = self.write(old_keys[index], here, key), self.write(old_values[index], here, value)
            new_keys, new_values = (*new_keys, key), (*new_values, value)
            scores = self.scores(query, key).astype(mstype.float32) + mask  # [B, J, R, T]
            mixed = self.mix(self.softmax(scores).astype(self.dtype), value).reshape(-1, self.width)  # [B, D]
            x = x + layer.attention.out(mixed).astype(mstype.float32)
            x = x + self._feed(layer, self.norms[2 * index + 1](x), tokens, valid)
        logits = self._logits(self.norms[-1](x))  # [B, V]
        return logits, ops.stack(new_keys, 0), ops.stack(new_values, 0)

    def _table(self, table: Tensor, position: Tensor) -> Tensor:
        """Rows of a rotation table for all heads: [B] -> [B, J * (R + 2) * h]."""
        return ops.tile(self.take(table, position, 0), (1, self.heads))

    def _project(self, attention: nn.Cell, x: Tensor, turn: tuple):
        """[B, D] -> queries [B, J, R, h], scaled, and keys and values [B, J, 1, h], turned to their places."""
        qkv = attention.qkv(x).astype(mstype.float32)  # [B, J * (R + 2) * h]
        if self.rotary:
            swapped = self.product(qkv.reshape(-1, self.size), self.swap)  # [B * J * (R + 2), h]
            swapped = swapped.reshape(-1, self.heads * (self.repeat + 2) * self.size)
            qkv = qkv * turn[0] + swapped * turn[1]
        else:
            qkv = qkv * turn[0]
        qkv = qkv.astype(self.dtype).reshape(-1, self.heads, self.repeat + 2, self.size)  # [B, J, R + 2, h]
        if self.repeat == 1:
            return self.split(qkv)
        return ops.split(qkv, [self.repeat, 1, 1], 2)

    def _feed(self, layer: nn.Cell, x: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """The feed-forward of normed rows [B, D]; tokens [B]."""
        rows = ops.expand_dims(x, 0)  # [1, B, D]
        if not layer.conditional:
            return layer.feed_forward(rows).reshape(-1, self.width)
        moe, ids = layer.feed_forward, tokens.reshape(1, -1)
        if not self.by_choice:
            return moe(rows, valid, self.nothing, ids)[0].reshape(-1, self.width)
        context = {"valid": valid, "noise": self.nothing, "token_ids": ids, "task_ids": None}
        routing = moe.router(rows, context)
        rows = ops.expand_dims(x, 1)  # [B, 1, D]
        if moe.choices > 1:
            rows = ops.tile(rows, (1, moe.choices, 1)).reshape(-1, 1, self.width)  # [B * K, 1, D]
        out = moe.experts.blocks(rows, routing["experts"].reshape(-1))  # [B * K, 1, D]
        gates = routing["gates"].reshape(-1, 1, moe.choices)  # [B, 1, K]
        out = self.mix(gates, out.reshape(-1, moe.choices, self.width)).reshape(-1, self.width)  # [B, D]
        if moe.shared is not None:
            out = out + moe.shared(ops.expand_dims(x, 0)).reshape(-1, self.width)
        return out

    def _logits(self, x: Tensor) -> Tensor:
        """Normed rows [B, D] -> [B, V] float32."""
        decoder = self.decoder
        if decoder.tied:
            table = decoder.embedding.table.astype(self.dtype)
            return decoder.tied_product(x.astype(self.dtype), table).astype(mstype.float32)
        return decoder.head(x).astype(mstype.float32)


class PlainNorm(nn.Cell):
    """The plain twin of a norm of `switchyard.kernels.norm`: half its operators where no gradient is asked for."""

    def __init__(self, norm: nn.Cell):
        super().__init__()
        self.norm, self.centred = norm, hasattr(norm, "bias")
        self.mean, self.rsqrt = ops.ReduceMean(keep_dims=True), ops.Rsqrt()

    def construct(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, D]."""
        if self.centred:
            x = x - self.mean(x, -1)
        x = x * self.rsqrt(self.mean(x * x, -1) + self.norm.eps) * self.norm.gain.reshape(1, -1)
        if self.centred:
            x = x + self.norm.bias.reshape(1, -1)
        return x


def rotation_tables(rotary: Rotary | None, length: int, repeat: int, size: int, scale: float):
    """What one head group [R + 2, h] of (queries, key, value) at each place is multiplied by: two [M, (R + 2) * h].

    x * cos + swapped(x) * sin is the rotation, halves swapped; the scale of the scores is folded into the queries'
    part, and the value's part is 1 and 0.
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


def chooses_tokens(decoder: Decoder) -> bool:
    """Whether rows choose experts at evaluation, in every conditional layer."""
    routers = [layer.feed_forward.router for layer in decoder.layers if layer.conditional]
    return all((router.eval_form or router.form) == "token_choice" for router in routers)


def cast_products(decoder: Decoder) -> None:
    """Keeps the weights of matrix products in the compute dtype: what each product would cast them to anyway."""
    for _, cell in decoder.cells_and_names():
        if isinstance(cell, (Linear, FeedForwardExperts)):
            for parameter in cell.get_parameters():
                parameter.set_dtype(cell.dtype)


def _norms(decoder: Decoder) -> list:
    """The norms in the order of their use."""
    found = []
    for layer in decoder.layers:
        found += [layer.attention_norm, layer.feed_forward_norm]
    return [*found, decoder.norm]
