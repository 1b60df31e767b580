"""The decoder-only Transformer with conditional layers.

Legend: B batch, S sequence, N = B * S tokens, D width, V vocabulary, M conditional layers, G groups that route for
themselves.
"""

import math

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.mesh import Mesh, first
from switchyard.distributed.own_classes import require_partners
from switchyard.errors import UserError
from switchyard.moe.conv_experts import SliceExperts
from switchyard.moe.dispatch.capacity import check_sort_keys
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.granularity import first_of_slices, from_slices, to_slices
from switchyard.moe.layer import MoELayer
from switchyard.moe.routing.base import require_causal
from switchyard.nn.cast import Cast
from switchyard.nn.fused import fused_operators
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.layers import Attention, Dropout, Embedding, Linear, causal_mask, hidden_mask
from switchyard.nn.masks import keep_where
from switchyard.nn.noise import NoiseSlices
from switchyard.nn.norm import create_norm

DTYPES = {"float32": mstype.float32, "float16": mstype.float16, "bfloat16": mstype.bfloat16}


class Block(nn.Cell):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the feed-forward is dense or conditional."""

    def __init__(
        self,
        config: Config,
        conditional: bool,
        causal: Tensor,
        random: InitialWeights,
        slices: NoiseSlices,
        vocab_size: int,
        fused: frozenset[str],
    ):
        super().__init__()
        model, dtype = config.model, DTYPES[config.model.compute_dtype]
        std = model.init_method_std
        std_out = std / math.sqrt(2 * model.num_layers)  # GPT-2: residual branches start small together
        self.groups, self.conditional = config.groups, conditional
        self.attention_norm = create_norm(model.norm, model.hidden_size, model.norm_eps, fused)
        self.attention = Attention(model, causal, std_out, random, dtype, fused)
        self.feed_forward_norm = create_norm(model.norm, model.hidden_size, model.norm_eps, fused)
        width, self.window = model.hidden_size, 1
        if conditional and config.granularity == "slice":
            self.window = config.moe.slice_length

            def windows(experts: int, hidden: int) -> nn.Cell:
                network = FeedForwardExperts(
                    experts, width, hidden, model.activation, (std, std_out), random, dtype, fused=fused
                )
                return SliceExperts(network, config.moe.slice_length)

            self.feed_forward = MoELayer(
                config, (std, std_out), random, dtype, slices, vocab_size, make_experts=windows
            )
        elif conditional:
            self.feed_forward = MoELayer(config, (std, std_out), random, dtype, slices, vocab_size, fused=fused)
        else:
            hidden = config.dense_width
            self.feed_forward = FeedForwardExperts(
                1, width, hidden, model.activation, (std, std_out), random, dtype, fused=fused
            )
        self.attention_dropout = Dropout(model.dropout, slices)
        self.feed_forward_dropout = Dropout(model.dropout, slices)
        self.add, self.lift, self.cut = ops.Add(), ops.ExpandDims(), False

    def construct(self, x: Tensor, tokens: Tensor, valid: Tensor, noise: Tensor, replay: Tensor = None):
        """x [N, D], tokens [B, S], valid [N], noise [.., N, D], replay [N, K] -> (x, losses or (), Audit or {})."""
        x = self.add(x, self.attention_dropout(self.attention(self.attention_norm(x), tokens.shape[0]), noise))
        if self.cut:
            return self.feed_cut(x, valid, noise)
        return self.feed(x, tokens, valid, noise, self.groups, replay)

    def feed(self, x: Tensor, tokens: Tensor, valid: Tensor, noise: Tensor, groups: int, replay: Tensor = None):
        """The second half: x [N, D] -> (x, losses or (), Audit or {}). Generation has one group, so any B will do."""
        rows, losses, audit = self.feed_forward_norm(x), (), {}
        if self.window > 1:
            out, losses, audit = self.feed_slices(rows, tokens, valid, noise, groups)
        elif self.conditional:
            grouped = rows.reshape(groups, -1, rows.shape[1])  # [G, N / G, D]
            ids = tokens.reshape(groups, -1)  # [G, N / G]
            if replay is not None:
                replay = replay.reshape(groups, -1, replay.shape[-1])  # [G, N / G, K]
            out, losses, audit = self.feed_forward(grouped, valid.reshape(groups, -1), noise, ids, None, replay)
        else:
            out = self.feed_forward(rows.expand_dims(0))  # [1, N, D]: a dense layer is one expert
        return self.add(x, self.feed_forward_dropout(out.reshape(x.shape), noise)), losses, audit

    def feed_cut(self, x: Tensor, valid: Tensor, noise: Tensor):
        """The second half on several devices: x [N, D], valid [B, S] -> (x, tally of MoELayer.spread or None)."""
        rows, tally = self.feed_forward_norm(x), None
        if self.conditional:
            out, tally = self.feed_forward.spread(rows, valid, noise)
        else:
            out = self.feed_forward(self.lift(rows, 0)).reshape(x.shape)  # [1, N, D] -> [N, D]
        return self.add(x, self.feed_forward_dropout(out, noise)), tally

    def shard(self, mesh: Mesh) -> None:
        """Rows between the parts are cut by data slices, and by model slices too with sequence_parallel.

        Raises:
            UserError: a feed-forward that cannot be cut.
        """
        require_partners(self, Block, {"feed": ("feed_cut",)})
        if self.window > 1:
            raise UserError("moe.granularity: slice; cannot be cut over devices; 'token'")
        data = mesh.degrees.data_parallel
        rows = data * mesh.degrees.model_parallel if mesh.sequence else data
        self.cut = True
        self.add.shard(((rows, 1), (rows, 1)))
        self.lift.shard(((data, 1),))
        self.attention_norm.shard(mesh)
        self.attention.shard(mesh)
        self.feed_forward_norm.shard(mesh)
        self.attention_dropout.shard(mesh)
        self.feed_forward_dropout.shard(mesh)
        if self.conditional:
            self.feed_forward.shard(mesh)
        else:
            self.feed_forward.shard(mesh, None, "data")

    def feed_slices(self, rows: Tensor, tokens: Tensor, valid: Tensor, noise: Tensor, groups: int):
        """The conditional layer over windows of tokens, each sent where its first token goes: rows [N, D]."""
        view = first_of_slices(rows, self.window).reshape(groups, -1, rows.shape[1])  # [G, N / G / w, D]
        ids = first_of_slices(tokens.reshape(-1), self.window).reshape(groups, -1)
        real = first_of_slices(valid.reshape(-1), self.window).reshape(groups, -1)
        windows = to_slices(rows, self.window).reshape(groups, -1, self.window * rows.shape[1])  # [G, N / G / w, w * D]
        noise = noise[:, :: self.window]  # [.., N / w, D]
        out, losses, audit = self.feed_forward(windows, real, noise, ids, None, None, view)
        return from_slices(out, self.window), losses, audit


class Decoder(nn.Cell):
    """Tokens [B, S] -> (logits [N, V] float32, losses, Audit).

    losses: (balance losses [M], z-losses [M], weighted sums of further losses [M]) of the M conditional layers, () when
    there are none; the Audit's figures have the same leading axis, {} when there are none.

    Args:
        config: the whole configuration.
        vocab_size: entries V of the tokenizer.
        length: longest sequence, for positions and the causal mask; at least model.seq_length.
        drawn: False: weights have shapes and no numbers, see nn.initializers.

    Raises:
        UserError: a router that is not causal, or that asks for task ids, which text does not have.
    """

    def __init__(self, config: Config, vocab_size: int, length: int | None = None, drawn: bool = True):
        super().__init__()
        check_sort_keys(config)
        model, random = config.model, InitialWeights(config.train.seed, drawn)
        length = max(length or 0, model.seq_length)
        self.vocab_size, self.length, self.head_size = vocab_size, length, model.hidden_size // model.num_heads
        self.kv_heads = model.n_kv_heads or model.num_heads
        self.moe_layers = config.moe_layers
        self.embedding = Embedding(vocab_size, model.hidden_size, model.init_method_std, random)
        self.position = None
        if model.position == "learned":
            self.position = Embedding(model.seq_length, model.hidden_size, model.init_method_std, random)
        slices = NoiseSlices()
        self.dropout = Dropout(model.dropout, slices)
        if self.moe_layers:
            require_causal(config.moe)
        fused = fused_operators(config, ms.get_context("device_target"))
        causal = hidden_mask(length) if "FlashAttentionScore" in fused else causal_mask(length)
        self.layers = nn.CellList(
            [
                Block(config, index in self.moe_layers, causal, random, slices, vocab_size, fused)
                for index in range(model.num_layers)
            ]
        )
        passes = 2 if config.moe.consistency_loss_factor and self.moe_layers else 1  # see training.step.LossCell
        self.noise_slices = slices.count * passes
        self.norm = create_norm(model.norm, model.hidden_size, model.norm_eps, fused)
        self.tied, self.dtype = model.tie_word_embeddings, DTYPES[model.compute_dtype]
        self.head = None
        if not self.tied:
            self.head = Linear(model.hidden_size, vocab_size, model.init_method_std, random, self.dtype)
        self.tied_product = ops.MatMul(transpose_b=True)
        self.cast_x, self.cast_table, self.widen = Cast(self.dtype), Cast(self.dtype), Cast(mstype.float32)
        self.local_places = None

    def construct(self, tokens: Tensor, valid: Tensor, noise: Tensor, replay: Tensor = None):
        """Tokens [B, S] int32, valid [B, S] float32, noise [max(noise_slices, 1), N, D] of U(0, 1).

        At evaluation the noise is not read: any [1, 1, 1] serves. replay [M, N, K] int32: choices of experts to force,
        -1 where the router's own stand, see switchyard.moe.routing.replay.
        """
        length = tokens.shape[1]
        valid = valid.reshape(-1)  # [N]
        x = keep_where(self.embed(tokens, ops.arange(length)), valid)  # [N, D]; what padding holds reaches nothing
        x = self.dropout(x, noise)
        losses, audits = (), ()
        for layer in self.layers:
            if replay is not None and layer.conditional:
                x, loss, audit = layer(x, tokens, valid, noise, replay[len(losses)])
            else:
                x, loss, audit = layer(x, tokens, valid, noise)
            if layer.conditional:
                losses, audits = (*losses, loss), (*audits, audit)
        return self.logits(x), stack_losses(losses), stack_audits(audits)

    def spread(self, tokens: Tensor, valid: Tensor, noise: Tensor):
        """`construct` on several devices -> (logits [N, V], tally [data_parallel, ..] of each conditional layer)."""
        x, tallies = self.enter(tokens, noise), ()
        for layer in self.layers:
            x, tally = layer(x, tokens, valid, noise)
            if layer.conditional:
                tallies = (*tallies, tally)
        return self.logits(x), tallies

    def enter(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """What goes into the first layer, on several devices: tokens [B, S] -> [N, D]."""
        x = self.embedding(tokens)  # [N, D]
        if self.position is not None:
            x = self.local_places(x, self.position.table)
        return self.dropout(x, noise)

    def add_places(self, x: Tensor, places: Tensor) -> Tensor:
        """x [N, D] plus what stands for each position, places [S, D]."""
        return (x.reshape(-1, *places.shape) + places).reshape(x.shape)

    def shard(self, mesh: Mesh) -> None:
        """Tables are whole everywhere, and every model slice makes all logits of its rows.

        Raises:
            UserError: a subclass that changes what one device calls alone; what cannot be cut.
        """
        require_partners(self, Decoder, {"construct": ("spread",), "embed": ("enter",)})
        rows, data = mesh.cut("data", None), mesh.degrees.data_parallel
        self.embedding.shard(mesh)
        self.local_places = mesh.local(self.add_places, (rows, mesh.cut(None, None)), (rows,), first, first)
        self.dropout.shard(mesh)
        for layer in self.layers:
            layer.shard(mesh)
        self.norm.shard(mesh)
        self.cast_x.shard(mesh, "data", None)
        self.cast_table.shard(mesh, None, None)
        self.widen.shard(mesh, "data", None)
        self.tied_product.shard(((data, 1), (1, 1)))
        if self.head is not None:
            self.head.shard(mesh, None, None)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [B, S] at positions [S] -> [N, D]."""
        x = self.embedding(tokens)  # [N, D]
        if self.position is None:
            return x
        places = self.position(positions)  # [S, D]
        return (x.reshape(tokens.shape[0], -1, x.shape[1]) + places).reshape(x.shape)

    def logits(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, V] float32."""
        x = self.norm(x)
        if self.tied:
            return self.widen(self.tied_product(self.cast_x(x), self.cast_table(self.embedding.table)))
        return self.widen(self.head(x))


def stack_losses(losses: tuple) -> tuple:
    """The three losses of each conditional layer -> three tensors [M]."""
    if len(losses) == 0:
        return ()
    return (
        ops.stack([loss[0] for loss in losses], 0),
        ops.stack([loss[1] for loss in losses], 0),
        ops.stack([loss[2] for loss in losses], 0),
    )


def stack_audits(audits: tuple) -> dict:
    """Audits of the conditional layers -> one whose figures have a leading layer axis."""
    if len(audits) == 0:
        return {}
    stacked = {
        "load": _stack(audits, "load"),
        "importance": _stack(audits, "importance"),
        "dropped": _stack(audits, "dropped"),
        "entropy": _stack(audits, "entropy"),
        "max_violation": _stack(audits, "max_violation"),
        "z": _stack(audits, "z"),
    }
    if "experts" in audits[0]:
        stacked["experts"] = _stack(audits, "experts")  # [M, N, K]
    return stacked


def _stack(audits: tuple, name: str) -> Tensor:
    return ops.stack([audit[name] for audit in audits], 0)
