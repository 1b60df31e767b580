"""Describes Switch Transformers, the encoder-decoder: config.json and tensors of `switch_transformers` models.

Experts are one tensor each there and stacked here; keys and values are two matrices there and one here, head by head.

What differs: transformers drops choices beyond `expert_capacity` tokens of a sequence, at evaluation too; here nothing
is dropped at evaluation (moe.eval_capacity_factor null), so a config.json that is made here has a capacity that drops
nothing.

Legend: V vocabulary, D width, H heads, h head size, Q = H * h, R buckets, F dense hidden width, E experts, X hidden
width of an expert.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.config.seq2seq import END, PAD
from switchyard.data.sentinels import wrapped
from switchyard.data.tokenizer import Tokenizer, sentinels_of
from switchyard.errors import UserError, represented
from switchyard.interop.huggingface.facts import seq2seq_facts
from switchyard.interop.huggingface.family import Family
from switchyard.interop.huggingface.rules import Parameter, Source
from switchyard.interop.huggingface.settings import SILENT, Keys

UNLIMITED = 2**31 - 1  # expert_capacity that drops nothing
LONGEST_TRAINED = 512  # tokens of model.seq_length, which config.json does not name: relative positions have no end
MOST_LAYERS = 10_000  # of a stack
# keys of config.json: (their names here, their type, what transformers takes where a key is missing)
NAMES: dict[str, tuple[str, type, Any]] = {
    "d_model": ("model.hidden_size", int, 768),
    "d_ff": ("model.intermediate_size", int, 2048),
    "num_layers": ("model.num_layers", int, 12),
    "num_heads": ("model.num_heads", int, 12),
    "dropout_rate": ("model.dropout", float, 0.1),
    "layer_norm_epsilon": ("model.norm_eps", float, 1e-6),
    "tie_word_embeddings": ("model.tie_word_embeddings", bool, True),
    "relative_attention_num_buckets": ("seq2seq.relative_attention_num_buckets", int, 32),
    "relative_attention_max_distance": ("seq2seq.relative_attention_max_distance", int, 128),
    "initializer_factor": ("seq2seq.initializer_factor", float, 1.0),
}
# the same of models with conditional layers
SPARSE_NAMES: dict[str, tuple[str, type, Any]] = {
    "num_experts": ("moe.expert_num", int, 8),
    "router_jitter_noise": ("moe.jitter", float, 0.01),
    "router_z_loss_coef": ("moe.z_loss_factor", float, 0.001),
    "router_aux_loss_coef": ("moe.aux_loss_factor", float, 0.001),
}
# keys of config.json with one value that our model has; transformers takes it, too, where the key is missing
ALWAYS: dict[str, Any] = {
    "router_bias": False,
    "is_gated_act": False,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu"}  # dense_act_fn -> model.activation; GELU in its tanh form
STACKS = ("encoder", "decoder")
QUIET = {  # beyond settings.SILENT: what is derived, or says nothing about the outputs of our model
    *("is_encoder_decoder", "add_router_probs", "router_ignore_padding_tokens", "task_specific_params", "n_positions"),
}  # fmt: skip
OTHER = {
    "num_decoder_layers": None,
    "d_kv": 64,
    "dense_act_fn": "relu",
    "expert_capacity": 64,
    "router_dtype": "float32",
}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


class SwitchTransformers(Family):
    """Translates Switch Transformers, see Family.

    Attributes:
        defaults: what transformers takes where config.json lacks a key.
    """

    model_type, architecture, sparse = "switch_transformers", "SwitchTransformersForConditionalGeneration", True
    loader = "AutoModelForSeq2SeqLM"
    tokenizer_settings: ClassVar[dict[str, Any]] = {"pad_token": "<pad>", "eos_token": "</s>"}
    defaults: ClassVar[dict[str, Any]] = (
        {key: usual for key, (_, _, usual) in (NAMES | SPARSE_NAMES).items()} | ALWAYS | OTHER
    )
    defaults |= {f"num_sparse_{name}_layers": 3 for name in STACKS}

    def read(self, tree: dict[str, Any], name: str = "imported") -> tuple[Config, list[str]]:
        """See Family.read."""
        keys = Keys(tree, self.defaults)
        for key, value in ALWAYS.items():
            found = keys.get(key, type(value))
            if found != value:
                raise UserError(f"config.json: {key}: {represented(found)}; only {represented(value)} is offered")
        sections = _sections(keys, NAMES) | {"train": {"name": name}}
        sections["model"] |= _model(keys)
        depths = [sections["model"]["num_layers"]]
        depths.append(_layers("num_decoder_layers", keys.get("num_decoder_layers", int) or depths[0]))
        sections["seq2seq"]["num_decoder_layers"] = depths[1]
        sections["moe"] = _moe(keys, depths)
        return configuration.build(sections, inherited=True), _lines(tree, keys)

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """See Family.write."""
        tree = {key: config.value(name) for key, (name, _, _) in (NAMES | SPARSE_NAMES).items()}
        tree |= {key: value for key, value in ALWAYS.items() if key != "is_gated_act"}
        activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        tree["dense_act_fn"] = activations.get(config.model.activation, "relu")
        all_sparse = len(config.moe_layers) == config.all_layers
        tree["d_ff"] = config.expert_width if all_sparse else config.dense_width
        tree |= {"num_decoder_layers": config.decoder_layers}
        tree |= {"d_kv": config.model.size_of_head, "vocab_size": vocab_size}
        for name, stack in zip(STACKS, config.stacks):
            tree[f"num_sparse_{name}_layers"] = _number_of_sparse(stack)
        tree |= {"expert_capacity": UNLIMITED, "is_encoder_decoder": True}
        return {"architectures": [self.architecture], "model_type": self.model_type} | tree

    def parameters(self, config: Config, vocab_size: int) -> Iterator[Parameter]:
        """See Family.parameters."""
        model, own = config.model, config.seq2seq
        table = _copied("embedding.table", "shared.weight", (vocab_size, model.hidden_size))
        if model.tie_word_embeddings:
            yield table
        else:  # transformers then reads a table for each stack
            yield replace(table, copies=COPIES)
            yield _turned("head.weight", "lm_head.weight", (model.hidden_size, vocab_size))
        for name, stack in zip(STACKS, config.stacks):
            bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            shape = (own.relative_attention_num_buckets, model.num_heads)
            yield _copied(f"{name}.relative_bias", bias, shape)
            yield _copied(f"{name}.norm.gain", f"{name}.final_layer_norm.weight", (model.hidden_size,))
            for layer in range(stack.model.num_layers):
                yield from _layer(stack, name, layer)

    def facts(self, config: Config) -> dict[str, Any]:
        """See Family.facts."""
        return seq2seq_facts(config)

    def unfit(self, config: Config) -> str | None:
        """See Family.unfit."""
        if config.model.type != "seq2seq":
            return f"model.type: {config.model.type}"
        return super().unfit(config)

    def left_out(self, name: str, tree: dict[str, Any]) -> str | None:
        """See Family.left_out."""
        if name in COPIES or name == "lm_head.weight":  # a head of its own is a parameter
            return "is the embedding table (shared.weight)"
        return "is not read by cross-attention" if name == UNUSED_BIAS else None

    def with_tokenizer(self, config: Config, text: str) -> tuple[Config, str]:
        """Returns the configuration for the sentinels that a tokenizer has, and the tokenizer, whose ids stay.

        model.seq_length is at most what the sentinels are enough for.

        Raises:
            UserError: a tokenizer without the layout of T5.
        """
        count = sentinels_of(Tokenizer.from_json(text))
        if not count:
            raise UserError(
                "tokenizer.json: does not have the special tokens of T5: padding 0, the end 1, and <extra_id_0>, "
                "<extra_id_1>, ... with falling ids; take the model's own tokenizer"
            )
        tree = config.model_dump()
        tree["seq2seq"]["sentinels"] = count
        tree["model"]["seq_length"] = _longest(config, count)
        return configuration.build(tree, inherited=True), wrapped(text, count)


def sparse_layers(layers: int, sparse: int) -> list[int]:
    """Returns which of some layers transformers makes conditional: without `sparse` ones still the second."""
    step = layers // sparse if sparse > 0 else layers
    return [layer for layer in range(layers) if step > 0 and (layer % step == 1 or step == 1)]


def _sections(keys: Keys, names: dict[str, tuple[str, type, Any]]) -> dict[str, dict[str, Any]]:
    """Returns section -> its keys."""
    sections: dict[str, dict[str, Any]] = {}
    for key, (name, kind, _) in names.items():
        section, _, ours = name.partition(".")
        sections.setdefault(section, {})[ours] = keys.need(key, kind)
    return sections


def _layers(key: str, count: int) -> int:
    """Returns the layers of a stack (UserError: more or less than a model may have)."""
    if not 0 < count <= MOST_LAYERS:
        raise UserError(f"config.json: {key}: {count}; must be 1 to {MOST_LAYERS:,}")
    return count


def _model(keys: Keys) -> dict[str, Any]:
    """Returns keys of the section `model` that need more than another name."""
    activation, size = keys.need("dense_act_fn", str), keys.need("d_kv", int)
    if activation not in ACTIVATIONS:
        allowed = " or ".join(ACTIVATIONS)
        raise UserError(f"config.json: dense_act_fn: {represented(activation)}; only {allowed} is offered")
    _layers("num_layers", keys.need("num_layers", int))
    usual = size * keys.need("num_heads", int) == keys.need("d_model", int)
    section = {"type": "seq2seq", "norm": "rmsnorm", "seq_length": LONGEST_TRAINED}
    return section | {"activation": ACTIVATIONS[activation], "head_size": None if usual else size}


def _moe(keys: Keys, depths: list[int]) -> dict[str, Any]:
    """Returns the section `moe` (UserError: a step that the number of conditional layers does not give)."""
    places, before = [], 0
    for name, layers in zip(STACKS, depths):
        sparse = keys.need(f"num_sparse_{name}_layers", int)
        step, usual = keys.get(f"{name}_sparse_step", int, None), layers // sparse if sparse > 0 else layers
        if step not in (None, usual):
            reason = f"num_sparse_{name}_layers ({sparse}) of {layers} make it {usual}"
            raise UserError(f"config.json: {name}_sparse_step: {step}; {reason}")
        places += [before + layer for layer in sparse_layers(layers, sparse)]
        before += layers
    section = _sections(keys, SPARSE_NAMES)["moe"]
    if not places:
        return {}
    if section["expert_num"] < 2:
        reason = "a conditional layer needs 2 experts or more"
        raise UserError(f"config.json: num_experts: {section['expert_num']}; {reason}")
    return section | {"router": "switch", "num_experts_chosen": 1, "layers": places}


def _lines(tree: dict[str, Any], keys: Keys) -> list[str]:
    """Returns lines about keys that are not taken over."""
    lines, capacity = [], keys.get("expert_capacity", int)
    if capacity is not None and capacity < UNLIMITED:
        lines.append(f"config.json: expert_capacity: {capacity} is not taken over: nothing is dropped at evaluation")
    if (dtype := keys.get("router_dtype", str)) not in (None, "float32"):
        lines.append(f"config.json: router_dtype: {represented(dtype)} is not taken over: the router is float32")
    if unread := sorted(tree.keys() - keys.read - SILENT - QUIET):
        lines.append(f"config.json: keys that were not read: {', '.join(map(represented, unread))}")
    return lines


def _number_of_sparse(stack: Config) -> int:
    """Returns how many conditional layers config.json names for the places of a stack; 0 where no number gives them."""
    layers, wanted = stack.model.num_layers, list(stack.moe_layers)
    return next((count for count in range(1, layers + 2) if sparse_layers(layers, count) == wanted), 0)


def _longest(config: Config, sentinels: int) -> int:
    """Returns the longest input, up to model.seq_length, whose spans have a sentinel each."""
    own, length = config.seq2seq, config.model.seq_length
    while length > 3 and own.spans(own.window(length))[1] > sentinels:
        length -= 1
    return length


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
    inner = heads * stack.model.size_of_head  # Q
    yield _turned(f"{ours}q.weight", f"{theirs}q.weight", (width, inner))
    yield _turned(f"{ours}out.weight", f"{theirs}o.weight", (inner, width))
    columns = np.arange(2 * inner).reshape(heads, 2, -1)  # [H, 2, h]
    sources = [
        Source(f"{theirs}{part}.weight", (inner, width), None, columns[:, place].reshape(-1))
        for place, part in enumerate("kv")
    ]
    yield Parameter(f"{ours}kv.weight", (width, 2 * inner), True, tuple(sources))


def _networks(ours: str, theirs: list[str], width: int, hidden: int) -> Iterator[Parameter]:
    """Yields the matrices of feed-forward networks, one for each name of `theirs`."""
    for matrix, their_matrix, shape in (("w_in", "wi", (width, hidden)), ("w_out", "wo", (hidden, width))):
        sources = [Source(f"{name}{their_matrix}.weight", shape[::-1], place) for place, name in enumerate(theirs)]
        yield Parameter(f"{ours}{matrix}", (len(theirs), *shape), True, tuple(sources))


def _copied(ours: str, theirs: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(ours, shape, False, (Source(theirs, shape),))


def _turned(ours: str, theirs: str, shape: tuple[int, int]) -> Parameter:
    return Parameter(ours, shape, True, (Source(theirs, shape[::-1]),))
