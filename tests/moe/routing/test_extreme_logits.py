"""Scores far out: gates, balance loss and gradients against float64, where float32 probabilities are all 0 or 1."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from oracles.routers import identity_router, route

from switchyard.moe.routing import losses as balance
from switchyard.nn.softmax import log_sigmoid

FAR = np.array([[-60.0, -62.0, -61.0], [-60.0, -80.0, -100.0], [-200.0, -201.0, -203.0], [40.0, -40.0, 0.0]])


def _log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _gates(routing, values):
    """Softmax of the chosen experts' values, float64."""
    return _softmax(np.take_along_axis(values, routing["expert_index"].astype(np.int64), -1))


def test_sigmoid_gates_sum_to_one_and_probabilities_are_the_shares_of_the_scores(pynative):
    routing = route(identity_router("sigmoid", 2, 3), FAR, [1, 1, 1, 1])
    np.testing.assert_allclose(routing["gates"], _gates(routing, _log_sigmoid(FAR)), atol=2e-6)
    np.testing.assert_allclose(routing["gates"].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(routing["probabilities"], _softmax(_log_sigmoid(FAR)), atol=2e-6)


def test_padded_rows_stay_zero(pynative):
    for name in ("sigmoid", "top_k", "noisy_top_k", "gshard"):
        routing = route(identity_router(name, 2, 3), FAR, [1, 0, 1, 0])
        assert not routing["gates"][[1, 3]].any() and (routing["expert_index"][[1, 3]] == 3).all(), name
        np.testing.assert_allclose(routing["gates"][[0, 2]].sum(-1), 1, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("level", [0.0, -20.0, -60.0, -500.0])
def test_balance_loss_of_collapsed_sigmoid_does_not_depend_on_the_level(level, pynative):
    """All rows at expert 0, 2 nats ahead of three others: 4 * P_0. A floor made it vanish from -50 on."""
    logits = np.full((5, 4), level - 2.0)
    logits[:, 0] = level
    routing = route(identity_router("sigmoid", 1, 4), logits)
    wanted = 4 * _softmax(_log_sigmoid(logits))[0, 0]
    parts = [Tensor(routing[name][None]) for name in ("expert_mask", "probabilities")]
    found = balance.switch_balance(*parts, Tensor(np.ones((1, 5), np.float32)), 1)
    assert (routing["expert_index"] == 0).all()
    assert float(found.asnumpy()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "top_k", "noisy_top_k", "gshard", "sinkhorn"])
def test_replay_of_an_impossible_expert_gives_gates_that_sum_to_one(name, pynative):
    """Experts 1 and 2, whose probabilities are 0 in float32: gates by their logits all the same, and a finite slope."""
    logits = np.array([[100.0, -60.0, -62.0, 90.0]])
    router = identity_router(name, 2, 4)
    rows, forced = Tensor(logits[None].astype(np.float32)), Tensor(np.array([[[1, 2]]], np.int32))
    context = {"valid": Tensor(np.ones((1, 1), np.float32)), "replay": forced}
    values = _log_sigmoid(logits) if name == "sigmoid" else logits
    wanted = _softmax(values[:, 1:3])
    np.testing.assert_allclose(router(rows, context)["gates"].asnumpy()[0], wanted, atol=2e-6)
    gradient = ms.grad(lambda x: router(x, context)["gates"][..., 0].sum())(rows).asnumpy()[0, 0]
    slope = wanted[0, 0] * wanted[0, 1] * (1 if name != "sigmoid" else 1 / (1 + np.exp(-60)))
    np.testing.assert_allclose(gradient, [0, slope, -slope, 0], atol=1e-6)


def test_gates_of_two_levels_where_a_group_is_impossible(pynative):
    """Experts 2 and 3 stand in a group 150 nats behind, so their products are 0 in float32."""
    router = identity_router("two_level", 2, 4, n_group=2, topk_group=2)
    group = np.zeros((4, 2), np.float32)
    group[0, 0] = 150.0
    router.group_weight.set_data(Tensor(group))
    rows = Tensor(np.array([[[1.0, 0.0, 3.0, 2.0]]], np.float32))
    context = {"valid": Tensor(np.ones((1, 1), np.float32)), "replay": Tensor(np.array([[[2, 3]]], np.int32))}
    np.testing.assert_allclose(router(rows, context)["gates"].asnumpy()[0], _softmax(np.array([[3.0, 2.0]])), atol=2e-6)


def test_gradient_of_sigmoid_routing_equals_float64(pynative):
    """Central differences in float64 of sum(weights * gates) + 0.5 * sum(slopes * probabilities)."""
    router, random = identity_router("sigmoid", 2, 3), np.random.default_rng(0)
    weights, slopes = random.normal(0, 1, (4, 2)), random.normal(0, 1, (4, 3))
    context = {"valid": Tensor(np.ones((1, 4), np.float32))}
    experts = route(router, FAR)["expert_index"].astype(np.int64)

    def objective(x):
        routing = router(x, context)
        gates, probabilities = routing["gates"] * Tensor(weights, ms.float32), routing["probabilities"]
        return gates.sum() + 0.5 * (probabilities * Tensor(slopes, ms.float32)).sum()

    def exact(x):
        value = _log_sigmoid(x)
        gates = _softmax(np.take_along_axis(value, experts, -1))
        return (gates * weights).sum() + 0.5 * (_softmax(value) * slopes).sum()

    gradient = ms.grad(objective)(Tensor(FAR[None].astype(np.float32))).asnumpy()[0]
    for place in np.ndindex(FAR.shape):
        step = np.zeros_like(FAR)
        step[place] = 1e-5
        assert gradient[place] == pytest.approx((exact(FAR + step) - exact(FAR - step)) / 2e-5, abs=2e-6), place


def test_log_sigmoid_and_its_slope(pynative):
    """At 0, where a composition of max and abs has the slope 1 or 0, and far out."""
    x = np.array([0.0, 1.0, -1.0, 30.0, -30.0, 500.0, -500.0])
    np.testing.assert_allclose(log_sigmoid(Tensor(x, ms.float32)).asnumpy(), _log_sigmoid(x), rtol=1e-5, atol=1e-6)
    slope = ms.grad(lambda v: log_sigmoid(v).sum())(Tensor(x, ms.float32)).asnumpy()
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(np.minimum(x, 500))), atol=1e-6)
