"""The tree: hand-typed nodes, leaves, one path, and how many nodes that path computes."""

import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from oracles.tiny import tiny_config

from switchyard.moe.routing import create_router
from switchyard.moe.routing.decision_tree import decisions
from switchyard.nn.initializers import InitialWeights


def _tree(experts=4, width=3, seed=0):
    return create_router(tiny_config(width=width, router="tree", expert_num=experts), InitialWeights(seed))


def _route(router, rows, valid=None):
    rows = np.array(rows, np.float32)
    valid = np.ones(rows.shape[:2], np.float32) if valid is None else np.array(valid, np.float32)
    return {n: p.asnumpy() for n, p in router(Tensor(rows), {"valid": Tensor(valid)}).items()}


def _by_hand():
    """Node n reads input n."""
    router = _tree()
    router.weight.set_data(Tensor(np.eye(3, dtype=np.float32)))
    return router


def _logit(p):
    return np.log(p / (1 - p))


def test_a_leaf_is_the_product_of_its_decisions(pynative):
    """Right with 0.9 at the root, 0.2 at its left child, 0.6 at its right one."""
    rows = [[[_logit(0.9), _logit(0.2), _logit(0.6)], [0, 0, 0], [1, 1, 1]]]
    routing = _route(_by_hand().set_train(True), rows, valid=[[1, 1, 0]])
    wanted = [[0.1 * 0.8, 0.1 * 0.2, 0.9 * 0.4, 0.9 * 0.6], [0.25] * 4]
    np.testing.assert_allclose(routing["probabilities"][0, :2], wanted, atol=1e-6)
    np.testing.assert_allclose(routing["gates"][0], [*wanted, [0] * 4], atol=1e-6)


def test_one_path_at_evaluation(pynative):
    """Left, then by the left child; right, then by the right one: experts 1, 2 and 3, gate 1."""
    rows = [[[-1, 2, 5], [1, 5, -2], [1, -5, 2]]]
    routing = _route(_by_hand().set_train(False), rows)
    np.testing.assert_array_equal(routing["expert_index"], [[[1], [2], [3]]])
    np.testing.assert_array_equal(routing["gates"], np.ones((1, 3, 1)))
    np.testing.assert_array_equal(routing["expert_mask"][0], np.eye(4)[1:])


@pytest.mark.parametrize("experts", [2, 4, 8, 32])
def test_the_path_ends_where_each_decision_is_likelier(experts, pynative):
    """Greedy descent by the soft tree's own probabilities, found from the leaves up."""
    router, rows = _tree(experts), np.random.default_rng(1).normal(0, 2, (1, 40, 3))
    leaves = _route(router.set_train(True), rows)["probabilities"][0]  # [40, E]
    found = _route(router.set_train(False), rows)["expert_index"][0, :, 0]
    for row, leaf in zip(leaves, found):
        low, high = 0, experts
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if row[middle:high].sum() > row[low:middle].sum() else (low, middle)
        assert leaf == low


class Counting(nn.Cell):
    """A gather that counts the nodes' weights it hands out: vectors of D, one product each."""

    def __init__(self):
        super().__init__()
        self.gather, self.vectors = ops.Gather(), 0

    def construct(self, table, index, axis):
        if table.ndim == 2:
            self.vectors += index.size
        return self.gather(table, index, axis)


@pytest.mark.parametrize("experts", [2, 8, 64, 256])
def test_evaluation_computes_log2_nodes_a_row(experts, pynative):
    """Products of a row with a node's weights: log2 E of them, where a gate needs E and the whole tree E - 1."""
    router, rows = _tree(experts).set_train(False), 10
    router.descent.take = counting = Counting()
    router.product = None  # the whole tree is not touched
    _route(router, np.ones((1, rows, 3)))
    assert counting.vectors == rows * decisions(experts)
    assert decisions(experts) == np.log2(experts) < experts
