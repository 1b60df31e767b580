"""Experts that choose rows: hand-typed scores, what is taken, and the classifier of mixture of depths."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.tiny import tiny_config

from switchyard.errors import UserError
from switchyard.moe.routing import create_router
from switchyard.nn.initializers import InitialWeights

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]], np.float32)


def _route(router, rows, valid=None):
    rows = np.array(rows, np.float32)
    valid = np.ones(rows.shape[:2], np.float32) if valid is None else np.array(valid, np.float32)
    routing = router(Tensor(rows), {"valid": Tensor(valid)})
    return {name: part.asnumpy() for name, part in routing.items()}


def _choice(**moe):
    config = tiny_config(width=3, router="expert_choice", expert_num=3, **moe)
    router = create_router(config, InitialWeights(0)).set_train(True)
    router.weight.set_data(Tensor(np.eye(3, dtype=np.float32)))
    return router


def test_experts_take_their_best_rows(pynative):
    """C = 3 * 2 * 1 / 3 = 2 rows each: columns of the softmax, the largest first."""
    routing = _route(_choice(num_experts_chosen=2, capacity_factor=1.0), np.log(PROBABILITIES)[None])
    np.testing.assert_array_equal(routing["token_index"], [[[0, 2], [2, 1], [1, 2]]])
    np.testing.assert_allclose(routing["gates"], [[[0.7, 0.25], [0.5, 0.3], [0.6, 0.25]]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[[1, 0, 0], [0, 1, 1], [1, 1, 1]]])


def test_padding_is_taken_last_and_counts_nothing(pynative):
    """Only row 0 is real: every expert takes it, its capacity of one row, and the other slot has the gate 0."""
    router = _choice(num_experts_chosen=2, capacity_factor=1.0)
    routing = _route(router, np.log(PROBABILITIES)[None], valid=[[1, 0, 0]])
    np.testing.assert_array_equal(routing["token_index"][..., 0], [[0, 0, 0]])
    np.testing.assert_allclose(routing["gates"], [[[0.7, 0], [0.2, 0], [0.1, 0]]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[[1, 1, 1], [0, 0, 0], [0, 0, 0]]])


@pytest.mark.parametrize("padded", [0, 1, 3, 9])
def test_capacity_is_that_of_the_real_rows(padded, pynative):
    """3 real rows, 3 experts, factor 1, K = 1: one row each, however many padded rows stand between them.

    Counted with 9 of padding, 12 / 3 = 4 slots would have let every expert take every row.
    """
    router = _choice(num_experts_chosen=1, capacity_factor=1.0)
    places = np.linspace(0, 2 + padded, 3).astype(int)
    rows, valid = np.full((1, 3 + padded, 3), 50.0), np.zeros((1, 3 + padded))
    rows[0, places], valid[0, places] = np.log(PROBABILITIES), 1
    routing = _route(router, rows, valid)
    np.testing.assert_array_equal(routing["expert_mask"][0, places], [[1, 0, 0], [0, 0, 1], [0, 1, 0]])
    assert routing["expert_mask"].sum() == 3
    np.testing.assert_array_equal(routing["slot_mask"][0].sum(-1), [1, 1, 1])
    np.testing.assert_allclose(routing["gates"][0][:, 0], [0.7, 0.5, 0.6], atol=1e-6)
    assert not routing["gates"][0][:, 1:].any()


@pytest.mark.parametrize("real", range(9))
def test_rows_taken_by_loop(real, pynative):
    """Against a loop: each expert its min(n, ceil(n * K * factor / E)) best rows, at least one where there are any."""
    router, random = _choice(num_experts_chosen=2, capacity_factor=1.1), np.random.default_rng(real)
    rows, valid = random.normal(0, 1, (1, 8, 3)), np.zeros((1, 8))
    valid[0, random.permutation(8)[:real]] = 1
    routing, wanted = _route(router, rows, valid), np.zeros((8, 3))
    for expert in range(3):
        scores = np.exp(rows[0, :, expert]) / np.exp(rows[0]).sum(-1)
        best = sorted((n for n in range(8) if valid[0, n]), key=lambda n: -scores[n])
        wanted[best[: min(real, math.ceil(round(real * 2 * 1.1 / 3, 6)))], expert] = 1
    np.testing.assert_array_equal(routing["expert_mask"][0], wanted)


def test_a_share_of_the_real_rows_of_each_sequence_works(pynative):
    """Half of 4, of 2 and of 3 real rows: 2, 1 and 2. Padding at the end leaves the taken rows as they are."""
    valid = [1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]
    routing = _route(_depths().set_train(True), _scores(5, 6, 7, 8, 1, 4, 9, 9, 3, 2, 1, 9), [valid])
    np.testing.assert_array_equal(routing["expert_mask"][0, :, 0], [0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(routing["slot_mask"][0, 0], [1, 1, 1, 0, 1, 1])


def test_capacity_of_evaluation(pynative):
    """Null is the factor of training: there is no dropless expert choice."""
    rows = np.log(PROBABILITIES)[None]
    for factor, wanted in ((None, 1), (2.0, 2)):
        router = _choice(capacity_factor=1.0, eval_capacity_factor=factor).set_train(False)
        assert _route(router, rows)["token_index"].shape == (1, 3, wanted)


def _depths(length=4, share=0.5):
    config = tiny_config(width=3, router="mixture_of_depths", expert_num=1, capacity_factor=share)
    config = config.model_copy(update={"model": config.model.model_copy(update={"seq_length": length})})
    router = create_router(config, InitialWeights(0), vocab_size=5)
    router.weight.set_data(Tensor([[1], [0], [0]], mstype.float32))
    return router


def _scores(*scores):
    rows = np.zeros((1, len(scores), 3), np.float32)
    rows[0, :, 0] = scores
    return rows


def test_half_of_each_sequence_works(pynative):
    """Two sequences of four rows: the two best of each, though the second's are all below the first's."""
    routing = _route(_depths().set_train(True), _scores(5, 6, 7, 8, 1, 4, 2, 3))
    np.testing.assert_array_equal(routing["token_index"], [[[3, 2, 5, 7]]])
    np.testing.assert_allclose(routing["gates"][0, 0], 1 / (1 + np.exp(-np.array([8, 7, 4, 3.0]))), atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"][0, :, 0], [0, 0, 1, 1, 0, 1, 0, 1])


def test_own_loss_is_the_cross_entropy_of_what_was_taken(pynative):
    """The classifier's logits are those of relu(x . 2) + 0.5 - 1 at x = first input; padding does not count."""
    router = _depths().set_train(True)
    hidden = np.zeros(router.hidden.shape, np.float32)
    hidden[0, 0] = 2
    router.hidden.set_data(Tensor(hidden))
    out = np.zeros(router.out.shape, np.float32)
    out[0] = 1
    router.out.set_data(Tensor(out))
    router.bias.set_data(Tensor([-0.5], mstype.float32))
    routing = _route(router, _scores(1, 0.5, 0.2, 9), valid=[[1, 1, 1, 0]])
    np.testing.assert_array_equal(routing["expert_mask"][0, :, 0], [1, 1, 0, 0])
    logits = np.array([1.5, 0.5, -0.1])
    wanted = np.log(1 + np.exp(logits)) - logits * [1, 1, 0]
    assert routing["own_loss"] == pytest.approx(wanted.sum(), abs=1e-6)  # of the group's real rows
    decided = _route(router.set_train(False), _scores(1, 0.5, 0.2, 9), valid=[[1, 1, 1, 0]])
    np.testing.assert_array_equal(decided["expert_index"][0, :, 0], [0, 0, 1, 1])  # 1 is nowhere
    np.testing.assert_allclose(decided["gates"][0, :2, 0], 1 / (1 + np.exp([-1, -0.5])), atol=1e-6)
    assert "own_loss" not in decided


def test_classifier_sends_no_gradient_to_the_rows(pynative):
    router, rows = _depths().set_train(True), Tensor(_scores(1, 2, 3, 4))
    valid = Tensor(np.ones((1, 4), np.float32))
    weights = ms.ParameterTuple(router.trainable_params())
    d_rows, d_weights = ms.grad(lambda r: router(r, {"valid": valid})["own_loss"].sum(), 0, weights)(rows)
    assert not d_rows.asnumpy().any()
    moved = {weight.name for weight, gradient in zip(weights, d_weights) if gradient.asnumpy().any()}
    assert "weight" not in moved and "bias" in moved


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"expert_num": 4}, r"moe\.expert_num: 4; moe\.router 'mixture_of_depths' needs 1 expert"),
        ({"expert_num": 1, "capacity_factor": 1.25}, r"moe\.capacity_factor: 1\.25; at most 1: mixture_of_depths"),
    ],
)
def test_depths_need_one_expert_and_a_share(moe, message):
    with pytest.raises(UserError, match=f"^{message}"):
        tiny_config(router="mixture_of_depths", **moe)


def test_layers_with_one_expert_are_conditional_for_depths_alone():
    assert tiny_config(router="mixture_of_depths", expert_num=1, capacity_factor=0.5).moe_layers == (0, 1, 2, 3)
    assert tiny_config(router="switch", expert_num=1).moe_layers == ()
