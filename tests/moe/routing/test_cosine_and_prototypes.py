"""Cosine scores, prototypes and two levels: hand-typed rows and gates."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.routers import identity_router, route
from oracles.tiny import tiny_config

from switchyard.errors import UserError
from switchyard.moe.routing import create_router
from switchyard.nn.initializers import InitialWeights


def _cosine(choices=1, scale=0.0):
    """Rows of D = 3 projected to their first two dimensions; experts at 0, 90, 180 and 270 degrees."""
    config = tiny_config(width=3, router="cosine", num_experts_chosen=choices)
    router = create_router(config, InitialWeights(0)).set_train(False)
    router.weight.set_data(Tensor(np.eye(3, 2, dtype=np.float32)))
    router.embeddings.set_data(Tensor(np.array([[5, 0, -1, 0], [0, 0.1, 0, -2]], np.float32)))
    router.scale.set_data(Tensor(np.array([scale], np.float32)))
    return router


ROWS = np.array([[3.0, 4.0, 9.0], [0.0, -0.01, 1.0], [-100.0, 0.0, 0.0]])
COSINES = [[0.6, 0.8, -0.6, -0.8], [0, -1, 0, 1], [-1, 0, 1, 0]]


def test_cosine_sees_directions_alone(pynative):
    routing = route(_cosine(), ROWS)
    np.testing.assert_allclose(routing["logits"], COSINES, atol=1e-6)
    np.testing.assert_array_equal(routing["expert_index"], [[1], [3], [2]])
    e = np.exp(COSINES)
    np.testing.assert_allclose(routing["gates"][:, 0], e.max(-1) / e.sum(-1), atol=1e-6)


def test_cosine_temperature_is_learned_and_bounded(pynative):
    np.testing.assert_allclose(route(_cosine(scale=np.log(4)), ROWS)["logits"], 4 * np.array(COSINES), atol=1e-5)
    np.testing.assert_allclose(route(_cosine(scale=50), ROWS)["logits"], 100 * np.array(COSINES), atol=1e-3)
    fresh = create_router(tiny_config(router="cosine"), InitialWeights(0))
    assert np.exp(-fresh.scale.asnumpy()[0]) == pytest.approx(0.07)


def test_cosine_two_choices_sum_to_one(pynative):
    routing = route(_cosine(2), ROWS, [1, 1, 0])
    np.testing.assert_array_equal(routing["expert_index"], [[1, 0], [3, 0], [4, 4]])
    first = 1 / (1 + np.exp(-0.2))
    np.testing.assert_allclose(routing["gates"][0], [first, 1 - first], atol=1e-6)
    np.testing.assert_allclose(routing["gates"].sum(-1), [1, 1, 0], atol=1e-6)


def test_zero_row_has_no_direction_and_no_trouble(pynative):
    routing = route(_cosine(), np.zeros((1, 3)))
    np.testing.assert_allclose(routing["probabilities"], 0.25, atol=1e-6)


# Four experts as two prototypes: (0, 1) and (2, 3).
LOGITS = np.log([[3.0, 1.0, 1.0, 4.0], [1.0, 1.0, 9.0, 1.0], [2.0, 6.0, 1.0, 1.0]])


def test_prototypes_choose_one_of_each_group(pynative):
    """Best gate first: .8 before .75; .9 before .5; .75 before .5. Equals go to the lower expert."""
    routing = route(identity_router("prototype", 2, 4), LOGITS)
    np.testing.assert_array_equal(routing["expert_index"], [[3, 0], [2, 0], [1, 2]])
    np.testing.assert_allclose(routing["gates"], [[0.8, 0.75], [0.9, 0.5], [0.75, 0.5]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[1, 0, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]])
    np.testing.assert_allclose(routing["probabilities"][0], [0.375, 0.125, 0.1, 0.4], atol=1e-6)


def test_one_prototype_is_switch(pynative):
    prototype, switch = (route(identity_router(name, 1, 4), LOGITS, [1, 0, 1]) for name in ("prototype", "switch"))
    for name in ("expert_index", "gates", "probabilities", "expert_mask"):
        np.testing.assert_allclose(prototype[name], switch[name], atol=1e-6)


def test_prototypes_need_equal_groups():
    with pytest.raises(UserError, match=r"^moe\.num_experts_chosen: 3; prototype: must divide the experts \(4\)"):
        tiny_config(router="prototype", num_experts_chosen=3)


# p of the groups (0, 1) and (2, 3): the group's matrix adds up the columns of each.
GROUP_WEIGHT = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)


def _two_level(choices, **moe):
    router = identity_router("two_level", choices, 4, n_group=2, **moe)
    router.group_weight.set_data(Tensor(GROUP_WEIGHT))
    return router


def test_two_levels_multiply(pynative):
    """Row 0: groups 3 : 4, within them 3 : 1 and 1 : 4. So p = 3/7 * (3/4, 1/4), 4/7 * (1/5, 4/5)."""
    routing = route(_two_level(1), LOGITS)
    wanted = [
        [9 / 28, 3 / 28, 4 / 35, 16 / 35],
        [0.1 / 2, 0.1 / 2, 0.9 * 0.9, 0.9 * 0.1],
        [12 / 13 / 4, 12 / 13 * 3 / 4, 1 / 26, 1 / 26],
    ]
    np.testing.assert_allclose(routing["probabilities"], wanted, atol=1e-6)
    np.testing.assert_array_equal(routing["expert_index"], [[3], [2], [1]])
    np.testing.assert_allclose(routing["gates"], [[16 / 35], [0.81], [9 / 13]], atol=1e-6)


def test_the_group_goes_first(pynative):
    """Groups 4 : 6; expert 2 and 3 share theirs, so the best expert of all, 0, stands in the group that loses."""
    logits = np.log([[4.0, 0.1, 2.5, 2.4]])
    router = _two_level(1)
    router.group_weight.set_data(Tensor(np.array([[1, 0], [0, 0], [0, 1], [0, 1]], np.float32)))
    routing = route(router, logits)
    assert routing["probabilities"].argmax() == 0
    np.testing.assert_array_equal(routing["expert_index"], [[2]])


@pytest.mark.parametrize(("taken", "experts"), [(1, [3, 2]), (2, [3, 0])])
def test_two_choices_of_one_group_or_of_both(taken, experts, pynative):
    routing = route(_two_level(2, topk_group=taken), LOGITS, [1, 1, 0])
    np.testing.assert_array_equal(routing["expert_index"][0], experts)
    p = routing["probabilities"][0, experts]
    np.testing.assert_allclose(routing["gates"][0], p / p.sum(), atol=1e-6)
    np.testing.assert_array_equal(routing["expert_index"][2], [4, 4])


def test_two_levels_need_two_groups():
    with pytest.raises(UserError, match=r"^moe\.router\.n_group: 1; two_level needs 2 or more groups"):
        tiny_config(router="two_level")
