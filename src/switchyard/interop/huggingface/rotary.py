"""Translates rope_theta and rope_scaling of config.json into model.theta and model.rotary_scaling, and back."""

from typing import TYPE_CHECKING, Any

from switchyard.config import ModelConfig
from switchyard.errors import UserError, represented

if TYPE_CHECKING:
    from switchyard.interop.huggingface.settings import Keys

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale")
YARN = (*YARN, "mscale_all_dim", "truncate")
OFFERED = {"linear": ("factor",), "llama3": LLAMA3, "yarn": YARN}
NAMES = ("rope_type", "type", "rope_theta")


def read_rotary(keys: "Keys") -> dict[str, Any]:
    """Returns model.theta and model.rotary_scaling (UserError: a scaling that is not offered)."""
    scaling, parameters = keys.get("rope_scaling", dict), keys.get("rope_parameters", dict, None)
    theta = keys.need("rope_theta", float)
    if parameters is not None:  # the form of transformers 5
        scaling = scaling or parameters
        theta = parameters.get("rope_theta", theta)
    kind = None if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
    if kind in (None, "default"):
        return {"theta": theta}
    if not isinstance(kind, str) or kind not in OFFERED:
        offered = ", ".join(OFFERED)
        raise UserError(f"config.json: rope_scaling: {represented(kind)} is not offered; one of {offered}")
    for key in scaling:
        if key not in (*OFFERED[kind], *NAMES):
            raise UserError(f"config.json: rope_scaling.{key}: {represented(scaling[key])}; not read with '{kind}'")
    found = {key: scaling[key] for key in OFFERED[kind] if scaling.get(key) is not None}
    if kind == "yarn":
        found = _yarn(found, keys.need("max_position_embeddings", int))
    return {"theta": theta, "rotary_scaling": {"type": kind, **found}}


def _yarn(found: dict[str, Any], longest: int) -> dict[str, Any]:
    """Returns the keys of YaRN with what transformers takes for those that are missing (UserError)."""
    if found.pop("truncate", True) is not True:
        raise UserError("config.json: rope_scaling.truncate: false; YaRN is offered with whole bounds of its ramp only")
    both = found.get("mscale") and found.get("mscale_all_dim")
    if "attention_factor" in found or not both:  # one alone is not read, and a factor that is given replaces both
        found.pop("mscale", None), found.pop("mscale_all_dim", None)
    for key in ("beta_fast", "beta_slow"):
        if not found.get(key):  # 0 means the default there
            found.pop(key, None)
    return {"original_max_position_embeddings": longest} | found


def write_rotary(model: ModelConfig) -> dict[str, Any]:
    """Returns rope_theta and rope_scaling."""
    if model.rotary_scaling is None:
        return {"rope_theta": model.theta, "rope_scaling": None}
    given = {key: value for key, value in model.rotary_scaling.model_dump().items() if value is not None}
    return {"rope_theta": model.theta, "rope_scaling": {"rope_type": given.pop("type"), **given}}
