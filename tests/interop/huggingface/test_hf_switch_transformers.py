"""Parity with transformers' Switch Transformers: by a fixture of its answers, and with it where torch is installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import NO_NOISE
from safetensors.numpy import load_file, save_file

from switchyard.errors import UserError
from switchyard.interop import switch_transformers as peer
from switchyard.models import create_model
from switchyard.moe.layer import MoELayer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "interop" / "switch_transformers"
VOCABULARY = 30


def tree() -> dict:
    return json.loads((FIXTURE / "config.json").read_text())


def imported(config, weights):
    """A model of ours with their weights."""
    model = create_model(config, VOCABULARY, drawn=False).set_train(False)
    own = {parameter.name: parameter for parameter in model.get_parameters()}
    found = {one.name: peer.joined(one, weights.__getitem__) for one in peer.parameters(config, VOCABULARY)}
    assert found.keys() == own.keys()
    for name, array in found.items():
        assert tuple(own[name].shape) == array.shape, name
        own[name].set_data(Tensor(array))
    return model


def answers_of(model, monkeypatch, given) -> dict[str, np.ndarray]:
    """Logits and experts of our model for a batch of theirs."""
    chosen, route = [], MoELayer.route

    def kept(layer, *arguments):
        routing = route(layer, *arguments)
        chosen.append(routing["expert_index"].asnumpy())
        return routing

    monkeypatch.setattr(MoELayer, "route", kept)
    tokens = np.concatenate((given["input_ids"], given["decoder_input_ids"]), 1).astype(np.int32)
    valid = np.ones(given["decoder_input_ids"].shape, np.float32)
    logits = model(Tensor(tokens), Tensor(valid), Tensor(NO_NOISE))[0].asnumpy()
    rows = len(tokens)
    return {
        "logits": logits.reshape(rows, -1, VOCABULARY),
        "encoder_experts": chosen[0].reshape(1, rows, -1),
        "decoder_experts": chosen[1].reshape(1, rows, -1),
    }


def check_alike(found, wanted):
    """The same experts for every real token, and the same logits."""
    real = wanted["attention_mask"] > 0
    assert 0 < real.sum() < real.size  # the batch is ragged
    np.testing.assert_array_equal(found["encoder_experts"][:, real], wanted["encoder_experts"][:, real])
    np.testing.assert_array_equal(found["decoder_experts"], wanted["decoder_experts"])
    assert len(np.unique(wanted["encoder_experts"])) > 2
    np.testing.assert_allclose(found["logits"], wanted["logits"], atol=1e-4)


def test_their_weights_give_their_logits_and_experts(monkeypatch, pynative):
    wanted, config = load_file(FIXTURE / "answers.safetensors"), peer.to_config(tree())
    model = imported(config, load_file(FIXTURE / "model.safetensors"))
    check_alike(answers_of(model, monkeypatch, wanted), wanted)


def test_what_goes_in_comes_out_bit_for_bit():
    weights, config = load_file(FIXTURE / "model.safetensors"), peer.to_config(tree())
    found = {}
    for one in peer.parameters(config, VOCABULARY):
        found |= dict(peer.split(one, peer.joined(one, weights.__getitem__)))
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)


def test_an_exported_config_json_says_what_the_imported_one_said():
    config = peer.to_config(tree())
    found, given = peer.from_config(config, VOCABULARY), tree()
    assert found.pop("expert_capacity") == peer.UNLIMITED
    assert {key: found[key] for key in found if key in given} == {key: given[key] for key in found if key in given}
    assert found.keys() - given.keys() <= {"tie_word_embeddings", "initializer_factor"}
    assert peer.to_config(found) == config


@pytest.mark.parametrize(
    ("layers", "sparse", "wanted"), [(12, 6, [1, 3, 5, 7, 9, 11]), (12, 3, [1, 5, 9]), (2, 0, [1])]
)
def test_conditional_layers_are_where_transformers_has_them(layers, sparse, wanted):
    assert peer.sparse_layers(layers, sparse) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_bias": True}, "router_bias: True; only False"),
        ({"d_kv": 8}, "d_kv: 8; only d_model / num_heads"),
        ({"dense_act_fn": "silu"}, "dense_act_fn: 'silu'; only relu or gelu_new"),
        ({"pad_token_id": 3}, "pad_token_id: 3"),
    ],
)
def test_what_our_model_does_not_have_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        peer.to_config(tree() | changes)


def test_a_tensor_of_another_shape_is_refused():
    weights = load_file(FIXTURE / "model.safetensors")
    weights["shared.weight"] = weights["shared.weight"][:-1]
    with pytest.raises(UserError, match=r"shared\.weight: \(29, 12\)"):
        imported(peer.to_config(tree()), weights)


def test_layers_that_transformers_does_not_place_so_are_not_exported():
    config = peer.to_config(tree() | {"num_sparse_decoder_layers": 2})
    moved = config.model_copy(update={"moe": config.moe.model_copy(update={"layers": [0]})})
    with pytest.raises(UserError, match=r"moe\.layers: \[0\]; switch_transformers"):
        peer.from_config(moved, VOCABULARY)


def test_the_script_makes_the_fixture_and_transformers_loads_what_we_export(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    subprocess.run([sys.executable, FIXTURE / "make.py", tmp_path], check=True, capture_output=True)
    for name in ("model.safetensors", "answers.safetensors"):
        made, kept = load_file(tmp_path / name), load_file(FIXTURE / name)
        assert made.keys() == kept.keys()
        for key in kept:
            np.testing.assert_allclose(made[key], kept[key], atol=1e-5)
    config, weights, out = peer.to_config(tree()), load_file(FIXTURE / "model.safetensors"), tmp_path / "exported"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(peer.from_config(config, VOCABULARY)))
    found = {}
    for one in peer.parameters(config, VOCABULARY):
        found |= dict(peer.split(one, peer.joined(one, weights.__getitem__)))
    save_file(found, out / "model.safetensors", {"format": "pt"})
    kind = transformers.SwitchTransformersForConditionalGeneration
    model, notes = kind.from_pretrained(out, output_loading_info=True)
    assert not any(notes.values()), notes
    wanted, torch = load_file(FIXTURE / "answers.safetensors"), pytest.importorskip("torch")
    given = {key: torch.tensor(wanted[key]) for key in ("input_ids", "attention_mask", "decoder_input_ids")}
    with torch.no_grad():
        logits = model.eval()(**given).logits.numpy()
    np.testing.assert_allclose(logits, wanted["logits"], atol=1e-5)
