"""The parts of a training step as cells of their own, which compute on the model's own weights.

Here is what networks have in common: a conditional layer, experts, the optimizer. Their own parts are in
`profile.decoder_parts`, `profile.seq2seq_parts` and `profile.image_parts`.

Legend: F = G * N rows that are routed, D their width, G routing groups, E experts, S slots of an expert.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, nn, ops

from switchyard.moe.conv_experts import ConvolutionExperts, SliceExperts
from switchyard.moe.dispatch.dispatchers import BlockDispatcher, SlotDispatcher
from switchyard.moe.experts import FeedForwardExperts
from switchyard.training.step import TrainStep

FLOAT = 4  # bytes of a float32
EXTRA = ("token_ids", "task_ids", "view")  # what a router may read besides the rows


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


class OfLayer(nn.Cell):
    """A part of a conditional layer that begins with the router.

    Args:
        layer: the conditional layer.
        extra: names, of EXTRA, of what comes behind tokens [F, D], valid [G, N] and noise.
    """

    def __init__(self, layer: nn.Cell, extra: tuple[str, ...]):
        super().__init__(auto_prefix=False)
        self.layer = layer
        self.ids, self.tasks, self.view = (extra.index(name) if name in extra else None for name in EXTRA)

    def decided_by(self, tokens: Tensor, valid: Tensor, noise: Tensor, rest: tuple) -> tuple:
        """Returns what the router decides by, see `MoELayer.router_inputs`."""
        ids = None if self.ids is None else rest[self.ids]
        tasks = None if self.tasks is None else rest[self.tasks]
        view = None if self.view is None else rest[self.view]
        return self.layer.router_inputs(tokens, valid, noise, ids, tasks, view)


class Routing(OfLayer):
    """Scores and chooses: tokens, valid, noise and what `extra` names -> gates [G, N, K]."""

    def construct(self, tokens: Tensor, valid: Tensor, noise: Tensor, *rest):
        return self.layer.route(valid, noise, None, self.decided_by(tokens, valid, noise, rest))["gates"]


class Sending(OfLayer):
    """Routes, fills what travels and counts: the arguments of `Routing` -> (slots, gates, statistics)."""

    def construct(self, tokens: Tensor, valid: Tensor, noise: Tensor, *rest):
        sent = self.layer.send(tokens, valid, noise, *self.decided_by(tokens, valid, noise, rest))
        last = len(sent) - 1 - self.layer.records
        return sent[0], sent[1], sent[last]


class Applying(nn.Cell):
    """The experts and the way back: slots, gates and the plan, as the dispatcher sent them -> tokens [N, D]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.dispatcher, self.experts = layer.train_dispatcher, layer.experts

    def construct(self, *sent):
        return self.dispatcher.apply(self.experts, sent)


def moe_parts(layer: nn.Cell, given: dict[str, Tensor], layers: int = 1, prefix: str = "") -> Iterator[Part]:
    """Yields the parts of a conditional layer: router, dispatch, experts, combine, shared experts.

    Args:
        layer: a MoELayer.
        given: its arguments by name: tokens [F, D], valid [G, N], noise, and some of EXTRA.
        layers: how many such layers there are.
        prefix: of the parts' names.
    """
    extra, seen = tuple(name for name in EXTRA if name in given), given.get("view", given["tokens"])
    tokens = layer.local_hide(given["tokens"], given["valid"])
    arguments = (tokens, given["valid"], given["noise"], *(given[name] for name in extra))
    sending, dispatcher, router = Sending(layer, extra), layer.train_dispatcher, None
    if layer.router.form == "token_choice":
        router = f"{prefix}router"
        products = ((1, tokens.shape[0], seen.shape[-1], layer.expert_num),) if layer.router.learnable else ()
        yield Part(router, Routing(layer, extra), arguments, layers, products=products)
    yield Part(prefix + ("dispatch" if router else "router and dispatch"), sending, arguments, layers, router)
    sent = layer.send(*arguments[:3], *sending.decided_by(*arguments[:3], arguments[3:]))
    sent = sent[: len(sent) - 1 - layer.records]
    experts = None
    if network_of(layer.experts) is not None and isinstance(dispatcher, (SlotDispatcher, BlockDispatcher)):
        experts = f"{prefix}experts"
        yield experts_part(experts, layer, sent, layers)
    yield Part(prefix + ("combine" if experts else "experts and combine"), Applying(layer), sent, layers, experts)
    if layer.shared is not None:
        yield Part(f"{prefix}shared experts", layer.shared, (tokens.reshape(1, *tokens.shape),), layers)


def experts_part(name: str, layer: nn.Cell, sent: tuple, layers: int) -> Part:
    """Returns the experts on the slots, or blocks, that the dispatcher sent."""
    if isinstance(layer.train_dispatcher, BlockDispatcher):
        count, rows, _ = sent[0].shape
        cell = Function(layer.experts, layer.experts.blocks)
        return Part(name, cell, sent[:2], layers, products=products_of(layer.experts, count, rows))
    slots = layer.train_dispatcher.crossing.there(sent[0])  # [E, S, D]
    return Part(name, layer.experts, (slots,), layers, products=products_of(layer.experts, *slots.shape[:2]))


def network_of(experts: nn.Cell) -> tuple[FeedForwardExperts, int] | None:
    """Returns the feed-forward networks that experts are made of, and how often a row visits them; None: of others."""
    if isinstance(experts, ConvolutionExperts):
        return experts.network, experts.places
    if isinstance(experts, SliceExperts):
        return experts.network, experts.length
    return (experts, 1) if isinstance(experts, FeedForwardExperts) else None


def products_of(experts: nn.Cell, count: int, rows: int) -> tuple[tuple[int, int, int, int], ...]:
    """Returns the matrix products of `count` networks on `rows` rows each."""
    network, visits = network_of(experts)
    width, hidden = network.w_in.shape[1:]
    first = (count, rows * visits, width, hidden)
    return (first,) * (1 + network.gated) + ((count, rows * visits, hidden, network.w_out.shape[2]),)


def loss_part(name: str, losses: nn.Cell, logits: Callable, x: Tensor, labels: Tensor, weights=(), products=()) -> Part:
    """Returns the mean cross-entropy of what `logits` makes of x, by `weights`: x, labels [N] -> []."""

    def loss(x: Tensor, labels: Tensor):
        return losses(logits(x), labels).mean()

    return Part(name, Function(None, loss), (x, labels), products=products, parameters=tuple(weights))


def norm_part(name: str, norm: nn.Cell, x: Tensor, times: int) -> Part:
    """Returns a norm of rows x [N, D], which reads and writes them, and once more half of it backward."""
    passes = 2.0 * x.size * FLOAT
    return Part(name, norm, (x,), times, moved=(passes, 1.5 * passes))


def text_head_part(step: TrainStep, x: Tensor, labels: Tensor) -> Part:
    """Returns the head of a network of text on rows x [N, D], and its loss by labels of N tokens."""
    model, losses = step.model, step.graph.loss.token_losses
    weights = (model.embedding.table,) if model.tied else model.head.trainable_params()
    products = ((1, *x.shape, model.vocab_size),)
    return loss_part("head and loss", losses, model.logits, x, labels.reshape(-1), weights, products)


def network_part(name: str, network: nn.Cell, x: Tensor, times: int = 1) -> Part:
    """Returns one network, dense or of convolutions, on all rows x [N, D]."""
    products = products_of(network, 1, x.shape[0])
    return Part(name, network, (x.reshape(1, *x.shape),), times, products=products)


def random_rows(*shape: int) -> Tensor:
    """Returns N(0, 1) float32."""
    return Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


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
