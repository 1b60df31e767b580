"""Exports: an import given back bit for bit, through any layout; and runs that were never imported."""

import json

import numpy as np
import pytest
from oracles.hf_models import CASES, FIXTURES, bits_of, config_of

from switchyard import config as configuration
from switchyard.checkpoint import store
from switchyard.checkpoint.reshard import convert
from switchyard.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from switchyard.errors import UserError
from switchyard.interop.huggingface.exporter import export_model
from switchyard.interop.huggingface.facts import decoder_facts
from switchyard.interop.huggingface.families import FAMILIES, SHARED
from switchyard.interop.huggingface.importer import import_model
from switchyard.interop.huggingface.rules import parameters


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.mark.parametrize("case", CASES)
def test_an_import_is_given_back_bit_for_bit(case, imported, tmp_path):
    export_model(imported(case), tmp_path / "out", say=quiet)
    assert bits_of(tmp_path / "out") == bits_of(FIXTURES / case)
    assert config_of(tmp_path / "out") == config_of(FIXTURES / case)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (FIXTURES / case / name).read_bytes(), name


@pytest.mark.parametrize("case", ["mixtral", "glm4_moe"])
def test_through_expert_parallel_shards_of_four_devices_and_back_it_is_bit_equal(case, imported, tmp_path):
    convert(store.resolve(imported(case)), "{data_parallel: 4, expert_parallel: 4}", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("weights-*-of-00004.safetensors"))) == 4
    convert(tmp_path / "shards", "{}", tmp_path / "one")
    export_model(tmp_path / "one", tmp_path / "out", say=quiet)
    assert bits_of(tmp_path / "out") == bits_of(FIXTURES / case)
    export_model(tmp_path / "shards", tmp_path / "straight", say=quiet)  # any layout is read
    assert bits_of(tmp_path / "straight") == bits_of(FIXTURES / case)


def test_files_have_at_most_the_asked_bytes_and_an_index(imported, tmp_path):
    export_model(imported("olmoe"), tmp_path / "out", largest=10_000, say=quiet)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = bits_of(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(len(content) for _, _, content in tensors.values())
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 10_000 + 5_000 for file in files)  # with their headers
    assert tensors == bits_of(FIXTURES / "olmoe")


def test_another_type_is_rounded_to_and_said_in_the_configuration(imported, tmp_path):
    export_model(imported("llama2"), tmp_path / "half", dtype="bfloat16", say=quiet)
    tensors = bits_of(tmp_path / "half")
    assert {dtype for dtype, _, _ in tensors.values()} == {"BF16"}
    assert config_of(tmp_path / "half")["dtype"] == "bfloat16"
    import_model(tmp_path / "half", tmp_path / "again", say=quiet)
    held, exact = store.read(tmp_path / "again").weights, store.read(imported("llama2")).weights
    for name, array in exact.items():
        np.testing.assert_allclose(held[name], array, rtol=2**-8)
    export_model(tmp_path / "again", tmp_path / "half_again", say=quiet)
    assert bits_of(tmp_path / "half_again") == tensors


def test_a_number_that_the_type_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    config, weights = _save_run(tmp_path / "run", {}, None, ByteTokenizer())
    weights["norm.gain"][3] = 1e5
    store.save(tmp_path / "run", config, ByteTokenizer().to_json(), weights, {}, {"step": 4, "seconds": 0.0})
    with pytest.raises(
        UserError, match=r"^'model\.norm\.weight': holds numbers that float16 cannot; use --dtype float32"
    ):
        export_model(tmp_path / "run", tmp_path / "out", dtype="float16", say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


MODEL = {
    "num_layers": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "seq_length": 16,
    "activation": "swiglu", "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"router": {"name": "top_k"}, "expert_num": 4, "num_experts_chosen": 2, "moe_intermediate_size": 12}
# what a run has -> the family that it is exported as
RUNS = {
    "dense": ({}, None, "llama"),
    "window": ({"sliding_window": 4}, None, "mistral"),
    "norm": ({"qk_norm": "head", "head_size": 8}, None, "qwen3"),
    "bias": ({"attention_bias": "qkv", "n_kv_heads": 2}, None, "qwen2"),
    "mixtral": ({}, MOE | {"moe_intermediate_size": 24}, "mixtral"),
    "gated shared expert": (
        {"attention_bias": "qkv"},
        MOE | {"shared_expert_num": 1, "shared_intermediate_size": 20, "use_shared_expert_gating": True},
        "qwen2_moe",
    ),
    "switch": ({"qk_norm": "head"}, MOE | {"router": "switch", "num_experts_chosen": 1, "layers": [1]}, "qwen3_moe"),
    "full norm": ({"qk_norm": "full"}, MOE, "olmoe"),
    "dense with partial rotation": ({"partial_rotary": 0.5}, None, "glm4_moe"),
    "sigmoid": ({}, MOE | {"router": {"name": "sigmoid"}, "layers": [1], "shared_expert_num": 2}, "glm4_moe"),
}


def _save_run(folder, model: dict, moe: dict | None, tokenizer: Tokenizer):
    """Writes a checkpoint with random weights of a configuration."""
    config = configuration.build({"model": MODEL | model} | ({"moe": moe} if moe else {}), inherited=True)
    random, weights = np.random.default_rng(0), {}
    for one in parameters((*FAMILIES["glm4_moe"].rules, *SHARED), config, tokenizer.vocab_size):
        weights[one.name] = random.normal(size=one.shape).astype(np.float32)
    store.save(folder, config, tokenizer.to_json(), weights, {}, {"step": 3, "seconds": 1.0})
    return config, weights


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_exported_as_the_family_that_fits_and_imported_again(name, tmp_path):
    model, moe, family = RUNS[name]
    config, weights = _save_run(tmp_path / "run", model, moe, ByteTokenizer())
    assert export_model(tmp_path / "run", tmp_path / "out", say=quiet).model_type == family
    again = import_model(tmp_path / "out", tmp_path / "again", say=quiet)
    assert decoder_facts(again) == decoder_facts(config)
    held = store.read(tmp_path / "again").weights
    assert held.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(held[key], array)


DENSE = "llama, mistral, qwen2, qwen3, qwen2_moe, qwen3_moe, glm4_moe"  # families that may have dense layers alone


@pytest.mark.parametrize(
    ("model", "moe", "reason"),
    [
        (
            {"activation": "relu"},
            None,
            f"model.activation: 'relu' ({DENSE}); moe.layers: [] (mixtral, olmoe)",
        ),
        ({"position": "learned"}, None, "model.position: 'learned'"),
        ({"norm": "layernorm"}, None, "model.norm: 'layernorm'"),
        ({}, MOE | {"eval_capacity_factor": 2.0}, "moe.eval_capacity_factor: 2.0"),
        ({}, MOE | {"force_balance": True}, "moe.force_balance: True"),
        ({}, MOE | {"router": "gshard"}, "moe.router: {'name': 'gshard'"),
        ({"sliding_window": 4, "qk_norm": "full"}, MOE, "model.sliding_window: [4, 4] (olmoe)"),
        ({"head_size": 8, "qk_norm": "full"}, MOE, "model.head_size: 8 (olmoe)"),
        ({"qk_norm": "full"}, None, "moe.layers: [] (mixtral, olmoe)"),
    ],
)
def test_what_no_family_has_is_refused_by_name_and_nothing_is_written(model, moe, reason, tmp_path):
    config = configuration.build({"model": MODEL | model} | ({"moe": moe} if moe else {}), inherited=True)
    store.save(tmp_path / "run", config, ByteTokenizer().to_json(), {"x": np.zeros(1, np.float32)}, {}, {"step": 1})
    with pytest.raises(UserError) as found:
        export_model(tmp_path / "run", tmp_path / "out", say=quiet)
    assert reason in str(found.value) and "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_family_that_is_asked_for_says_what_it_lacks(imported, tmp_path):
    with pytest.raises(UserError, match=r"^--family: llama; has no models with model\.qk_norm: 'head': leave"):
        export_model(imported("qwen3"), tmp_path / "out", "llama", say=quiet)
    with pytest.raises(UserError, match=r"^--family: mixtral; has no models with "):
        export_model(imported("llama2"), tmp_path / "out", "mixtral", say=quiet)


def test_another_family_that_fits_may_be_asked_for(tmp_path):
    _save_run(tmp_path / "run", {}, None, ByteTokenizer())
    assert export_model(tmp_path / "run", tmp_path / "out", "mistral", say=quiet).model_type == "mistral"
    assert config_of(tmp_path / "out")["sliding_window"] is None


def test_weights_that_the_family_does_not_name_are_refused(tmp_path):
    config, weights = _save_run(tmp_path / "run", {}, None, ByteTokenizer())
    store.save(
        tmp_path / "run", config, ByteTokenizer().to_json(), weights | {"extra": weights["norm.gain"]}, {}, {"step": 4}
    )
    with pytest.raises(UserError, match=r"^weight 'extra': \(16,\) in the checkpoint, none by llama"):
        export_model(tmp_path / "run", tmp_path / "out", say=quiet)


def test_adapters_are_to_be_merged_first(tmp_path):
    config, weights = _save_run(tmp_path / "run", {}, None, ByteTokenizer())
    weights["layers.0.attention.qkv.lora.a"] = np.zeros((16, 2), np.float32)
    store.save(tmp_path / "run", config, ByteTokenizer().to_json(), weights, {}, {"step": 4, "seconds": 0.0})
    with pytest.raises(UserError, match=r"holds adapters \(train\.lora\); merge them first: python -m switchyard"):
        export_model(tmp_path / "run", tmp_path / "out", say=quiet)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("\n abcé")], ids=["byte", "char"])
def test_own_tokenizers_become_files_of_the_library_with_the_same_ids(tokenizer, tmp_path):
    _save_run(tmp_path / "run", {}, None, tokenizer)
    export_model(tmp_path / "run", tmp_path / "out", say=quiet)
    text = "a cab\nbé ccc a"
    made = Tokenizer.from_json((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    np.testing.assert_array_equal(made.encode(text), tokenizer.encode(text))
    assert made.decode(made.encode(text)) == text and made.vocab_size == tokenizer.vocab_size
    assert config_of(tmp_path / "out")["eos_token_id"] == tokenizer.separator


@pytest.mark.parametrize(
    ("key", "value"),
    [("texts", {"../evil.txt": "x"}), ("dtype", "I8"), ("others", {"lm_head.weight": "U8"}), ("more", 1)],
)
def test_a_state_that_somebody_changed_writes_no_other_file(key, value, imported, tmp_path):
    held = store.read(imported("mixtral"))
    state = held.state | {"huggingface": held.state["huggingface"] | {key: value}}
    store.save(tmp_path / "run", held.config, held.tokenizer_json, held.weights, {}, state)
    with pytest.raises(UserError, match=r"^checkpoint '.*step-00000000': state\.json: huggingface: "):
        export_model(tmp_path / "run", tmp_path / "out", say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_without_an_origin_takes_files_and_types_of_another_folder(imported, tmp_path):
    held = store.read(imported("mixtral"))
    store.save(tmp_path / "run", held.config, held.tokenizer_json, held.weights, {}, {"step": 2, "seconds": 0.0})
    export_model(tmp_path / "run", tmp_path / "out", like=FIXTURES / "mixtral", say=quiet)
    assert bits_of(tmp_path / "out") == bits_of(FIXTURES / "mixtral")
    assert "chat_template" in (tmp_path / "out" / "tokenizer_config.json").read_text()
