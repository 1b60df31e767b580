"""Switch Transformers: parity by a fixture of what transformers computes, and with it where torch is installed."""

import json
import runpy
import shutil

import numpy as np
import pytest
from mindspore import Tensor
from oracles.hf_models import FIXTURES, bits_of, changed, config_of
from oracles.tiny import NO_NOISE
from oracles.tiny_seq2seq import seq2seq_config
from safetensors.numpy import load_file, save_file

from switchyard import config as configuration
from switchyard.checkpoint import store
from switchyard.checkpoint.reshard import convert
from switchyard.data import Tokenizer
from switchyard.data.sentinels import SentinelTokenizer
from switchyard.data.tokenizer import ByteTokenizer, LibraryTokenizer
from switchyard.errors import UserError
from switchyard.interop.huggingface.exporter import export_model
from switchyard.interop.huggingface.families import FAMILIES
from switchyard.interop.huggingface.importer import import_model
from switchyard.interop.huggingface.switch_transformers import UNLIMITED, sparse_layers
from switchyard.models import create_model
from switchyard.moe.layer import MoELayer

CASE = "switch_transformers"
FIXTURE, FAMILY = FIXTURES / CASE, FAMILIES[CASE]
BOUND = 1e-4  # of a logit, float32


def quiet(line: str) -> None:
    """Says nothing."""


def answers_of(run, monkeypatch, given) -> dict[str, np.ndarray]:
    """Logits and experts of a run's model for a batch of theirs."""
    held, chosen, route = store.read(run, with_optimizer=False), [], MoELayer.route

    def kept(layer, *arguments):
        routing = route(layer, *arguments)
        chosen.append(routing["expert_index"].asnumpy())
        return routing

    monkeypatch.setattr(MoELayer, "route", kept)
    model = create_model(held.config, Tokenizer.from_json(held.tokenizer_json).vocab_size).set_train(False)
    store.load_weights(model, held.weights)
    tokens = np.concatenate((given["input_ids"], given["decoder_input_ids"]), 1).astype(np.int32)
    valid = np.ones(given["decoder_input_ids"].shape, np.float32)
    logits = model(Tensor(tokens), Tensor(valid), Tensor(NO_NOISE))[0].asnumpy()
    found, rows = {"logits": logits.reshape(*valid.shape, -1)}, len(tokens)
    for name, experts in zip(("encoder_experts", "decoder_experts"), chosen):
        found[name] = experts.reshape(1, rows, -1)
    return found


def check_alike(found, wanted):
    """The same experts for every real token, and the same logits."""
    real = wanted["attention_mask"] > 0
    assert 0 < real.sum() < real.size  # the batch is ragged
    np.testing.assert_array_equal(found["encoder_experts"][:, real], wanted["encoder_experts"][:, real])
    np.testing.assert_array_equal(found["decoder_experts"], wanted["decoder_experts"])
    assert len(np.unique(wanted["encoder_experts"])) > 2
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=0, atol=BOUND)


def test_their_weights_give_their_logits_and_experts(imported, monkeypatch, pynative):
    wanted = load_file(FIXTURE / "answers.safetensors")
    assert wanted["logits"].std() > 0.5
    check_alike(answers_of(imported(CASE), monkeypatch, wanted), wanted)


def test_an_import_is_given_back_bit_for_bit_through_shards_of_four_devices_too(imported, tmp_path):
    assert export_model(imported(CASE), tmp_path / "out", say=quiet).model_type == CASE
    assert bits_of(tmp_path / "out") == bits_of(FIXTURE)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == (FIXTURE / name).read_text(), name
    convert(store.resolve(imported(CASE)), "{data_parallel: 4, expert_parallel: 4}", tmp_path / "shards")
    convert(tmp_path / "shards", "{}", tmp_path / "one")
    export_model(tmp_path / "one", tmp_path / "again", say=quiet)
    assert bits_of(tmp_path / "again") == bits_of(FIXTURE)


def random_folder(folder, **keys):
    """A folder with a changed config.json and random tensors that fit it."""
    changed(CASE, folder, lambda tree: tree.update(keys))
    config, _ = FAMILY.read(config_of(folder))
    random, arrays = np.random.default_rng(0), {}
    for one in FAMILY.parameters(config, 30):
        arrays |= {source.name: random.normal(size=source.shape).astype(np.float32) for source in one.sources}
    save_file(arrays, folder / "model.safetensors")
    return folder


COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def with_copies(folder):
    """The tensors of a folder and, where the head is not tied, the tables of both stacks that transformers reads."""
    tensors = bits_of(folder)
    return tensors | (dict.fromkeys(COPIES, tensors["shared.weight"]) if "lm_head.weight" in tensors else {})


@pytest.mark.parametrize(
    "keys",
    [
        {"d_kv": 6, "tie_word_embeddings": False},
        {"num_sparse_encoder_layers": 3, "encoder_sparse_step": 0, "dense_act_fn": "gelu_new"},  # a dense encoder
        {"num_sparse_encoder_layers": 2, "encoder_sparse_step": 1, "num_layers": 2, "num_decoder_layers": 2},
    ],
)
def test_other_models_go_in_and_out_bit_for_bit(keys, tmp_path):
    folder = random_folder(tmp_path / "model", **keys)
    import_model(folder, tmp_path / "run", say=quiet)
    export_model(tmp_path / "run", tmp_path / "out", say=quiet)
    assert bits_of(tmp_path / "out") == with_copies(folder)
    held = store.read(tmp_path / "run", with_optimizer=False)
    model = create_model(held.config, 30)
    assert {one.name: tuple(one.shape) for one in model.get_parameters()} == {
        name: array.shape for name, array in held.weights.items()
    }


def test_a_config_json_that_is_made_says_what_the_imported_one_said():
    given = config_of(FIXTURE)
    config, lines = FAMILY.read(given)
    assert lines == ["config.json: expert_capacity: 1000 is not taken over: nothing is dropped at evaluation"]
    found = FAMILY.write(config, 30)
    assert found.pop("expert_capacity") == UNLIMITED
    assert {key: found[key] for key in found if key in given} == {key: given[key] for key in found if key in given}
    assert found.keys() - given.keys() == {"tie_word_embeddings"}
    assert FAMILY.read(found)[0] == config


@pytest.mark.parametrize(
    ("layers", "sparse", "wanted"), [(12, 6, [1, 3, 5, 7, 9, 11]), (12, 3, [1, 5, 9]), (2, 0, [1]), (3, 4, [])]
)
def test_conditional_layers_are_where_transformers_has_them(layers, sparse, wanted):
    assert sparse_layers(layers, sparse) == wanted


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"router_bias": True}, "config.json: router_bias: True; only False is offered"),
        ({"is_gated_act": True}, "config.json: is_gated_act: True; only False is offered"),
        ({"dense_act_fn": "silu"}, "config.json: dense_act_fn: 'silu'; only relu or gelu_new is offered"),
        ({"pad_token_id": 3}, "config.json: pad_token_id: 3; only 0 is offered"),
        ({"encoder_sparse_step": 1}, "config.json: encoder_sparse_step: 1; num_sparse_encoder_layers (1) of 2 make it"),
        ({"num_experts": 1}, "config.json: num_experts: 1; a conditional layer needs 2 experts or more"),
        ({"num_layers": 1 << 70}, "must be 1 to 10,000"),
        ({"d_kv": 5}, "q.weight': shape (12, 12); config.json makes it (15, 12)"),
        ({"d_model": None}, "config.json: d_model: null; must be a whole number"),
        (
            {"num_layers": 1, "encoder_sparse_step": 1},
            "tensor 'encoder.block.0.layer.1.mlp.router.classifier.weight' is",
        ),
        ({"vocab_size": 27}, "'shared.weight': shape (30, 12); config.json makes it (27, 12)"),
    ],
)
def test_what_our_model_does_not_have_is_refused_by_name(keys, reason, tmp_path):
    folder = changed(CASE, tmp_path / "model", lambda tree: tree.update(keys))
    with pytest.raises(UserError) as found:
        import_model(folder, tmp_path / "out", say=quiet)
    assert reason in str(found.value) and "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_copies_of_the_embedding_table_are_left_out_and_said(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "model")
    arrays = load_file(FIXTURE / "model.safetensors")
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    arrays |= {"encoder.embed_tokens.weight": arrays["shared.weight"], bias: np.ones((8, 3), np.float32)}
    save_file(arrays, tmp_path / "model" / "model.safetensors")
    lines = []
    import_model(tmp_path / "model", tmp_path / "run", say=lines.append)
    assert lines[1:3] == [
        f"'{bias}' is not read by cross-attention: left out",
        "'encoder.embed_tokens.weight' is the embedding table (shared.weight): left out",
    ]


def test_tables_of_the_stacks_that_differ_are_refused_where_the_head_is_not_tied(tmp_path):
    folder = random_folder(tmp_path / "model", tie_word_embeddings=False)
    arrays = load_file(folder / "model.safetensors")
    for index, name in enumerate(COPIES):
        arrays[name] = arrays["shared.weight"] + 0.5 * index
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"^'decoder\.embed_tokens\.weight': other numbers than 'shared\.weight'; only"):
        import_model(folder, tmp_path / "out", say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_without_the_tokens_of_t5_is_refused(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "model")
    tree = json.loads((FIXTURE / "tokenizer.json").read_text())
    tree["added_tokens"] = [one for one in tree["added_tokens"] if "extra_id" not in one["content"]]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"^tokenizer\.json: does not have the special tokens of T5: padding 0, "):
        import_model(tmp_path / "model", tmp_path / "out", say=quiet)


def test_the_tokenizer_of_an_import_keeps_its_ids_and_fills_up_the_spare_rows(imported):
    held = store.read(imported(CASE), with_optimizer=False)
    tokenizer = Tokenizer.from_json(held.tokenizer_json)
    assert isinstance(tokenizer, SentinelTokenizer)
    assert (tokenizer.vocab_size, tokenizer.text.vocab_size, tokenizer.sentinel(0)) == (30, 30, 27)
    assert held.config.seq2seq.sentinels == 4
    spans = [held.config.seq2seq.spans(held.config.seq2seq.window(length))[1] for length in (81, 82)]
    assert held.config.model.seq_length == 81 and spans == [4, 5]  # the longest with a sentinel for each span


def own_run(folder, moe=None):
    """A run that was never imported, with random weights and a byte tokenizer."""
    config = seq2seq_config(moe, {"activation": "relu", "seq_length": 40})
    tokenizer = SentinelTokenizer(ByteTokenizer(), 4)
    random, weights = np.random.default_rng(0), {}
    for one in FAMILY.parameters(config, tokenizer.vocab_size):
        weights[one.name] = (0.3 * random.normal(size=one.shape)).astype(np.float32)
    store.save(folder, config, tokenizer.to_json(), weights, {}, {"step": 3, "seconds": 1.0})
    return config, tokenizer, weights


@pytest.mark.parametrize("moe", [None, {"expert_num": 1}], ids=["sparse", "dense"])
def test_a_run_is_exported_with_the_ids_of_its_tokenizer_and_imported_again(moe, tmp_path):
    config, tokenizer, weights = own_run(tmp_path / "run", moe)
    assert export_model(tmp_path / "run", tmp_path / "out", say=quiet).model_type == CASE
    assert config_of(tmp_path / "out")["expert_capacity"] == UNLIMITED
    again = import_model(tmp_path / "out", tmp_path / "again", say=quiet)
    assert FAMILY.facts(again) == FAMILY.facts(config)
    held = store.read(tmp_path / "again", with_optimizer=False)
    for name, array in weights.items():
        np.testing.assert_array_equal(held.weights[name], array)
    kept, text = Tokenizer.from_json(held.tokenizer_json), "Grüße, a<extra_id_0> b<extra_id_3>"
    assert kept.vocab_size == tokenizer.vocab_size and isinstance(kept.text, LibraryTokenizer)
    np.testing.assert_array_equal(kept.encode(text), tokenizer.encode(text))
    assert kept.decode(kept.encode(text)) == text


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"moe": {"layers": [0], "expert_num": 4}}, "moe.layers: [0]"),
        ({"model": {"activation": "swiglu"}}, "model.activation: 'swiglu'"),
        ({"model": {"norm": "layernorm"}}, "model.norm: 'layernorm'"),
        ({"moe": {"expert_num": 4, "layers": 2, "shared_expert_num": 1}}, "moe.shared_intermediate_size: "),
        ({"moe": {"expert_num": 4, "layers": 2, "router": "top_k", "num_experts_chosen": 2}}, "moe.num_experts_chosen"),
        ({"model": {"type": "decoder"}}, "model.type: decoder"),
    ],
)
def test_what_the_family_does_not_have_is_named(sections, reason):
    tree = {"model": {"type": "seq2seq", "num_layers": 2, "norm": "rmsnorm"} | sections.pop("model", {})} | sections
    assert FAMILY.unfit(configuration.build(tree, inherited=True)).startswith(reason)


# with torch and transformers, where both are installed


@pytest.fixture(scope="module")
def peer() -> dict:
    """Gives the functions of the fixture's script."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return runpy.run_path(str(FIXTURE / "make.py"))


def theirs(folder, peer) -> dict[str, np.ndarray]:
    """Loads a folder strictly in transformers, and returns what it answers."""
    from transformers import AutoModelForSeq2SeqLM

    model, notes = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values()), notes
    return {name: tensor.numpy() for name, tensor in peer["answers"](model.eval()).items()}


def test_the_script_makes_the_fixture_again(peer, tmp_path):
    peer["write"](tmp_path)
    assert sorted(path.name for path in FIXTURE.iterdir() if path.suffix in (".json", ".safetensors")) == sorted(
        path.name for path in tmp_path.iterdir() if path.name != "generation_config.json"
    )
    assert bits_of(tmp_path) == bits_of(FIXTURE) and config_of(tmp_path) == config_of(FIXTURE)
    assert (tmp_path / "tokenizer.json").read_text() == (FIXTURE / "tokenizer.json").read_text()
    found = load_file(tmp_path / "answers.safetensors")
    for name, array in load_file(FIXTURE / "answers.safetensors").items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"d_kv": 8, "tie_word_embeddings": False, "dense_act_fn": "gelu_new", "initializer_factor": 1.0},
        {"num_layers": 4, "num_sparse_encoder_layers": 1, "num_decoder_layers": 3},
    ],
    ids=["fixture", "head size, own head, GELU", "deeper"],
)
def test_an_export_loads_in_transformers_and_computes_the_same(keys, peer, tmp_path, monkeypatch, pynative):
    peer["write"](tmp_path / "model", **keys)
    import_model(tmp_path / "model", tmp_path / "run", say=quiet)
    export_model(tmp_path / "run", tmp_path / "out", say=quiet)
    wanted = load_file(tmp_path / "model" / "answers.safetensors")
    assert bits_of(tmp_path / "out") == with_copies(tmp_path / "model")
    ours, back = answers_of(tmp_path / "run", monkeypatch, wanted), theirs(tmp_path / "out", peer)
    check_alike(ours, wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(back[name], array)
    there, here = np.abs(ours["logits"] - wanted["logits"]).max(), np.abs(ours["logits"] - back["logits"]).max()
    print(f"{keys}: import {there:.1e}, export {here:.1e}, largest logit {np.abs(wanted['logits']).max():.1f}")


def test_a_run_of_ours_is_a_model_of_transformers_with_its_tokenizer(peer, tmp_path, monkeypatch, pynative):
    from transformers import AutoTokenizer

    _, tokenizer, _ = own_run(tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", say=quiet)
    back = theirs(tmp_path / "out", peer)
    check_alike(answers_of(tmp_path / "run", monkeypatch, back), back)
    loaded, text = AutoTokenizer.from_pretrained(tmp_path / "out"), "a cat<extra_id_0> on"
    assert loaded(text)["input_ids"] == [*tokenizer.encode(text), 1]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
