"""Stacked experts: one batched product equals expert after expert."""

import numpy as np
import pytest
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.moe_loop import work
from oracles.tiny import weights_of

from switchyard.moe.experts import FeedForwardExperts
from switchyard.nn.initializers import InitialWeights


def _experts(activation, dtype=mstype.float32, seed=0, std=(0.5, 0.25)):
    return FeedForwardExperts(3, 6, 8, activation, std, InitialWeights(seed), dtype)


def _rows(*shape):
    return np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)


def _one_by_one(experts, rows, owners, activation):
    """Slice i of rows through expert owners[i], row by row."""
    weights = {f"experts.{name}": value for name, value in weights_of(experts).items()}
    return np.array(
        [[work(x, weights, "experts", owner, activation) for x in rows[i]] for i, owner in enumerate(owners)]
    )


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_stacked_experts_equal_one_by_one(activation, pynative):
    experts, rows = _experts(activation), _rows(3, 4, 6)
    assert (experts.w_gate is None) == (activation != "swiglu")
    wanted = _one_by_one(experts, rows.astype(np.float64), [0, 1, 2], activation)
    np.testing.assert_allclose(experts(Tensor(rows)).asnumpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_blocks_use_their_expert(activation, pynative):
    experts, rows, owners = _experts(activation), _rows(5, 2, 6), [2, 0, 0, 2, 1]
    out = experts.blocks(Tensor(rows), Tensor(np.array(owners, np.int32)))
    np.testing.assert_allclose(
        out.asnumpy(), _one_by_one(experts, rows.astype(np.float64), owners, activation), atol=1e-5
    )


def test_half_precision_products_give_float32(pynative):
    rows = Tensor(_rows(3, 4, 6))
    half, full = _experts("gelu", mstype.float16)(rows), _experts("gelu")(rows)
    assert half.dtype == mstype.float32
    difference = np.abs(half.asnumpy() - full.asnumpy()).max()
    assert 0 < difference < 1e-2


def test_weights_follow_the_generator_and_the_deviations():
    one, same, other = (weights_of(_experts("swiglu", seed=seed)) for seed in (0, 0, 1))
    for name, value in one.items():
        np.testing.assert_array_equal(value, same[name])
        assert np.any(value != other[name])
        assert value.std() == pytest.approx({"w_in": 0.5, "w_gate": 0.5, "w_out": 0.25}[name], rel=0.2)
