"""GShard: which second choices count, by hand."""

import numpy as np
import pytest
from oracles.routers import identity_router, route
from oracles.tiny import tiny_config

from switchyard.errors import UserError

# Probabilities of three experts; the two best sum to 0.9, 0.75 and 0.75.
LOGITS = np.log([[0.6, 0.3, 0.1], [0.25, 0.25, 0.5], [0.15, 0.6, 0.25]])
GATES = [[2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.6 / 0.85, 0.25 / 0.85]]


@pytest.mark.parametrize("train", [False, True])
def test_all_second_choices(train, pynative):
    routing = route(identity_router("gshard", 2, 3, train), LOGITS, [1, 0, 1])
    np.testing.assert_array_equal(routing["expert_index"], [[0, 1], [3, 3], [1, 2]])
    np.testing.assert_allclose(routing["gates"], [GATES[0], [0, 0], GATES[2]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[1, 1, 0], [0, 0, 0], [0, 1, 1]])


@pytest.mark.parametrize("train", [False, True])
def test_second_choices_above_a_threshold(train, pynative):
    """g2 is 1/3, 1/3 and 5/17 after the division: the threshold 0.3 refuses the third row's."""
    router = identity_router("gshard", 2, 3, train, second_expert="threshold", second_expert_threshold=0.3)
    routing = route(router, LOGITS)
    np.testing.assert_array_equal(routing["expert_index"], [[0, 1], [2, 0], [1, 3]])
    np.testing.assert_allclose(routing["gates"], [GATES[0], GATES[1], [GATES[2][0], 0]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[1, 1, 0], [1, 0, 1], [0, 1, 0]])


def test_second_choices_by_lot(pynative):
    """Kept where 2 g2 > U: 2/3 > 0.6, 2/3 < 0.7, padding nowhere. Every choice counts at evaluation."""
    router = identity_router("gshard", 2, 3, True, second_expert="sampling")
    noise = np.zeros((1, 3, 3))
    noise[0, :, 0] = [0.6, 0.7, 0.0]
    routing = route(router, LOGITS, [1, 1, 0], noise)
    np.testing.assert_array_equal(routing["expert_index"], [[0, 1], [2, 3], [3, 3]])
    np.testing.assert_allclose(routing["gates"], [GATES[0], [2 / 3, 0], [0, 0]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    routing = route(router.set_train(False), LOGITS)
    np.testing.assert_array_equal(routing["expert_index"], [[0, 1], [2, 0], [1, 2]])


def test_lot_is_in_proportion(pynative):
    """A second gate of 0.2 is kept two times in five, one of one half always."""
    router = identity_router("gshard", 2, 2, True, second_expert="sampling")
    noise = np.random.default_rng(0).random((1, 4000, 2))
    kept = route(router, np.log([[0.8, 0.2]] * 4000), None, noise)["expert_mask"][:, 1].mean()
    assert kept == pytest.approx(0.4, abs=0.03)
    assert route(router, np.zeros((4000, 2)), None, noise)["expert_mask"].min() == 1


def test_chooses_two():
    with pytest.raises(UserError, match=r"^moe\.num_experts_chosen: 1; moe\.router 'gshard' chooses 2"):
        tiny_config(router="gshard")
