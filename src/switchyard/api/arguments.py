"""The arguments of the public layer: keys of the sections `model` and `moe` under their YAML names.

Nothing here imports MindSpore.
"""

from typing import Any, TypedDict

from switchyard.config import Config, build
from switchyard.errors import UserError, represented

MODEL_KEYS = ("activation", "compute_dtype", "init_method_std", "intermediate_size", "seq_length")
OF_TRAINING = {  # keys of `moe` that a layer by itself cannot follow -> who does
    "layers": "the network that holds the layer decides which of its layers are conditional",
    "granularity": "the layer routes rows; make the rows before it",
    "slice_length": "the layer routes rows; make the rows before it",
    "record": "only train.py and eval.py record choices",
    "replay": "only train.py and eval.py replay choices",
    "router_warmup_steps": "only train.py counts steps",
    "router_freeze_step": "only train.py counts steps: set requires_grad of the router's parameters to False instead",
}


class LayerKeys(TypedDict, total=False):
    """Keys that `MoELayer` takes besides its own arguments; the configuration reference describes each of them."""

    activation: str
    compute_dtype: str
    init_method_std: float
    intermediate_size: int | None
    seq_length: int
    router: Any
    experts: Any
    dispatcher: Any
    losses: dict[Any, float]
    num_experts_chosen: int
    moe_intermediate_size: int | None
    shared_expert_num: int
    shared_intermediate_size: int | None
    use_shared_expert_gating: bool
    dispatch: str
    capacity_factor: float
    eval_capacity_factor: float | None
    drop_order: str
    min_capacity: int
    reroute: int
    force_balance: bool
    copies: int
    dropless_block_size: int | None
    aux_loss_factor: float
    z_loss_factor: float
    jitter: float
    groups: int | None


def layer_config(hidden_size: int, expert_num: int, seed: int, groups: int, keys: dict[str, Any]) -> Config:
    """Returns the configuration of a layer by itself.

    Args:
        hidden_size: D.
        expert_num: E.
        seed: of the initial weights.
        groups: G where `keys` does not say it.
        keys: see LayerKeys.

    Raises:
        UserError: an unknown key, a wrong value or an impossible combination, in the words of the YAML file.
    """
    for key, reason in OF_TRAINING.items():
        if key in keys:
            raise UserError(f"moe.{key}: {represented(keys[key])}; {reason}: leave it out")
    groups = keys.get("groups") or groups
    if "sequence" in (keys.get("losses") or {}) and "seq_length" not in keys:
        raise UserError("model.seq_length: not given; moe.losses.sequence needs the length of a sequence")
    model = {key: value for key, value in keys.items() if key in MODEL_KEYS}
    moe = {key: value for key, value in keys.items() if key not in MODEL_KEYS}
    tree = {
        "model": {"hidden_size": hidden_size, "num_layers": 1, "num_heads": 1, "position": "learned", **model},
        "moe": {"expert_num": expert_num, **moe, "groups": groups},
        "data": {"batch_size": groups},  # a law of the configuration; the layer reads no batch size
        "train": {"seed": seed},
    }
    config = build(tree)
    if config.moe.consistency_loss_factor:
        key = "moe.router.consistency_loss_factor"
        raise UserError(
            f"{key}: {config.value(key)}; compares two passes of a network, which train.py makes: set it to 0"
        )
    return config
