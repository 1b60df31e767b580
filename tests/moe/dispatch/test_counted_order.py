"""The order of choices found by counting, held equal to the one found by sorting."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from switchyard.moe.dispatch.counted_order import CountedOrder, countable
from switchyard.moe.dispatch.plan import ChoiceOrder


@pytest.mark.parametrize(("groups", "rows", "choices", "experts"), [(1, 64, 1, 4), (2, 96, 2, 5), (3, 32, 3, 2)])
@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_counting_and_sorting_find_the_same_order(groups, rows, choices, experts, mode):
    ms.set_context(mode=mode)
    random = np.random.default_rng(rows)
    chosen = random.integers(0, experts + 1, (groups, rows * choices)).astype(np.int32)  # `experts`: nowhere
    gates = Tensor(random.random(chosen.shape, np.float32))
    expected = ChoiceOrder(experts, choices, "position")(Tensor(chosen), gates)
    found = CountedOrder(experts, choices)(Tensor(chosen), gates)
    real = chosen < experts  # the position of a choice that goes nowhere means nothing
    for name, left, right in zip(("order", "position", "count", "start"), found, expected):
        left, right = left.asnumpy(), right.asnumpy()
        if name == "position":
            left, right = left[real], right[real]
        np.testing.assert_array_equal(left, right, name)


def test_all_choices_of_one_expert_keep_their_places():
    order, position, count, start = CountedOrder(2, 1)(Tensor(np.ones((1, 32), np.int32)), None)
    np.testing.assert_array_equal(order.asnumpy(), [np.arange(32)])
    np.testing.assert_array_equal(position.asnumpy(), [np.arange(32)])
    assert count.asnumpy().tolist() == [[0, 32]] and start.asnumpy().tolist() == [[0, 0]]


@pytest.mark.parametrize(("choices", "able"), [(32, True), (96, True), (8192, True), (100, False), (7, False)])
def test_blocks_must_divide_the_choices(choices, able):
    assert countable(choices) is able
