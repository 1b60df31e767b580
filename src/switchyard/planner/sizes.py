"""Computes sizes of a network of text: its parameters, and the rows that its experts work on. No MindSpore in here.

Legend: D width, E experts, V vocabulary, X columns of the projection to queries, keys and values.
"""

import math

from switchyard.config import Config
from switchyard.distributed.placement import (
    ParallelDims,
    degree_of,
    optimizer_cut,
    optimizer_shards,
    placement,
    stages_of,
)
from switchyard.moe.dispatch.capacity import slot_shape, zero_rows
from switchyard.nn.fused import fused_operators

FLOAT = 4  # bytes of float32: parameters, gradients, moments, rows between the parts of a layer
Shape = tuple[int, ...]


def parameters(config: Config, vocab: int, stage: int = 0) -> dict[str, Shape]:
    """Returns name -> full shape of every parameter of the network; for a pipeline, of one stage."""
    degrees, layers = ParallelDims.of(config.parallel), config.model.num_layers
    found = (_of_seq2seq if config.model.type == "seq2seq" else _all_parameters)(config, vocab)
    return {name: shape for name, shape in found.items() if stage in stages_of(name, layers, degrees)[:1]}


def parameter_count(config: Config, vocab: int) -> int:
    """Returns the numbers of all parameters of the decoder."""
    return sum(math.prod(shape) for shape in _all_parameters(config, vocab).values())


def _all_parameters(config, vocab):
    model, width = config.model, config.model.hidden_size
    found = {"embedding.table": (vocab, width)}
    if model.position == "learned":
        found["position.table"] = (model.seq_length, width)
    for index in range(model.num_layers):
        prefix = f"layers.{index}."
        found |= _norm(f"{prefix}attention_norm", model)
        found |= _attention(f"{prefix}attention.", config)
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
    return (config.model.num_heads + 2 * config.model.kv_heads) * config.model.size_of_head


def mixed(config: Config) -> int:
    """Returns the columns of what all query heads bring together, the rows of the output projection."""
    return config.model.num_heads * config.model.size_of_head


def _attention(prefix, config):
    model = config.model
    found = {f"{prefix}qkv.weight": (model.hidden_size, projection(config))}
    if model.attention_bias:
        found[f"{prefix}qkv.bias"] = (projection(config),)
    found[f"{prefix}out.weight"] = (mixed(config), model.hidden_size)
    if model.attention_bias == "all":
        found[f"{prefix}out.bias"] = (model.hidden_size,)
    for part, heads in (("queries", model.num_heads), ("keys", model.kv_heads)) if model.qk_norm else ():
        found[f"{prefix}qk_norm.{part}.gain"] = (model.size_of_head * (heads if model.qk_norm == "full" else 1),)
    return found


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
        found |= matrices(f"{prefix}shared.", 1, config.shared_width)
    if moe.use_shared_expert_gating:
        found[f"{prefix}shared.gate"] = (1, width, 1)
    return found


def router_state(config: Config, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Returns name -> full shape of the routers' parameters without gradient; shapes: of `parameters`."""
    if config.moe.router != "sigmoid":
        return {}
    weights = (name for name in shapes if name.endswith(".router.weight"))
    return {f"{name.removesuffix('weight')}bias": (config.moe.expert_num,) for name in weights}


def shard_sizes(name, shape, degrees):
    """Returns (numbers of a rank's shard, numbers of it that the rank keeps between steps)."""
    axes = placement(name, shape, degrees)
    size = math.prod(shape) // math.prod(degree_of(axis, degrees) for axis in axes)
    return size, size // optimizer_shards(shape, axes, degrees)


def is_cut_inside(name: str, shape: Shape, degrees: ParallelDims) -> bool:
    """Returns whether ZeRO cuts a stacked matrix along axis 1: the layer gathers it whenever it runs, and its gradient
    is cut at once."""
    axis, _ = optimizer_cut(shape, placement(name, shape, degrees), degrees)
    return axis == 1


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


def takes(config: Config, name: str) -> bool:
    """Returns whether the graph has a fused operator; without a named device, the graph for Ascend is counted."""
    target = config.context.device_target
    return name in fused_operators(config, "Ascend" if target == "auto" else target)


def reads_again(config: Config, name: str) -> bool:
    """Returns whether the backward pass reads a parameter: products do, fused norms do, other gains, biases and tables
    do not, unless their layer is recomputed."""
    kind, of_heads = name.rsplit(".", 1)[1], ".qk_norm." in name
    if kind not in ("gain", "bias", "table"):
        return True
    if kind == "table":
        return name == "embedding.table" and config.model.tie_word_embeddings
    rms = config.model.qk_norm == "head" if of_heads else config.model.norm == "rmsnorm"
    if kind == "gain" and rms and takes(config, "RmsNorm"):
        return True
    kept = of_heads and config.model.qk_norm == "full"  # what their shards have exchanged is not recomputed
    return config.parallel.recompute and name.startswith("layers.") and not kept


def seen_tokens(config: Config, layer: int) -> int:
    """Returns the keys that a row of a layer is multiplied with: all of its sequence, those that a mask hides too.

    FlashAttentionScore leaves out what lies outside a sliding window.
    """
    length, window = config.model.seq_length, config.model.window_of(layer)
    fused = window is not None and takes(config, "FlashAttentionScore")
    return min(length, window) if fused else length
