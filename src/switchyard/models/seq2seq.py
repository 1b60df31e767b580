"""The encoder-decoder Transformer with conditional layers: Switch Transformer (arXiv 2101.03961) on T5 (1910.10683).

Legend: B batch, S tokens of an encoder's input, T tokens of a decoder's input, N = B * S or B * T tokens of a stack, D
width, V vocabulary, H heads, R buckets, M conditional layers, G groups that route for themselves.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.config.seq2seq import PAD
from switchyard.distributed.mesh import LOCAL, CompiledMesh, LocalMesh, first
from switchyard.models.decoder import DTYPES, TokenRows, feed_forward
from switchyard.moe.dispatch.capacity import check_sort_keys
from switchyard.moe.routing.base import require_causal
from switchyard.moe.statistics import Beside
from switchyard.nn.cast import Cast
from switchyard.nn.fused import fused_operators
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.layers import Dropout, Embedding, Linear
from switchyard.nn.noise import NoiseSlices
from switchyard.nn.norm import create_norm
from switchyard.nn.relative import RelativeAttention, RelativeBias


class Seq2SeqBlock(nn.Cell):
    """Computes x + attention(norm(x)), of a decoder then x + cross_attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        config: of the stack, see Config.stacks.
        place: which of the stack's conditional layers this one is, from 0; None: the feed-forward is dense.
        bias: of relative positions.
        crosses: whether there is a cross-attention.
        random: hands out the initial weights.
        slices: hands out the slices of noise.
        vocab_size: V.
        fused: operators of the device, see nn.fused.
        mesh: the devices.
    """

    def __init__(
        self,
        config: Config,
        place: int | None,
        bias: RelativeBias,
        crosses: bool,
        random: InitialWeights,
        slices: NoiseSlices,
        vocab_size: int,
        fused: frozenset[str],
        mesh: LocalMesh,
    ):
        super().__init__()
        model, dtype, factor = config.model, DTYPES[config.model.compute_dtype], config.seq2seq.initializer_factor
        hidden = config.dense_width if place is None else config.expert_width
        std = (factor * model.hidden_size**-0.5, factor * hidden**-0.5)
        self.conditional, self.crosses = place is not None, crosses

        def norm() -> nn.Cell:
            return create_norm(model.norm, model.hidden_size, model.norm_eps, fused)

        self.attention_norm, self.attention = norm(), RelativeAttention(config, random, dtype, bias)
        self.attention_dropout, self.attention_add = Dropout(model.dropout, slices), ops.Add()
        if crosses:
            self.cross_attention_norm = norm()
            self.cross_attention = RelativeAttention(config, random, dtype, None)
            self.cross_attention_dropout, self.cross_attention_add = Dropout(model.dropout, slices), ops.Add()
        self.feed_forward_norm = norm()
        self.feed_forward = feed_forward(config, place, std, random, slices, vocab_size, fused, mesh)
        self.feed_forward_dropout = Dropout(config.dropout_of(self.conditional), slices)
        self.feed_forward_add = ops.Add()
        self.expand_dims = ops.ExpandDims()

    def construct(self, x: Tensor, rows: tuple, noise: Tensor, table: Tensor, memory: tuple = ()):
        """Returns (x [N, D], statistics, choices), the last two as of MoELayer, () where the feed-forward is dense.

        Args:
            x: [N, D].
            rows: of the stack: token ids [N], valid [B, S], valid in groups [G, N / G].
            noise: [.., N, D].
            table: of relative positions [R, H].
            memory: of the encoder: its rows [B * S, D], valid [B, S].
        """
        ids, valid, grouped = rows
        seen = self.attention_norm(x)
        x = self.attention_add(x, self.attention_dropout(self.attention(seen, seen, valid, table), noise))
        if self.crosses:
            out = self.cross_attention(self.cross_attention_norm(x), memory[0], memory[1], table)
            x = self.cross_attention_add(x, self.cross_attention_dropout(out, noise))
        tokens, stats, choices = self.feed_forward_norm(x), (), ()
        if self.conditional:
            out, stats, choices = self.feed_forward(tokens, grouped, noise, ids)
        else:
            out = self.feed_forward(self.expand_dims(tokens, 0)).reshape(x.shape)  # [1, N, D]: one expert
        return self.feed_forward_add(x, self.feed_forward_dropout(out, noise)), stats, choices

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards tokens between the parts by data shards, and with sequence_parallel by model shards too."""
        data = mesh.degrees.data_parallel
        rows = data * mesh.degrees.model_parallel if mesh.sequence else data
        for part in ("attention", "cross_attention", "feed_forward") if self.crosses else ("attention", "feed_forward"):
            getattr(self, f"{part}_norm").shard(mesh)
            getattr(self, part).shard(mesh)
            getattr(self, f"{part}_dropout").shard(mesh)
            getattr(self, f"{part}_add").shard(((rows, 1), (rows, 1)))
        self.expand_dims.shard(((data, 1),))


class Stack(TokenRows):
    """The layers of an encoder or a decoder: rows [N, D] -> (rows [N, D], statistics and choices of each layer).

    Args:
        config: of the stack, see Config.stacks.
        crosses: whether it is a decoder: causal, and with cross-attention.
        length: of the longest sequence.
        random, vocab_size, fused, mesh: see Seq2SeqBlock.
    """

    def __init__(self, config: Config, crosses: bool, length: int, random: InitialWeights, vocab_size, fused, mesh):
        super().__init__(config.groups)
        model, own = config.model, config.seq2seq
        slices, places = NoiseSlices(), {layer: place for place, layer in enumerate(config.moe_layers)}
        self.dropout, self.last_dropout = Dropout(model.dropout, slices), Dropout(model.dropout, slices)
        shape = (own.relative_attention_num_buckets, model.num_heads)
        self.relative_bias = random.normal(own.initializer_factor * model.hidden_size**-0.5, shape, "relative_bias")
        bias = RelativeBias(config, crosses, length)
        self.layers = nn.CellList(
            [
                Seq2SeqBlock(config, places.get(index), bias, crosses, random, slices, vocab_size, fused, mesh)
                for index in range(model.num_layers)
            ]
        )
        self.norm = create_norm(model.norm, model.hidden_size, model.norm_eps, fused)
        self.noise_slices = slices.count

    def construct(self, x: Tensor, tokens: Tensor, valid: Tensor, noise: Tensor, memory: tuple = ()):
        """Takes embedded tokens [N, D], tokens [B, S], valid [B, S], noise [.., N, D], memory: see Seq2SeqBlock."""
        x = self.dropout(self.local_hide(x, valid), noise)
        rows = (self.local_ids(tokens), valid, self.local_groups(valid))
        stats, choices = (), ()
        for layer in self.layers:
            x, own, chosen = layer(x, rows, noise, self.relative_bias, memory)
            if layer.conditional:
                stats, choices = (*stats, own), (*choices, chosen)
        return self.last_dropout(self.norm(x), noise), stats, choices

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards sequences by data shards."""
        self.shard_rows(mesh)
        for cell in (self.dropout, *self.layers, self.norm, self.last_dropout):
            cell.shard(mesh)


class Seq2Seq(nn.Cell):
    """Maps tokens [B, S + T] to (logits [B * T, V] float32, statistics [G, M * (6 + 2 E)], choices ()).

    The first S tokens of a sequence are the encoder's input, the rest the decoder's. The M conditional layers are those
    of the encoder, then those of the decoder; see models.Decoder. Embeddings are shared; where the head is tied, too,
    its input is scaled by 1 / sqrt(D).

    Args:
        config: the whole configuration.
        vocab_size: entries V of the tokenizer.
        length: longest sequence of a stack, for the constants of positions.
        drawn: False: weights have shapes and no numbers, see nn.initializers.
        mesh: the devices.

    Raises:
        UserError: a router that is not causal in a layer of the decoder.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        length: int | None = None,
        drawn: bool = True,
        mesh: LocalMesh = LOCAL,
    ):
        super().__init__()
        stacks, model, factor = config.stacks, config.model, config.seq2seq.initializer_factor
        for stack in stacks:
            check_sort_keys(stack)
        if stacks[1].moe_layers:
            require_causal(config.moe)
        random, self.vocab_size = InitialWeights(config.train.seed, drawn), vocab_size
        self.moe_layers = config.moe_layers
        self.kv_heads, self.head_size = model.num_heads, model.size_of_head
        self.length = max(length or 0, model.seq_length, config.target_length)
        self.dtype, self.tied = DTYPES[model.compute_dtype], model.tie_word_embeddings
        self.scale = model.hidden_size**-0.5
        fused = fused_operators(config, ms.get_context("device_target"))
        self.embedding = Embedding(vocab_size, model.hidden_size, factor, random)
        self.encoder = Stack(stacks[0], False, self.length, random, vocab_size, fused, mesh)
        self.decoder = Stack(stacks[1], True, self.length, random, vocab_size, fused, mesh)
        passes = 2 if config.moe.consistency_loss_factor and self.moe_layers else 1  # see training.loss.TrainLoss
        self.noise_slices = max(self.encoder.noise_slices, self.decoder.noise_slices) * passes
        self.head = None if self.tied else Linear(model.hidden_size, vocab_size, self.scale, random, self.dtype)
        self.tied_product = ops.MatMul(transpose_b=True)
        self.cast_x, self.cast_table, self.to_float32 = Cast(self.dtype), Cast(self.dtype), Cast(mstype.float32)
        self.local_inputs, self.local_noise, self.local_scale = self.to_inputs, self.split_noise, self.scaled
        self.beside = Beside()

    @property
    def layers(self) -> list:
        """Returns the layers of both stacks."""
        return [*self.encoder.layers, *self.decoder.layers]

    def construct(self, tokens: Tensor, valid: Tensor, noise: Tensor, replay: Tensor = None):
        """Takes tokens [B, S + T] int32, valid [B, T] float32: 1 = a real token of the decoder, and noise
        [max(noise_slices, 1), B * (S + T), D] of U(0, 1), any [1, 1, 1] at evaluation. Padding of the encoder is PAD.
        """
        inputs, keep, outputs = self.local_inputs(tokens, valid)  # [B, S] twice, [B, T]
        noises = (noise, noise)
        if self.training and noise.shape[2] > 1:  # [.., 1, 1] stands for no noise
            noises = self.local_noise(noise, tokens, valid)  # [.., B * S, D], [.., B * T, D]
        memory, stats, _ = self.encoder(self.embedding(inputs), inputs, keep, noises[0])
        x, own, _ = self.decoder(self.embedding(outputs), outputs, valid, noises[1], (memory, keep))
        return self.logits(x), self.beside((*stats, *own)), ()

    def logits(self, x: Tensor) -> Tensor:
        """Projects normed rows [N, D] on the vocabulary: [N, V] float32."""
        if self.tied:
            x = self.local_scale(x)
            return self.to_float32(self.tied_product(self.cast_x(x), self.cast_table(self.embedding.table)))
        return self.to_float32(self.head(x))

    # ---- local to one device
    def to_inputs(self, tokens: Tensor, valid: Tensor) -> tuple:
        """Splits tokens [B, S + T] by valid [B, T]: the encoder's [B, S], which of them are real, the decoder's."""
        length = tokens.shape[1] - valid.shape[1]
        inputs = tokens[:, :length]
        return inputs, (inputs != PAD).astype(mstype.float32), tokens[:, length:]

    def split_noise(self, noise: Tensor, tokens: Tensor, valid: Tensor) -> tuple:
        """Splits noise [J, B * (S + T), D] into that of the encoder and that of the decoder."""
        slices, width, length = noise.shape[0], noise.shape[2], tokens.shape[1] - valid.shape[1]
        parts = noise.reshape(slices, -1, tokens.shape[1], width)  # [J, B, S + T, D]
        return (
            parts[:, :, :length].reshape(slices, -1, width),  # [J, B * S, D]
            parts[:, :, length:].reshape(slices, -1, width),  # [J, B * T, D]
        )

    def scaled(self, x: Tensor) -> Tensor:
        """Scales rows [N, D] for a tied head."""
        return x * self.scale

    def shard(self, mesh: CompiledMesh) -> None:
        """Leaves the embedding full everywhere; every model shard makes all logits of its tokens.

        Raises:
            UserError: what cannot be sharded.
        """
        pair, data = mesh.layout("data", None), mesh.degrees.data_parallel

        def inputs(tokens, valid):
            length = tokens[1] - valid[1]
            return [tokens[0], length], [tokens[0], length], valid

        def input_types(tokens, valid):
            return tokens, valid, tokens

        def noises(noise, tokens, valid):
            batch, length = tokens[0], tokens[1] - valid[1]
            return [noise[0], batch * length, noise[2]], [noise[0], batch * valid[1], noise[2]]

        def noise_types(noise, tokens, valid):
            return noise, noise

        self.local_inputs = mesh.local(self.to_inputs, (pair, pair), (pair, pair, pair), inputs, input_types)
        self.local_noise = mesh.local(
            self.split_noise, (mesh.noise, pair, pair), (mesh.noise, mesh.noise), noises, noise_types
        )
        self.local_scale = mesh.local(self.scaled, (pair,), (pair,), first, first)
        for cell in (self.embedding, self.encoder, self.decoder, self.beside):
            cell.shard(mesh)
        self.cast_x.shard(mesh, "data", None)
        self.cast_table.shard(mesh, None, None)
        self.to_float32.shard(mesh, "data", None)
        self.tied_product.shard(((data, 1), (1, 1)))
        if self.head is not None:
            self.head.shard(mesh)
