"""The encoder-decoder: what may see what, padding, noise, a golden loss; its logits are tested in tests/interop."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import NO_NOISE
from oracles.tiny_seq2seq import LENGTH, MOE, TARGETS, VOCABULARY, random_pair, seq2seq_config

from switchyard.config.seq2seq import PAD
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.moe.metrics import TOKENS, width
from switchyard.training.loss import TrainLoss
from switchyard.training.step import create_step


def run(model, tokens, valid):
    """Logits [B, T, V] and statistics [M, 6 + 2 E]."""
    logits, stats, _ = model(Tensor(tokens), Tensor(valid), Tensor(NO_NOISE))
    stats = stats.asnumpy().sum(0).reshape(len(model.moe_layers), -1) if len(stats) else None
    return logits.asnumpy().reshape(*valid.shape, -1), stats


def test_a_token_of_the_decoder_changes_nothing_before_it_one_of_the_encoder_changes_all(pynative):
    model = create_model(seq2seq_config(), VOCABULARY).set_train(False)
    tokens, valid = random_pair()
    logits = run(model, tokens, valid)[0]
    for place in (1, 3):
        changed = tokens.copy()
        changed[:, LENGTH + place] = (changed[:, LENGTH + place] + 1) % VOCABULARY
        other = run(model, changed, valid)[0]
        np.testing.assert_allclose(other[:, :place], logits[:, :place], atol=1e-6)
        assert np.abs(other[:, place:] - logits[:, place:]).max(axis=(0, 2)).min() > 1e-4
    changed = tokens.copy()
    changed[:, LENGTH - 1] = tokens[:, LENGTH - 1] % (VOCABULARY - 2) + 2
    changed[:, LENGTH - 1] += changed[:, LENGTH - 1] == tokens[:, LENGTH - 1]
    assert np.abs(run(model, changed, valid)[0] - logits).max(axis=(0, 2)).min() > 1e-4


def test_padding_changes_no_real_token_and_no_figure(pynative):
    """An input of 6 tokens, alone and padded beside another sequence; a target of 2."""
    model = create_model(seq2seq_config(), VOCABULARY).set_train(False)
    tokens, valid = random_pair()
    short = np.concatenate((tokens[:1, :6], tokens[:1, LENGTH : LENGTH + 2]), 1)
    logits, stats = run(model, short, np.ones((1, 2), np.float32))
    padded = tokens.copy()
    padded[:, 6:LENGTH], padded[1, :6] = PAD, PAD
    valid[0, 2:], valid[1] = 0, 0
    mixed, mixed_stats = run(model, padded, valid)
    np.testing.assert_allclose(mixed[0, :2], logits[0], atol=1e-5)
    np.testing.assert_allclose(mixed_stats, stats, atol=1e-5, rtol=1e-5)
    assert stats[:, TOKENS].tolist() == [6, 2] and stats.shape == (2, width(4))


@pytest.mark.parametrize(("layers", "allowed"), [([0, 1], True), (2, False)])
def test_a_router_that_is_not_causal_serves_the_encoder_only(layers, allowed, pynative):
    config = seq2seq_config({"router": "expert_choice", "expert_num": 4, "layers": layers})
    if not allowed:
        with pytest.raises(UserError, match=r"moe\.router: 'expert_choice'; looks at the whole sequence"):
            create_model(config, VOCABULARY)
        return
    logits, stats = run(create_model(config, VOCABULARY).set_train(False), *random_pair())
    assert np.isfinite(logits).all() and len(stats) == 2


GATED, HALF = {"activation": "swiglu", "tie_word_embeddings": False}, {"compute_dtype": "float16"}


@pytest.mark.parametrize("model", [GATED, HALF])
def test_gated_feed_forward_a_head_of_its_own_and_half_precision_give_finite_logits(model, pynative):
    found = create_model(seq2seq_config({}, model), VOCABULARY).set_train(False)
    logits, stats = run(found, *random_pair())
    assert stats is None and np.isfinite(logits).all() and logits.dtype == np.float32
    assert (found.head is None) == found.tied


def test_auxiliary_losses_are_means_over_the_tokens_of_their_own_stack(pynative):
    """With a balance loss alone the loss above the cross-entropy is the sum over layers of their means."""
    config = seq2seq_config(MOE | {"aux_loss_factor": 0.5, "z_loss_factor": 0, "jitter": 0})
    model = create_model(config, VOCABULARY).set_train(False)
    tokens, valid = random_pair()
    tokens[1, 5:LENGTH], valid[1, 2:] = PAD, 0
    stats = run(model, tokens, valid)[1]
    labels = np.full(valid.shape, 3, np.int32)
    inputs = [tokens, labels, valid, NO_NOISE, np.ones((1, 1), np.float32)]
    figures = TrainLoss(model, config)(*map(Tensor, inputs)).asnumpy()
    assert stats[:, TOKENS].tolist() == [14, 6]
    wanted = 0.5 * (stats[:, 0] / stats[:, TOKENS]).sum()
    assert wanted > 0.5
    np.testing.assert_allclose(figures[0] - figures[1], wanted, rtol=1e-5)


def test_dropout_and_jitter_read_the_noise_of_their_own_tokens(pynative):
    model = create_model(seq2seq_config(model={"dropout": 0.2}), VOCABULARY).set_train(True)
    tokens, valid = random_pair()
    rng = np.random.default_rng(0)
    noise = rng.random((model.noise_slices, 2 * (LENGTH + TARGETS), 16), np.float32)
    given = Tensor(tokens), Tensor(valid)
    logits = model(*given, Tensor(noise))[0].asnumpy().reshape(2, TARGETS, -1)
    other = noise.reshape(model.noise_slices, 2, -1, 16).copy()
    other[:, 1] = rng.random(other[:, 1].shape)  # of the second sequence
    changed = model(*given, Tensor(other.reshape(noise.shape)))[0].asnumpy().reshape(2, TARGETS, -1)
    assert np.abs(changed[1] - logits[1]).max() > 1e-3
    np.testing.assert_allclose(changed[0], logits[0], atol=1e-5)


RATE = 0.25
DROPPING = MOE | {"expert_dropout": RATE, "jitter": 0, "dispatch": "dropless"}


def test_expert_dropout_drops_what_experts_add_in_training_and_nothing_else(pynative):
    """A value of the experts' output whose noise is below 0.25 is dropped; those that stay are divided by 0.75."""
    model = create_model(seq2seq_config(DROPPING), VOCABULARY).set_train(False)
    dense, conditional = model.encoder.layers
    assert not dense.conditional and conditional.conditional and model.noise_slices == 1
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((6, 16)).astype(np.float32), rng.random((1, 6, 16), np.float32)
    rows = Tensor(np.full(6, 3, np.int32)), Tensor(np.ones((2, 3), np.float32)), Tensor(np.ones((1, 6), np.float32))
    given = Tensor(x), rows, Tensor(noise), model.encoder.relative_bias
    seen = conditional.attention_norm(given[0])
    middle = x + conditional.attention(seen, seen, rows[1], given[3]).asnumpy()
    full = conditional(*given)[0].asnumpy()  # at evaluation: nothing is dropped
    added, wanted = full - middle, middle.copy()
    for row in range(6):
        for column in range(16):
            if noise[0, row, column] >= RATE:
                wanted[row, column] += added[row, column] / (1 - RATE)
    unchanged = dense(*given)[0].asnumpy()
    model.set_train(True)
    np.testing.assert_allclose(conditional(*given)[0].asnumpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(dense(*given)[0].asnumpy(), unchanged, atol=1e-5)  # another softmax at evaluation
    assert 0.15 < (noise < RATE).mean() < 0.35 and np.abs(added).min() > 1e-4


@pytest.mark.parametrize(("expert_dropout", "expected"), [(None, (0.1, 0.1)), (0.0, (0.1, 0.0)), (0.4, (0.1, 0.4))])
def test_expert_dropout_has_a_rate_of_its_own_else_that_of_the_model(expert_dropout, expected):
    """(of a dense feed-forward, of experts)."""
    config = seq2seq_config(MOE | {"expert_dropout": expert_dropout}, {"dropout": 0.1})
    assert (config.dropout_of(False), config.dropout_of(True)) == expected


GOLDEN = [3.569785, 2.939786, 2.750221, 2.620371, 2.480875]


def test_golden_loss_of_five_steps(graph):
    """AdamW from seed 1; the figures change only when the mathematics does."""
    config = seq2seq_config(model={"dropout": 0.1}, schedule={"warmup_steps": 0})
    step, (tokens, valid) = create_step(config, VOCABULARY), random_pair()
    labels = np.roll(tokens[:, LENGTH:], -1, 1)
    found = []
    for index in range(5):
        noise = np.random.default_rng(index).random((1, step.model.noise_slices, tokens.size, 16), np.float32)
        found.append(step(tokens[None], labels[None], valid[None], noise, 1e-2)["loss"])
    np.testing.assert_allclose(found, GOLDEN, atol=1e-4)
    assert ms.get_context("mode") == ms.GRAPH_MODE
