"""The decoder against a plain numpy reference; causality, placement, noise, a golden loss."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from oracles.decoder_loop import decoder_loop
from oracles.tiny import NO_NOISE, weights_of
from oracles.tiny_decoder import EXPERTS, VARIANTS, VOCABULARY, decoder_config, loads_of, random_tokens, run_decoder

from switchyard.models import create_model
from switchyard.moe.metrics import BALANCE, NUM_KEPT, TOKENS, Z, width


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_numpy_reference(name, pynative):
    model, moe = VARIANTS[name]
    config = decoder_config(model, moe)
    decoder = create_model(config, VOCABULARY).set_train(False)
    tokens = random_tokens()
    logits, stats = run_decoder(decoder, tokens)
    np.testing.assert_allclose(logits, decoder_loop(weights_of(decoder), config, tokens), atol=2e-5, rtol=1e-4)
    assert len(stats) == len(config.moe_layers)
    assert (decoder.head is None) == config.model.tie_word_embeddings


def test_logits_equal_the_numpy_reference_when_compiled(graph):
    model, moe = VARIANTS["experts-everywhere"]
    config = decoder_config(model | {"n_kv_heads": 2}, moe | {"groups": 2})
    decoder, tokens = create_model(config, VOCABULARY).set_train(False), random_tokens()
    wanted = decoder_loop(weights_of(decoder), config, tokens)
    np.testing.assert_allclose(run_decoder(decoder, tokens)[0], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["dense-rotary-tied", "dense-learned-free-layernorm-gelu", "experts-everywhere"])
def test_a_token_changes_nothing_before_it(name, pynative):
    decoder = create_model(decoder_config(*VARIANTS[name]), VOCABULARY).set_train(False)
    tokens = random_tokens()
    logits = run_decoder(decoder, tokens)[0]
    for place in (1, 4, 7):
        changed = tokens.copy()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        other = run_decoder(decoder, changed)[0]
        np.testing.assert_allclose(other[:, :place], logits[:, :place], atol=1e-6)
        assert np.abs(other[:, place:] - logits[:, place:]).max(axis=(0, 2)).min() > 1e-3  # and everything after


def test_same_sequence_same_logits_in_any_batch(pynative):
    decoder = create_model(decoder_config(*VARIANTS["experts-everywhere"]), VOCABULARY).set_train(False)
    tokens = random_tokens(4)
    together = run_decoder(decoder, tokens)[0]
    for row in range(4):
        np.testing.assert_allclose(run_decoder(decoder, tokens[row : row + 1])[0][0], together[row], atol=1e-5)


def test_padding_changes_no_real_token_and_no_figure(pynative):
    """A short batch padded on the right and below: logits of real tokens and all statistics are unchanged."""
    decoder = create_model(decoder_config(*VARIANTS["experts-everywhere"]), VOCABULARY).set_train(False)
    tokens, padded, valid = random_tokens(1, 5), random_tokens(2, 8, seed=9), np.zeros((2, 8), np.float32)
    padded[0, :5], valid[0, :5] = tokens[0], 1
    logits, stats = run_decoder(decoder, tokens)
    mixed, mixed_stats = run_decoder(decoder, padded, valid)
    np.testing.assert_allclose(mixed[0, :5], logits[0], atol=1e-5)
    np.testing.assert_allclose(mixed_stats, stats, atol=1e-5, rtol=1e-5)
    assert loads_of(stats).sum(1).tolist() == [10, 10]  # 5 real tokens, 2 choices each
    assert stats[:, TOKENS].tolist() == [5, 5] and stats[:, NUM_KEPT].tolist() == [10, 10]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [("all", (0, 1, 2, 3)), (2, (1, 3)), (3, (2,)), (4, (3,)), ([0, 3], (0, 3)), ([2, 1, 2], (1, 2)), ([], ())],
)
def test_placement_of_conditional_layers(layers, wanted, pynative):
    decoder = create_model(decoder_config({"num_layers": 4}, {"expert_num": 4, "layers": layers}), VOCABULARY)
    found = [index for index, layer in enumerate(decoder.layers) if layer.conditional]
    assert tuple(found) == decoder.moe_layers == wanted
    tokens = random_tokens()
    _, stats, choices = decoder(Tensor(tokens), Tensor(np.ones(tokens.shape, np.float32)), Tensor(NO_NOISE))
    assert choices == () and (stats == () if not wanted else stats.shape == (1, len(wanted) * width(4)))


def test_one_expert_is_a_dense_model(pynative):
    decoder = create_model(decoder_config(moe={"expert_num": 1}), VOCABULARY)
    assert decoder.moe_layers == () and not run_decoder(decoder, random_tokens())[1].size


def test_weights_follow_the_seed():
    one, same, other = (
        weights_of(create_model(decoder_config(*VARIANTS["experts-everywhere"], seed=seed), VOCABULARY))
        for seed in (1, 1, 2)
    )
    assert one.keys() == same.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, same[name])
        constant = name.endswith("gain") or name.endswith("bias")
        assert constant or np.any(value != other[name]), name
    for layer in (0, 1):  # no two matrices start alike
        assert np.any(one["layers.0.attention.qkv.weight"] != one["layers.1.attention.qkv.weight"])
        experts = one[f"layers.{layer}.feed_forward.experts.w_in"]
        assert all(np.any(experts[0] != expert) for expert in experts[1:])


def test_parameter_names_are_unique_and_say_where():
    decoder = create_model(decoder_config(*VARIANTS["experts-everywhere"]), VOCABULARY)
    names = [name for name, _ in decoder.parameters_and_names()]
    assert names == [parameter.name for parameter in decoder.get_parameters()]
    assert len(set(names)) == len(names)
    assert "layers.1.feed_forward.router.weight" in names


def test_dropout_reads_the_noise_in_training_only(pynative):
    """Five slices: the embedding and two branches of each of two layers; with jitter one more for each router."""
    decoder = create_model(decoder_config({"dropout": 0.5}, EXPERTS | {"jitter": 0.1}), VOCABULARY)
    assert decoder.noise_slices == 5 + 2
    tokens, random = random_tokens(), np.random.default_rng(0)
    noise = random.random((2, 7, 16, 16)).astype(np.float32)
    decoder.set_train(True)
    first, again, other = (run_decoder(decoder, tokens, noise=n)[0] for n in (noise[0], noise[0], noise[1]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    decoder.set_train(False)
    np.testing.assert_array_equal(run_decoder(decoder, tokens, noise=noise[0])[0], run_decoder(decoder, tokens)[0])


def test_dropout_keeps_the_mean(pynative):
    """Noise below the rate zeroes a value, the rest is scaled by 1 / (1 - rate)."""
    decoder = create_model(decoder_config({"dropout": 0.25}), VOCABULARY).set_train(True)
    noise = np.array([[[0.0, 0.2499, 0.25, 0.99]]], np.float32)
    dropped = decoder.dropout(ops.ones((1, 4)), Tensor(noise)).asnumpy()
    np.testing.assert_allclose(dropped, [[0, 0, 4 / 3, 4 / 3]], rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_training_groups_do_not_change_evaluation(groups, pynative):
    tokens = random_tokens(4)
    config = decoder_config(moe=EXPERTS | {"groups": groups}, batch=4)
    logits = run_decoder(create_model(config, VOCABULARY).set_train(False), tokens)[0]
    plain = run_decoder(create_model(decoder_config(moe=EXPERTS, batch=4), VOCABULARY).set_train(False), tokens)[0]
    np.testing.assert_allclose(logits, plain, atol=1e-5)


def test_length_beyond_the_training_sequence(pynative):
    """Rotary positions go on: a longer model has the same weights and the same logits where both reach."""
    config = decoder_config()
    short, long = (create_model(config, VOCABULARY, length).set_train(False) for length in (None, 12))
    tokens = random_tokens(2, 12)
    np.testing.assert_allclose(run_decoder(long, tokens)[0][:, :8], run_decoder(short, tokens[:, :8])[0], atol=1e-5)


def test_half_precision_is_near(pynative):
    tokens = random_tokens()
    full, half = (
        run_decoder(create_model(decoder_config({"compute_dtype": kind}), VOCABULARY).set_train(False), tokens)[0]
        for kind in ("float32", "float16")
    )
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.05


class Objective(nn.Cell):
    """Mean cross-entropy of the next token, plus weighted balance and z-losses."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def construct(self, tokens, labels, valid, noise):
        logits, stats, _ = self.decoder(tokens, valid, noise)
        loss = ops.cross_entropy(logits, labels)
        sums = stats.reshape(2, -1)  # [M, 6 + 2 E] of one group
        return loss + (0.01 * sums[:, BALANCE].sum() + 0.001 * sums[:, Z].sum()) / valid.sum()


GOLDEN = [3.321178, 2.769169, 2.456662, 2.209458, 2.058369]


def test_golden_loss_of_five_steps(graph):
    """Plain gradient descent from seed 1; the figures change only when the mathematics does."""
    decoder = create_model(decoder_config(*VARIANTS["experts-everywhere"]), VOCABULARY).set_train(True)
    objective = Objective(decoder)
    parameters = ms.ParameterTuple(decoder.trainable_params())
    step = ms.value_and_grad(objective, None, parameters)
    tokens = random_tokens(2, 9)
    inputs = Tensor(tokens[:, :-1]), Tensor(tokens[:, 1:].reshape(-1)), Tensor(np.ones((2, 8), np.float32))
    found = []
    for _ in range(5):
        loss, gradients = step(*inputs, Tensor(NO_NOISE))
        found.append(float(loss.asnumpy()))
        for parameter, gradient in zip(parameters, gradients):
            parameter.set_data(Tensor(parameter.asnumpy() - 0.05 * gradient.asnumpy()))
    np.testing.assert_allclose(found, GOLDEN, atol=1e-4)
