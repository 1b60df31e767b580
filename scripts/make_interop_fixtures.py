"""Makes the fixtures of tests/interop: tiny random models of each family, as transformers saves and computes them.

    python scripts/make_interop_fixtures.py [--out tests/fixtures/interop]

Each folder holds what save_pretrained wrote, a tokenizer, and reference.safetensors: a ragged batch of tokens with
padding at the right, and the logits and chosen experts of its real tokens, computed in float32. It needs torch and
transformers 4.57.1, which the project itself does not depend on.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import save_file

from switchyard.json_text import to_json

LENGTHS = (12, 7, 3)
COMMON = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.02, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
# name -> (class of transformers, keys of its configuration, type of the saved weights)
CASES = {
    "llama2": (
        "Llama",
        {"num_key_value_heads": 4, "attention_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        torch.float32,
    ),
    "llama3": ("Llama", {"head_dim": 8, "rope_scaling": LLAMA3, "tie_word_embeddings": True}, torch.float32),
    "mistral": ("Mistral", {"sliding_window": 4}, torch.float32),
    "qwen2": (
        "Qwen2",
        {"rope_scaling": YARN, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        torch.bfloat16,
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}, torch.float32),
    "mixtral": ("Mixtral", {"intermediate_size": 12, "num_local_experts": 4, "rope_theta": 1e4}, torch.float16),
    "qwen2_moe": (
        "Qwen2Moe",
        EXPERTS | {"shared_expert_intermediate_size": 20, "norm_topk_prob": False, "mlp_only_layers": [0]},
        torch.float32,
    ),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 8, "norm_topk_prob": True, "attention_bias": True}, torch.float32),
    "olmoe": (
        "Olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12, "norm_topk_prob": False},
        torch.float32,
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 2},
            **{"first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "n_group": 2, "topk_group": 1, "head_dim": 8},
            **{"attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5, "norm_topk_prob": True},
        },
        torch.float32,
    ),
}
SHARD_SIZES = {"mixtral": "12KB"}  # the others are one file
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-_=+*/<>"
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"


def build(name: str) -> torch.nn.Module:
    """Returns a model of a case with weights that leave no part idle, rounded to the type they are saved in."""
    kind, keys, dtype = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**(COMMON | keys))
    config._attn_implementation = "eager"
    torch.manual_seed(sorted(CASES).index(name))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key:
                continue
            noise = torch.randn(tensor.shape)
            if tensor.dim() == 1:
                value = 1 + 0.2 * noise if "norm" in key else 0.2 * noise
            else:
                value = noise / tensor.shape[-1] ** 0.5 * (2.0 if "gate.weight" in key else 1.0)
            tensor.copy_(value.to(dtype).float())
    return model


def reference(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Computes tokens and valid [B, S], logits [T, V] of the T real tokens, and choices [M, T, K] of M layers."""
    choices: list[torch.Tensor] = []
    k = getattr(model.config, "num_experts_per_tok", 0)

    def note(module, inputs, output):
        found = output[0] if isinstance(output, tuple) else torch.softmax(output.float(), -1).topk(k, -1)[1]
        choices.append(found.reshape(len(LENGTHS), max(LENGTHS), -1))

    hooks = [module.register_forward_hook(note) for key, module in model.named_modules() if key.endswith("mlp.gate")]
    hooks += [
        module.register_forward_hook(note)
        for key, module in model.named_modules()
        if key.endswith("block_sparse_moe.gate")
    ]
    tokens = torch.randint(3, 60, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    valid = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=valid).logits
    for hook in hooks:
        hook.remove()
    real = valid.bool()
    arrays = {"tokens": tokens.int(), "valid": valid.float(), "logits": logits[real]}
    if choices:
        arrays["choices"] = torch.stack([chosen[real].int() for chosen in choices])
    return {key: np.ascontiguousarray(tensor.numpy()) for key, tensor in arrays.items()}


def tokenizer_json() -> str:
    """Returns a tokenizer of 60 entries, one a character; the models have 64."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.decoder = tokenizers.decoders.Fuse()
    return made.to_str(pretty=True)


def write(name: str, folder: Path) -> None:
    """Writes the folder of a case anew."""
    shutil.rmtree(folder, ignore_errors=True)
    model, dtype = build(name), CASES[name][2]
    arrays = reference(model)
    biases = {key: buffer.clone() for key, buffer in model.named_buffers() if "inv_freq" not in key}
    model.to(dtype)
    for key, buffer in model.named_buffers():
        if key in biases:
            buffer.data = biases[key]
    model.save_pretrained(folder, max_shard_size=SHARD_SIZES.get(name, "5GB"))
    save_file(arrays, folder / "reference.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names = ["input_ids", "attention_mask"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names, **special}
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(to_json(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Writes the folders of all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "interop"
    parser.add_argument("--out", type=Path, default=default, help="folder of the folders (default: of the tests)")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)} (default: all)")
    chosen = parser.parse_args()
    for name in chosen.cases or CASES:
        folder = chosen.out / name
        write(name, folder)
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1000:.1f} kB")


if __name__ == "__main__":
    main()
