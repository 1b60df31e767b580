"""The parts of a decoder's training step as cells of their own, which compute on the model's own weights.

Legend: N tokens of a micro-batch, D width, W columns of the projections, H query heads, J key/value heads,
R = H / J, h head size, S sequence, B batch, V vocabulary, G routing groups, E experts, L layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, nn, ops

from switchyard.models.decoder import Decoder
from switchyard.moe.dispatch.dispatchers import BlockDispatcher, SlotDispatcher
from switchyard.moe.experts import FeedForwardExperts
from switchyard.nn.float_attention import FloatAttention
from switchyard.training.step import TrainStep

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Part:
    """Holds one part of the step.

    Attributes:
        name: in the table.
        cell: float tensors, or a tuple of them, of the inputs.
        inputs: of the cell; gradients are taken with respect to those of a float type, and to the cell's parameters.
        times: how often a step does it.
        without: name of a part that is contained in this one, and is listed for itself.
        products: (batch, rows, inner, columns) of each matrix product in it.
        moved: bytes that it reads and writes at least, forward and backward; the floor where there are no products.
        backward: whether it has a backward pass.
        parameters: that gradients are taken of; empty: all of the cell.
    """

    name: str
    cell: Callable
    inputs: tuple
    times: int = 1
    without: str | None = None
    products: tuple[tuple[int, int, int, int], ...] = ()
    moved: tuple[float, float] = (0.0, 0.0)
    backward: bool = True
    parameters: tuple = field(default=())


class Function(nn.Cell):
    """Runs a function as a cell, which has the parameters of the function's owner.

    Without an owner the cell has none, though the function may compute on weights of the whole model: a call visits no
    cells of the model, and copies share its weights.
    """

    def __init__(self, owner: nn.Cell | None, function: Callable):
        super().__init__(auto_prefix=False)
        self.owner, self.function = owner, function

    def construct(self, *inputs):
        return self.function(*inputs)


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


class Routing(nn.Cell):
    """Scores and chooses: tokens [N, D], valid [G, N / G], noise, ids [N] -> gates [G, N / G, K]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, tokens: Tensor, valid: Tensor, noise: Tensor, ids: Tensor):
        inputs = self.layer.router_inputs(tokens, valid, noise, ids, None, None)
        return self.layer.route(valid, noise, None, inputs)["gates"]


class Sending(nn.Cell):
    """Routes, fills what travels and counts: the arguments of `Routing` -> (slots, gates, statistics)."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, tokens: Tensor, valid: Tensor, noise: Tensor, ids: Tensor):
        sent = self.layer.send(tokens, valid, noise, *self.layer.router_inputs(tokens, valid, noise, ids, None, None))
        last = len(sent) - 1 - self.layer.records
        return sent[0], sent[1], sent[last]


class Applying(nn.Cell):
    """The experts and the way back: slots, gates and the plan, as the dispatcher sent them -> tokens [N, D]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.dispatcher, self.experts = layer.train_dispatcher, layer.experts

    def construct(self, *sent):
        return self.dispatcher.apply(self.experts, sent)


def parts_of(step: TrainStep, batch: tuple[np.ndarray, ...]) -> Iterator[Part]:
    """Yields the parts of a decoder's step, for a micro-batch of tokens, labels, valid [B, S] and noise [J, N, D]."""
    model, config = step.model, step.config
    tokens, labels, valid, noise = map(Tensor, batch)
    rows, width = tokens.size, config.model.hidden_size
    x = Tensor(np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32))
    passes = 2.0 * rows * width * FLOAT
    table, moved = (model.embedding.table,), (passes, passes)
    embed = Function(None, model.embed)
    yield Part("embedding", embed, (tokens, valid), moved=moved, parameters=table)
    norms = 2 * len(model.layers) + 1
    norm = model.layers[0].attention_norm
    yield Part("norm", norm, (x,), norms, moved=(passes, 1.5 * passes))
    yield from attention_parts(model, x, tokens.shape[0])
    dense = [layer.feed_forward for layer in model.layers if not layer.conditional]
    if dense:
        inputs = (x.reshape(1, rows, width),)
        yield Part("dense feed-forward", dense[0], inputs, len(dense), products=products_of(dense[0], 1, rows))
    conditional = [layer.feed_forward for layer in model.layers if layer.conditional]
    if conditional:
        arguments = (x, valid.reshape(model.groups, -1), noise, tokens.reshape(-1))
        yield from moe_parts(conditional[0], arguments, len(conditional))
    yield head_part(model, step.graph.loss.token_losses, x, labels.reshape(-1))
    yield from optimizer_parts(step)


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


def moe_parts(layer: nn.Cell, arguments: tuple, layers: int) -> Iterator[Part]:
    """Yields the parts of a conditional layer: router, dispatch, experts, combine."""
    arguments, sending = (layer.local_hide(arguments[0], arguments[1]), *arguments[1:]), Sending(layer)
    (rows, width), dispatcher, router = arguments[0].shape, layer.train_dispatcher, None
    if layer.router.form == "token_choice":
        router = "router"
        products = ((1, rows, width, layer.expert_num),) if layer.router.learnable else ()
        yield Part(router, Routing(layer), arguments, layers, products=products)
    yield Part("dispatch" if router else "router and dispatch", sending, arguments, layers, router)
    sent = layer.send(*arguments[:3], *layer.router_inputs(*arguments, None, None))
    sent = sent[: len(sent) - 1 - layer.records]
    experts = None
    if isinstance(layer.experts, FeedForwardExperts) and isinstance(dispatcher, (SlotDispatcher, BlockDispatcher)):
        experts = "experts"
        yield experts_part(layer, sent, layers)
    yield Part("combine" if experts else "experts and combine", Applying(layer), sent, layers, experts)
    if layer.shared is not None:
        yield Part("shared experts", layer.shared, (arguments[0].reshape(1, rows, width),), layers)


def experts_part(layer: nn.Cell, sent: tuple, layers: int) -> Part:
    """Returns the experts on the slots, or blocks, that the dispatcher sent."""
    if isinstance(layer.train_dispatcher, BlockDispatcher):
        count, rows, _ = sent[0].shape
        cell = Function(layer.experts, layer.experts.blocks)
        return Part("experts", cell, sent[:2], layers, products=products_of(layer.experts, count, rows))
    slots = layer.train_dispatcher.crossing.there(sent[0])  # [E, G * C, D]
    return Part("experts", layer.experts, (slots,), layers, products=products_of(layer.experts, *slots.shape[:2]))


def products_of(experts: FeedForwardExperts, count: int, rows: int) -> tuple[tuple[int, int, int, int], ...]:
    """Returns the matrix products of `count` networks on `rows` rows each."""
    width, hidden = experts.w_in.shape[1:]
    first = (count, rows, width, hidden)
    return (first,) * (1 + experts.gated) + ((count, rows, hidden, experts.w_out.shape[2]),)


def head_part(model: Decoder, losses: nn.Cell, x: Tensor, labels: Tensor) -> Part:
    """Returns the logits and the mean cross-entropy: x [N, D], labels [N] -> []."""

    def loss(x: Tensor, labels: Tensor):
        return losses(model.logits(x), labels).mean()

    weights = (model.embedding.table,) if model.tied else tuple(model.head.trainable_params())
    products = ((1, *x.shape, model.vocab_size),)
    return Part("head and loss", Function(None, loss), (x, labels), products=products, parameters=weights)


def optimizer_parts(step: TrainStep) -> Iterator[Part]:
    """Yields the norm of the gradients, which reads each, and AdamW, which reads four floats and writes three."""
    optimizer, norm = step.graph.optimizer, Tensor(np.float32(1.0))
    gradients = tuple(ops.zeros_like(parameter) for parameter in optimizer.adamw.parameters)

    def total(*gradients):
        return optimizer.norm(gradients)

    def update(*gradients):
        return optimizer.update(gradients, norm)

    for name, function, floats in (("gradient norm", total, 1), ("optimizer", update, 7)):
        moved = (1.0 * floats * FLOAT * step.size, 0.0)
        yield Part(name, Function(None, function), gradients, moved=moved, backward=False)
