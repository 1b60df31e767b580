"""Finds the family that a configuration fits: what it says must survive the way through a config.json."""

from typing import Any

from switchyard.config import Config
from switchyard.errors import UserError, represented
from switchyard.interop.huggingface.families import FAMILIES, NOT_OFFERED, Family
from switchyard.interop.huggingface.settings import from_config, to_config

MODEL_KEYS = (
    *("num_layers", "hidden_size", "num_heads", "norm", "norm_eps", "position", "theta", "activation"),
    *("tie_word_embeddings", "attention_bias", "qk_norm", "partial_rotary"),
)


def family_of(model_type: Any) -> Family:
    """Returns the family of a model_type (UserError: there is none; it says why where that is known)."""
    if model_type in NOT_OFFERED:
        raise UserError(f"model_type: {model_type}; {NOT_OFFERED[model_type]} is not offered")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type: {represented(model_type)}; not offered; one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def facts(config: Config) -> dict[str, Any]:
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


def _expert_facts(config: Config) -> dict[str, Any]:
    moe = config.moe
    found = {f"moe.{key}": getattr(moe, key) for key in ("expert_num", "num_experts_chosen", "experts", "dispatcher")}
    return found | {
        "moe.router": router_facts(config),
        "moe.moe_intermediate_size": config.expert_width,
        "moe.shared_intermediate_size": config.shared_width,
        "moe.use_shared_expert_gating": moe.use_shared_expert_gating,
        "moe.copies": moe.copies,
        "moe.granularity": config.granularity,
        "moe.eval_capacity_factor": moe.eval_capacity_factor,
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


def unfit(family: Family, config: Config) -> str | None:
    """Returns what of a configuration a family does not have, `key: value`; None where it fits."""
    if config.model.type != "decoder":
        return f"model.type: {config.model.type}"
    if config.moe_layers and family.experts is None:
        return f"moe.expert_num: {config.moe.expert_num}"
    try:
        other, _ = to_config(family, from_config(family, config, 1))
    except UserError as error:
        return str(error)
    wanted, found = facts(config), facts(other)
    for key, value in wanted.items():
        if key not in found or found[key] != value:
            return f"{key}: {represented(value)}"
    return None


def choose(config: Config, name: str | None = None) -> Family:
    """Returns the family of that name, or the first that a configuration fits (UserError: there is none)."""
    families = [family_of(name)] if name else list(FAMILIES.values())
    reasons = {family.model_type: unfit(family, config) for family in families}
    fitting = [family for family in families if reasons[family.model_type] is None]
    if fitting:
        return fitting[0]
    if name:
        raise UserError(f"--family: {name} does not have {reasons[name]}; leave --family out to let one be found")
    told = "; ".join(f"{family} lacks {reason}" for family, reason in reasons.items())
    raise UserError(f"--model: no family has all of this configuration: {told}")
