"""The keys of attention, such as head size, norms, biases and windows, against loops in NumPy; also by one token."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from oracles.decoder_loop import decoder_loop
from oracles.tiny import NO_NOISE, weights_of
from oracles.tiny_decoder import EXPERTS, VOCABULARY, decoder_config, random_tokens, run_decoder

from switchyard.models import Decode, Prefill, create_model

YARN = {"type": "yarn", "factor": 4, "beta_fast": 2, "beta_slow": 0.5, "original_max_position_embeddings": 16}
LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
CASES = {
    "head size": ({"head_size": 6, "n_kv_heads": 2}, {}),
    "norm of each head": ({"qk_norm": "head", "n_kv_heads": 2}, {}),
    "norm of all heads": ({"qk_norm": "full", "n_kv_heads": 2}, {}),
    "biases of three": ({"attention_bias": "qkv", "n_kv_heads": 2}, {}),
    "biases of all": ({"attention_bias": "all", "position": "learned"}, {}),
    "partial rotary": ({"head_size": 8, "partial_rotary": 0.5}, {}),
    "linear": ({"rotary_scaling": {"type": "linear", "factor": 2}}, {}),
    "llama3": ({"head_size": 16, "rotary_scaling": LLAMA3 | {"type": "llama3", "factor": 8}}, {}),
    "yarn": ({"head_size": 16, "rotary_scaling": YARN}, {}),
    "window": ({"sliding_window": 3}, {}),
    "window of a layer": ({"sliding_window": 2, "window_layers": [1], "n_kv_heads": 2}, {}),
    "shared width": ({"activation": "swiglu"}, EXPERTS | {"shared_expert_num": 1, "shared_intermediate_size": 9}),
    "all": (
        {
            **{"head_size": 16, "n_kv_heads": 2, "qk_norm": "head", "attention_bias": "all", "partial_rotary": 0.5},
            **{"rotary_scaling": YARN, "sliding_window": 3, "window_layers": [1], "activation": "swiglu"},
        },
        EXPERTS,
    ),
}


def decoder_of(name):
    """(configuration, decoder) of a case; gains and biases are random too, so that each is seen."""
    config = decoder_config(*CASES[name])
    decoder, random = create_model(config, VOCABULARY).set_train(False), np.random.default_rng(5)
    for parameter in decoder.get_parameters():
        if parameter.ndim == 1:
            noise = random.normal(0, 0.3, parameter.shape)
            parameter.set_data(Tensor((parameter.asnumpy() + noise).astype(np.float32)))
    return config, decoder


@pytest.mark.parametrize("name", CASES)
def test_each_key_equals_the_loops_whole_and_token_by_token(name, pynative):
    """Logits of whole sequences; then prompts of unequal length, and one token a call to the end of the cache."""
    config, decoder = decoder_of(name)
    tokens, lengths = random_tokens(), np.array([3, 5], np.int32)
    wanted = decoder_loop(weights_of(decoder), config, tokens)
    np.testing.assert_allclose(run_decoder(decoder, tokens)[0], wanted, atol=5e-5, rtol=1e-4)
    prompt = tokens[:, :5].copy()
    prompt[0, 3:] = 0
    logits, *caches = Prefill(decoder, 8)(Tensor(prompt), Tensor(lengths))
    np.testing.assert_allclose(logits.asnumpy(), wanted[[0, 1], lengths - 1], atol=5e-5, rtol=1e-4)
    room = [(0, 0)] * 2 + [(0, 3), (0, 0)]
    caches = [Tensor(np.pad(cache.asnumpy(), room, constant_values=99)) for cache in caches]
    decode = Decode(decoder, 8)
    for step in range(3):
        place = lengths + step
        logits = decode(Tensor(tokens[[0, 1], place]), Tensor(place), *caches)
        np.testing.assert_allclose(logits.asnumpy(), wanted[[0, 1], place], atol=5e-5, rtol=1e-4)


GRADIENTS = (
    *("qkv.weight", "qkv.bias", "out.weight", "out.bias", "qk_norm.queries.gain", "qk_norm.keys.gain"),
    "embedding.table",
)


@pytest.mark.parametrize("kind", ["head", "full"])
def test_gradients_equal_differences_of_the_loops(kind, pynative):
    """Of a weighted sum of logits, along one random direction of each parameter, in float64."""
    model = CASES["all"][0] | {"qk_norm": kind}
    config = decoder_config(model | {"num_layers": 1, "window_layers": [0]}, batch=1)
    decoder, random, tokens = create_model(config, VOCABULARY), np.random.default_rng(7), random_tokens(1, 6)
    weight = random.normal(0, 1, (6, VOCABULARY))
    parameters = [parameter for parameter in decoder.get_parameters() if parameter.name.endswith(GRADIENTS)]
    assert len(parameters) == len(GRADIENTS)

    def objective(tokens):
        logits, _, _ = decoder(tokens, ops.ones(tokens.shape, ms.float32), Tensor(NO_NOISE))
        return (logits * Tensor(weight.astype(np.float32))).sum()

    _, gradients = ms.value_and_grad(objective, None, ms.ParameterTuple(parameters))(Tensor(tokens))
    at = weights_of(decoder)
    for parameter, gradient in zip(parameters, gradients):
        direction, small, ends = random.normal(0, 1, parameter.shape), 1e-5, []
        for step in (small, -small):
            moved = at | {parameter.name: at[parameter.name] + step * direction}
            ends.append((decoder_loop(moved, config, tokens)[0] * weight).sum())
        gradient, slope = gradient.asnumpy().astype(np.float64), (ends[0] - ends[1]) / (2 * small)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert size > 1, parameter.name
        np.testing.assert_allclose((gradient * direction).sum(), slope, atol=1e-4 * size, err_msg=parameter.name)


def test_a_window_as_long_as_the_text_hides_nothing(pynative):
    tokens = random_tokens()
    full, wide, narrow = (
        run_decoder(create_model(decoder_config({"sliding_window": window}), VOCABULARY).set_train(False), tokens)[0]
        for window in (None, 8, 7)
    )
    np.testing.assert_array_equal(wide, full)
    np.testing.assert_array_equal(narrow[:, :7], full[:, :7])
    assert np.abs(narrow[:, 7] - full[:, 7]).max() > 1e-3  # the last token no longer sees the first


def test_a_token_behind_all_windows_changes_nothing(pynative):
    """Two layers with a window of 3 see 4 tokens back: token 0 reaches position 4, and no later one."""
    decoder = create_model(decoder_config({"sliding_window": 3}), VOCABULARY).set_train(False)
    tokens = random_tokens()
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    moved = np.abs(run_decoder(decoder, changed)[0] - run_decoder(decoder, tokens)[0]).max((0, 2))
    assert moved[:5].min() > 1e-4 and moved[5:].max() == 0


def test_biases_begin_at_zero_and_gains_at_one():
    weights = weights_of(create_model(decoder_config(CASES["all"][0]), VOCABULARY))
    assert {name: weights[f"layers.0.attention.{name}"].shape for name in ("qkv.bias", "out.bias", "out.weight")} == {
        "qkv.bias": (128,),  # 2 key/value heads of 2 queries, a key and a value, 16 columns each
        "out.bias": (16,),
        "out.weight": (64, 16),
    }
    assert not weights["layers.0.attention.qkv.bias"].any() and not weights["layers.1.attention.out.bias"].any()
    assert (weights["layers.1.attention.qk_norm.queries.gain"] == np.ones(16)).all()
