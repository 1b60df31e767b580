"""Dispatch and combine by gathers, with their handwritten gradients, against one-hot matrix products."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from switchyard.moe.dispatch.onehot import OneHotCombine, OneHotDispatch, OneHotPlan
from switchyard.moe.dispatch.plan import BlockPlan, CapacityPlan
from switchyard.nn.gather import Combine, Dispatch, TakeRows, TakeSlicedRows, with_zero_row

EXPERTS, ROWS, WIDTH = 4, 7, 5
PLAN = ("dispatch_index", "combine_index")


def _routing(groups, choices, padded=0):
    random = np.random.default_rng(choices)
    experts = np.argsort(random.random((groups, ROWS, EXPERTS)), -1)[..., :choices].astype(np.int32)
    gates = random.uniform(0.1, 1, (groups, ROWS, choices)).astype(np.float32)
    if padded:
        experts[:, -padded:], gates[:, -padded:] = EXPERTS, 0
    return Tensor(experts), Tensor(gates)


def _normal(*shape):
    return Tensor(np.random.default_rng(len(shape)).normal(0, 1, shape).astype(np.float32))


def _close(got, wanted):
    for one, two in zip(got, wanted):
        np.testing.assert_allclose(one.asnumpy(), two.asnumpy(), atol=1e-5)


@pytest.mark.parametrize("order", ["position", "probability"])
@pytest.mark.parametrize(("groups", "choices", "padded"), [(1, 1, 0), (1, 2, 2), (3, 1, 1), (3, 3, 1)])
def test_value_and_gradients_equal_the_one_hot_form(order, groups, choices, padded, pynative):
    """The way there, a slot-wise work, and the way back: rows, work and gates get the same gradients."""
    experts, gates = _routing(groups, choices, padded)
    plan = CapacityPlan(EXPERTS, choices, 0.5, order)(experts, gates)
    there, back, one_hot = Dispatch(choices), Combine(choices), OneHotPlan(EXPERTS, choices, 0.5, order)
    one_hot_there, one_hot_back = OneHotDispatch(), OneHotCombine()
    slots = plan["dispatch_index"].shape[1]
    rows, work, d_out = _normal(groups, ROWS, WIDTH), _normal(slots, WIDTH), _normal(groups, ROWS, WIDTH)

    def by_gather(rows, work, gates):
        moved = there(rows, *(plan[name] for name in PLAN)) * work  # [G, M, D]
        flat = gates.reshape(groups, -1)
        out = back(moved, flat, *(plan[name] for name in PLAN))
        return (out * d_out).sum(), out

    def by_one_hot(rows, work, gates):
        dispatch, combine = one_hot(experts, gates)
        moved = one_hot_there(rows, dispatch).reshape(groups, slots, WIDTH) * work
        out = one_hot_back(moved.reshape(groups, EXPERTS, -1, WIDTH), combine)
        return (out * d_out).sum(), out

    (got, d_got) = ms.value_and_grad(by_gather, (0, 1, 2), has_aux=True)(rows, work, gates)
    (wanted, d_wanted) = ms.value_and_grad(by_one_hot, (0, 1, 2), has_aux=True)(rows, work, gates)
    assert float((1 - plan["kept_mask"]).sum().asnumpy()) > 0  # something is dropped
    _close(got, wanted)
    _close(d_got, d_wanted)


def test_block_plan_moves_rows_there_and_back(pynative):
    """With gates of one half and no work, two choices give a real row back, and padding comes back as zero."""
    experts, _ = _routing(2, 2, padded=2)
    plan = BlockPlan(EXPERTS, 2, 3)(experts, ops.ones((2, ROWS, 2)))
    rows, halves = _normal(2, ROWS, WIDTH), ops.ones((2, ROWS * 2)) * 0.5
    there, back = Dispatch(2), Combine(2)

    def round_trip(rows):
        moved = there(rows, *(plan[name] for name in PLAN))
        return back(moved, halves, *(plan[name] for name in PLAN))

    wanted = rows.asnumpy().copy()
    wanted[:, -2:] = 0
    np.testing.assert_allclose(round_trip(rows).asnumpy(), wanted, atol=1e-6)
    gradient = ms.grad(lambda r: round_trip(r).sum())(rows).asnumpy()
    np.testing.assert_allclose(gradient, np.where(np.arange(ROWS) < ROWS - 2, 1, 0)[None, :, None] + 0 * wanted)


def test_an_empty_slot_moves_nothing_and_teaches_nothing(pynative):
    """Whatever stands in an empty slot, not-a-number included, reaches neither outputs nor gradients."""
    experts, gates = Tensor(np.zeros((1, ROWS, 1), np.int32)), ops.ones((1, ROWS, 1))
    plan = CapacityPlan(EXPERTS, 1, 1.0, "position")(experts, gates)
    back = Combine(1)
    filled = (plan["dispatch_index"].asnumpy() < ROWS)[..., None]
    outputs = np.where(filled, 1.0, np.nan) * np.ones((1, 1, WIDTH))

    def loss(outputs, gates):
        return back(outputs, gates, *(plan[name] for name in PLAN)).sum()

    d_outputs, d_gates = ms.grad(loss, (0, 1))(Tensor(outputs.astype(np.float32)), gates.reshape(1, -1))
    np.testing.assert_array_equal(d_outputs.asnumpy(), filled + np.zeros((1, 1, WIDTH)))
    np.testing.assert_array_equal(d_gates.asnumpy(), plan["kept_mask"].asnumpy() * WIDTH)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("take", [TakeRows, TakeSlicedRows])
def test_rows_are_taken_by_their_index_and_the_one_behind_the_last_is_zeros(groups, take, pynative):
    table = np.random.default_rng(0).normal(0, 1, (groups, ROWS, WIDTH)).astype(np.float32)
    index = np.random.default_rng(1).integers(0, ROWS + 1, (groups, 11)).astype(np.int32)
    index[:, 3] = ROWS
    longer = np.concatenate([table, np.zeros((groups, 1, WIDTH), np.float32)], 1)
    wanted = np.stack([longer[g][index[g]] for g in range(groups)])
    np.testing.assert_array_equal(take()(with_zero_row(Tensor(table)), Tensor(index)).asnumpy(), wanted)
