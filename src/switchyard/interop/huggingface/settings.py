"""Translates config.json into our configuration, and back."""

import math
from typing import TYPE_CHECKING, Any

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.errors import UserError, represented
from switchyard.interop.huggingface.rotary import read_rotary, write_rotary

if TYPE_CHECKING:
    from switchyard.interop.huggingface.decoders import DecoderFamily, Experts

LONGEST_TRAINED = 1024  # tokens of model.seq_length, however long a model may read: a mask of [S, S] is made for them
# keys whose other values change the mathematics: key -> (values that do not, what it means)
REFUSED = {
    "clip_qkv": ((None,), "queries, keys and values that are clipped"),
    "mlp_bias": ((None, False), "biases in the feed-forward"),
    "kv_lora_rank": ((None,), "multi-head latent attention (MLA)"),
    "attn_logit_softcapping": ((None,), "soft-capped attention"),
    "final_logit_softcapping": ((None,), "soft-capped logits"),
    "moe_layer_freq": ((None, 1), "conditional layers by a frequency"),
}
TRAINING = {"attention_dropout": 0.0, "router_jitter_noise": 0.0}  # read in training alone: told, not taken over
SILENT = {  # what says nothing about the mathematics, or repeats what tensors say
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "max_position_embeddings", "output_router_logits"),
    *("num_nextn_predict_layers", "pretraining_tp", "quantization_config", "rope_parameters", "max_window_layers"),
}  # fmt: skip
WINDOWED = ("sliding_attention", "full_attention")  # of layer_types
MISSING = object()
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    str: "a text",
}


class Keys:
    """Reads typed keys of config.json, and knows which were read."""

    def __init__(self, tree: dict[str, Any], defaults: dict[str, Any]):
        self._tree, self._defaults, self.read = tree, defaults, set()

    def get(self, key: str, kind: type, default: Any = MISSING) -> Any:
        """Returns a value, null as None (UserError: of another type, or missing without a default)."""
        self.read.add(key)
        value = self._tree.get(key, self._defaults.get(key, MISSING if default is MISSING else default))
        if value is MISSING:
            raise UserError(f"config.json: {key}: missing; a model of this family needs it")
        if value is None:
            return None
        number = kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool)
        if kind is float and number and math.isfinite(value):
            return float(value)
        if not isinstance(value, kind) or (kind is int and not number):
            raise UserError(f"config.json: {key}: {represented(value)}; must be {KINDS[kind]}")
        return value

    def need(self, key: str, kind: type) -> Any:
        """Returns a value that is not null (UserError)."""
        value = self.get(key, kind)
        if value is None:
            raise UserError(f"config.json: {key}: null; must be {KINDS[kind]}")
        return value

    def unread(self) -> list[str]:
        """Returns the keys that nothing has read and that may mean something."""
        return sorted(self._tree.keys() - self.read - SILENT - REFUSED.keys() - TRAINING.keys())


def to_config(family: "DecoderFamily", tree: dict[str, Any], name: str = "imported") -> tuple[Config, list[str]]:
    """Returns (our configuration of a config.json, lines about keys that are not taken over).

    Args:
        family: of the model.
        tree: config.json.
        name: train.name.

    Raises:
        UserError: a key that is missing or of another type, or a value that our models do not have.
    """
    keys = Keys(tree, family.defaults)
    _refuse(tree, family)
    sections = {"model": _model(family, keys), "train": {"name": name}}
    if family.experts is not None:
        sections["moe"] = _moe(family.experts, keys)
        if sections["moe"].get("layers") == "all":  # no feed-forward is dense
            del sections["model"]["intermediate_size"]
    config = configuration.build(sections, inherited=True)
    if config.moe_layers and config.moe.num_experts_chosen == 1 and _normalises(family.experts, keys):
        raise UserError(
            "config.json: num_experts_per_tok: 1; its gate divided by itself is 1, which moe.router 'top_k' does not do"
        )
    lines = [
        f"config.json: {key}: {tree[key]} is of training alone and is not taken over"
        for key, off in TRAINING.items()
        if tree.get(key) not in (None, off)
    ]
    if unread := keys.unread():
        lines.append(f"config.json: keys that were not read: {', '.join(unread)}")
    return config, lines


def _refuse(tree: dict[str, Any], family: "DecoderFamily") -> None:
    """Refuses what our models do not have (UserError)."""
    for key, (allowed, meaning) in REFUSED.items():
        if key in tree and tree[key] not in allowed:
            raise UserError(f"config.json: {key}: {represented(tree[key])}; {meaning} is not offered")
    share = tree.get("partial_rotary_factor")
    if not family.partial_rotary and share not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor: {represented(share)}; {family.model_type} has none")
    kind = tree.get("hidden_act", family.defaults["hidden_act"])
    if kind not in ("silu", "swish"):
        raise UserError(f"config.json: hidden_act: {represented(kind)}; only silu (SwiGLU) is offered")


def _model(family: "DecoderFamily", keys: Keys) -> dict[str, Any]:
    """Returns the section `model`."""
    hidden, heads = keys.need("hidden_size", int), keys.need("num_attention_heads", int)
    keys.read.add("hidden_act")
    section = {
        "num_layers": keys.need("num_hidden_layers", int),
        "hidden_size": hidden,
        "num_heads": heads,
        "n_kv_heads": keys.get("num_key_value_heads", int),
        "head_size": _head_size(family, keys, hidden, heads),
        "intermediate_size": keys.need("intermediate_size", int),
        "seq_length": min(LONGEST_TRAINED, keys.need("max_position_embeddings", int)),
        "norm": "rmsnorm",
        "norm_eps": keys.need("rms_norm_eps", float),
        "activation": "swiglu",
        "tie_word_embeddings": keys.need("tie_word_embeddings", bool),
        "init_method_std": keys.need("initializer_range", float),
        "attention_bias": _kind(family.bias, keys),
        "qk_norm": _kind(family.qk_norm, keys),
    }
    if family.partial_rotary:
        section["partial_rotary"] = keys.need("partial_rotary_factor", float)
    return section | read_rotary(keys) | _window(family, keys, section["num_layers"])


def _head_size(family: "DecoderFamily", keys: Keys, hidden: int, heads: int) -> int | None:
    """Returns model.head_size: null where it is the usual one."""
    size = keys.get("head_dim", int)
    if size is None or size * heads == hidden:
        return None
    if not family.own_head_size:
        reason = f"{family.model_type} has hidden_size / num_attention_heads ({hidden} / {heads})"
        raise UserError(f"config.json: head_dim: {size}; {reason}")
    return size


def _kind(choice: tuple[str | None, str] | None, keys: Keys) -> str | None:
    """Returns the value of ours where a family has the part and config.json asks for it."""
    if choice is None:
        return None
    key, kind = choice
    return kind if key is None or keys.get(key, bool) else None


def _window(family: "DecoderFamily", keys: Keys, layers: int) -> dict[str, Any]:
    """Returns model.sliding_window and model.window_layers."""
    if family.window == "none":
        return {}
    if family.window != "plain" and not keys.need("use_sliding_window", bool):
        keys.read |= {"sliding_window", "layer_types"}
        return {}
    window = keys.get("sliding_window", int)
    places = [] if window is None else _window_layers(family, keys, layers)
    if not places:
        return {}
    return {"sliding_window": window, "window_layers": "all" if len(places) == layers else places}


def _window_layers(family: "DecoderFamily", keys: Keys, layers: int) -> list[int]:
    """Returns the layers whose attention has the window."""
    first = keys.need("max_window_layers", int) if family.window in ("layered", "bottom") else 0
    if family.window == "bottom" and first > 0:
        raise UserError(
            f"config.json: max_window_layers: {first}; transformers gives {family.model_type} another window with each "
            "attention kernel: only 0 means the same in all"
        )
    kinds = keys.get("layer_types", list) if family.window == "layered" else None
    if kinds is None:
        return [layer for layer in range(layers) if layer >= first]
    if len(kinds) != layers or any(kind not in WINDOWED for kind in kinds):
        raise UserError(f"config.json: layer_types: {represented(kinds)}; one of {', '.join(WINDOWED)} for each layer")
    return [layer for layer, kind in enumerate(kinds) if kind == WINDOWED[0]]


def _normalises(experts: "Experts", keys: Keys) -> bool:
    return experts.normalised is True or keys.need(experts.normalised, bool)


def _moe(experts: "Experts", keys: Keys) -> dict[str, Any]:
    """Returns the section `moe`."""
    count, places = keys.need(experts.count, int), _places(experts, keys, keys.need("num_hidden_layers", int))
    if count <= 1:
        if places and (count == 1 or experts.places != "step"):  # Qwen's 0 makes every layer dense
            raise UserError(f"config.json: {experts.count}: {count}; a conditional layer needs 2 experts or more")
        return {}
    router = {"name": experts.router, "norm_topk_prob": _normalises(experts, keys)}
    factor = 0.0 if experts.router == "sigmoid" else keys.need("router_aux_loss_coef", float)
    if experts.router == "sigmoid":
        router |= {key: keys.need(key, int) for key in ("n_group", "topk_group")}
        router["routed_scaling_factor"] = keys.need("routed_scaling_factor", float)
    section = {
        "router": router,
        "expert_num": count,
        "num_experts_chosen": keys.need("num_experts_per_tok", int),
        "moe_intermediate_size": keys.need(experts.width, int),
        "layers": places,
        "dispatch": "dropless",
        "aux_loss_factor": factor,
        "z_loss_factor": 0.0,
    }
    return section | _shared(experts, keys)


def _places(experts: "Experts", keys: Keys, layers: int) -> list[int] | str:
    """Returns moe.layers."""
    if experts.places == "all":
        return "all"
    if experts.places == "first dense":
        places = list(range(keys.need("first_k_dense_replace", int), layers))
    else:
        step, dense = keys.need("decoder_sparse_step", int), keys.get("mlp_only_layers", list) or []
        if step < 1:
            raise UserError(f"config.json: decoder_sparse_step: {step}; must be 1 or more")
        places = [layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in dense]
    return "all" if len(places) == layers else places


def _shared(experts: "Experts", keys: Keys) -> dict[str, Any]:
    """Returns the keys of the shared experts."""
    if experts.shared == "gated":
        width = keys.need("shared_expert_intermediate_size", int)
        return {"shared_expert_num": 1, "use_shared_expert_gating": True, "shared_intermediate_size": width}
    if experts.shared == "counted" and (count := keys.get("n_shared_experts", int)):
        return {"shared_expert_num": count}
    return {}


def from_config(family: "DecoderFamily", config: Config, vocab_size: int) -> dict[str, Any]:
    """Returns a config.json of the family; what the family does not have is left out, see `Family.unfit`."""
    model = config.model
    tree: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": config.dense_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_dropout": 0.0,
        **dict(family.extra),
        **write_rotary(model),
    }
    if family.own_head_size:
        tree["head_dim"] = model.size_of_head
    for choice, value in ((family.bias, model.attention_bias), (family.qk_norm, model.qk_norm)):
        if choice is not None and choice[0] is not None:
            tree[choice[0]] = value == choice[1]
    if family.partial_rotary:
        tree["partial_rotary_factor"] = model.partial_rotary
    tree |= _window_keys(family, config)
    return tree | (_expert_keys(family.experts, config) if family.experts else {})


def _window_keys(family: "DecoderFamily", config: Config) -> dict[str, Any]:
    """Returns the keys of the sliding window."""
    model, window = config.model, config.model.sliding_window
    if family.window == "none":
        return {}
    tree: dict[str, Any] = {"sliding_window": window}
    if family.window != "plain":
        tree["use_sliding_window"] = window is not None
    if family.window in ("layered", "bottom"):
        tree["max_window_layers"] = 0
    if family.window == "layered":
        windows = [model.window_of(layer) for layer in range(model.num_layers)]
        tree["layer_types"] = [WINDOWED[0] if size else WINDOWED[1] for size in windows]
    return tree


def _expert_keys(experts: "Experts", config: Config) -> dict[str, Any]:
    """Returns the keys of the conditional layers."""
    moe, layers = config.moe, config.model.num_layers
    options = moe.router.given()
    tree: dict[str, Any] = {
        experts.count: moe.expert_num,
        experts.width: config.expert_width,
        "num_experts_per_tok": moe.num_experts_chosen,
    }
    if isinstance(experts.normalised, str):
        tree[experts.normalised] = moe.num_experts_chosen > 1 and options.get("norm_topk_prob", True)
    if experts.router == "sigmoid":
        for key, default in (("n_group", 1), ("topk_group", 1), ("routed_scaling_factor", 1.0)):
            tree[key] = options.get(key, default)
    else:
        tree["router_aux_loss_coef"] = moe.aux_loss_factor
    dense = [layer for layer in range(layers) if layer not in config.moe_layers]
    if experts.places == "step":
        tree |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    elif experts.places == "first dense":
        tree["first_k_dense_replace"] = len(dense)
    if experts.shared == "gated":
        tree["shared_expert_intermediate_size"] = config.shared_width
    elif experts.shared == "counted":
        tree["n_shared_experts"] = moe.shared_expert_num
    return tree
