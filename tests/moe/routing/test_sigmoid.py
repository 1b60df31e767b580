"""Sigmoid scores: gates, groups, and the bias that balances."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from oracles.routers import identity_router, route
from oracles.tiny import tiny_config

from switchyard.errors import UserError
from switchyard.moe.routing import create_router
from switchyard.nn.initializers import InitialWeights

SCORES = np.array([[0.8, 0.6, 0.2], [0.1, 0.3, 0.5], [0.9, 0.4, 0.7]])
LOGITS = np.log(SCORES / (1 - SCORES))


def test_two_choices_sum_to_one_times_the_factor(pynative):
    routing = route(identity_router("sigmoid", 2, 3, routed_scaling_factor=2.5), LOGITS, [1, 0, 1])
    np.testing.assert_array_equal(routing["expert_index"], [[0, 1], [3, 3], [0, 2]])
    wanted = 2.5 * np.array([[8 / 14, 6 / 14], [0, 0], [9 / 16, 7 / 16]])
    np.testing.assert_allclose(routing["gates"], wanted, atol=1e-6)
    np.testing.assert_allclose(routing["probabilities"], SCORES / SCORES.sum(-1, keepdims=True), atol=1e-6)


def test_gates_as_they_are(pynative):
    routing = route(identity_router("sigmoid", 2, 3, norm_topk_prob=False), LOGITS)
    np.testing.assert_allclose(routing["gates"], [[0.8, 0.6], [0.5, 0.3], [0.9, 0.7]], atol=1e-6)
    np.testing.assert_allclose(
        route(identity_router("sigmoid", 1, 3), LOGITS)["gates"], [[0.8], [0.5], [0.9]], atol=1e-6
    )


def test_bias_decides_the_choice_and_not_the_gate(pynative):
    router = identity_router("sigmoid", 1, 3)
    router.bias.set_data(Tensor(np.array([-0.15, 0.1, 0.0], np.float32)))
    routing = route(router, LOGITS)
    np.testing.assert_array_equal(routing["expert_index"], [[1], [2], [0]])  # .65 .70 .20 / -.05 .40 .50 / .75 .50 .70
    np.testing.assert_allclose(routing["gates"], [[0.6], [0.5], [0.9]], atol=1e-6)


def _train(router):
    """A compiled step as training has it: value and gradient of the weight."""

    class Step(nn.Cell):
        def __init__(self):
            super().__init__()
            self.router = router
            self.gradient = ops.value_and_grad(self.objective, None, ms.ParameterTuple(router.trainable_params()))

        def objective(self, rows, valid):
            return self.router(rows, {"valid": valid})["gates"].sum()

        def construct(self, rows, valid):
            return self.gradient(rows, valid)

    return Step().set_train(True)


@pytest.mark.parametrize("mode", [0, 1])
def test_bias_follows_the_load(mode, request):
    """Loads (2, 0, 1) of mean 1: expert 0 falls, expert 1 rises, expert 2 stays; the step itself moves nothing."""
    request.getfixturevalue("pynative" if mode else "graph")
    router = identity_router("sigmoid", 1, 3, True, topk_bias_update_rate=0.15)
    step = _train(router)
    rows = Tensor(np.concatenate([LOGITS, LOGITS[:1]])[None].astype(np.float32))
    valid = Tensor(np.array([[1, 1, 1, 0]], np.float32))
    value, (gradient,) = step(rows, valid)
    assert float(value.asnumpy()) == pytest.approx(0.8 + 0.5 + 0.9)
    assert np.abs(gradient.asnumpy()).max() > 0.1
    np.testing.assert_array_equal(router.bias.asnumpy(), 0)
    router.update(np.array([2, 0, 1], np.float32))
    np.testing.assert_allclose(router.bias.asnumpy(), [-0.15, 0.15, 0.0], atol=1e-6)
    value, _ = step(rows, valid)  # .65 .75 .20 / -.05 .45 .50 / .75 .55 .70: one row each
    assert float(value.asnumpy()) == pytest.approx(0.6 + 0.5 + 0.9)
    router.update(np.array([1, 1, 1], np.float32))
    np.testing.assert_allclose(router.bias.asnumpy(), [-0.15, 0.15, 0.0], atol=1e-6)
    assert [parameter.name for parameter in router.trainable_params()] == [router.weight.name]


def test_bias_rests_at_rate_zero():
    router = identity_router("sigmoid", 1, 3, True, topk_bias_update_rate=0.0)
    router.update(np.array([3, 0, 0], np.float32))
    np.testing.assert_array_equal(router.bias.asnumpy(), 0)


def test_replica_groups_have_a_bias_each():
    """Loads (4, 0) of the first group's two experts, (1, 1) of the second's."""
    config = tiny_config(router="sigmoid", copies=2, topk_bias_update_rate=0.5)
    router = create_router(config, InitialWeights(0))
    router.update(np.array([4, 0, 1, 1], np.float32))
    assert [bias.asnumpy().tolist() for bias in router.state()] == [[-0.5, 0.5], [0, 0]]


def test_bias_balances_a_collapsed_router(pynative):
    """All rows prefer expert 0: after some hundred passes the load is even, without any loss."""
    router = identity_router("sigmoid", 1, 4, True, topk_bias_update_rate=0.01)
    logits = np.random.default_rng(0).normal([3, 0, 0, -1], 1, (200, 4))
    assert route(router, logits)["expert_mask"].sum(0).max() > 150
    for _ in range(150):
        load = route(router, logits)["expert_mask"].sum(0)
        router.update(load)
    assert load.max() / load.mean() < 1.15


def test_choice_within_the_best_group(pynative):
    """Groups (0, 1) and (2, 3): .9 + .1 against .6 + .5; the best expert of all stands in the group that loses."""
    scores = np.array([[0.9, 0.1, 0.6, 0.5], [0.9, 0.3, 0.6, 0.5]])
    router = identity_router("sigmoid", 2, 4, n_group=2, norm_topk_prob=False)
    routing = route(router, np.log(scores / (1 - scores)))
    np.testing.assert_array_equal(routing["expert_index"], [[2, 3], [0, 1]])
    np.testing.assert_allclose(routing["gates"], [[0.6, 0.5], [0.9, 0.3]], atol=1e-6)


def test_two_of_three_groups_of_one(pynative):
    router = identity_router("sigmoid", 2, 3, n_group=3, topk_group=2)
    np.testing.assert_array_equal(route(router, LOGITS)["expert_index"], [[0, 1], [2, 1], [0, 2]])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_group": 3}, r"^moe\.router\.n_group: 3; must divide the experts \(4\)"),
        ({"n_group": 2, "topk_group": 3}, r"^moe\.router\.topk_group: 3; at most moe\.router\.n_group \(2\)"),
        (
            {"n_group": 4, "num_experts_chosen": 2},
            r"^moe\.num_experts_chosen: 2; at most the 1 experts of moe\.router\.topk_group",
        ),
    ],
)
def test_groups_that_cannot_be(keys, message):
    with pytest.raises(UserError, match=message):
        tiny_config(router="sigmoid", **keys)
