"""The order of choices found by counting, held equal to the one found by sorting."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from switchyard.moe.dispatch.counted_order import CountedOrder, countable
from switchyard.moe.dispatch.plan import CapacityPlan, ChoiceOrder


@pytest.mark.parametrize(("groups", "rows", "choices", "experts"), [(1, 64, 1, 4), (2, 96, 2, 5), (3, 32, 3, 2)])
@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_counting_and_sorting_find_the_same_places(groups, rows, choices, experts, mode):
    ms.set_context(mode=mode)
    random = np.random.default_rng(rows)
    chosen = random.integers(0, experts + 1, (groups, rows * choices)).astype(np.int32)  # `experts`: nowhere
    gates = Tensor(random.random(chosen.shape, np.float32))
    expected = ChoiceOrder(experts, choices, "position")(Tensor(chosen), gates)[1].asnumpy()
    found = CountedOrder(experts, choices)(Tensor(chosen)).asnumpy()
    real = chosen < experts
    np.testing.assert_array_equal(found[real], expected[real])
    assert (found[~real] >= 2**24 - 1).all()  # behind any capacity


@pytest.mark.parametrize(("groups", "choices", "factor"), [(1, 1, 0.5), (3, 2, 0.75), (1, 2, None)])
def test_counting_and_sorting_make_the_same_plan(groups, choices, factor, pynative):
    random = np.random.default_rng(choices)
    chosen = Tensor(random.integers(0, 5, (groups, 32, choices)).astype(np.int32))  # of four experts
    expected, found = (
        CapacityPlan(4, choices, factor, "position", counts=counts)(chosen, ops.ones(chosen.shape))
        for counts in (False, True)
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].asnumpy(), array.asnumpy(), name)


def test_all_choices_of_one_expert_keep_their_places():
    position = CountedOrder(2, 1)(Tensor(np.ones((1, 32), np.int32)))
    np.testing.assert_array_equal(position.asnumpy(), [np.arange(32)])


@pytest.mark.parametrize(("choices", "able"), [(32, True), (96, True), (8192, True), (100, False), (7, False)])
def test_blocks_must_divide_the_choices(choices, able):
    assert countable(choices) is able
