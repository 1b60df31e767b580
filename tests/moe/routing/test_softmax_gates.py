"""Switch and top-k: hand-typed rows, gates and gradients."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import tiny_config

from switchyard.moe.routing import create_router
from switchyard.moe.routing.base import TopChoices, router_weight
from switchyard.nn.initializers import InitialWeights

# The router's matrix is the identity, so a row is its own logits; log p makes the probabilities p.
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]], np.float32)


def _identity(router, choices, **moe):
    config = tiny_config(width=3, router=router, expert_num=3, num_experts_chosen=choices, **moe)
    cell = create_router(config, InitialWeights(0))
    cell.weight.set_data(Tensor(np.eye(3, dtype=np.float32)))
    return cell


def _route(cell, valid=(1, 1, 1)):
    rows = Tensor(np.log(PROBABILITIES)[None])
    routing = cell(rows, {"valid": Tensor(np.array([valid], np.float32))})
    return {name: value.asnumpy() for name, value in routing.items()}


@pytest.mark.parametrize("router", ["switch", "top_k"])
@pytest.mark.parametrize("normalise", [True, False])
def test_one_choice_keeps_its_probability(router, normalise, pynative):
    """Never renormalised, whatever norm_topk_prob says: a gate divided by itself would be 1 and learn nothing."""
    routing = _route(_identity(router, 1, norm_topk_prob=normalise))
    np.testing.assert_array_equal(routing["expert_index"], [[[0], [2], [1]]])
    np.testing.assert_allclose(routing["gates"], [[[0.7], [0.6], [0.5]]], atol=1e-6)
    np.testing.assert_allclose(routing["probabilities"], PROBABILITIES[None], atol=1e-6)
    np.testing.assert_allclose(routing["logits"], np.log(PROBABILITIES)[None], atol=1e-6)


def test_two_choices_renormalised(pynative):
    """The tie in the third row goes to the lower expert."""
    routing = _route(_identity("top_k", 2))
    np.testing.assert_array_equal(routing["expert_index"], [[[0, 1], [2, 1], [1, 0]]])
    np.testing.assert_allclose(routing["gates"], [[[7 / 9, 2 / 9], [2 / 3, 1 / 3], [2 / 3, 1 / 3]]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[[1, 1, 0], [0, 1, 1], [1, 1, 0]]])


def test_two_choices_as_they_are(pynative):
    routing = _route(_identity("top_k", 2, norm_topk_prob=False), valid=(1, 0, 1))
    np.testing.assert_array_equal(routing["expert_index"], [[[0, 1], [3, 3], [1, 0]]])
    np.testing.assert_allclose(routing["gates"], [[[0.7, 0.2], [0, 0], [0.5, 0.25]]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[[1, 1, 0], [0, 0, 0], [1, 1, 0]]])


@pytest.mark.parametrize(
    ("normalise", "gates"), [(False, [[0.3, 0.25], [0.5, 0.2]]), (True, [[6 / 11, 5 / 11], [5 / 7, 2 / 7]])]
)
def test_choice_within_the_best_group(normalise, gates, pynative):
    """Groups (0, 1) and (2, 3): .4 + .05 against .3 + .25, so the best expert of all is out of reach; then .5 + .2."""
    probabilities = np.array([[0.4, 0.05, 0.3, 0.25], [0.5, 0.2, 0.1, 0.2]], np.float32)
    router = {"name": "top_k", "n_group": 2, "norm_topk_prob": normalise}
    config = tiny_config(width=4, router=router, expert_num=4, num_experts_chosen=2)
    cell = create_router(config, InitialWeights(0))
    cell.weight.set_data(Tensor(np.eye(4, dtype=np.float32)))
    routing = cell(Tensor(np.log(probabilities)[None]), {"valid": Tensor(np.ones((1, 2), np.float32))})
    np.testing.assert_array_equal(routing["expert_index"].asnumpy(), [[[2, 3], [0, 1]]])
    np.testing.assert_allclose(routing["gates"].asnumpy(), [gates], atol=1e-6)


def test_every_expert_chosen_is_the_softmax_itself(pynative):
    routing = _route(_identity("top_k", 3))
    np.testing.assert_allclose(routing["gates"], -np.sort(-PROBABILITIES)[None], atol=1e-6)


@pytest.mark.parametrize("router", ["switch", "top_k"])
def test_gradient_of_a_single_gate_is_that_of_the_softmax(router, pynative):
    """d p_i / d logit_j = p_i (1[i = j] - p_j), for the row (0.7, 0.2, 0.1) and i = 0."""
    cell, valid = _identity(router, 1), Tensor(np.ones((1, 1), np.float32))
    gradient = ms.grad(lambda rows: cell(rows, {"valid": valid})["gates"].sum())
    wanted = [[[0.7 * 0.3, -0.7 * 0.2, -0.7 * 0.1]]]
    np.testing.assert_allclose(gradient(Tensor(np.log(PROBABILITIES)[None, :1])).asnumpy(), wanted, atol=1e-6)


def test_top_choices_take_the_lower_expert_of_equals(pynative):
    experts, masks = TopChoices(4, 3)(Tensor(np.array([[[1, 3, 3, 2], [0, 0, 0, 0]]], np.float32)))
    np.testing.assert_array_equal(experts.asnumpy(), [[[1, 2, 3], [0, 1, 2]]])
    np.testing.assert_array_equal(masks[1].asnumpy(), [[[0, 0, 1, 0], [0, 1, 0, 0]]])


def test_no_expert_starts_ahead():
    """Initial logits of unit rows have deviation 0.1 (arXiv 2101.03961, section 2.4)."""
    weight = router_weight(512, 64, InitialWeights(0)).asnumpy()
    logits = np.random.default_rng(1).normal(0, 1, (1000, 512)) @ weight
    assert logits.std() == pytest.approx(0.1, rel=0.05)
