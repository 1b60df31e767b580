"""Translates MindFormers' `moe_config` and `parallel_config`, of files and of its objects. No MindSpore in here.

The defaults of keys that are not given are those of MindFormers.
"""

from typing import Any

from switchyard.errors import UserError
from switchyard.interop.mindformers.reader import Reader

NUMBER = (int, float)
SPEED = "changes the speed of MindFormers' own operators only"
# keys of moe_config that say how MindFormers computes, not what, with the values that they have if not given
SPEED_OF_EXPERTS = {
    "comp_comm_parallel": False, "comp_comm_parallel_degree": 2, "group_wise_a2a": False, "use_gmm": False,
    "use_fused_ops_topkrouter": False, "use_fused_ops_permute": False, "enable_deredundency": False,
    "npu_nums_per_device": 1, "use_allgather_dispatcher": False, "moe_shared_expert_overlap": False,
    "enable_gmm_safe_tokens": False, "dispatch_global_max_bs": 0, "ep_extend_tp": True, "max_router_load": 131072,
    "expert_group_size": None, "cur_layer": 0, "moe_module_name": "", "update_step": 10000, "hot_expert_num": 0,
    "cold_token_percent": 1.0,
}  # fmt: skip
LOGS = {"save_token_distribution": False, "callback_moe_droprate": False}


def moe_section(theirs: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Returns the section `moe` that a `moe_config` means.

    Args:
        theirs: its keys that are given.
        num_layers: of the model.

    Raises:
        UserError: a key that has no counterpart here.
    """
    reader = Reader("moe_config", theirs)
    section = read_moe(reader, num_layers)
    refuse_left(reader)
    return section


def parallel_section(theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns the section `parallel` that a `parallel_config` means (UserError: a key that has no counterpart here)."""
    reader = Reader("parallel_config", theirs)
    section = read_parallel(reader)
    refuse_left(reader)
    return section


def refuse_left(reader: Reader) -> None:
    """Refuses the first key that was left (UserError)."""
    for left in reader.finish():
        raise UserError(f"{left}; leave it out")


def read_moe(reader: Reader, num_layers: int) -> dict[str, Any]:
    """Reads a `moe_config` as the section `moe`; the reader keeps what has no counterpart."""
    section = {
        "router": read_router(reader),
        "expert_num": reader.take("expert_num", default=1, kind=int),
        "num_experts_chosen": reader.take("num_experts_chosen", default=1, kind=int),
        "z_loss_factor": reader.take("z_loss_factor", default=0.0, kind=NUMBER),
        "shared_expert_num": reader.take("shared_expert_num", default=0, kind=int),
        "use_shared_expert_gating": reader.take("use_shared_expert_gating", default=False, kind=bool),
        "moe_intermediate_size": reader.take("moe_intermediate_size", kind=int),
        **read_capacity(reader),
        **read_losses(reader),
        **read_layers(reader, num_layers),
    }
    for name, usual in SPEED_OF_EXPERTS.items():
        reader.leave(name, SPEED, usual)
    for name, usual in LOGS.items():
        reader.leave(name, "the log of every step has the load of all experts", usual)
    reader.leave("router_dense_type", "router arithmetic is float32 here", "float32")
    reader.leave("enable_cold_hot_expert", "no copies of hot experts", False)
    reader.leave("expert_model_parallel", "experts are sharded by parallel.model_parallel, as all layers")
    return {name: value for name, value in section.items() if value is not None}


def read_router(reader: Reader) -> Any:
    """Reads which router a `moe_config` means, with its options."""
    policy = reader.take("routing_policy", default="TopkRouterV1", kind=str)
    if policy == "TopkRouterV1" and reader.take("num_experts_chosen", default=1) == 1:
        reader.leave(
            "routing_policy", "divides a single gate by itself, so that no router learns: read as TopkRouterV2"
        )
    elif policy not in ("TopkRouterV1", "TopkRouterV2"):
        reader.leave("routing_policy", "no such router")
    normalised = reader.take("norm_topk_prob", default=True, kind=bool)
    factor = reader.take("routed_scaling_factor", default=1.0, kind=NUMBER)
    options = {"norm_topk_prob": normalised, "routed_scaling_factor": float(factor)}
    sigmoid = reader.take("use_gating_sigmoid", default=False, kind=bool)
    biased = reader.take("balance_via_topk_bias", default=False, kind=bool)
    rate = reader.take("topk_bias_update_rate", default=0.0, kind=NUMBER)
    method = reader.take("topk_method", default="greedy", kind=str)
    groups, taken = reader.take("n_group", kind=int), reader.take("topk_group", kind=int)
    if not sigmoid:
        reader.leave("balance_via_topk_bias", "only sigmoid scores are balanced by a bias here", False)
    else:
        options["topk_bias_update_rate"] = float(rate) if biased else 0.0
    if method == "noaux_tc":
        options |= {"n_group": groups or 1, "topk_group": taken or 1}
    elif method != "greedy":
        reader.leave("topk_method", "a group is scored by its two best experts here, which is noaux_tc")
    return {"name": "sigmoid" if sigmoid else "top_k", **options}


def read_capacity(reader: Reader) -> dict[str, Any]:
    """Reads how much room experts have, and who gets it."""
    factor = reader.take("capacity_factor", default=1.1, kind=NUMBER)
    token_by_token = reader.take("enable_sdrop", default=False, kind=bool)
    order = {"drop_order": "token"} if token_by_token else {}
    return {"dispatch": "dropless"} if factor <= 0 else {"capacity_factor": float(factor), **order}


def read_losses(reader: Reader) -> dict[str, Any]:
    """Reads the balance losses: TopkRouterV2 has those of `aux_loss_types`, TopkRouterV1 `aux_loss_factor`."""
    own = reader.take("aux_loss_factor", default=0.05, kind=NUMBER)
    types = reader.take("aux_loss_types", default=[], kind=list)
    factors = reader.take("aux_loss_factors", default=[], kind=list)
    if len(types) != len(factors):
        raise UserError(f"{reader.name}.aux_loss_factors: {factors}; must have one factor for each of {types}")
    by_name = dict(zip(types, factors))
    others = [name for name in by_name if name != "expert" and by_name[name]]
    if others:
        reader.leave("aux_loss_types", f"no such loss: {', '.join(others)}; 'expert' is moe.aux_loss_factor")
    first = reader.take("routing_policy", default="TopkRouterV1") == "TopkRouterV1"
    return {"aux_loss_factor": float(own if first else by_name.get("expert", 0.0))}


def read_layers(reader: Reader, num_layers: int) -> dict[str, Any]:
    """Reads which layers are conditional."""
    dense = reader.take("first_k_dense_replace", default=0)
    dense = 0 if isinstance(dense, bool) else dense  # MindFormers' own default is True, and means none
    if not isinstance(dense, int) or not 0 <= dense <= num_layers:
        raise UserError(f"{reader.name}.first_k_dense_replace: {dense}; a number from 0 to the {num_layers} layers")
    return {"layers": list(range(dense, num_layers))} if dense else {}


def read_parallel(reader: Reader) -> dict[str, Any]:
    """Reads a `parallel_config` as the section `parallel`; the reader keeps what has no counterpart."""
    recompute = reader.take("recompute", default={})
    if not isinstance(recompute, dict | bool):
        reader.leave("recompute", "all layers are recomputed, or none")
        recompute = {}
    section = {
        "data_parallel": reader.take("data_parallel", default=1, kind=int),
        "model_parallel": reader.take("model_parallel", default=1, kind=int),
        "expert_parallel": reader.take("expert_parallel", default=1, kind=int),
        "pipeline_stage": reader.take("pipeline_stage", default=1, kind=int),
        "sequence_parallel": reader.take("use_seq_parallel", default=False, kind=bool),
        "recompute": recompute if isinstance(recompute, bool) else bool(recompute.get("recompute", False)),
    }
    micro = reader.take("micro_batch_num", default=1, kind=int)
    if section["pipeline_stage"] > 1:
        section["micro_batch_num"] = micro
    else:
        reader.skip("micro_batch_num")  # without stages MindFormers does not read it either
    for name in ("context_parallel", "seq_split_num", "ulysses_degree_in_cp"):
        reader.leave(name, "sequences are not split over devices", 1)
    reader.skip("gradient_aggregation_group", "vocab_emb_dp", "optimizer_shard", "context_parallel_algo", "mem_coeff")
    reader.skip("select_recompute", "swap")
    return section
