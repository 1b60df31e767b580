"""The parts of an encoder-decoder's training step, those of each stack by its name.

Legend: B batch, S tokens of an encoder's input, T tokens of a decoder's, N = B * S or B * T rows of a stack, D width,
H heads, h head size, G routing groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn

from switchyard.models.seq2seq import Seq2Seq, Stack
from switchyard.nn.relative import RelativeAttention
from switchyard.profile.parts import (
    FLOAT,
    Part,
    moe_parts,
    network_part,
    norm_part,
    optimizer_parts,
    random_rows,
    text_head_part,
)
from switchyard.training.step import TrainStep


class SelfAttending(nn.Cell):
    """Looks at its own rows: x [N, D], which of its keys are real [B, S], table of positions -> [N, D]."""

    def __init__(self, attention: RelativeAttention):
        super().__init__(auto_prefix=False)
        self.attention = attention

    def construct(self, x: Tensor, keep: Tensor, table: Tensor):
        return self.attention(x, x, keep, table)


@dataclass(frozen=True)
class StackInputs:
    """Holds what a stack reads.

    Attributes:
        x: rows [N, D].
        tokens, keep: ids and which of them are real, [B, S] or [B, T].
        noise: [J, N, D].
    """

    x: Tensor
    tokens: Tensor
    keep: Tensor
    noise: Tensor


def seq2seq_parts(step: TrainStep, batch: tuple[np.ndarray, ...]) -> Iterator[Part]:
    """Yields the parts of a step, for a micro-batch of tokens [B, S + T], labels, valid [B, T] and noise [J, N, D]."""
    model = step.model
    tokens, labels, valid, noise = map(Tensor, batch)
    width = step.config.model.hidden_size
    encoder, decoder = inputs_of_stacks(model, tokens, valid, noise, width)
    for name, stack, given in (("encoder", model.encoder, encoder), ("decoder", model.decoder, decoder)):
        passes = 2.0 * given.x.size * FLOAT
        yield Part(f"{name} embedding", model.embedding, (given.tokens,), moved=(passes, passes))
        yield from stack_parts(name, stack, given)
    yield from cross_parts(model, encoder, decoder)
    yield text_head_part(step, decoder.x, labels)
    yield from optimizer_parts(step)


def inputs_of_stacks(model: Seq2Seq, tokens: Tensor, valid: Tensor, noise: Tensor, width: int) -> tuple:
    """Returns the StackInputs of the encoder and those of the decoder."""
    inputs, keep, outputs = model.to_inputs(tokens, valid)  # [B, S] twice, [B, T]
    noises = model.split_noise(noise, tokens, valid) if noise.shape[2] > 1 else (noise, noise)
    encoder = StackInputs(random_rows(inputs.size, width), inputs, keep, noises[0])
    return encoder, StackInputs(random_rows(outputs.size, width), outputs, valid, noises[1])


def stack_parts(name: str, stack: Stack, given: StackInputs) -> Iterator[Part]:
    """Yields norm, self-attention and feed-forward of a stack."""
    layers, crosses, x = list(stack.layers), stack.layers[0].crosses, given.x
    yield norm_part(f"{name} norm", layers[0].attention_norm, x, (3 if crosses else 2) * len(layers) + 1)
    attention, inputs = layers[0].attention, (x, given.keep, stack.relative_bias)
    products = attention_products(attention, given.keep.shape, given.keep.shape)
    yield Part(f"{name} attention", SelfAttending(attention), inputs, len(layers), products=products)
    dense = [layer.feed_forward for layer in layers if not layer.conditional]
    if dense:
        yield network_part(f"{name} feed-forward", dense[0], x, len(dense))
    conditional = [layer.feed_forward for layer in layers if layer.conditional]
    if conditional:
        ids, groups = given.tokens.reshape(-1), given.keep.reshape(stack.groups, -1)
        arguments = {"tokens": x, "valid": groups, "noise": given.noise, "token_ids": ids}
        yield from moe_parts(conditional[0], arguments, len(conditional), f"{name} ")


def cross_parts(model: Seq2Seq, encoder: StackInputs, decoder: StackInputs) -> Iterator[Part]:
    """Yields the attention of the decoder to the encoder."""
    attention, table = model.decoder.layers[0].cross_attention, model.decoder.relative_bias  # which it does not read
    products = attention_products(attention, decoder.keep.shape, encoder.keep.shape)
    inputs = (decoder.x, encoder.x, encoder.keep, table)
    yield Part("cross-attention", attention, inputs, len(model.decoder.layers), products=products)


def attention_products(attention: RelativeAttention, queries: tuple, keys: tuple) -> tuple:
    """Returns the matrix products of queries [B, S] that look at keys [B, T]."""
    (batch, length), inner = queries, attention.heads * attention.head_size
    width = attention.q.weight.shape[0]
    heads, memory = batch * attention.heads, keys[1]
    return (
        (1, batch * length, width, inner),
        (1, batch * memory, width, 2 * inner),
        (heads, length, attention.head_size, memory),
        (heads, length, memory, attention.head_size),
        (1, batch * length, inner, width),
    )
