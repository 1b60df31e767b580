"""Against torch and transformers, where both are installed: exports load there and compute the same.

The differences that docs/interop.md gives are printed with -s.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
from oracles.hf_models import CASES, FIXTURES, bits_of, config_of, references, run
from safetensors.numpy import load_file

from switchyard.interop.huggingface.exporter import export_model
from switchyard.interop.huggingface.importer import import_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "make_interop_fixtures.py"
BOUND = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def script() -> dict:
    """Gives the functions of scripts/make_interop_fixtures.py."""
    return runpy.run_path(str(SCRIPT))


def _logits(folder: Path, script: dict) -> tuple[np.ndarray, np.ndarray | None]:
    """Loads a folder strictly and returns (logits [T, V], choices [M, T, K]) of the reference's batch."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    arrays = script["reference"](model.eval())
    return arrays["logits"], arrays.get("choices")


@pytest.mark.parametrize("case", CASES)
def test_an_export_loads_in_transformers_and_computes_the_same(case, imported, script, tmp_path, pynative):
    export_model(imported(case), tmp_path / "out", say=lambda line: None)
    expected = references(case)
    ours, _ = run(imported(case), expected["tokens"], expected["valid"])
    theirs, choices = _logits(tmp_path / "out", script)
    there, back = np.abs(ours - expected["logits"]).max(), np.abs(theirs - ours).max()
    print(f"{case}: import {there:.1e}, export {back:.1e}")
    assert there <= BOUND and back <= BOUND
    np.testing.assert_array_equal(theirs, expected["logits"])  # its own numbers, bit for bit
    if choices is not None:
        np.testing.assert_array_equal(choices, expected["choices"])


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
# more of what a config.json may say: (case, keys that differ)
VARIANTS = {
    "mistral without a window": ("mistral", {"sliding_window": None, "head_dim": 6}),
    "mixtral with a window, tied": (
        "mixtral",
        {"sliding_window": 3, "tie_word_embeddings": True, "num_experts_per_tok": 3},
    ),
    "qwen2 with windows by name": ("qwen2", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2 with windows everywhere": ("qwen2", WINDOW | {"max_window_layers": 0, "rope_scaling": None}),
    "qwen3 with biases and a window": ("qwen3", WINDOW | {"attention_bias": True, "max_window_layers": 1}),
    "qwen3_moe every second layer": (
        "qwen3_moe",
        WINDOW | {"decoder_sparse_step": 2, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}},
    ),
    "qwen3_moe of one choice": ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "qwen2_moe with a window": (
        "qwen2_moe",
        WINDOW | {"max_window_layers": 0, "norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": []},
    ),
    "olmoe of grouped queries": (
        "olmoe",
        {"attention_bias": True, "norm_topk_prob": True, "rope_scaling": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7}},
    ),
    "glm4_moe plain": (
        "glm4_moe",
        {
            "n_group": 1,
            "norm_topk_prob": False,
            "use_qk_norm": False,
            "attention_bias": False,
            "first_k_dense_replace": 0,
        }
        | {"partial_rotary_factor": 0.75, "rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 16.0}},
    ),
    "llama with yarn": ("llama3", {"rope_scaling": YARN | {"beta_slow": 2.0}, "num_key_value_heads": 1}),
    "llama in bfloat16": ("llama2", {}),
    "glm4_moe in bfloat16, its bias in float32": ("glm4_moe", {}),
    "mistral with yarn": ("mistral", {"rope_scaling": YARN, "head_dim": 4}),  # transformers needs head_dim here
    "mixtral with linear scaling": ("mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "glm4_moe of dense layers": ("glm4_moe", {"first_k_dense_replace": 2}),
    "qwen3_moe of dense layers": ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_of_a_family_compute_the_same_both_ways(name, script, tmp_path, monkeypatch, pynative):
    case, keys = VARIANTS[name]
    kind, given, dtype = script["CASES"][case]
    dtype = torch.bfloat16 if "bfloat16" in name else dtype
    monkeypatch.setitem(script["CASES"], case, (kind, given | keys, dtype))
    script["write"](case, tmp_path / "model")
    import_model(tmp_path / "model", tmp_path / "run", say=lambda line: None)
    export_model(tmp_path / "run", tmp_path / "out", say=lambda line: None)
    assert bits_of(tmp_path / "out") == bits_of(tmp_path / "model")
    expected = load_file(tmp_path / "model" / "reference.safetensors")
    ours, chosen = run(tmp_path / "run", expected["tokens"], expected["valid"])
    theirs, _ = _logits(tmp_path / "out", script)
    print(f"{name}: {np.abs(ours - expected['logits']).max():.1e}")
    np.testing.assert_allclose(ours, expected["logits"], rtol=0, atol=BOUND)
    np.testing.assert_array_equal(theirs, expected["logits"])
    if chosen is not None:
        np.testing.assert_array_equal(np.sort(chosen, -1), np.sort(expected["choices"], -1))


def test_a_tokenizer_goes_along_with_its_template(imported, tmp_path):
    export_model(imported("mixtral"), tmp_path / "out", say=lambda line: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "user: hello\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == 59  # those that fill up the model are out again
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.float16 and model.generation_config.eos_token_id == 2
    assert model.float().generate(**tokenizer("the ", return_tensors="pt"), max_new_tokens=3).shape[1] > 4


@pytest.mark.parametrize("case", CASES)
def test_the_script_makes_the_fixtures_again(case, script, tmp_path):
    script["write"](case, tmp_path / case)
    assert bits_of(tmp_path / case) == bits_of(FIXTURES / case)
    assert config_of(tmp_path / case) == config_of(FIXTURES / case)
    found = load_file(tmp_path / case / "reference.safetensors")
    for name, array in references(case).items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
    names = sorted(path.name for path in (FIXTURES / case).iterdir())
    assert sorted(path.name for path in (tmp_path / case).iterdir()) == names
    assert sum(path.stat().st_size for path in (FIXTURES / case).iterdir()) <= 60_000


def test_a_model_that_was_trained_here_is_one_of_transformers(script, tmp_path, pynative):
    """GLM by weights of ours with a byte tokenizer, over a window of text that both read."""
    from switchyard import config as configuration
    from switchyard.checkpoint import store
    from switchyard.data.tokenizer import ByteTokenizer
    from switchyard.models import create_model

    model = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "activation": "swiglu"}
    moe = {
        "router": {"name": "sigmoid"},
        "expert_num": 4,
        "num_experts_chosen": 2,
        "layers": [1],
        "shared_expert_num": 1,
    }
    config = configuration.build({"model": model | {"init_method_std": 0.4}, "moe": moe | {"aux_loss_factor": 0}})
    weights = {one.name: one.asnumpy() for one in create_model(config, 256).get_parameters()}
    state = {"step": 1, "seconds": 0.0}
    store.save(tmp_path / "run", config, ByteTokenizer().to_json(), weights, {}, state)
    assert export_model(tmp_path / "run", tmp_path / "out", say=lambda line: None).model_type == "glm4_moe"
    theirs, choices = _logits(tmp_path / "out", script)
    expected = references("glm4_moe")
    ours, found = run(tmp_path / "run", expected["tokens"], expected["valid"])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUND)
    np.testing.assert_array_equal(np.sort(found, -1), np.sort(choices, -1))
    import_model(tmp_path / "out", tmp_path / "again", say=lambda line: None)
    again, _ = run(tmp_path / "again", expected["tokens"], expected["valid"])
    np.testing.assert_array_equal(again, ours)
