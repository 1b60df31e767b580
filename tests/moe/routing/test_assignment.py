"""Sinkhorn and BASE: hand-typed matrices, balance in training, and the assignment against the best there is."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from oracles.routers import identity_router, route
from oracles.tiny import tiny_config
from scipy.optimize import linear_sum_assignment

from switchyard.errors import UserError
from switchyard.moe.routing.assignment import Auction

# Three rows that all prefer expert 0; the last one least. A fourth is padding and would like nothing better.
LOGITS = np.log([[8.0, 1.0, 1.0], [4.0, 3.0, 1.0], [4.0, 1.0, 3.0], [90.0, 1.0, 1.0]])


def _skewed(rows, experts, seed=0):
    """Scores of rows that nearly all prefer the first experts."""
    return np.random.default_rng(seed).normal(-2.0 * np.arange(experts), 1.0, (rows, experts))


def test_sinkhorn_by_hand(pynative):
    """Scaled to rows and columns of sum 1 the matrix has its maxima on the diagonal; the gates are the softmax's."""
    routing = route(identity_router("sinkhorn", 1, 3, True, sinkhorn_iterations=20), LOGITS, [1, 1, 1, 0])
    np.testing.assert_array_equal(routing["expert_index"], [[0], [1], [2], [3]])
    np.testing.assert_allclose(routing["gates"], [[0.8], [3 / 8], [3 / 8], [0]], atol=1e-6)
    routing = route(identity_router("sinkhorn", 1, 3), LOGITS, [1, 1, 1, 0])
    np.testing.assert_array_equal(routing["expert_index"], [[0], [0], [0], [3]])


def test_sinkhorn_scales_rows_and_columns(pynative):
    """What the choice goes by, each row's sum divided out, is the doubly scaled matrix."""
    router = identity_router("sinkhorn", 2, 3, True, sinkhorn_iterations=50)
    valid = Tensor(np.ones((1, 3), np.float32))
    ranked = router.rank(Tensor(LOGITS[None, :3].astype(np.float32)), valid).asnumpy()[0]
    scaled = np.exp(ranked) / np.exp(ranked).sum(-1, keepdims=True)
    np.testing.assert_allclose(scaled.sum(0), [1, 1, 1], atol=1e-3)
    ratio = scaled / np.exp(LOGITS[:3])  # still a product of a row's and a column's factor
    np.testing.assert_allclose(ratio[0] / ratio[0, 0], ratio[1] / ratio[1, 0], atol=1e-5)


@pytest.mark.parametrize("choices", [1, 2])
def test_sinkhorn_balances_in_training(choices, pynative):
    logits = _skewed(512, 4)
    load = [
        route(identity_router("sinkhorn", choices, 4, train), logits)["expert_mask"].sum(0) for train in (False, True)
    ]
    plain, balanced = (part.max() / part.mean() for part in load)
    assert balanced < 1.25 < 1.7 < plain


def test_sinkhorn_gates_sum_to_one_for_two(pynative):
    routing = route(identity_router("sinkhorn", 2, 3, True), LOGITS)
    np.testing.assert_allclose(routing["gates"].sum(-1), 1, atol=1e-6)


def test_base_by_hand(pynative):
    """The only assignment of one row each with the sum log 8 + log 3 + log 3; gates are sigmoids: 8/9, 3/4, 3/4."""
    routing = route(identity_router("base", 1, 3, True), LOGITS, [1, 1, 1, 0])
    np.testing.assert_array_equal(routing["expert_index"], [[0], [1], [2], [3]])
    np.testing.assert_allclose(routing["gates"], [[8 / 9], [3 / 4], [3 / 4], [0]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], np.eye(4)[:, :3])
    routing = route(identity_router("base", 1, 3), LOGITS, [1, 1, 1, 0])
    np.testing.assert_array_equal(routing["expert_index"], [[0], [0], [0], [3]])
    np.testing.assert_allclose(routing["gates"], [[8 / 9], [4 / 5], [4 / 5], [0]], atol=1e-6)


@pytest.mark.parametrize("case", ["skewed", "equal rows", "equal scores", "few bids"])
def test_base_load_is_exactly_the_mean(case, pynative):
    """Largest load / mean load is 1 in training, also where many rows are the same and where rounds run out."""
    logits = {
        "skewed": _skewed(64, 4),
        "equal rows": np.repeat([[3.0, 2.0, 0.0, 1.0]], 64, 0),
        "equal scores": np.zeros((64, 4)),
        "few bids": _skewed(64, 4),
    }[case]
    router = identity_router("base", 1, 4, True)
    if case == "few bids":
        router.auction.rounds = 1
    chosen = route(router, logits)["expert_mask"]
    np.testing.assert_array_equal(chosen.sum(0), [16, 16, 16, 16])
    np.testing.assert_array_equal(chosen.sum(1), 1)


def test_base_with_padding_shares_the_real_rows(pynative):
    valid = np.ones(64)
    valid[10:33] = 0  # 41 real rows: at most 11 each
    chosen = route(identity_router("base", 1, 4, True), _skewed(64, 4), valid)["expert_mask"]
    np.testing.assert_array_equal(chosen.sum(1), valid)
    assert chosen.sum(0).max() == 11


def _assign(scores):
    cell, valid = Auction(scores.shape[-1]), np.ones(scores.shape[:2], np.float32)
    return cell(Tensor(scores.astype(np.float32)), Tensor(valid)).asnumpy()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_auction_comes_near_the_best_assignment(seed, pynative):
    """Within a fraction of the scores' range, a row, of SciPy's linear assignment on N seats."""
    scores = np.stack([_skewed(48, 6, seed), _skewed(48, 6, seed + 10)])
    found = _assign(scores)
    for g in range(2):
        seats = np.repeat(scores[g], 8, 1)  # eight seats of each expert
        rows, columns = linear_sum_assignment(-seats)
        best = seats[rows, columns].sum()
        total = scores[g][np.arange(48), found[g]].sum()
        assert best - 48 * 0.005 * (scores[g].max() - scores[g].min()) <= total <= best + 1e-4
        greedy = scores[g].max(-1).sum()
        assert total < greedy  # the best experts are too popular for everybody to have theirs


def test_base_compiles_with_its_gradient(graph):
    """The assignment inside a compiled gradient: the weight learns through the gate alone."""
    router = identity_router("base", 1, 4, True)

    class Step(nn.Cell):
        def __init__(self):
            super().__init__()
            self.router = router
            self.gradient = ops.value_and_grad(self.objective, None, ms.ParameterTuple(router.trainable_params()), True)

        def objective(self, rows, valid):
            routing = self.router(rows, {"valid": valid})
            return routing["gates"].sum(), routing["expert_mask"]

        def construct(self, rows, valid):
            return self.gradient(rows, valid)

    logits, step = _skewed(32, 4), Step().set_train(True)
    (value, chosen), (gradient,) = step(Tensor(logits[None].astype(np.float32)), Tensor(np.ones((1, 32), np.float32)))
    chosen = chosen.asnumpy()[0]
    np.testing.assert_array_equal(chosen.sum(0), [8, 8, 8, 8])
    gates = 1 / (1 + np.exp(-(logits * chosen).sum(-1)))
    assert float(value.asnumpy()) == pytest.approx(gates.sum(), rel=1e-5)
    slope = chosen * (gates * (1 - gates))[:, None]
    np.testing.assert_allclose(gradient.asnumpy(), logits.T @ slope, atol=1e-4)


def test_base_chooses_one():
    with pytest.raises(UserError, match=r"^moe\.num_experts_chosen: 2; moe\.router 'base' chooses 1"):
        tiny_config(router="base", num_experts_chosen=2)
