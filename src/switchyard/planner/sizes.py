"""Computes sizes of a network of text: its parameters, and the rows that its experts work on. No MindSpore in here.

Legend: D width, E experts, V vocabulary, X columns of the projection to queries, keys and values.
"""

import math

from switchyard.config import Config
from switchyard.distributed.placement import ParallelDims, degree_of, optimizer_shards, placement, stages_of
from switchyard.moe.dispatch.capacity import slot_shape, zero_rows

FLOAT = 4  # bytes of float32: parameters, gradients, moments, rows between the parts of a layer
Shape = tuple[int, ...]


def parameters(config: Config, vocab: int, stage: int = 0) -> dict[str, Shape]:
    """Returns name -> full shape of every parameter of the network; for a pipeline, of one stage."""
    degrees, layers = ParallelDims.of(config.parallel), config.model.num_layers
    found = (_of_seq2seq if config.model.type == "seq2seq" else _all_parameters)(config, vocab)
    return {name: shape for name, shape in found.items() if stage in stages_of(name, layers, degrees)[:1]}


def _all_parameters(config, vocab):
    model, width = config.model, config.model.hidden_size
    found = {"embedding.table": (vocab, width)}
    if model.position == "learned":
        found["position.table"] = (model.seq_length, width)
    for index in range(model.num_layers):
        prefix = f"layers.{index}."
        found |= _norm(f"{prefix}attention_norm", model)
        found[f"{prefix}attention.qkv.weight"] = (width, projection(config))
        found[f"{prefix}attention.out.weight"] = (width, width)
        found |= _norm(f"{prefix}feed_forward_norm", model) | _feed_forward(config, index, f"{prefix}feed_forward.")
    found |= _norm("norm", model)
    if not model.tie_word_embeddings:
        found["head.weight"] = (width, vocab)
    return found


def _of_seq2seq(config, vocab):
    model, width = config.model, config.model.hidden_size
    found = {"embedding.table": (vocab, width)}
    for name, stack in zip(("encoder", "decoder"), config.stacks):
        found[f"{name}.relative_bias"] = (config.seq2seq.relative_attention_num_buckets, model.num_heads)
        parts = ("attention", "cross_attention") if name == "decoder" else ("attention",)
        for index in range(stack.model.num_layers):
            prefix = f"{name}.layers.{index}."
            for part in parts:
                found |= _norm(f"{prefix}{part}_norm", model)
                matrices = {"q": (width, width), "kv": (width, 2 * width), "out": (width, width)}
                found |= {f"{prefix}{part}.{key}.weight": shape for key, shape in matrices.items()}
            found |= _norm(f"{prefix}feed_forward_norm", model) | _feed_forward(stack, index, f"{prefix}feed_forward.")
        found |= _norm(f"{name}.norm", model)
    return found if model.tie_word_embeddings else found | {"head.weight": (width, vocab)}


def projection(config: Config) -> int:
    """Returns the columns X of the matrix that makes queries, keys and values."""
    model = config.model
    return model.hidden_size + 2 * (model.n_kv_heads or model.num_heads) * (model.hidden_size // model.num_heads)


def _norm(name, model):
    shape = (model.hidden_size,)
    return {f"{name}.gain": shape} | ({f"{name}.bias": shape} if model.norm == "layernorm" else {})


def _feed_forward(config, index, prefix):
    width, moe = config.model.hidden_size, config.moe

    def matrices(name, count, hidden):
        found = {f"{name}w_in": (count, width, hidden)}
        if config.model.activation == "swiglu":
            found[f"{name}w_gate"] = (count, width, hidden)
        return found | {f"{name}w_out": (count, hidden, width)}

    if index not in config.moe_layers:
        return matrices(prefix, 1, config.dense_width)
    found = {f"{prefix}router.weight": (width, moe.expert_num)}
    found |= matrices(f"{prefix}experts.", moe.expert_num, config.expert_width)
    if moe.shared_expert_num:
        found |= matrices(f"{prefix}shared.", 1, config.expert_width * moe.shared_expert_num)
    if moe.use_shared_expert_gating:
        found[f"{prefix}shared.gate"] = (1, width, 1)
    return found


def shard_sizes(name, shape, degrees):
    """Returns (numbers of a rank's shard, numbers of it that the rank keeps between steps)."""
    axes = placement(name, shape, degrees)
    size = math.prod(shape) // math.prod(degree_of(axis, degrees) for axis in axes)
    return size, size // optimizer_shards(shape, axes, degrees, 0)


def worked_rows(config: Config) -> int:
    """Returns the rows that the experts of a device process in a conditional layer.

    With capacities their slots, filled or not; dropless what a balanced router sends, zero rows of each device besides.
    """
    moe, data = config.moe, config.parallel.data_parallel
    if moe.dispatch == "capacity":
        return math.prod(slot_shape(config)[:3]) // data
    return config.rows // data * moe.choices + zero_rows(config, moe.dispatch == "dropless_static")


def product_bytes(config: Config) -> int:
    """Returns the bytes of a number in the matrix products."""
    return FLOAT if config.model.compute_dtype == "float32" else 2
