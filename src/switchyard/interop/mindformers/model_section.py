"""Translates `model.model_config` of MindFormers: the Transformer, and experts that are described there.

MindFormers has several names for a key: those of its older models, and those of Hugging Face. No MindSpore in here.
"""

from typing import Any

from switchyard.config.schema import ModelConfig
from switchyard.interop.mindformers.reader import Left, Reader
from switchyard.interop.mindformers.sections import NUMBER, SPEED, read_layers

EXPERTS = ("num_experts", "n_routed_experts", "expert_num", "num_moe_experts")
NAMES = {  # our key -> (theirs, type)
    "num_layers": (("num_layers", "num_hidden_layers", "n_layer"), int),
    "hidden_size": (("hidden_size",), int),
    "num_heads": (("num_heads", "num_attention_heads", "n_head"), int),
    "n_kv_heads": (("n_kv_heads", "num_key_value_heads", "num_query_groups", "multi_query_group_num"), int),
    "intermediate_size": (("intermediate_size", "ffn_hidden_size"), int),
    "seq_length": (("seq_length",), int),
    "norm_eps": (("rms_norm_eps", "layernorm_epsilon", "layer_norm_epsilon"), NUMBER),
    "theta": (("theta", "rope_theta", "rotary_base"), NUMBER),
    "dropout": (("hidden_dropout", "hidden_dropout_rate"), NUMBER),
    "init_method_std": (("init_method_std", "initializer_range"), NUMBER),
    "compute_dtype": (("compute_dtype",), str),
    "tie_word_embeddings": (("tie_word_embeddings",), bool),
}
ACTIVATIONS = {"silu": "swiglu", "swiglu": "swiglu", "fusedswiglu": "swiglu", "gelu": "gelu", "relu": "relu"}
ROUTED = {  # our key of the router -> (theirs, type)
    "norm_topk_prob": (("norm_topk_prob",), bool),
    "routed_scaling_factor": (("routed_scaling_factor", "moe_router_topk_scaling_factor"), NUMBER),
}
LATENT = (
    "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_head_dim", "qk_rope_head_dim",
    "qk_pos_emb_head_dim", "v_head_dim",
)  # fmt: skip
SCALED = (
    "scaling_factor", "factor", "rotary_scaling_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "rope_scaling", "use_rope_scaling", "rope_ratio", "original_max_position_embeddings",
)  # fmt: skip
INFERENCE = (
    "batch_size", "use_past", "block_size", "num_blocks", "is_dynamic", "max_decode_length", "max_length", "top_k",
    "top_p", "do_sample", "repetition_penalty", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "temperature", "quantization_bit", "quantization_config", "pre_seq_len", "prefix_projection",
    "dispatch_global_max_bs",
)  # fmt: skip
OPERATORS = (
    "moe_grouped_gemm", "use_gmm", "moe_token_dispatcher_type", "moe_router_fusion", "moe_permute_fusion",
    "use_fused_ops_topkrouter", "use_fused_ops_permute", "bias_dropout_fusion", "bias_swiglu_fusion",
    "use_fused_swiglu", "apply_rope_fusion", "use_fused_rope", "use_flash_attention", "use_fused_mla", "mla_qkv_concat",
    "qkv_concat", "mlp_concat", "use_attn_mask_compression", "use_eod_attn_mask_compression", "use_pad_tokens",
    "enable_gmm_safe_tokens", "use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp",
    "npu_nums_per_device", "group_wise_a2a", "comp_comm_parallel", "comp_comm_parallel_degree", "fused_norm",
    "moe_shared_expert_overlap", "apply_query_key_layer_scaling", "offset", "pp_interleave_num", "disable_lazy_inline",
)  # fmt: skip
TYPES = (
    "params_dtype", "param_init_type", "layernorm_compute_dtype", "layernorm_compute_type", "softmax_compute_dtype",
    "softmax_compute_type", "rotary_dtype", "router_dense_type", "moe_router_dtype", "attention_softmax_in_fp32",
    "fp32_residual_connection",
)  # fmt: skip
OWN_FILES = (
    "type", "auto_register", "architectures", "model_type", "auto_map", "checkpoint_name_or_path",
    "input_sliced_sig", "name_or_path", "model_architecture",
)  # fmt: skip


def read_model(reader: Reader) -> dict[str, Any]:
    """Reads a `model_config` as the section `model`; the reader keeps what has no counterpart."""
    section = {name: reader.take(*theirs, kind=kind) for name, (theirs, kind) in NAMES.items()}
    for name in ("dropout", "theta", "norm_eps", "init_method_std"):
        section[name] = None if section[name] is None else float(section[name])
    untied = reader.take("untie_embeddings_and_output_weights", kind=bool)
    if section["tie_word_embeddings"] is None:
        section["tie_word_embeddings"] = False if untied is None else not untied
    section |= read_activation(reader) | read_norm(reader) | read_position(reader) | read_attention(reader, section)
    reader.leave("vocab_size", "data.tokenizer decides the vocabulary")
    reader.leave("padded_vocab_size", "data.tokenizer decides the vocabulary")
    reader.leave("max_position_embeddings", "rotary positions have no end; model.seq_length is that of training")
    reader.leave("attention_dropout", "no dropout of attention weights", 0.0)
    reader.leave(("num_nextn_predict_layers", "mtp_num_layers", "mtp_depth"), "no multi-token prediction", 0)
    reader.leave(("mtp_loss_factor", "mtp_loss_scaling_factor"), "no multi-token prediction", 0.0)
    for names, why in (
        (INFERENCE, "a key of inference"),
        (OPERATORS, SPEED),
        (OWN_FILES, "names MindFormers' own files"),
    ):
        reader.leave(names, why)
    reader.leave(TYPES, "weights, norms, softmax, router and residuals are float32 here", "float32")
    return {name: value for name, value in section.items() if value is not None}


def read_own(reader: Reader) -> dict[str, dict[str, Any]]:
    """Reads the `model_config` of SwitchyardConfig: keys of this package under their own names."""
    model = {name: reader.take(name) for name in ModelConfig.model_fields if name != "type"}
    sections = {
        "model": {name: value for name, value in model.items() if value is not None},
        "moe": reader.take("moe", default={}, kind=dict),
    }
    reader.skip("vocab_size", *OWN_FILES)  # of data.tokenizer
    seed = reader.take("seed", kind=int)
    return sections if seed is None else sections | {"train": {"seed": seed}}


def read_activation(reader: Reader) -> dict[str, Any]:
    """Reads the non-linearity of the feed-forward."""
    theirs = reader.take("hidden_act", "activation_func", kind=str)
    gated = reader.take("gated_linear_unit", kind=bool)
    if theirs is None:
        return {"activation": "swiglu"} if gated else {}
    if theirs not in ACTIVATIONS or (gated is False and ACTIVATIONS[theirs] == "swiglu"):
        reader.leave("hidden_act", f"one of {', '.join(ACTIVATIONS)}, of which the first three are gated")
    return {"activation": ACTIVATIONS.get(theirs, "swiglu")}


def read_norm(reader: Reader) -> dict[str, Any]:
    """Reads the kind of norm."""
    kind = reader.take("normalization", kind=str)
    root = reader.take("rmsnorm", kind=bool)
    reader.leave("apply_residual_connection_post_layernorm", "norms stand before attention and feed-forward", False)
    reader.leave("post_layer_norm", "a last norm is always there", True)
    reader.leave("sandwich_norm", "norms stand before attention and feed-forward", False)
    if kind is None and root is None:
        return {}
    return {"norm": "layernorm" if kind == "LayerNorm" or root is False else "rmsnorm"}


def read_position(reader: Reader) -> dict[str, Any]:
    """Reads the encoding of positions."""
    kind = reader.take("position_embedding_type", "extend_method", kind=str)
    if kind not in (None, "rope", "learned_absolute"):
        reader.leave(("position_embedding_type", "extend_method"), "rope or learned_absolute")
    reader.leave(SCALED, "set model.rotary_scaling by hand where this package has it")
    return {} if kind is None else {"position": "learned" if kind == "learned_absolute" else "rotary"}


def read_attention(reader: Reader, section: dict[str, Any]) -> dict[str, Any]:
    """Reads what attention has besides its heads, as far as this package has keys for it."""
    found, known = {}, ModelConfig.model_fields
    size = reader.take("head_dim", "kv_channels", kind=int)
    if (
        size
        and section["hidden_size"]
        and section["num_heads"]
        and size * section["num_heads"] != section["hidden_size"]
    ):
        if "head_size" in known:
            found["head_size"] = size
        else:
            reader.leave(("head_dim", "kv_channels"), "heads are as wide as hidden_size / num_heads")
    biased = reader.take("attention_bias", "add_qkv_bias", "qkv_has_bias", default=False, kind=bool)
    normed = reader.take("qk_layernorm", "use_qk_norm", default=False, kind=bool)
    for given, name, value in ((biased, "attention_bias", "qkv"), (normed, "qk_norm", "head")):
        if given and name in known:
            found[name] = value
    if biased and "attention_bias" not in known:
        reader.leave(("attention_bias", "add_qkv_bias", "qkv_has_bias"), "projections have no bias")
    if normed and "qk_norm" not in known:
        reader.leave(("qk_layernorm", "use_qk_norm"), "queries and keys have no norm")
    reader.leave("add_bias_linear", "projections have no bias", False)
    reader.leave("multi_query_attention", "n_kv_heads says it", True)
    reader.leave(LATENT, "no latent attention", False)
    return found


def describes_experts(values: dict[str, Any]) -> bool:
    """Returns whether a `model_config` describes experts itself, maybe all but their number."""
    return any(values.get(name) for name in (*EXPERTS, "num_experts_per_tok")) or any(
        name.startswith("moe_") for name in values
    )


def read_experts(reader: Reader, num_layers: int) -> dict[str, Any]:
    """Reads the experts of a `model_config` as the section `moe`: those models drop no choice."""
    section = {
        "router": read_core_router(reader),
        "expert_num": reader.take(*EXPERTS, kind=int),
        "num_experts_chosen": reader.take(
            "num_experts_per_tok", "num_experts_chosen", "moe_router_topk", default=2, kind=int
        ),
        "moe_intermediate_size": reader.take("moe_intermediate_size", "moe_ffn_hidden_size", kind=int),
        "dispatch": "dropless",
        "force_balance": reader.take("moe_router_force_expert_balance", default=False, kind=bool),
        **read_core_losses(reader),
        **read_shared(reader),
        **read_layers(reader, num_layers),
    }
    if section["expert_num"] is None:
        reader.left.append(Left("model_config.num_experts", None, "stands in pretrained_model_dir: set moe.expert_num"))
    reader.leave("moe_layer_freq", "moe.layers says which layers are conditional", 1)
    reader.leave(("capacity_factor", "moe_expert_capacity_factor"), "MindFormers reads it nowhere in these models")
    reader.leave("moe_token_drop_policy", "MindFormers reads it nowhere in these models", False)
    reader.leave("moe_router_pre_softmax", "MindFormers reads it nowhere in these models")
    reader.leave("moe_input_jitter_eps", "MindFormers reads it nowhere in these models")
    return {name: value for name, value in section.items() if value is not None}


def read_core_router(reader: Reader) -> dict[str, Any]:
    """Reads the router."""
    score = reader.take("scoring_func", "moe_router_score_function", default="softmax", kind=str)
    options = {name: reader.take(*theirs, kind=kind) for name, (theirs, kind) in ROUTED.items()}
    options = {name: value for name, value in options.items() if value is not None}
    biased = reader.take("moe_router_enable_expert_bias", "balance_via_topk_bias", default=False, kind=bool)
    rate = reader.take("moe_router_bias_update_rate", "topk_bias_update_rate", default=0.001, kind=NUMBER)
    groups = reader.take("n_group", "moe_router_num_groups", default=0, kind=int)
    taken = reader.take("topk_group", "moe_router_group_topk", default=0, kind=int)
    reader.leave("topk_method", "groups are scored by their two best experts", "noaux_tc")
    limits = {"n_group": groups, "topk_group": taken} if groups > 1 else {}
    if score != "sigmoid":
        names = ("moe_router_enable_expert_bias", "balance_via_topk_bias")
        reader.leave(names, "only sigmoid scores are balanced by a bias here", False)
        return {"name": "top_k", **options, **limits}
    return {"name": "sigmoid", **options, **limits, "topk_bias_update_rate": float(rate) if biased else 0.0}


def read_core_losses(reader: Reader) -> dict[str, Any]:
    """Reads the balance losses."""
    kind = reader.take("moe_router_load_balancing_type", default="sub_seq_aux_loss", kind=str)
    factor = float(reader.take("moe_aux_loss_coeff", "router_aux_loss_coef", default=0.0, kind=NUMBER))
    found = {"z_loss_factor": 0.0, "aux_loss_factor": 0.0}
    reader.leave(("moe_z_loss_coeff", "z_loss_factor"), "MindFormers reads it nowhere in these models", 0.0)
    if kind == "seq_aux_loss":
        return found | ({"losses": {"sequence": factor}} if factor else {})
    if kind != "sub_seq_aux_loss":
        reader.leave("moe_router_load_balancing_type", "read as the loss of one micro-batch")
    return found | {"aux_loss_factor": factor}


def read_shared(reader: Reader) -> dict[str, Any]:
    """Reads the shared experts."""
    number = reader.take("n_shared_experts", "shared_expert_num", default=0, kind=int)
    width = reader.take("moe_shared_expert_intermediate_size", kind=int)
    each = reader.take("moe_intermediate_size", "moe_ffn_hidden_size", kind=int)
    if width and each and width % each == 0:
        number = width // each
    elif width:
        reader.leave("moe_shared_expert_intermediate_size", "must be a multiple of moe_intermediate_size")
    gated = reader.take("use_shared_expert_gating", default=False, kind=bool)
    return {"shared_expert_num": number, **({"use_shared_expert_gating": True} if gated and number else {})}
