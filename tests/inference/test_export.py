"""An export computes what the training graph computes, appears whole or not at all, and says what it is."""

import json

import mindspore as ms
import numpy as np
import pytest
from oracles.marks import long_but
from oracles.tiny_export import EXPERTS, quiet, save_export, save_run
from oracles.tiny_run import TEXT

from switchyard.checkpoint import store as checkpoint
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.inference import export_graphs, parity
from switchyard.inference import manifest as manifests
from switchyard.inference.export import export, prefill_block
from switchyard.inference.mindir import open_model
from switchyard.models import create_model, single_experts

ATTENTION = {
    **{"head_size": 8, "n_kv_heads": 2, "qk_norm": "head", "attention_bias": "all", "partial_rotary": 0.5},
    **{"rotary_scaling": {"type": "linear", "factor": 2}, "sliding_window": 5, "window_layers": [1]},
}
VARIANTS = {
    "switch": ({}, {"expert_num": 4}),
    "grouped-query-swiglu-free-shared": (
        {"n_kv_heads": 2, "activation": "swiglu", "tie_word_embeddings": False},
        EXPERTS | {"layers": 2, "shared_expert_num": 1, "norm_topk_prob": False},
    ),
    "dense-learned-layernorm-gelu": ({"position": "learned", "norm": "layernorm", "activation": "gelu"}, {}),
    "capacity-groups-keys-of-attention": (
        ATTENTION,
        EXPERTS | {"eval_capacity_factor": 0.5, "groups": 2, "dropless_block_size": 3},
    ),
}


def whole_forward(run, tokens, **moe):
    """Logits [B, S, V] of the training graph at evaluation on the weights of a run."""
    held = checkpoint.read(run)
    config = build(held.config.model_dump() | {"moe": held.config.moe.model_dump() | moe})
    vocabulary = held.weights["embedding.table"].shape[0]
    decoder = create_model(config, vocabulary, length=24).set_train(False)
    checkpoint.load_weights(decoder, held.weights)
    ones, nothing = np.ones(tokens.shape, np.float32), np.zeros((1, 1, 1), np.float32)
    logits, _, _ = decoder(ms.Tensor(tokens), ms.Tensor(ones), ms.Tensor(nothing))
    return logits.asnumpy().reshape(*tokens.shape, -1)


@pytest.mark.parametrize(
    "name", long_but(VARIANTS, ["grouped-query-swiglu-free-shared", "capacity-groups-keys-of-attention"])
)
def test_parity(name, tmp_path, graph):
    """Prompts of unequal length, then token by token; shapes that the export did not see. Drops are left behind."""
    changed, moe = VARIANTS[name]
    run, config = save_run(tmp_path, changed, moe)
    longest = 16 if config.model.position == "learned" else 24
    manifest = export(run, tmp_path / "out", [f"export.max_length={longest}"], say=quiet)
    assert manifest.parity.max_abs_difference < 1e-5 and manifest.parity.not_reached == ()
    model = open_model(tmp_path / "out", say=quiet)
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (3, longest)).astype(np.int32)
    expected = whole_forward(run, tokens, groups=1, eval_capacity_factor=None)
    lengths = np.array([4, 1, longest - 3])
    logits, keys, values = model.prefill([row[:length] for row, length in zip(tokens, lengths)])
    np.testing.assert_allclose(logits, expected[[0, 1, 2], lengths - 1], atol=2e-5)
    keys, values = model.grow(keys, values, longest)
    for step in range(3):
        places = lengths + step
        logits, keys, values = model.decode(tokens[[0, 1, 2], places], places, keys, values)
        np.testing.assert_allclose(logits, expected[[0, 1, 2], places], atol=2e-5)


def test_the_manifest(exported):
    manifest = manifests.read(exported)
    manifests.verify(exported, manifest)
    assert set(manifest.files) == {"prefill.mindir", "decode.mindir", "decode_batch.mindir", "tokenizer.json"}
    assert sorted(path.name for path in exported.iterdir()) == sorted([*manifest.files, "manifest.json"])
    model, vocabulary = manifest.model, len(set(TEXT))
    assert (model.vocab_size, model.num_layers, model.n_kv_heads, model.head_size) == (vocabulary, 2, 4, 4)
    assert model.moe_layers == (0, 1) and model.compute_dtype == "float32"
    assert model.parameters == vocabulary * 16 + 2 * (16 * 48 + 16 * 16 + 16 * 4 + 4 * 2 * 16 * 64 + 2 * 16) + 16
    assert manifest.limits.max_length == 24 and manifest.encryption is None
    assert manifest.source.step == 1 and manifest.source.checkpoint.endswith("checkpoints/step-00000001")
    found = manifest.parity
    assert 0 < found.max_abs_difference <= 1e-4 == found.bound and found.not_reached == ()
    assert found.decode_positions == parity.STEPS * found.prefill_positions > 0
    assert json.loads((exported / "manifest.json").read_text())["parity"]["max_abs_difference"] > 0


@pytest.mark.long
def test_heavy_experts_have_a_graph_of_one_row(tmp_path, graph, monkeypatch):
    """It decodes one prompt after the other with caches of two lengths, as the others do; five shapes of prompts."""
    monkeypatch.setattr(single_experts, "HEAVY", 1)
    model = open_model(save_export(tmp_path, model={"num_layers": 1, "activation": "swiglu"}), say=quiet)
    assert model.decode_graphs == ("decode", "decode_batch", "decode_one")
    assert model.manifest.limits.one_shape == ("prefill", "decode_batch", "decode_one")
    for length, prompts in ((16, [[1, 2, 3]]), (24, [[4] * 20]), (16, [[5, 6]]), (16, [[7]] * 2), (16, [[8]] * 3)):
        _, *state = model.prefill([np.array(prompt) for prompt in prompts])
        given = np.full(len(prompts), 9), np.full(len(prompts), len(prompts[0]))
        state = model.grow(*state, length)
        wanted, *state = model.decode(*given, *state, graph="decode")
        for name in model.decode_graphs[1 : 3 if len(prompts) == 1 else 2]:
            found, *state = model.decode(*given, *state, graph=name)
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_every_expert_is_reached_or_named(tmp_path, graph):
    """An expert that no token can choose is named for both graphs, and the comparison holds for the others."""
    run, _ = save_run(tmp_path, moe=EXPERTS | {"num_experts_chosen": 1})
    held = checkpoint.read(run)
    weights = dict(held.weights)
    bias = np.zeros((16, 4), np.float32)
    weights["layers.1.feed_forward.router.weight"] = bias  # equal scores: the first expert is chosen always
    state = held.state | {"step": 2}
    checkpoint.save(run, held.config, held.tokenizer_json, weights, {"a": np.zeros(1, np.float32)}, state)
    lines = []
    manifest = export(run, tmp_path / "out", say=lines.append)
    wanted = {(1, expert, name) for expert in (1, 2, 3) for name in ("prefill", "decode")}
    assert set(manifest.parity.not_reached) == wanted
    assert any("does not reach: 1 of layer 1 (prefill), 2 of layer 1 (prefill)" in line for line in lines)


@pytest.mark.parametrize("name", long_but(["prefill", "decode", "decode_batch"], ["decode_batch"]))
def test_a_difference_is_refused_and_leaves_nothing(name, tmp_path, graph, monkeypatch):
    """Files whose weights are not the checkpoint's: one line, no directory, no temporary one."""
    run, _ = save_run(tmp_path)
    write = export_graphs.write_graph

    def write_altered(cell, path, key, *inputs):
        own = cell.experts[1]  # of prefill: expert by expert; of decode: copies; of decode_batch: [E * F, D]
        parameter = own.each[2].w_out if path.name == "prefill" else own.w_out
        before = parameter.asnumpy()
        if path.name == name:
            altered = before.copy()
            altered.reshape(1 if name == "prefill" else 4, -1)[-1] *= 1.01  # one expert of the last layer, by 1 %
            parameter.set_data(ms.Tensor(altered))
        write(cell, path, key, *inputs)
        parameter.set_data(ms.Tensor(before))

    monkeypatch.setattr(export_graphs, "write_graph", write_altered)
    with pytest.raises(UserError, match=f"^export: a logit of {name}.mindir differs .* by .*, more than 1e-04"):
        export(run, tmp_path / "out", say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "text.txt"]


def test_an_export_is_replaced_and_other_folders_are_not(tmp_path, graph, monkeypatch):
    out = save_export(tmp_path)
    (out / "manifest.json").rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"^--out: '.*out' contains other files; give a new folder"):
        export(tmp_path / "runs" / "tiny", out, say=quiet)
    assert len(list(out.iterdir())) == 4  # nothing was touched
    (tmp_path / "aside").rename(out / "manifest.json")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^--out: '.*file' is a file"):
        export(tmp_path / "runs" / "tiny", tmp_path / "file", say=quiet)
    export(tmp_path / "runs" / "tiny", out, ["export.max_length=8"], say=quiet)
    assert manifests.read(out).limits.max_length == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "runs", "text.txt"]


def test_encryption(tmp_path, graph):
    """The key opens the files; without it, or with another, one line says so; it stands in no file."""
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_bytes(b"a key of sixteen")
    other.write_bytes(b"another one of 24 bytes.")
    out = save_export(tmp_path, [f"export.key_file={key}"])
    assert manifests.read(out).encryption == "AES-GCM"
    assert all(b"a key of sixteen" not in path.read_bytes() for path in out.iterdir())
    assert "key" not in (out / "manifest.json").read_text()
    logits, _, _ = open_model(out, key, say=quiet).prefill([np.array([1, 2, 3])])
    assert np.isfinite(logits).all()
    with pytest.raises(UserError, match=r"^--key-file: not given; '.*out' is encrypted"):
        open_model(out, say=quiet)
    with pytest.raises(
        UserError, match=r"^--key-file: the key does not decrypt '.*mindir'; give the key of the export"
    ):
        open_model(out, other, say=quiet)


def test_half_precision(tmp_path, graph):
    """float16 products: files of half the size, caches in float16, its own bound."""
    out = save_export(tmp_path, ["model.compute_dtype=float16"])
    manifest = manifests.read(out)
    assert manifest.model.compute_dtype == "float16" and manifest.parity.bound == 2e-2
    _, keys, _ = open_model(out, say=quiet).prefill([np.array([1, 2, 3])])
    assert keys[0].dtype == ms.float16


def test_overrides_that_would_change_the_weights(tmp_path):
    run, _ = save_run(tmp_path)
    with pytest.raises(UserError, match=r"^moe\.expert_num: 8; the checkpoint's weights"):
        export(run, tmp_path / "out", ["moe.expert_num=8"], say=quiet)
    with pytest.raises(UserError, match=r"^checkpoint '.*none': does not exist"):
        export(tmp_path / "none", tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


def test_block_of_prefill():
    def block(length, **moe):
        return prefill_block(build({"moe": {"expert_num": 8} | moe}), length)

    assert block(512) == 16 and block(64) == 8 and block(4096) == 32
    assert block(512, dropless_block_size=5) == 5 and block(512, expert_num=1) == 1


def test_a_validation_text_of_one_prediction(tmp_path, graph):
    """Two tokens of validation: one place of prefill can be compared, and no decode step."""
    run, _ = save_run(tmp_path, moe={})
    (tmp_path / "short.txt").write_text(TEXT[:200])
    manifest = export(
        run, tmp_path / "out", [f"data.path={tmp_path / 'short.txt'}", "data.val_fraction=0.01"], say=quiet
    )
    assert (manifest.parity.prefill_positions, manifest.parity.decode_positions) == (2, 0)
