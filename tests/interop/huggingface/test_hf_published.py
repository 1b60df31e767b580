"""Published models by their config.json: what the rules name has as many numbers as the model cards give."""

import math

import pytest

from switchyard.interop.huggingface.families import FAMILIES

LLAMA_3_1_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "mlp_bias": False,
    "attention_bias": False, "pretraining_tp": 1, "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rope_scaling": None,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
}  # fmt: skip
MIXTRAL_8X7B = MISTRAL_7B | {
    "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
}  # fmt: skip
QWEN2_5_05B = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "max_position_embeddings": 32768, "max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
}  # fmt: skip
QWEN3_06B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
    "max_position_embeddings": 40960, "use_sliding_window": False, "sliding_window": None, "rope_theta": 1000000,
}  # fmt: skip
QWEN1_5_MOE = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "max_position_embeddings": 8192, "norm_topk_prob": False, "use_sliding_window": False, "max_window_layers": 21,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "max_position_embeddings": 40960, "norm_topk_prob": True,
    "rope_theta": 1000000.0, "mlp_only_layers": [], "decoder_sparse_step": 1,
}  # fmt: skip
OLMOE_1B_7B = {
    "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "max_position_embeddings": 4096, "norm_topk_prob": False, "clip_qkv": None,
}  # fmt: skip
PUBLISHED = {
    "Llama 3.1 8B": (LLAMA_3_1_8B, 8_030_261_248),
    "Llama 2 7B": (LLAMA_2_7B, 6_738_415_616),
    "Mistral 7B": (MISTRAL_7B, 7_241_732_096),
    "Mixtral 8x7B": (MIXTRAL_8X7B, 46_702_792_704),
    "Qwen2.5 0.5B": (QWEN2_5_05B, 494_032_768),
    "Qwen3 0.6B": (QWEN3_06B, 596_049_920),
    "Qwen1.5-MoE-A2.7B": (QWEN1_5_MOE, 14_315_784_192),
    "Qwen3 30B A3B": (QWEN3_30B_A3B, 30_532_122_624),
    "OLMoE 1B 7B": (OLMOE_1B_7B, 6_919_161_856),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name):
    tree, count = PUBLISHED[name]
    family = FAMILIES[tree["model_type"]]
    config, lines = family.read(tree)
    assert lines == []
    assert sum(math.prod(one.shape) for one in family.parameters(config, tree["vocab_size"])) == count
    assert family.unfit(config) is None
