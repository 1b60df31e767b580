"""What cannot be imported is refused by name in one line, and nothing is written."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.hf_models import CASES, FIXTURES, changed, config_of
from safetensors.numpy import load_file, save_file

from switchyard.data import Tokenizer
from switchyard.errors import UserError
from switchyard.interop.huggingface.exporter import export_model
from switchyard.interop.huggingface.families import FAMILIES
from switchyard.interop.huggingface.importer import import_model
from switchyard.interop.huggingface.rotary import OFFERED


def _refusal(model: Path, out: Path, **more) -> str:
    """Returns the message, after a look at what was left."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as found:
        import_model(model, out, say=lambda line: None, **more)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model_type": "deepseek_v3"}, "model_type: deepseek_v3; multi-head latent attention (MLA) is not offered"),
        ({"model_type": "gpt_oss"}, "model_type: gpt_oss; attention sinks is not offered"),
        ({"model_type": "falcon"}, "model_type: 'falcon'; not offered; one of llama, mistral, "),
        ({"model_type": None}, "model_type: None; not offered"),
        ({"model_type": []}, "model_type: []; not offered"),
        ({"rope_scaling": {"type": []}}, "rope_scaling: [] is not offered; one of linear, llama3, yarn"),
        ({"quantization_config": {"quant_method": "gptq"}}, "config.json: quantization_config; quantised"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act: 'gelu'; only silu (SwiGLU) is offered"),
        ({"kv_lora_rank": 8}, "config.json: kv_lora_rank: 8; multi-head latent attention (MLA) is not offered"),
        ({"mlp_bias": True}, "config.json: mlp_bias: True; biases in the feed-forward is not offered"),
        ({"clip_qkv": 8.0}, "config.json: clip_qkv: 8.0; queries, keys and values that are clipped"),
        ({"partial_rotary_factor": 0.5}, "config.json: partial_rotary_factor: 0.5; mixtral has none"),
        ({"hidden_size": "16"}, "config.json: hidden_size: '16'; must be a whole number"),
        ({"hidden_size": None}, "config.json: hidden_size: null; must be a whole number"),
        ({"num_attention_heads": 3}, "model.num_heads: 3; must divide model.hidden_size (16)"),
        ({"num_experts_per_tok": 5}, "moe.num_experts_chosen: 5; at most moe.expert_num (4)"),
        ({"num_local_experts": 1}, "config.json: num_local_experts: 1; a conditional layer needs 2 experts or more"),
        ({"num_experts_per_tok": 1}, "config.json: num_experts_per_tok: 1; its gate divided by itself is 1"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling: 'dynamic' is not offered; one of "),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "rope_scaling.x: 1; not read with 'linear'"),
        ({"intermediate_size": 16}, "experts.0.w1.weight': shape (12, 16); config.json makes it (16, 16)"),
        (
            {"num_hidden_layers": 3},
            "tensor 'model.layers.2.input_layernorm.weight' is missing; mixtral needs it: (16,)",
        ),
        ({"num_hidden_layers": 1}, "unexpected tensor 'model.layers.1."),
        ({"vocab_size": 0}, "shape (64, 16); config.json makes it (0, 16)"),
    ],
)
def test_a_configuration_that_is_not_offered(keys, reason, tmp_path):
    folder = changed("mixtral", tmp_path / "model", lambda tree: tree.update(keys))
    assert reason in _refusal(folder, tmp_path / "out")


def test_windows_that_transformers_itself_does_not_agree_on(tmp_path):
    keys = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    folder = changed("qwen2_moe", tmp_path / "model", lambda tree: tree.update(keys))
    assert _refusal(folder, tmp_path / "out").startswith("config.json: max_window_layers: 1; transformers gives ")


def test_a_head_size_that_the_family_does_not_have(tmp_path):
    folder = changed("olmoe", tmp_path / "model", lambda tree: tree.update(head_dim=8))
    assert _refusal(folder, tmp_path / "out") == (
        "config.json: head_dim: 8; olmoe has hidden_size / num_attention_heads (16 / 4)"
    )


def _copy(case: str, folder: Path) -> Path:
    shutil.copytree(FIXTURES / case, folder)
    return folder


def _rewrite(folder: Path, change) -> None:
    """Changes the tensors of a single file."""
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def _without(name: str):
    return lambda arrays: arrays.pop(name)


def _with(name: str, array: np.ndarray):
    return lambda arrays: arrays.update({name: array})


QUERY = "model.layers.0.self_attn.q_proj.weight"
NOT_FINITE = np.full((16, 16), np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without(QUERY), f"tensor '{QUERY}' is missing; olmoe needs it: (16, 16)"),
        (_with(QUERY, np.ones((16, 8), np.float32)), f"tensor '{QUERY}': shape (16, 8); config.json makes it (16, 16)"),
        (_with(QUERY, np.ones((16, 16), np.int8)), f"tensor '{QUERY}' is I8; quantised and whole-number weights"),
        (
            _with(QUERY, NOT_FINITE),
            f"{QUERY}, model.layers.0.self_attn.v_proj.weight': holds numbers that are not finite",
        ),
        (
            _with("model.layers.0.mlp.gate.bias", np.ones(4, np.float32)),
            "unexpected tensor 'model.layers.0.mlp.gate.bias'",
        ),
        (_with("lm_head.bias", np.ones(64, np.float32)), "unexpected tensor 'lm_head.bias': olmoe has none"),
    ],
)
def test_tensors_that_do_not_fit(change, reason, tmp_path):
    folder = _copy("olmoe", tmp_path / "model")
    _rewrite(folder, change)
    assert reason in _refusal(folder, tmp_path / "out")


def test_a_missing_shard(tmp_path):
    folder = _copy("mixtral", tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors': the shard is missing" in _refusal(folder, tmp_path / "out")


def test_a_tensor_that_the_index_names_and_no_shard_has(tmp_path):
    folder = _copy("mixtral", tmp_path / "model")
    shard = folder / "model-00001-of-00002.safetensors"
    arrays = load_file(shard)
    arrays.pop("model.embed_tokens.weight")
    save_file(arrays, shard)
    assert "tensor 'model.embed_tokens.weight' is missing: model.safetensors.index.json" in _refusal(
        folder, tmp_path / "o"
    )


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 3, "pytorch_model.bin"])
def test_an_index_that_names_other_places(place, tmp_path):
    folder = _copy("mixtral", tmp_path / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = place
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no name of a safetensors file here" in _refusal(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_named_and_never_opened(name, tmp_path):
    folder = _copy("olmoe", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "reference.safetensors").unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    assert f"{name} is not safetensors and is never opened" in _refusal(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_that_lead_out_of_the_folder(name, tmp_path):
    folder = _copy("olmoe", tmp_path / "model")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    message = _refusal(folder, tmp_path / "out")
    assert f"{name}' is a link that leads out of its folder; copy the folder with cp -rL" in message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", b"{", "config.json': not JSON"),
        ("config.json", b"[]", "config.json': not a JSON object"),
        ("config.json", b'{"a": 1, "a": 2}', "config.json': not JSON: key 'a' is given twice"),
        ("config.json", b"\xff\xfe", "config.json': not UTF-8 text"),
        ("config.json", None, "config.json' is missing"),
        ("model.safetensors", b"PK\x03\x04", "model.safetensors': not safetensors, or damaged"),
        ("model.safetensors", None, "neither model.safetensors nor model.safetensors.index.json; a download that"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        (
            "tokenizer.json",
            None,
            "tokenizer.json is missing; save a fast tokenizer there, or name a file with --tokenizer",
        ),
    ],
)
def test_files_that_are_damaged_or_missing(name, content, reason, tmp_path):
    folder = _copy("olmoe", tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert reason in _refusal(folder, tmp_path / "out")


def test_a_truncated_shard(tmp_path):
    folder = _copy("olmoe", tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    assert "model.safetensors': not safetensors, or damaged (tensors end at byte" in _refusal(folder, tmp_path / "out")


def test_a_tokenizer_with_more_entries_than_the_model(tmp_path):
    folder = changed("olmoe", tmp_path / "model", lambda tree: tree.update(vocab_size=50))
    _rewrite(folder, lambda arrays: arrays.update({k: v[:50] for k, v in arrays.items() if v.shape[0] == 64}))
    assert "59 entries, the model has 50; take the model's own tokenizer" in _refusal(folder, tmp_path / "out")


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    assert _refusal(FIXTURES / "olmoe", tmp_path / "out").endswith("already exists; remove it or give another folder")


def test_what_may_be_left_out_is_left_out_and_said(tmp_path):
    folder = _copy("llama3", tmp_path / "model")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    _rewrite(folder, lambda arrays: arrays.update(extra, **{"lm_head.weight": arrays["model.embed_tokens.weight"]}))
    lines = []
    import_model(folder, tmp_path / "out", say=lines.append)
    assert lines[:2] == [
        "'lm_head.weight' is the embedding table (tie_word_embeddings): left out",
        "'model.layers.0.self_attn.rotary_emb.inv_freq' is computed from the configuration: left out",
    ]


def test_layers_that_predict_the_token_after_the_next_are_left_out(tmp_path):
    folder = changed("glm4_moe", tmp_path / "model", lambda tree: tree.update(num_nextn_predict_layers=1))
    _rewrite(folder, _with("model.layers.2.eh_proj.weight", np.ones((16, 32), np.float32)))
    lines = []
    import_model(folder, tmp_path / "run", say=lines.append)
    reason = "predicts the token after the next (num_nextn_predict_layers): left out"
    assert lines[0] == f"'model.layers.2.eh_proj.weight' {reason}"
    export_model(tmp_path / "run", tmp_path / "out", say=lambda line: None)
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    _rewrite(folder, _with("model.layers.3.eh_proj.weight", np.ones((16, 32), np.float32)))
    assert "unexpected tensor 'model.layers.3.eh_proj.weight'" in _refusal(folder, tmp_path / "again")


def test_a_tokenizer_of_another_folder_may_be_named(tmp_path):
    folder = _copy("olmoe", tmp_path / "model")
    (folder / "tokenizer.json").rename(tmp_path / "other.json")
    import_model(folder, tmp_path / "run", tmp_path / "other.json", say=lambda line: None)
    tokenizer = Tokenizer.from_json((tmp_path / "run" / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer.vocab_size == 64 and tokenizer.decode(tokenizer.encode("hello 42")) == "hello 42"


def test_keys_that_are_not_read_are_told(tmp_path):
    keys = {"attention_dropout": 0.1, "my_key": 3, "auto_map": {"AutoModel": "code.Model"}}
    folder, lines = changed("llama2", tmp_path / "model", lambda tree: tree.update(keys)), []
    import_model(folder, tmp_path / "out", say=lines.append)
    assert lines[:2] == [
        "config.json: attention_dropout: 0.1 is of training alone and is not taken over",
        "config.json: keys that were not read: auto_map, my_key",
    ]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


SCALINGS = st.dictionaries(
    st.sampled_from(["type", "rope_type", "rope_theta", *sorted({key for keys in OFFERED.values() for key in keys})]),
    st.sampled_from([*OFFERED, "default", "dynamic"]) | st.floats(0, 100) | st.integers(-3, 100) | ANYTHING,
    max_size=8,
)


@given(st.sampled_from([*CASES, "switch_transformers"]), st.data())
def test_any_value_of_any_key_is_one_line_or_a_configuration_that_can_be_written(case, data):
    tree = config_of(FIXTURES / case)
    family = FAMILIES[tree["model_type"]]
    for key in data.draw(st.lists(st.sampled_from(sorted({*tree, *family.defaults})), min_size=1, max_size=3)):
        tree[key] = data.draw(SCALINGS if key == "rope_scaling" else ANYTHING)
    try:
        config, lines = family.read(tree)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(line, str) for line in lines)
        assert family.unfit(config) is None
