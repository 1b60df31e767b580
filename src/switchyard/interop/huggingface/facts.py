"""Reduces the configuration of a model to what decides its outputs."""

from typing import Any

from switchyard.config import Config

MODEL_KEYS = (
    *("num_layers", "hidden_size", "num_heads", "norm", "norm_eps", "position", "theta", "activation"),
    *("tie_word_embeddings", "attention_bias", "qk_norm", "partial_rotary"),
)
MOE_KEYS = (
    *("expert_num", "num_experts_chosen", "experts", "dispatcher", "copies", "eval_capacity_factor", "force_balance"),
    "use_shared_expert_gating",
)
NOT_OF_T5 = {
    f"model.{key}" for key in ("position", "theta", "partial_rotary", "n_kv_heads", "rotary_scaling", "sliding_window")
}


def decoder_facts(config: Config) -> dict[str, Any]:
    """Returns what decides the outputs of a model, each under one key however it was written."""
    model = config.model
    found = {f"model.{key}": getattr(model, key) for key in MODEL_KEYS}
    scaling = model.rotary_scaling
    found |= {
        "model.type": model.type,
        "model.n_kv_heads": model.kv_heads,
        "model.head_size": model.size_of_head,
        "model.rotary_scaling": None if scaling is None else scaling.model_dump(),
        "model.sliding_window": [model.window_of(layer) for layer in range(model.num_layers)],
        "moe.layers": list(config.moe_layers),
    }
    if len(config.moe_layers) < model.num_layers:
        found["model.intermediate_size"] = config.dense_width
    return found | (_expert_facts(config) if config.moe_layers else {})


def seq2seq_facts(config: Config) -> dict[str, Any]:
    """Returns the same of an encoder-decoder, whose positions are those of the section `seq2seq`."""
    own = config.seq2seq
    facts = {key: value for key, value in decoder_facts(config).items() if key not in NOT_OF_T5}
    if len(config.moe_layers) < config.all_layers:
        facts["model.intermediate_size"] = config.dense_width
    return facts | {
        "seq2seq.num_decoder_layers": config.decoder_layers,
        "seq2seq.relative_attention_num_buckets": own.relative_attention_num_buckets,
        "seq2seq.relative_attention_max_distance": own.relative_attention_max_distance,
    }


def _expert_facts(config: Config) -> dict[str, Any]:
    moe = config.moe
    found = {f"moe.{key}": getattr(moe, key) for key in MOE_KEYS}
    return found | {
        "moe.router": router_facts(config),
        "moe.moe_intermediate_size": config.expert_width,
        "moe.shared_intermediate_size": config.shared_width,
        "moe.granularity": config.granularity,
    }


def router_facts(config: Config) -> dict[str, Any]:
    """Returns the router with its options as they count: one choice is never normalised, and `switch` is `top_k` of
    one choice.
    """
    moe, options = config.moe, config.moe.router.given()
    name = "top_k" if moe.router == "switch" else str(moe.router)
    limits = options.get("topk_group", 1) < options.get("n_group", 1)
    if name not in ("top_k", "sigmoid"):
        return {"name": name, **options}
    return {
        "name": name,
        "norm_topk_prob": options.get("norm_topk_prob", True) and moe.num_experts_chosen > 1,
        "routed_scaling_factor": options["routed_scaling_factor"],
        "groups": (options["n_group"], options["topk_group"]) if limits else (1, 1),
    }
