"""The second half of generation, `Decode`: one token a call, for every sequence of a batch.

See models.generation for the first half, and for what the two share. Few operators, none of which copies a cache or
broadcasts a large tensor: on CPU a step of a small model costs about 3 microseconds an operator.

Legend: B batch, D width, V vocabulary, L layers, J key/value heads, R query heads of each, h head size, T cache length,
M longest sequence, E experts, K choices of a row, F hidden width of an expert.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.distributed.expert_shard import ExpertShard
from switchyard.models.decoder import Decoder
from switchyard.models.generation import CacheWriter, _Half, chooses_tokens, conditional_layers
from switchyard.models.single_experts import EachExpert, SwitchedExpert, are_heavy, held, numbers
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.routing.softmax import Switch, TopK
from switchyard.nn.activation import SwiGLU


class Decode(_Half):
    """Decodes one token a sequence: tokens [B], positions [B], 2 L caches [B, J, T, h] -> logits [B, V].

    Caches are those of the keys, layer by layer, then those of the values. The step writes its keys and values into
    them, in place: nothing is handed on, and the next step takes the same tensors. `positions` are the places of the
    new tokens, below T; what the caches hold at and behind them is not read. Nothing is dropped.

    A row of a conditional layer reads copies of the weights of its K experts, which suits few rows. With
    `every_expert` all rows pass through all experts, and the gates of those that were not chosen are 0: no weight is
    copied, which is the faster way from about B * K * 3 = E on. Where experts are few and heavy, see
    models.single_experts, each expert is given its own rows instead. With `one_row` B is 1, and the weights of its K
    experts are read in place.

    Args:
        decoder: whose layers are read.
        max_length: M, the longest sequence.
        every_expert, one_row: see above. Where `has_plain_experts` is false they change nothing.
        shard: the experts that this process of a job holds; None: all. Its weights are read where they lie.
        copies: whether matrices may be put beside each other in copies; False: every weight is one of the decoder's.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_length: int,
        every_expert: bool = False,
        shard: ExpertShard | None = None,
        copies: bool = True,
        one_row: bool = False,
    ):
        super().__init__(decoder, max_length)
        self.expert_shard = shard
        self.spread_mask = Tensor(np.zeros((1, self.heads, self.repeat, 1), np.float32))
        self.first_row = ops.StridedSlice(end_mask=0b0100)
        self.write = CacheWriter(self.heads)
        plain = [
            moe.router for moe in conditional_layers(decoder)[:1] if self.by_choice and has_plain_choice(moe.router)
        ]
        self.choosers = nn.CellList([PlainChoice(router) for router in plain])
        plain_experts = copies and shard is None and has_plain_experts(decoder)
        layers = conditional_layers(decoder) if plain_experts else []
        self.experts = nn.CellList([_way(moe, every_expert, one_row) for moe in layers])

    def construct(self, tokens: Tensor, position: Tensor, *caches: Tensor):
        x, turn = self.embed(tokens, position), self.turn(position)  # [B, D]
        one = self.first_row(caches[0], (0, 0, 0, 0), (1, 1, 0, 1), (1, 1, 1, 1))  # [1, 1, T, 1]
        places = self.prefix(ops.ones_like(one).astype(mstype.float32), 2).reshape(1, 1, 1, -1) - 1.0  # [1, 1, 1, T]
        masks, distance = (), position.reshape(-1, 1, 1, 1).astype(mstype.float32) - places  # [B, 1, 1, T]
        for window in self.windows:
            masks = (*masks, self.mask(distance, window) + self.spread_mask)  # [B, J, R, T]
        at = self.write.index(position)  # [B, J, 1, 3]
        valid = ops.ones_like(tokens).astype(mstype.float32).reshape(1, -1)  # [1, B]
        for index, layer in enumerate(self.decoder.layers):
            query, key, value = self.parts(self.project(layer.attention, self.norms[2 * index](x), turn))
            key = self.write(caches[index], at, key)  # [B, J, T, h]
            value = self.write(caches[len(self.decoder.layers) + index], at, value)
            scores = self.scores(query, key).astype(mstype.float32) + masks[self.mask_of[index]]  # [B, J, R, T]
            mixed = self.mix(self.softmax(scores).astype(self.dtype), value)  # [B, J, R, h]
            mixed = mixed.reshape(-1, self.heads * self.repeat * self.size)  # [B, H * h]
            x = x + layer.attention.out(mixed).astype(mstype.float32)
            seen = self.norms[2 * index + 1](x)
            if layer.conditional and len(self.choosers) == 1:
                x = x + self.conditional(layer.feed_forward, seen)
            else:
                x = x + self.feed(layer, seen, tokens.reshape(1, -1), valid)
        return self.logits(x)

    def conditional(self, moe: nn.Cell, x: Tensor) -> Tensor:
        """Applies the conditional layer to normed rows [B, D] -> [B, D], by a plain choice."""
        experts, gates = self.choosers[0](moe.router.scores(x, None, None)[0])  # [B, K] each
        if len(self.experts) > 0:
            out = self.experts[moe.place](x, experts, gates)
        else:
            out = self.work(moe, x, experts.reshape(-1), gates)
        if moe.shared is not None:
            out = out + moe.shared(ops.expand_dims(x, 0)).reshape(-1, self.width)
        return out

    def work(self, moe: nn.Cell, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """Rows [B, D], experts [B * K], gates [B, K] -> [B, D], by blocks of one row."""
        if self.expert_shard is not None:
            experts = self.expert_shard.own(experts)
            gates = gates * (experts < self.expert_shard.count).astype(mstype.float32).reshape(-1, moe.choices)
            experts = ops.minimum(experts, self.expert_shard.count - 1)
        elif moe.router.may_skip_tokens:
            experts = ops.minimum(experts, moe.expert_num - 1)  # E, no expert, is no place in the weights; its gate: 0
        rows = ops.expand_dims(x, 1)  # [B, 1, D]
        if moe.choices > 1:
            rows = ops.tile(rows, (1, moe.choices, 1)).reshape(-1, 1, self.width)  # [B * K, 1, D]
        out = moe.eval_dispatcher.through(moe.experts, rows, experts)  # [B * K, 1, D]
        out = self.mix(ops.expand_dims(gates, 1), out.reshape(-1, moe.choices, self.width)).reshape(-1, self.width)
        return out if self.expert_shard is None else self.expert_shard.total(out)


class PlainChoice(nn.Cell):
    """The plain twin of `switch` and `top_k` at evaluation: logits [B, E] -> (experts [B, K], gates [B, K]).

    A stable sort in the place of K passes of argmax: a third of its operators; of equal logits the lower expert is
    first, as there.
    """

    def __init__(self, router: nn.Cell):
        super().__init__()
        self.choices, self.normalise, self.factor = router.choices, getattr(router, "normalise", False), router.factor
        self.sort, self.softmax, self.own = ops.Sort(axis=-1, descending=True), ops.Softmax(-1), ops.GatherD()
        self.take, self.first = ops.Gather(), Tensor(np.arange(self.choices, dtype=np.int32))  # faster than a slice

    def construct(self, logits: Tensor):
        best, experts = self.sort(logits)  # [B, E] each
        best, experts = self.take(best, self.first, 1), self.take(experts, self.first, 1)  # [B, K] each
        gates = self.softmax(best) if self.normalise else self.own(self.softmax(logits), 1, experts)
        return experts, gates if self.factor == 1.0 else gates * self.factor


class _PlainExperts(nn.Cell):
    """Holds what the two ways through feed-forward experts share: the gate's matrix beside the first, and the product.

    Args:
        experts: whose weights are copied.
    """

    def __init__(self, experts: FeedForwardExperts):
        super().__init__()
        self.dtype, self.gated = experts.dtype, experts.gated
        self.bend = SwiGLU(silu=True) if self.gated else experts.activation  # the same numbers, an operator less
        self.expert_num, self.hidden_width, self.width = experts.w_out.shape
        self.batched, self.take = ops.BatchMatMul(), ops.Gather()


class ChosenExperts(_PlainExperts):
    """Feed-forward experts of which the chosen ones' weights are copied: the faster way for few rows."""

    def __init__(self, experts: FeedForwardExperts):
        super().__init__(experts)
        first = numbers(experts.w_in)  # [E, D, F]
        if self.gated:
            first = np.concatenate((numbers(experts.w_gate), first), 2)  # [E, D, 2 F]
        self.w_first = held(first, experts.w_in, "w_first")
        self.w_out = held(numbers(experts.w_out), experts.w_out, "w_out")
        self.split = ops.Split(2, 2)

    def construct(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """Rows [B, D], experts [B, K] and their gates [B, K] -> [B, D] float32."""
        own, rows = experts.reshape(-1), ops.expand_dims(x.astype(self.dtype), 1)  # [B * K], [B, 1, D]
        if experts.shape[1] > 1:
            rows = ops.tile(rows, (1, experts.shape[1], 1)).reshape(-1, 1, x.shape[1])  # [B * K, 1, D]
        hidden = self.batched(rows, self.take(self.w_first, own, 0))  # [B * K, 1, 2 F], or [B * K, 1, F]
        hidden = self.bend(*self.split(hidden)) if self.gated else self.bend(hidden)  # [B * K, 1, F]
        out = self.batched(hidden, self.take(self.w_out, own, 0)).astype(mstype.float32)  # [B * K, 1, D]
        out = out.reshape(-1, experts.shape[1], self.width)  # [B, K, D]
        return self.batched(ops.expand_dims(gates, 1), out).reshape(-1, self.width)


class EveryExpert(_PlainExperts):
    """Feed-forward experts side by side: rows pass through all of them, and no weight is copied.

    The first matrices stand beside each other, [D, E * F], the last below each other, [E * F, D], so that the sum over
    the experts is part of the last product.
    """

    def __init__(self, experts: FeedForwardExperts):
        super().__init__(experts)

        def beside(weight: Parameter, name: str) -> Parameter:
            return held(numbers(weight).transpose(1, 0, 2).reshape(weight.shape[1], -1), weight, name)

        self.w_in = beside(experts.w_in, "w_in")  # [D, E * F]
        self.w_gate = beside(experts.w_gate, "w_gate") if self.gated else None
        self.w_out = held(numbers(experts.w_out).reshape(-1, self.width), experts.w_out, "w_out")
        self.product, self.one_hot = ops.MatMul(), ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """Rows [B, D], experts [B, K] and their gates [B, K] -> [B, D] float32."""
        x = x.astype(self.dtype)
        hidden = self.product(x, self.w_in)  # [B, E * F]
        hidden = self.bend(self.product(x, self.w_gate), hidden) if self.gated else self.bend(hidden)
        chosen = self.one_hot(experts, self.expert_num, self.on, self.off)  # [B, K, E]
        gates = self.batched(ops.expand_dims(gates, 1), chosen).reshape(-1, self.expert_num, 1)  # [B, E, 1]
        hidden = hidden.reshape(-1, self.expert_num, self.hidden_width) * gates.astype(self.dtype)  # [B, E, F]
        hidden = hidden.reshape(-1, self.expert_num * self.hidden_width)  # [B, E * F]
        return self.product(hidden, self.w_out).astype(mstype.float32)


def has_plain_choice(router: nn.Cell) -> bool:
    """Returns whether `PlainChoice` is a twin of a router."""
    return type(router) in (Switch, TopK)


def has_plain_experts(decoder: Decoder) -> bool:
    """Returns whether `EveryExpert` is a twin of all experts of a decoder, chosen plainly."""
    plain = chooses_tokens(decoder) and all(has_plain_choice(moe.router) for moe in conditional_layers(decoder))
    return plain and all(type(moe.experts) is FeedForwardExperts for moe in conditional_layers(decoder))


def has_heavy_experts(decoder: Decoder) -> bool:
    """Returns whether `Decode` of one row reads experts in place faster than it copies them."""
    return has_plain_experts(decoder) and all(are_heavy(moe.experts) for moe in conditional_layers(decoder))


def _way(moe: nn.Cell, every_expert: bool, one_row: bool) -> nn.Cell:
    """Returns the way of rows through the experts of a conditional layer."""
    if one_row:
        return SwitchedExpert(moe.experts, moe.choices)
    if every_expert:
        return EachExpert(moe.experts) if are_heavy(moe.experts) else EveryExpert(moe.experts)
    return ChosenExperts(moe.experts)
