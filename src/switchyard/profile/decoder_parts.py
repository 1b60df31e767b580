"""The parts of a decoder's training step.

Legend: N tokens of a micro-batch, D width, H query heads, J key/value heads, R = H / J, h head size, S sequence, B
batch, G routing groups, w tokens of a window that is routed as one row.
"""

from collections.abc import Iterator

import numpy as np
from mindspore import Tensor, nn, ops

from switchyard.models.decoder import Decoder
from switchyard.nn.float_attention import FloatAttention
from switchyard.profile.parts import (
    FLOAT,
    Function,
    Part,
    moe_parts,
    network_part,
    norm_part,
    optimizer_parts,
    random_rows,
    text_head_part,
)
from switchyard.training.step import TrainStep


class Attending(nn.Cell):
    """Attends in sequences: x [N, D] -> [N, D]."""

    def __init__(self, attention: nn.Cell, batch: int):
        super().__init__(auto_prefix=False)
        self.attention, self.batch = attention, batch

    def construct(self, x: Tensor):
        return self.attention(x, self.batch)


class Positions(nn.Cell):
    """Turns queries [B, J, R, S, h] and keys [B, J, S, h] to their places."""

    def __init__(self, rotary: nn.Cell):
        super().__init__()
        self.rotary = rotary

    def construct(self, query: Tensor, key: Tensor):
        cos, sin = self.rotary.tables(ops.arange(query.shape[3]))
        return self.rotary(query, cos, sin), self.rotary(key, cos, sin)


class Turning(nn.Cell):
    """Turns queries [B, J, R, S, h] and keys [B, J, S, h] to their places as FloatAttention does."""

    def __init__(self, attention: FloatAttention):
        super().__init__(auto_prefix=False)
        self.attention = attention

    def construct(self, query: Tensor, key: Tensor):
        return self.attention.queries(query), self.attention.keys(key)


def decoder_parts(step: TrainStep, batch: tuple[np.ndarray, ...]) -> Iterator[Part]:
    """Yields the parts of a decoder's step, for a micro-batch of tokens, labels, valid [B, S] and noise [J, N, D]."""
    model = step.model
    tokens, labels, valid, noise = map(Tensor, batch)
    x = random_rows(tokens.size, step.config.model.hidden_size)
    passes = 2.0 * x.size * FLOAT
    embed, table = Function(None, model.embed), (model.embedding.table,)
    yield Part("embedding", embed, (tokens, valid), moved=(passes, passes), parameters=table)
    yield norm_part("norm", model.layers[0].attention_norm, x, 2 * len(model.layers) + 1)
    yield from attention_parts(model, x, tokens.shape[0])
    dense = [layer.feed_forward for layer in model.layers if not layer.conditional]
    if dense:
        yield network_part("dense feed-forward", dense[0], x, len(dense))
    conditional = [layer for layer in model.layers if layer.conditional]
    if conditional:
        given = {"tokens": x, "valid": valid.reshape(model.groups, -1), "noise": noise, "token_ids": tokens.reshape(-1)}
        given = in_windows(conditional[0], given) if conditional[0].window > 1 else given
        yield from moe_parts(conditional[0].feed_forward, given, len(conditional))
    yield text_head_part(step, x, labels)
    yield from optimizer_parts(step)


def in_windows(block: nn.Cell, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the arguments of a conditional layer that routes windows: tokens [N / w, w * D], a view [N / w, D]."""
    view, tokens = block.local_windows(given["tokens"])
    noise = block.local_noise(given["noise"]) if given["noise"].shape[2] > 1 else given["noise"]
    ids, valid = block.local_ids(given["token_ids"]), block.local_valid(given["valid"])
    return {"tokens": tokens, "valid": valid, "noise": noise, "token_ids": ids, "view": view}


def attention_parts(model: Decoder, x: Tensor, batch: int) -> Iterator[Part]:
    """Yields attention, and the turning of queries and keys in it."""
    attention, (rows, width), layers = model.layers[0].attention, x.shape, len(model.layers)
    heads, repeat, size, length = attention.kv_heads, attention.repeat, attention.head_size, x.shape[0] // batch
    joint = heads * (repeat + 2) * size
    scores = (batch * heads, repeat * length, size, length)
    mixed = (batch * heads, repeat * length, length, size)
    products = ((1, rows, width, joint), scores, mixed, (1, rows, heads * repeat * size, width))

    positions = None
    if attention.rotary is not None and attention.half is None and attention.fused is None:
        positions = "positions"
        query, key = (ops.zeros((batch, heads, *repeats, length, size), x.dtype) for repeats in ((repeat,), ()))
        turn = Positions(attention.rotary) if attention.float is None else Turning(attention.float)
        moved = 2.0 * (repeat + 1) * heads * size * rows * FLOAT
        yield Part(positions, turn, (query, key), layers, moved=(moved, moved))
    yield Part("attention", Attending(attention, batch), (x,), layers, positions, products)
