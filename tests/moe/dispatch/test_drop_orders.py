"""Who keeps a slot and where the others go: drop orders, minimum capacity, re-routing, by hand and by a plain loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor
from oracles.capacity_law import slots as fair_slots

from switchyard.moe.dispatch.plan import CapacityPlan, capacity
from switchyard.moe.dispatch.reroute import Reroute

NOWHERE = 3  # with three experts


def _seated(experts, gates, factor, order, priority=None, least=1):
    """Choices n * K + k that got a slot, as a set."""
    experts, gates = np.array(experts, np.int32), np.array(gates, np.float32)
    priority = None if priority is None else Tensor(np.array([priority], np.float32))
    plan = CapacityPlan(3, experts.shape[-1], factor, order, least)(
        Tensor(experts[None]), Tensor(gates[None]), priority
    )
    return set(np.flatnonzero(plan["kept_mask"].asnumpy()[0]).tolist())


# Rows 0, 1 and 2 all want expert 0 first and expert 1 second; one slot each (factor 1/2 of six choices).
EXPERTS, GATES = [[0, 1], [0, 1], [0, 1]], [[0.5, 0.4], [0.6, 0.1], [0.55, 0.45]]


def test_batch_priority_asks_the_surest_row(pynative):
    """Row 1 has the largest gate, 0.6: it gets both slots, its second gate of 0.1 before those of 0.4 and 0.45."""
    assert _seated(EXPERTS, GATES, 0.5, "batch_priority") == {2, 3}
    assert _seated(EXPERTS, GATES, 0.5, "probability") == {2, 5}
    assert _seated(EXPERTS, GATES, 0.5, "position") == {0, 1}


def test_batch_priority_serves_first_choices_first(pynative):
    """Row 0 is the surest, and its second choice still comes after the first choice of row 1."""
    assert _seated([[0, 1], [1, 0], [2, 0]], [[0.9, 0.8], [0.3, 0.2], [0.4, 0.3]], 0.5, "batch_priority") == {0, 2, 4}


def test_token_order_serves_all_choices_of_a_row_before_the_next_row(pynative):
    """Row 0 takes a slot of experts 0 and 1; row 1 wants expert 1 first and still finds it full."""
    assert _seated([[0, 1], [1, 2], [2, 0]], [[0.5, 0.4], [0.9, 0.1], [0.8, 0.2]], 0.5, "token") == {0, 1, 3}
    assert _seated([[0, 1], [1, 2], [2, 0]], [[0.5, 0.4], [0.9, 0.1], [0.8, 0.2]], 0.5, "position") == {0, 2, 4}


def test_random_goes_by_priority(pynative):
    assert _seated(EXPERTS, GATES, 0.5, "random", priority=[0.9, 0.5, 0.1]) == {4, 5}
    assert _seated(EXPERTS, GATES, 0.5, "random", priority=[0.2, 0.5, 0.9]) == {0, 1}
    assert _seated(EXPERTS, GATES, 0.5, "random") == {0, 1}  # evaluation draws none: by position


@pytest.mark.parametrize("order", ["batch_priority", "random"])
def test_padding_takes_no_slot(order, pynative):
    experts = [[NOWHERE, NOWHERE], [0, 1], [0, 1]]
    assert _seated(experts, [[0, 0], [0.6, 0.1], [0.5, 0.4]], 0.5, order, priority=[0.0, 0.1, 0.2]) == {2, 3}


def test_minimum_capacity(pynative):
    assert capacity(100, 50, 1, 1.0, 4) == 4
    assert capacity(3, 50, 1, 1.0, 4) == 3  # never more than rows
    assert capacity(100, 10, 1, 1.0, 4) == 10
    assert _seated(EXPERTS, GATES, 0.5, "position", least=2) == {0, 1, 2, 3}


def _rerouted(experts, gates, probabilities, factor, rounds, order="position"):
    experts, gates = np.array(experts, np.int32), np.array(gates, np.float32)
    probabilities = np.array(probabilities, np.float32)
    cell = Reroute(3, experts.shape[-1], factor, order, 1, rounds)
    held, weights = cell(Tensor(experts[None]), Tensor(gates[None]), Tensor(probabilities[None]))
    return held.asnumpy()[0], weights.asnumpy()[0]


# All four rows want expert 0, which has two slots as every expert has (factor 1.5).
ALIKE = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.7, 0.2, 0.1], [0.8, 0.05, 0.15]]


def test_refused_rows_go_to_the_next_best(pynative):
    """Rows 2 and 3 find expert 0 full. Next best: expert 1 for row 2, expert 2 for row 3."""
    held, gates = _rerouted([[0]] * 4, [[0.5], [0.6], [0.7], [0.8]], ALIKE, 1.5, 1)
    np.testing.assert_array_equal(held, [[0], [0], [1], [2]])
    np.testing.assert_allclose(gates, [[0.5], [0.6], [0.2], [0.15]])


def test_rounds_go_on_until_there_is_room(pynative):
    """One slot each, the second best of all is expert 1: one refused row gets it, the other asks again."""
    wanted = [[0.5, 0.3, 0.2]] * 4
    held, _ = _rerouted([[0]] * 4, [[0.5]] * 4, wanted, 0.75, 1)
    np.testing.assert_array_equal(held, [[0], [1], [NOWHERE], [NOWHERE]])
    held, gates = _rerouted([[0]] * 4, [[0.5]] * 4, wanted, 0.75, 5)
    np.testing.assert_array_equal(held, [[0], [1], [2], [NOWHERE]])  # three slots for four rows
    np.testing.assert_allclose(gates, [[0.5], [0.3], [0.2], [0]])


def test_a_row_goes_to_an_expert_once(pynative):
    """Row 1's second choice, expert 0, is full. It has expert 1 already, so expert 2 is next, though less probable."""
    held, gates = _rerouted([[0, 2], [1, 0]], [[0.6, 0.4], [0.7, 0.3]], [[0.6, 0.0, 0.4], [0.3, 0.6, 0.1]], 0.75, 1)
    np.testing.assert_array_equal(held, [[0, 2], [1, NOWHERE]])  # expert 2's one slot is row 0's
    held, gates = _rerouted([[0, 1], [1, 0]], [[0.6, 0.4], [0.7, 0.3]], [[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]], 0.75, 1)
    np.testing.assert_array_equal(held, [[0, 2], [1, NOWHERE]])  # both second choices ask for expert 2
    np.testing.assert_allclose(gates, [[0.6, 0.1], [0.7, 0]], atol=1e-6)


def test_order_decides_who_moves(pynative):
    """By probability rows 3 and 2 keep their slots, and row 1 and 0 move."""
    held, _ = _rerouted([[0]] * 4, [[0.5], [0.6], [0.7], [0.8]], ALIKE, 1.5, 1, "probability")
    np.testing.assert_array_equal(held, [[1], [2], [0], [0]])


def test_padding_is_not_moved(pynative):
    held, gates = _rerouted([[NOWHERE], [0], [0], [0]], [[0.0], [0.6], [0.7], [0.8]], ALIKE, 0.75, 2)
    np.testing.assert_array_equal(held, [[NOWHERE], [0], [1], [2]])
    assert gates[0] == 0


class _Cells:
    """Of one shape, so that kernels are made once: ten rows, two choices of four experts, capacity 4."""

    def __init__(self):
        self.plans = {order: CapacityPlan(4, 2, 0.8, order) for order in ("batch_priority", "random")}
        self.reroute = Reroute(4, 2, 0.8, "position", 1, 6)


@st.composite
def routings(draw):
    """(experts [10, 2], gates, probabilities [10, 4], priority [10]) with ties and padding."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = random.gumbel(size=(10, 4)) - draw(st.sampled_from([0.0, 1.0, 5.0])) * np.arange(4)
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    experts = np.argsort(-scores, -1)[:, :2].astype(np.int32)
    gates = np.take_along_axis(probabilities, experts, -1)
    if draw(st.booleans()):
        gates = np.ceil(gates * 4) / 4
    padded = random.random(10) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    experts[padded], gates[padded] = 4, 0
    return experts, gates.astype(np.float32), probabilities.astype(np.float32), random.random(10).astype(np.float32)


@pytest.fixture(scope="module")
def cells():
    return _Cells()


@pytest.mark.parametrize("order", ["batch_priority", "random"])
def test_seats_equal_a_plain_queue(order, cells, pynative):
    room = fair_slots(20, 4, 0.8)

    @given(routings())
    @settings(max_examples=15)
    def holds(routing):
        experts, gates, _, priority = routing
        plan = cells.plans[order](Tensor(experts[None]), Tensor(gates[None]), Tensor(priority[None]))
        key = priority if order == "random" else -gates.max(-1)
        queue = sorted(((k, key[n], n) for n in range(10) for k in range(2)), key=lambda c: c)
        held, wanted = np.zeros(5, int), np.zeros((10, 2))
        for k, _, n in queue:
            expert = experts[n, k]
            if expert < 4 and held[expert] < room:
                wanted[n, k] = 1
                held[expert] += 1
        np.testing.assert_array_equal(plan["kept_mask"].asnumpy()[0].reshape(10, 2), wanted)

    holds()


def test_reroute_laws(cells, graph):
    """Nobody is moved without need, no expert is overfull, no row has one twice, and who is left found no room."""
    room = fair_slots(20, 4, 0.8)

    @given(routings())
    @settings(max_examples=20)
    def holds(routing):
        experts, gates, probabilities, _ = routing
        held, weights = cells.reroute(Tensor(experts[None]), Tensor(gates[None]), Tensor(probabilities[None]))
        held, weights = held.asnumpy()[0], weights.asnumpy()[0]
        load = np.bincount(held.ravel(), minlength=5)[:4]
        asked = np.bincount(experts.ravel(), minlength=5)[:4]
        assert load.max() <= room
        for n in range(10):
            for k in range(2):
                if experts[n, k] == 4:
                    assert held[n, k] == 4
                elif held[n, k] == experts[n, k]:
                    assert weights[n, k] == gates[n, k]
                elif held[n, k] < 4:
                    assert asked[experts[n, k]] > room
                    assert weights[n, k] == pytest.approx(probabilities[n, held[n, k]])
                    assert held[n, 0] != held[n, 1]
                else:  # every expert is full, or the row's own
                    free = set(np.flatnonzero(load < room))
                    assert free <= {held[n, 1 - k]} and weights[n, k] == 0

    holds()
