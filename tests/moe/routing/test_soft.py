"""Dense, merged and Soft MoE: hand-typed rows and weights."""

import numpy as np
import pytest
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.tiny import tiny_config

from switchyard.moe.routing import create_router
from switchyard.nn.initializers import InitialWeights

# With the identity as the router's matrix a row is its own logits; log p makes the probabilities p.
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]], np.float32)


def _router(name, weight=None, **moe):
    router = create_router(tiny_config(width=3, router=name, **{"expert_num": 3} | moe), InitialWeights(0))
    router.weight.set_data(Tensor(np.eye(3) if weight is None else np.array(weight), mstype.float32))
    return router


def _route(router, rows, valid=(1, 1, 1)):
    rows = Tensor(np.array(rows, np.float32)[None])
    routing = router(rows, {"valid": Tensor(np.array([valid], np.float32))})
    return {name: part.asnumpy()[0] for name, part in routing.items()}


def test_dense_weighs_all_by_the_softmax(pynative):
    routing = _route(_router("dense"), np.log(PROBABILITIES), valid=(1, 1, 0))
    np.testing.assert_allclose(routing["gates"], PROBABILITIES * [[1], [1], [0]], atol=1e-6)
    np.testing.assert_allclose(routing["probabilities"], PROBABILITIES, atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[1, 1, 1], [1, 1, 1], [0, 0, 0]])


def test_merged_is_the_gate_of_the_mean_of_real_rows(pynative):
    """Rows (4, 0, 0) and (0, 0, 0), mean (2, 0, 0); the third is padding."""
    routing = _route(_router("merged"), [[4, 0, 0], [0, 0, 0], [9, 9, 9]], valid=(1, 1, 0))
    gates = np.exp([2, 0, 0]) / (np.exp(2) + 2)
    np.testing.assert_allclose(routing["gates"], gates, atol=1e-6)
    np.testing.assert_allclose(routing["probabilities"][:2], [gates, gates], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"].sum(-1), [3, 3, 0])


def test_soft_mixes_rows_into_slots_and_slots_into_rows(pynative):
    """Two experts of one slot; unit rows along x and y, so that X Phi is the identity: weights e / (e + 1) and less."""
    router = _router("soft", [[1, 0], [0, 1], [0, 0]], expert_num=2)
    routing = _route(router, [[5, 0, 0], [0, 0.1, 0], [1, 1, 1]], valid=(1, 1, 0))
    more, less = np.e / (np.e + 1), 1 / (np.e + 1)
    np.testing.assert_allclose(routing["dispatch"][..., 0], [[more, less], [less, more], [0, 0]], atol=1e-5)
    np.testing.assert_allclose(routing["combine"][..., 0], [[more, less], [less, more], [0, 0]], atol=1e-5)
    np.testing.assert_allclose(routing["probabilities"][:2], [[more, less], [less, more]], atol=1e-5)


def test_scale_sharpens_soft_slots(pynative):
    router = _router("soft", [[1, 0], [0, 1], [0, 0]], expert_num=2)
    router.scale.set_data(Tensor([50.0], mstype.float32))
    routing = _route(router, [[5, 0, 0], [0, 0.1, 0], [1, 1, 1]], valid=(1, 1, 0))
    np.testing.assert_allclose(routing["dispatch"][..., 0], [[1, 0], [0, 1], [0, 0]], atol=1e-5)


def test_soft_does_not_see_how_long_rows_are(pynative):
    """Section 2.3: rows are normalised, so a wide model's softmaxes stay soft."""
    router, rows = _router("soft", np.random.default_rng(1).normal(0, 1, (3, 6)), slots_per_expert=2), np.eye(3)
    one, two = _route(router, rows), _route(router, 100 * rows)
    np.testing.assert_allclose(one["dispatch"], two["dispatch"], atol=1e-5)


@pytest.mark.parametrize("name", ["soft", "merged"])
def test_a_group_of_padding_alone_is_finite(name, pynative):
    routing = _route(_router(name, np.ones((3, 3))), np.ones((3, 3)), valid=(0, 0, 0))
    assert all(np.isfinite(part).all() for part in routing.values())
    assert not routing["expert_mask"].any()
