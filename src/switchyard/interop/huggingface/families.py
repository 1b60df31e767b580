"""Lists the families of models that can be imported and exported: a row each, with its rules for tensors.

A new family of decoders is a new row of FAMILIES: its names in config.json, the defaults of transformers for keys that
a config.json may lack, what its attention and its experts are, and its tensors. See `family.Family` for other networks.
"""

from typing import Any

from switchyard.config import Config
from switchyard.errors import UserError, represented
from switchyard.interop.huggingface.decoders import DecoderFamily, Experts
from switchyard.interop.huggingface.family import Family
from switchyard.interop.huggingface.rules import Rule
from switchyard.interop.huggingface.switch_transformers import SwitchTransformers

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."


def _projections(kind: str) -> tuple[str, str, str]:
    """Returns the names of queries, keys and values."""
    return tuple(f"{ATTENTION}{part}_proj.{kind}" for part in "qkv")


def _feed_forward(ours: str, axes: str, theirs: str, when: str) -> tuple[Rule, ...]:
    """Returns the rules of gated networks of `ours`; `theirs`: the names of gate, input and output matrix."""
    experts, hidden = axes.split()
    gate, first, last = (f"{theirs.rpartition('.')[0]}.{name}.weight" for name in theirs.rpartition(".")[2].split("|"))
    return (
        Rule(f"{ours}.w_gate", f"{experts} D {hidden}", gate, turned=True, when=when),
        Rule(f"{ours}.w_in", f"{experts} D {hidden}", first, turned=True, when=when),
        Rule(f"{ours}.w_out", f"{experts} {hidden} D", last, turned=True, when=when),
    )


OURS = "layers.{layer}."
NAMES = "gate_proj|up_proj|down_proj"
ENDS = (
    Rule("embedding.table", "V D", "model.embed_tokens.weight"),
    Rule("norm.gain", "D", "model.norm.weight"),
    Rule("head.weight", "D V", "lm_head.weight", turned=True, when="untied"),
)
BLOCK = (
    Rule(f"{OURS}attention_norm.gain", "D", f"{LAYER}input_layernorm.weight"),
    Rule(f"{OURS}attention.qkv.weight", "D W", _projections("weight"), turned=True),
    Rule(f"{OURS}attention.qkv.bias", "W", _projections("bias"), when="qkv bias"),
    Rule(f"{OURS}attention.out.weight", "Q D", f"{ATTENTION}o_proj.weight", turned=True),
    Rule(f"{OURS}attention.out.bias", "D", f"{ATTENTION}o_proj.bias", when="all bias"),
    Rule(f"{OURS}attention.qk_norm.queries.gain", "h", f"{ATTENTION}q_norm.weight", when="head norm"),
    Rule(f"{OURS}attention.qk_norm.keys.gain", "h", f"{ATTENTION}k_norm.weight", when="head norm"),
    Rule(f"{OURS}attention.qk_norm.queries.gain", "Q", f"{ATTENTION}q_norm.weight", when="full norm"),
    Rule(f"{OURS}attention.qk_norm.keys.gain", "K", f"{ATTENTION}k_norm.weight", when="full norm"),
    Rule(f"{OURS}feed_forward_norm.gain", "D", f"{LAYER}post_attention_layernorm.weight"),
)
DENSE = _feed_forward(f"{OURS}feed_forward", "1 F", f"{LAYER}mlp.{NAMES}", "dense")
MIXTRAL = (
    Rule(f"{OURS}feed_forward.router.weight", "D E", f"{LAYER}block_sparse_moe.gate.weight", True, "conditional"),
    *_feed_forward(
        f"{OURS}feed_forward.experts", "E X", LAYER + "block_sparse_moe.experts.{expert}.w1|w3|w2", "conditional"
    ),
)
MLP = (
    Rule(f"{OURS}feed_forward.router.weight", "D E", f"{LAYER}mlp.gate.weight", True, "conditional"),
    *_feed_forward(f"{OURS}feed_forward.experts", "E X", f"{LAYER}mlp.experts.{{expert}}.{NAMES}", "conditional"),
)
SHARED = (
    *_feed_forward(f"{OURS}feed_forward.shared", "1 S", f"{LAYER}mlp.shared_expert.{NAMES}", "shared"),
    Rule(f"{OURS}feed_forward.shared.gate", "1 D 1", f"{LAYER}mlp.shared_expert_gate.weight", True, "shared gate"),
)
GLM = (
    Rule(f"{OURS}feed_forward.router.bias", "E", f"{LAYER}mlp.gate.e_score_correction_bias", when="router bias"),
    *_feed_forward(f"{OURS}feed_forward.shared", "1 S", f"{LAYER}mlp.shared_experts.{NAMES}", "shared"),
)

COMMON = {
    "hidden_act": "silu", "initializer_range": 0.02, "rope_theta": 10000.0, "rope_scaling": None,
    "tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None,
}  # fmt: skip
QWEN = COMMON | {"rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
STEP = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False, "router_aux_loss_coef": 0.001}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        DecoderFamily(
            "llama",
            "LlamaForCausalLM",
            COMMON | {"rms_norm_eps": 1e-6, "attention_bias": False},
            (*ENDS, *BLOCK, *DENSE),
            bias=("attention_bias", "all"),
            extra=(("mlp_bias", False),),
        ),
        DecoderFamily(
            "mistral",
            "MistralForCausalLM",
            COMMON | {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
            (*ENDS, *BLOCK, *DENSE),
            window="plain",
        ),
        DecoderFamily(
            "qwen2",
            "Qwen2ForCausalLM",
            QWEN | {"num_key_value_heads": 32, "layer_types": None},
            (*ENDS, *BLOCK, *DENSE),
            bias=(None, "qkv"),
            window="layered",
        ),
        DecoderFamily(
            "qwen3",
            "Qwen3ForCausalLM",
            QWEN | {"num_key_value_heads": 32, "head_dim": 128, "layer_types": None, "attention_bias": False},
            (*ENDS, *BLOCK, *DENSE),
            bias=("attention_bias", "all"),
            qk_norm=(None, "head"),
            window="layered",
        ),
        DecoderFamily(
            "mixtral",
            "MixtralForCausalLM",
            COMMON
            | {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6, "sliding_window": None}
            | {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
            (*ENDS, *BLOCK, *MIXTRAL),
            window="plain",
            experts=Experts("num_local_experts", "intermediate_size", normalised=True, places="all"),
        ),
        DecoderFamily(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            QWEN
            | STEP
            | {"num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
            | {"num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True},
            (*ENDS, *BLOCK, *DENSE, *MLP, *SHARED),
            bias=("qkv_bias", "qkv"),
            window="bottom",
            experts=Experts("num_experts", "moe_intermediate_size", shared="gated"),
        ),
        DecoderFamily(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            QWEN
            | STEP
            | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128}
            | {"attention_bias": False},
            (*ENDS, *BLOCK, *DENSE, *MLP),
            bias=("attention_bias", "all"),
            qk_norm=(None, "head"),
            window="switched",
            experts=Experts("num_experts", "moe_intermediate_size"),
        ),
        DecoderFamily(
            "olmoe",
            "OlmoeForCausalLM",
            COMMON
            | {"rms_norm_eps": 1e-5, "attention_bias": False, "num_experts_per_tok": 8, "num_experts": 64}
            | {"norm_topk_prob": False, "router_aux_loss_coef": 0.01},
            (*ENDS, *BLOCK, *MLP),
            bias=("attention_bias", "all"),
            qk_norm=(None, "full"),
            own_head_size=False,
            experts=Experts("num_experts", "intermediate_size", places="all"),
            extra=(("clip_qkv", None),),
        ),
        DecoderFamily(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            COMMON
            | {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "attention_bias": False}
            | {"moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128}
            | {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
            | {"norm_topk_prob": True, "use_qk_norm": False},
            (*ENDS, *BLOCK, *DENSE, *MLP, *GLM),
            bias=("attention_bias", "qkv"),
            qk_norm=("use_qk_norm", "head"),
            partial_rotary=True,
            experts=Experts(
                "n_routed_experts", "moe_intermediate_size", "sigmoid", places="first dense", shared="counted"
            ),
        ),
        SwitchTransformers(),
    )
}
NOT_OFFERED = {
    "deepseek_v2": "multi-head latent attention (MLA)",
    "deepseek_v3": "multi-head latent attention (MLA)",
    "kimi_k2": "multi-head latent attention (MLA)",
    "gpt_oss": "attention sinks",
    "llama4_text": "chunked attention and per-layer positions",
    "llama4": "chunked attention and per-layer positions",
    "gemma2": "soft-capped logits and norms after each part",
    "gemma3_text": "norms after each part",
    "qwen3_next": "linear attention",
}


def family_of(model_type: Any) -> Family:
    """Returns the family of a model_type (UserError: there is none; it says why where that is known)."""
    if isinstance(model_type, str) and model_type in NOT_OFFERED:
        raise UserError(f"model_type: {model_type}; {NOT_OFFERED[model_type]} is not offered")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type: {represented(model_type)}; not offered; one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def choose(config: Config, name: str | None = None) -> Family:
    """Returns the family of that name, or the first that a configuration fits (UserError: there is none)."""
    families = [family_of(name)] if name else list(FAMILIES.values())
    reasons = {family.model_type: family.unfit(config) for family in families}
    fitting = [family for family in families if reasons[family.model_type] is None]
    if fitting:
        return fitting[0]
    if name:
        raise UserError(f"--family: {name}; has no models with {reasons[name]}: leave --family out to let one be found")
    lacking: dict[str | None, list[str]] = {}
    for family, reason in reasons.items():
        lacking.setdefault(reason, []).append(family)
    told = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in lacking.items())
    raise UserError(f"--model: no family has models of this configuration; what they do not have: {told}")
