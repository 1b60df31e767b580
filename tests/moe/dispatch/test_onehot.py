"""The one-hot form by hand: dispatch as a matrix of 0 and 1, combine as the same weighted by gates."""

import numpy as np
import pytest
from mindspore import Tensor

from switchyard.moe.dispatch.onehot import OneHotCombine, OneHotDispatch, OneHotPlan

# Three tokens, two experts of one slot each. Tokens 0 and 1 want expert 0, token 2 wants expert 1.
EXPERTS = np.array([[[0], [0], [1]]], np.int32)
GATES = np.array([[[0.5], [0.75], [0.25]]], np.float32)


@pytest.mark.parametrize(("order", "winner"), [("position", 0), ("probability", 1)])
def test_three_tokens(order, winner, pynative):
    dispatch, combine = OneHotPlan(2, 1, 0.6, order)(Tensor(EXPERTS), Tensor(GATES))
    wanted = np.zeros((1, 3, 2, 1), np.float32)
    wanted[0, winner, 0, 0] = wanted[0, 2, 1, 0] = 1
    np.testing.assert_array_equal(dispatch.asnumpy(), wanted)
    np.testing.assert_array_equal(combine.asnumpy(), wanted * GATES[..., None])

    rows = np.array([[[1, 10], [2, 20], [3, 30]]], np.float32)
    slots = OneHotDispatch()(Tensor(rows), dispatch)
    np.testing.assert_array_equal(slots.asnumpy(), [[[rows[0, winner]], [[3, 30]]]])
    back = np.zeros((1, 3, 2), np.float32)
    back[0, winner] = rows[0, winner] * GATES[0, winner]
    back[0, 2] = [0.75, 7.5]
    np.testing.assert_allclose(OneHotCombine()(slots, combine).asnumpy(), back)


def test_padding_has_no_seat(pynative):
    experts = np.array([[[2], [0], [1]]], np.int32)
    dispatch, _ = OneHotPlan(2, 1, 0.6, "position")(Tensor(experts), Tensor(GATES))
    np.testing.assert_array_equal(dispatch.asnumpy().sum((2, 3)), [[0, 1, 1]])


def test_soft_weights_mix_rows(pynative):
    """Any weights do: a slot is a weighted sum of rows, a row a weighted sum of slots."""
    random = np.random.default_rng(0)
    rows, weights = random.normal(0, 1, (2, 5, 3)), random.random((2, 5, 4, 2))
    rows, weights = rows.astype(np.float32), weights.astype(np.float32)
    slots = OneHotDispatch()(Tensor(rows), Tensor(weights)).asnumpy()
    np.testing.assert_allclose(slots, np.einsum("gnec,gnd->gecd", weights, rows), atol=1e-5)
    back = OneHotCombine()(Tensor(slots), Tensor(weights)).asnumpy()
    np.testing.assert_allclose(back, np.einsum("gnec,gecd->gnd", weights, slots), atol=1e-5)
