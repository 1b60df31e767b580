"""The decoder-only Transformer with conditional layers.

Legend: B batch, S sequence, N = B * S tokens, D width, V vocabulary, M conditional layers, G groups that route for
themselves.
"""

import math

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.mesh import LOCAL, CompiledMesh, LocalMesh, first
from switchyard.errors import UserError
from switchyard.moe.conv_experts import SliceExperts
from switchyard.moe.dispatch.capacity import check_sort_keys
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.granularity import first_of_slices, from_slices, to_slices
from switchyard.moe.layer import MoELayer
from switchyard.moe.routing.base import require_causal
from switchyard.moe.statistics import Beside
from switchyard.nn.cast import Cast
from switchyard.nn.fused import fused_operators
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.layers import Attention, Dropout, Embedding, Linear, causal_mask, hidden_mask
from switchyard.nn.masks import keep_where
from switchyard.nn.noise import NoiseSlices
from switchyard.nn.norm import create_norm

DTYPES = {"float32": mstype.float32, "float16": mstype.float16, "bfloat16": mstype.bfloat16}


class Block(nn.Cell):
    """Computes x + attention(norm(x)), then x + feed_forward(norm(x)); the feed-forward is dense or conditional.

    Args:
        config: the whole configuration.
        index: which of the layers this one is, from 0.
        place: which of the conditional layers this one is, from 0; None: the feed-forward is dense.
        causal: mask of attention.
        random: hands out the initial weights.
        slices: hands out the slices of noise.
        vocab_size: V.
        fused: operators of the device, see nn.fused.
        mesh: the devices.
    """

    def __init__(
        self,
        config: Config,
        index: int,
        place: int | None,
        causal: Tensor,
        random: InitialWeights,
        slices: NoiseSlices,
        vocab_size: int,
        fused: frozenset[str],
        mesh: LocalMesh = LOCAL,
    ):
        super().__init__()
        model, dtype = config.model, DTYPES[config.model.compute_dtype]
        std = model.init_method_std
        std_out = std / math.sqrt(2 * model.num_layers)  # GPT-2: residual branches start small together
        self.conditional = place is not None
        self.attention_norm = create_norm(model.norm, model.hidden_size, model.norm_eps, fused)
        self.attention = Attention(model, causal, std_out, random, dtype, fused, model.window_of(index))
        self.feed_forward_norm = create_norm(model.norm, model.hidden_size, model.norm_eps, fused)
        self.window = config.moe.slice_length if self.conditional and config.granularity == "slice" else 1
        self.feed_forward = feed_forward(config, place, (std, std_out), random, slices, vocab_size, fused, mesh)
        self.attention_dropout = Dropout(model.dropout, slices)
        self.feed_forward_dropout = Dropout(config.dropout_of(self.conditional), slices)
        self.add, self.expand_dims = ops.Add(), ops.ExpandDims()
        self.local_windows, self.local_tokens = self.to_windows, self.to_tokens
        self.local_ids, self.local_valid, self.local_noise = self.first_ids, self.first_valid, self.first_noise

    def construct(
        self, x: Tensor, ids: Tensor, valid: Tensor, noise: Tensor, batch: int, replay: Tensor = None, segments=None
    ):
        """Takes x [N, D], ids [N], valid [G, N / G], noise [.., N, D], replay [M, N, K], segments [B, S]; returns (x,
        statistics, choices), the last two as of MoELayer, () where the feed-forward is dense."""
        x = self.add(x, self.attention_dropout(self.attention(self.attention_norm(x), batch, segments), noise))
        tokens, stats, choices = self.feed_forward_norm(x), (), ()
        if not self.conditional:
            out = self.feed_forward(self.expand_dims(tokens, 0)).reshape(x.shape)  # [1, N, D]: one expert
        elif self.window > 1:
            out, stats, choices = self.feed_windows(tokens, ids, valid, noise, replay)
        else:
            out, stats, choices = self.feed_forward(tokens, valid, noise, ids, None, replay)
        return self.add(x, self.feed_forward_dropout(out, noise)), stats, choices

    def feed_windows(self, tokens: Tensor, ids: Tensor, valid: Tensor, noise: Tensor, replay: Tensor):
        """Applies the conditional layer to windows of tokens [N, D], each sent where its first token goes."""
        seen, windows = self.local_windows(tokens)  # [N / w, D], [N / w, w * D]
        ids, valid = self.local_ids(ids), self.local_valid(valid)  # [N / w], [G, N / G / w]
        if self.training and noise.shape[2] > 1:  # [.., 1, 1] stands for no noise
            noise = self.local_noise(noise)  # [.., N / w, D]
        out, stats, choices = self.feed_forward(windows, valid, noise, ids, None, replay, seen)
        return self.local_tokens(out), stats, choices

    # ---- local to one device
    def to_windows(self, tokens: Tensor) -> tuple:
        """Cuts tokens [N, D] into (the first token of each window [N / w, D], the windows [N / w, w * D])."""
        return first_of_slices(tokens, self.window), to_slices(tokens, self.window)

    def to_tokens(self, windows: Tensor) -> Tensor:
        """Takes windows apart: [N / w, w * D] -> [N, D]."""
        return from_slices(windows, self.window)

    def first_ids(self, ids: Tensor) -> Tensor:
        """Takes the first of each window: [N] -> [N / w]."""
        return ids[:: self.window]

    def first_valid(self, valid: Tensor) -> Tensor:
        """Takes the first of each window: [G, N / G] -> [G, N / G / w]."""
        return valid[:, :: self.window]

    def first_noise(self, noise: Tensor) -> Tensor:
        """Takes the first of each window: [.., N, D] -> [.., N / w, D]."""
        return noise[:, :: self.window]

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards tokens between the parts by data shards, and with sequence_parallel by model shards too."""
        data = mesh.degrees.data_parallel
        rows = data * mesh.degrees.model_parallel if mesh.sequence else data
        self.add.shard(((rows, 1), (rows, 1)))
        self.expand_dims.shard(((data, 1),))
        self.attention_norm.shard(mesh)
        self.attention.shard(mesh)
        self.feed_forward_norm.shard(mesh)
        self.attention_dropout.shard(mesh)
        self.feed_forward_dropout.shard(mesh)
        self.feed_forward.shard(mesh)
        if self.conditional:
            self._shard_windows(mesh)

    def _shard_windows(self, mesh: CompiledMesh) -> None:
        """Keeps each window within one device."""
        window, pair, row = self.window, mesh.layout("data", None), mesh.layout("data")

        def windows(rows):
            return [rows[0] // window, rows[1]], [rows[0] // window, rows[1] * window]

        def tokens(rows):
            return [rows[0] * window, rows[1] // window]

        def shorter(whole):
            return [whole[0] // window]

        def narrower(whole):
            return [whole[0], -(-whole[1] // window), *whole[2:]]  # [1, 1, 1] stands for no noise

        def twice(kind):
            return kind, kind

        self.local_windows = mesh.local(self.to_windows, (pair,), (pair, pair), windows, twice)
        self.local_tokens = mesh.local(self.to_tokens, (pair,), (pair,), tokens, first)
        self.local_ids = mesh.local(self.first_ids, (row,), (row,), shorter, first)
        self.local_valid = mesh.local(self.first_valid, (pair,), (pair,), narrower, first)
        self.local_noise = mesh.local(self.first_noise, (mesh.noise,), (mesh.noise,), narrower, first)


def feed_forward(
    config: Config,
    place: int | None,
    std: tuple[float, float],
    random: InitialWeights,
    slices: NoiseSlices,
    vocab_size: int,
    fused: frozenset[str],
    mesh: LocalMesh,
) -> nn.Cell:
    """Returns the feed-forward of a block: one dense expert, or a conditional layer.

    Args:
        config, place, random, slices, vocab_size, fused, mesh: see Block.
        std: (first, last) initial standard deviation of the matrices.
    """
    model, dtype, make = config.model, DTYPES[config.model.compute_dtype], None

    def network(experts: int, hidden: int) -> FeedForwardExperts:
        width, kind = model.hidden_size, model.activation
        return FeedForwardExperts(experts, width, hidden, kind, std, random, dtype, fused=fused)

    def windows(experts: int, hidden: int) -> SliceExperts:
        return SliceExperts(network(experts, hidden), config.moe.slice_length)

    if place is None:
        return network(1, config.dense_width)
    if config.granularity == "slice":
        make = windows
    return MoELayer(
        config, std, random, dtype, slices, vocab_size, make_experts=make, fused=fused, mesh=mesh, place=place
    )


class TokenRows(nn.Cell):
    """Turns what a stack of layers is given into rows of tokens: padding hidden, ids, and valid in groups.

    Args:
        groups: G that route for themselves.
    """

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups
        self.local_hide, self.local_groups, self.local_ids = self.hide_padding, self.to_groups, self.to_ids

    # ---- local to one device
    def hide_padding(self, x: Tensor, valid: Tensor) -> Tensor:
        """Sets x [N, D] to zero where valid [B, S] is 0."""
        return keep_where(x, valid.reshape(-1))

    def to_groups(self, valid: Tensor) -> Tensor:
        """Reshapes [B, S] -> [G, N / G]."""
        return valid.reshape(self.groups, -1)

    def to_ids(self, tokens: Tensor) -> Tensor:
        """Reshapes [B, S] -> [N]."""
        return tokens.reshape(-1)

    def shard_rows(self, mesh: CompiledMesh) -> None:
        """Shards sequences by data shards."""
        pair, row, groups = mesh.layout("data", None), mesh.layout("data"), mesh.groups
        self.groups = groups // mesh.degrees.data_parallel

        def grouped(valid):
            return [groups, valid[0] * valid[1] // groups]

        def length(tokens):
            return [tokens[0] * tokens[1]]

        self.local_hide = mesh.local(self.hide_padding, (pair, pair), (pair,), first, first)
        self.local_groups = mesh.local(self.to_groups, (pair,), (pair,), grouped, first)
        self.local_ids = mesh.local(self.to_ids, (pair,), (row,), length, first)


class Decoder(TokenRows):
    """Maps tokens [B, S] to (logits [N, V] float32, statistics [G, M * (6 + 2 E)], choices [N, M * K]).

    The statistics are those of the M conditional layers side by side, see moe.metrics, () where there are none; the
    choices are those of the routers, side by side too, where moe.record asks for them, else ().

    Args:
        config: the whole configuration.
        vocab_size: entries V of the tokenizer.
        length: longest sequence, for positions and the causal mask; at least model.seq_length.
        drawn: False: weights have shapes and no numbers, see nn.initializers.
        mesh: the devices.

    Raises:
        UserError: a router that is not causal, or that asks for task ids, which text does not have.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        length: int | None = None,
        drawn: bool = True,
        mesh: LocalMesh = LOCAL,
    ):
        super().__init__(config.groups)
        check_sort_keys(config)
        model, random = config.model, InitialWeights(config.train.seed, drawn)
        length = max(length or 0, model.seq_length)
        self.vocab_size, self.length, self.head_size = vocab_size, length, model.size_of_head
        self.kv_heads = model.kv_heads
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
        make_mask = hidden_mask if "FlashAttentionScore" in fused else causal_mask
        windows = [model.window_of(index) for index in range(model.num_layers)]
        masks = {window: make_mask(length, window) for window in set(windows)}
        places = {layer: place for place, layer in enumerate(self.moe_layers)}
        self.layers = nn.CellList(
            [
                Block(config, index, places.get(index), masks[windows[index]], random, slices, vocab_size, fused, mesh)
                for index in range(model.num_layers)
            ]
        )
        passes = 2 if config.moe.consistency_loss_factor and self.moe_layers else 1  # see training.loss.TrainLoss
        self.noise_slices = slices.count * passes
        self.norm = create_norm(model.norm, model.hidden_size, model.norm_eps, fused)
        self.tied, self.dtype = model.tie_word_embeddings, DTYPES[model.compute_dtype]
        self.head, self.half_logits = None, "HalfLogits" in fused
        if not self.tied:
            self.head = Linear(model.hidden_size, vocab_size, model.init_method_std, random, self.dtype)
        self.tied_product = ops.MatMul(transpose_b=True)
        self.cast_x, self.cast_table, self.to_float32 = Cast(self.dtype), Cast(self.dtype), Cast(mstype.float32)
        self.local_places = self.add_positions
        self.masks_documents, self.separator = config.data.document_mask, None  # see `mask_documents`
        self.beside, self.beside_choices, self.records = Beside(), Beside(), config.moe.record is not None

    def construct(self, tokens: Tensor, valid: Tensor, noise: Tensor, replay: Tensor = None):
        """Takes tokens [B, S] int32, valid [B, S] float32, noise [max(noise_slices, 1), N, D] of U(0, 1).

        At evaluation the noise is not read: any [1, 1, 1] serves. replay [M, N, K] int32: choices of experts to force,
        -1 where the router's own stand, see moe.routing.replay.
        """
        x = self.dropout(self.embed(tokens, valid), noise)
        ids, grouped = self.local_ids(tokens), self.local_groups(valid)  # [N], [G, N / G]
        stats, choices, segments = (), (), None
        if self.separator is not None:
            segments = self.to_segments(tokens)  # [B, S]
        for layer in self.layers:
            x, own, chosen = layer(x, ids, grouped, noise, tokens.shape[0], replay, segments)
            if layer.conditional:
                stats, choices = (*stats, own), (*choices, chosen)
        return self.logits(x), self.beside(stats), self.beside_choices(choices) if self.records else ()

    def embed(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Embeds tokens [B, S], valid [B, S] -> [N, D]; what padding holds reaches nothing."""
        x = self.embedding(tokens)  # [N, D]
        if self.position is not None:
            x = self.local_places(x, tokens, self.position.table)
        return self.local_hide(x, valid)

    def logits(self, x: Tensor) -> Tensor:
        """Projects x [N, D] on the vocabulary: [N, V] float32, with HalfLogits of nn.fused in training float16."""
        x = self.norm(x)
        if self.tied:
            return self.widen(self.tied_product(self.cast_x(x), self.cast_table(self.embedding.table)))
        return self.widen(self.head(x))

    def widen(self, logits: Tensor) -> Tensor:
        """Returns logits [N, V] in the type that the loss is computed of."""
        return logits if self.half_logits and self.training else self.to_float32(logits)

    def to_segments(self, tokens: Tensor) -> Tensor:
        """Numbers the documents of each sequence: tokens [B, S] -> [B, S] float32; a separator ends its document."""
        ends = (tokens == self.separator).astype(mstype.float32)
        return ops.cumsum(ends, 1) - ends

    # ---- local to one device
    def add_positions(self, x: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
        """Adds to x [N, D] the entry of each token's position in the table [S, D]; tokens [B, S]."""
        length = tokens.shape[1]
        places = table if length == table.shape[0] else table[:length]  # the slice copies, at a row's pace
        return (x.reshape(-1, *places.shape) + places).reshape(x.shape)

    def shard(self, mesh: CompiledMesh) -> None:
        """Leaves tables full everywhere; every model shard makes all logits of its tokens.

        Raises:
            UserError: what cannot be sharded.
        """
        if self.masks_documents:
            raise UserError("data.document_mask: true; a compiled cluster cannot mask documents; set it to false")
        pair, full, data = mesh.layout("data", None), mesh.layout(None, None), mesh.degrees.data_parallel
        self.shard_rows(mesh)
        self.local_places = mesh.local(self.add_positions, (pair, pair, full), (pair,), first, first)
        for cell in (self.embedding, self.dropout, *self.layers, self.norm, self.beside, self.beside_choices):
            cell.shard(mesh)
        self.cast_x.shard(mesh, "data", None)
        self.cast_table.shard(mesh, None, None)
        self.to_float32.shard(mesh, "data", None)
        self.tied_product.shard(((data, 1), (1, 1)))
        if self.head is not None:
            self.head.shard(mesh)


def mask_documents(model: nn.Cell, separator: int | None) -> None:
    """Lets a Decoder with data.document_mask attend within documents, before it is compiled; leaves others as they are.

    Args:
        model: may be any network.
        separator: token that ends a document.

    Raises:
        UserError: the tokenizer has no separator.
    """
    if not getattr(model, "masks_documents", False):
        return
    if separator is None:
        raise UserError("data.document_mask: true; the tokenizer has no token between documents; set it to false")
    model.separator = separator
