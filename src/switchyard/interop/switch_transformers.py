"""Translates between Seq2Seq and the `switch_transformers` models of Hugging Face: config.json, tensors, names.

Hugging Face's linear layers hold [out, in], ours [in, out]. Experts are one tensor each there and stacked here; keys
and values are two matrices there and one here, head by head.

What differs: transformers drops choices beyond `expert_capacity` tokens of a sequence, at evaluation too; here nothing
is dropped at evaluation (moe.eval_capacity_factor null), so an exported config.json has a capacity that drops nothing.

Legend: V vocabulary, D width, H heads, h head size, Q = H * h, R buckets, F dense hidden width, E experts, X hidden
width of an expert.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.config.seq2seq import END, PAD
from switchyard.errors import UserError, represented

ARCHITECTURE, MODEL_TYPE = "SwitchTransformersForConditionalGeneration", "switch_transformers"
UNLIMITED = 2**31 - 1  # expert_capacity that drops nothing
LONGEST_TRAINED = 512  # tokens of model.seq_length, which config.json does not name: relative positions have no end
# keys of config.json: their names here, and what transformers takes where a key is missing
NAMES: dict[str, tuple[str, Any]] = {
    "d_model": ("model.hidden_size", 768),
    "d_ff": ("model.intermediate_size", 2048),
    "num_layers": ("model.num_layers", 12),
    "num_heads": ("model.num_heads", 12),
    "dense_act_fn": ("model.activation", "relu"),
    "dropout_rate": ("model.dropout", 0.1),
    "layer_norm_epsilon": ("model.norm_eps", 1e-6),
    "tie_word_embeddings": ("model.tie_word_embeddings", True),
    "num_experts": ("moe.expert_num", 8),
    "router_jitter_noise": ("moe.jitter", 0.01),
    "router_z_loss_coef": ("moe.z_loss_factor", 0.001),
    "router_aux_loss_coef": ("moe.aux_loss_factor", 0.001),
    "num_decoder_layers": ("seq2seq.num_decoder_layers", 12),
    "relative_attention_num_buckets": ("seq2seq.relative_attention_num_buckets", 32),
    "relative_attention_max_distance": ("seq2seq.relative_attention_max_distance", 128),
    "initializer_factor": ("seq2seq.initializer_factor", 1.0),
}
# keys of config.json with one value that our model has: (value, what transformers takes where the key is missing)
ALWAYS: dict[str, tuple[Any, Any]] = {
    "router_bias": (False, False),
    "is_gated_act": (False, False),
    "pad_token_id": (PAD, 0),
    "eos_token_id": (END, 1),
    "decoder_start_token_id": (PAD, 0),
}
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu"}  # dense_act_fn -> model.activation; GELU in its tanh form
SPARSE = ("num_sparse_encoder_layers", "num_sparse_decoder_layers")  # 3 where they are missing


@dataclass(frozen=True)
class Source:
    """Describes one tensor of theirs, as a part of a parameter of ours.

    Attributes:
        name, shape: of the tensor.
        expert: its index on the first axis of ours; None where ours has no axis of experts.
        columns: which of the last axis of ours it fills; None = all.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    columns: np.ndarray | None = None


@dataclass(frozen=True)
class Parameter:
    """Holds one parameter of ours with what it is made of.

    Attributes:
        name, shape: of ours.
        turned: whether the last two axes of ours are theirs in the other order.
        sources: in the order of theirs.
    """

    name: str
    shape: tuple[int, ...]
    turned: bool
    sources: tuple[Source, ...]


def sparse_layers(layers: int, sparse: int) -> list[int]:
    """Returns which of some layers transformers makes conditional: without `sparse` ones still the second."""
    step = layers // sparse if sparse > 0 else layers
    return [layer for layer in range(layers) if step > 0 and (layer % step == 1 or step == 1)]


def to_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the sections of our configuration of a config.json (UserError: a value that our model does not have)."""
    for key, (value, usual) in ALWAYS.items():
        if tree.get(key, usual) != value:
            raise UserError(f"config.json: {key}: {represented(tree[key])}; only {represented(value)} is offered")
    sections: dict[str, dict[str, Any]] = {"model": {}, "moe": {}, "seq2seq": {}}
    for key, (name, usual) in NAMES.items():
        section, _, ours = name.partition(".")
        sections[section][ours] = tree.get(key, usual)
    model, size = sections["model"], tree.get("d_kv", 64)
    if model["activation"] not in ACTIVATIONS:
        allowed = " or ".join(ACTIVATIONS)
        raise UserError(f"config.json: dense_act_fn: {represented(model['activation'])}; only {allowed} is offered")
    model["activation"] = ACTIVATIONS[model["activation"]]
    if size * model["num_heads"] != model["hidden_size"]:
        reason = f"only d_model / num_heads ({model['hidden_size']} / {model['num_heads']}) is offered"
        raise UserError(f"config.json: d_kv: {represented(size)}; {reason}")
    model |= {"type": "seq2seq", "norm": "rmsnorm", "seq_length": LONGEST_TRAINED}
    encoder, decoder = model["num_layers"], sections["seq2seq"]["num_decoder_layers"] or model["num_layers"]
    sparse = [tree.get(key, 3) for key in SPARSE]
    places = [*sparse_layers(encoder, sparse[0]), *(encoder + layer for layer in sparse_layers(decoder, sparse[1]))]
    sections["moe"] |= {"router": "switch", "num_experts_chosen": 1, "layers": places}
    return sections


def to_config(tree: dict[str, Any], name: str = "imported") -> Config:
    """Returns our configuration of a config.json; `name`: train.name (UserError: see `to_tree`)."""
    return configuration.build(to_tree(tree) | {"train": {"name": name}}, inherited=True)


def from_config(config: Config, vocab_size: int) -> dict[str, Any]:
    """Returns a config.json (UserError: a model that transformers does not have)."""
    for key, fits, remedy in _fits(config):
        if not fits:
            raise UserError(f"{key}: {represented(config.value(key))}; {MODEL_TYPE} of transformers {remedy}")
    tree = {key: config.value(name) for key, (name, _) in NAMES.items()}
    tree |= {key: value for key, (value, _) in ALWAYS.items() if key != "is_gated_act"}
    tree["dense_act_fn"] = next(name for name, ours in ACTIVATIONS.items() if ours == config.model.activation)
    tree |= {"d_ff": config.dense_width, "num_decoder_layers": config.decoder_layers}
    tree |= {"d_kv": config.model.hidden_size // config.model.num_heads, "vocab_size": vocab_size}
    for key, stack in zip(SPARSE, config.stacks):
        tree[key] = _number_of_sparse(stack)
    tree |= {"expert_capacity": UNLIMITED, "is_encoder_decoder": True}
    return {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE} | tree


def _fits(config: Config) -> Iterator[tuple[str, bool, str]]:
    """Yields (key, whether transformers has it, what it has)."""
    model, moe = config.model, config.moe
    yield "model.type", model.type == "seq2seq", "is an encoder-decoder"
    yield "model.norm", model.norm == "rmsnorm", "has RMSNorm"
    yield "model.activation", model.activation in ("relu", "gelu"), "has relu or gelu, no gated feed-forward"
    yield "moe.router", moe.router == "switch", "has the router 'switch'"
    yield "moe.expert_num", bool(config.moe_layers), "has a conditional layer in each stack"
    yield "moe.experts", moe.experts is None, "has feed-forward experts"
    yield "moe.shared_expert_num", moe.shared_expert_num == 0, "has no shared experts"
    same = config.expert_width == config.dense_width
    yield "moe.moe_intermediate_size", same, "has experts as wide as a dense feed-forward"
    placed = all(_number_of_sparse(stack) is not None for stack in config.stacks)
    yield "moe.layers", placed, "makes every n-th layer conditional, from the second on"


def _number_of_sparse(stack: Config) -> int | None:
    """Returns how many conditional layers config.json names for the places of a stack; None: no number gives them."""
    layers, wanted = stack.model.num_layers, list(stack.moe_layers)
    counts = (*range(1, layers + 1), 0)
    return next((count for count in counts if sparse_layers(layers, count) == wanted), None)


def parameters(config: Config, vocab_size: int) -> Iterator[Parameter]:
    """Yields all parameters of a model."""
    model, own = config.model, config.seq2seq
    yield _copied("embedding.table", "shared.weight", (vocab_size, model.hidden_size))
    if not model.tie_word_embeddings:
        yield _turned("head.weight", "lm_head.weight", (model.hidden_size, vocab_size))
    for name, stack in zip(("encoder", "decoder"), config.stacks):
        bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shape = (own.relative_attention_num_buckets, model.num_heads)
        yield _copied(f"{name}.relative_bias", bias, shape)
        yield _copied(f"{name}.norm.gain", f"{name}.final_layer_norm.weight", (model.hidden_size,))
        for layer in range(stack.model.num_layers):
            yield from _layer(stack, name, layer)


def _layer(stack: Config, name: str, layer: int) -> Iterator[Parameter]:
    """Yields the parameters of one layer of a stack, "encoder" or "decoder"."""
    ours, theirs, width = f"{name}.layers.{layer}.", f"{name}.block.{layer}.layer.", stack.model.hidden_size
    parts = [("attention", "SelfAttention")] + [("cross_attention", "EncDecAttention")] * (name == "decoder")
    for place, (part, their_part) in enumerate(parts):
        yield from _attention(stack, f"{ours}{part}.", f"{theirs}{place}.{their_part}.")
        yield _copied(f"{ours}{part}_norm.gain", f"{theirs}{place}.layer_norm.weight", (width,))
    place = f"{theirs}{len(parts)}."
    yield _copied(f"{ours}feed_forward_norm.gain", f"{place}layer_norm.weight", (width,))
    if layer not in stack.moe_layers:
        yield from _networks(f"{ours}feed_forward.", [f"{place}mlp."], width, stack.dense_width)
        return
    experts = stack.moe.expert_num
    yield _turned(f"{ours}feed_forward.router.weight", f"{place}mlp.router.classifier.weight", (width, experts))
    names = [f"{place}mlp.experts.expert_{expert}." for expert in range(experts)]
    yield from _networks(f"{ours}feed_forward.experts.", names, width, stack.expert_width)


def _attention(stack: Config, ours: str, theirs: str) -> Iterator[Parameter]:
    """Yields the matrices of one attention."""
    width, heads = stack.model.hidden_size, stack.model.num_heads
    yield _turned(f"{ours}q.weight", f"{theirs}q.weight", (width, width))
    yield _turned(f"{ours}out.weight", f"{theirs}o.weight", (width, width))
    columns = np.arange(2 * width).reshape(heads, 2, -1)  # [H, 2, h]
    sources = [
        Source(f"{theirs}{part}.weight", (width, width), None, columns[:, place].reshape(-1))
        for place, part in enumerate("kv")
    ]
    yield Parameter(f"{ours}kv.weight", (width, 2 * width), True, tuple(sources))


def _networks(ours: str, theirs: list[str], width: int, hidden: int) -> Iterator[Parameter]:
    """Yields the matrices of feed-forward networks, one for each name of `theirs`."""
    for matrix, their_matrix, shape in (("w_in", "wi", (width, hidden)), ("w_out", "wo", (hidden, width))):
        sources = [Source(f"{name}{their_matrix}.weight", shape[::-1], place) for place, name in enumerate(theirs)]
        yield Parameter(f"{ours}{matrix}", (len(theirs), *shape), True, tuple(sources))


def _copied(ours: str, theirs: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(ours, shape, False, (Source(theirs, shape),))


def _turned(ours: str, theirs: str, shape: tuple[int, int]) -> Parameter:
    return Parameter(ours, shape, True, (Source(theirs, shape[::-1]),))


def joined(parameter: Parameter, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns our parameter of theirs; `read`: name -> array (UserError: an array of another shape)."""
    out = None
    for source in parameter.sources:
        array = read(source.name)
        if tuple(array.shape) != source.shape:
            raise UserError(f"{source.name}: {tuple(array.shape)}; config.json says {source.shape}")
        array = array.swapaxes(-1, -2) if parameter.turned else array
        out = np.empty(parameter.shape, array.dtype) if out is None else out
        out[_place(source)] = array
    return out


def split(parameter: Parameter, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields their tensors by name, of our parameter."""
    for source in parameter.sources:
        part = array[_place(source)]
        yield source.name, np.ascontiguousarray(part.swapaxes(-1, -2) if parameter.turned else part)


def _place(source: Source) -> tuple:
    """Returns the place of a source in our parameter."""
    if source.expert is not None:
        return (source.expert,)
    return (...,) if source.columns is None else (..., source.columns)
