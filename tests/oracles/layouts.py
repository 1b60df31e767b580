"""The layouts whose compiled steps are looked at: name -> tree of a configuration.

Two layers, the first dense, the second conditional; 8 devices, of which rank 5 is compiled (of one layout rank 1),
once for all tests: see `tests/conftest.py`.
"""

DEVICES, RANK, VOCAB = 8, 5, 32
MODEL = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_length": 8, "intermediate_size": 32}
SWITCH = {"router": "switch", "expert_num": 8, "layers": 2}
TOP_2 = SWITCH | {"router": "top_k", "num_experts_chosen": 2}
TWO_AXES = {"data_parallel": 8, "expert_parallel": 4}
TWO_STAGES = {"pipeline_stage": 2, "micro_batch_num": 3}
THREE_AXES = {"data_parallel": 4, "expert_parallel": 2, "model_parallel": 2}

UNTIED = MODEL | {"tie_word_embeddings": False}
EVERY_LAYER = SWITCH | {"layers": "all"}
FIRST_STAGE = "pp2 dp2 tp2 sequence recompute zero1"  # of which rank 1 is compiled
# whatever a decoder can have besides: gates, biases, two tables, a free head, shared experts, half the bytes
RICH_MODEL = MODEL | {
    "hidden_size": 64,  # heads of 16 columns, which fused attention asks for
    "activation": "swiglu",
    "compute_dtype": "bfloat16",
    "dropout": 0.1,
    "n_kv_heads": 2,
    "norm": "layernorm",
    "position": "learned",
    "tie_word_embeddings": False,
    "attention_bias": "all",
    "qk_norm": "head",
    "sliding_window": 3,
    "window_layers": [1],
}
RICH_MOE = TOP_2 | {
    "jitter": 0.01,
    "moe_intermediate_size": 24,
    "shared_expert_num": 2,
    "shared_intermediate_size": 40,
    "use_shared_expert_gating": True,
}


def tree(parallel: dict, moe: dict = SWITCH, model: dict = MODEL, **sections: dict) -> dict:
    """A configuration of these degrees."""
    return {"model": model, "moe": moe, "data": {"batch_size": 16}, "parallel": parallel, **sections}


LAYOUTS = {
    "dp8": tree({"data_parallel": 8}),
    "ep8": tree({"data_parallel": 8, "expert_parallel": 8}),
    "dp8 ep4": tree(TWO_AXES, TOP_2),
    "dp8 ep4 zero1": tree(TWO_AXES | {"optimizer_shard": 1}),
    "dp8 ep4 zero3": tree(TWO_AXES | {"optimizer_shard": 3}),
    "dp8 ep4 recompute": tree(TWO_AXES | {"recompute": True}),
    "dp8 ep4 accumulation": tree(TWO_AXES, train={"gradient_accumulation_steps": 2}),
    "dp8 ep4 float16": tree(TWO_AXES, model=MODEL | {"compute_dtype": "float16"}),
    "dp4 ep2 tp2": tree(THREE_AXES),
    "dp4 ep2 tp2 sequence": tree(THREE_AXES | {"sequence_parallel": True}),
    "pp2 dp4 ep2": tree(TWO_STAGES | {"data_parallel": 4, "expert_parallel": 2}, EVERY_LAYER, UNTIED),
}
FURTHER = {  # of which only bytes are looked at
    FIRST_STAGE: tree(
        TWO_STAGES
        | {"data_parallel": 2, "model_parallel": 2, "sequence_parallel": True, "recompute": True, "optimizer_shard": 1},
        EVERY_LAYER | {"shared_expert_num": 1},
        UNTIED,
    ),
    "rich dp4 ep2 tp2 dropless recompute zero1": tree(
        THREE_AXES | {"recompute": True, "optimizer_shard": 1},
        RICH_MOE | {"dispatch": "dropless", "expert_num": 6},  # three on a rank, and two replicas: ZeRO cuts axis 1
        RICH_MODEL,
    ),
    "dp4 ep2 tp2 sequence recompute": tree(
        THREE_AXES | {"sequence_parallel": True, "recompute": True}, SWITCH | {"shared_expert_num": 1}
    ),
    "rich dp4 ep2 tp2": tree(THREE_AXES, RICH_MOE, RICH_MODEL),
    "norms of all heads, dp4 ep2 tp2 recompute zero3": tree(
        THREE_AXES | {"recompute": True, "optimizer_shard": 3},
        model=MODEL | {"qk_norm": "full", "attention_bias": "qkv"},
    ),
    "rich dp4 ep2 tp2 recompute zero1": tree(
        THREE_AXES | {"recompute": True, "optimizer_shard": 1}, RICH_MOE, RICH_MODEL
    ),
    "rich dp4 ep2 tp2 sequence zero3": tree(
        THREE_AXES | {"sequence_parallel": True, "optimizer_shard": 3}, RICH_MOE, RICH_MODEL
    ),
}
DROPLESS = {  # with nothing dropped
    f"dp8 ep4 {form}": tree(TWO_AXES, TOP_2 | {"dispatch": form}) for form in ("dropless", "dropless_static")
}


SHORT = (  # compiled by the ordinary tests, the others by those marked `long`
    *("dp8 ep4", "dp8 ep4 zero1", "dp8 ep4 recompute", "dp4 ep2 tp2 sequence", "pp2 dp4 ep2", *DROPLESS),
    *(FIRST_STAGE, "rich dp4 ep2 tp2", "rich dp4 ep2 tp2 dropless recompute zero1"),
)


def rank_of(name: str) -> int:
    """Which rank of a layout is compiled."""
    return 1 if name == FIRST_STAGE else RANK
