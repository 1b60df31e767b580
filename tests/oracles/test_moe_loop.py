"""The loop oracle is checked itself: its handwritten gradient against central differences."""

import numpy as np
import pytest
from oracles.capacity_law import drop_rate
from oracles.moe_loop import Rules, moe_loop


def _weights(activation, shared, random):
    names = ["w_in", "w_out"] + (["w_gate"] if activation == "swiglu" else [])
    shape = {"w_in": (4, 5), "w_gate": (4, 5), "w_out": (5, 4)}
    weights = {f"experts.{name}": random.normal(0, 0.7, (3, *shape[name])) for name in names}
    if shared:
        weights |= {f"shared.{name}": random.normal(0, 0.7, (1, *shape[name])) for name in names}
    return weights | {"router.weight": random.normal(0, 0.7, (4, 3))}


@pytest.mark.parametrize(
    ("rules", "shared"),
    [
        (Rules("gelu", 1, False, 2, "position"), False),
        (Rules("swiglu", 2, True, 2, "probability"), True),
        (Rules("relu", 2, False, None), True),
    ],
    ids=["gelu-k1", "swiglu-k2-shared", "relu-dropless"],
)
def test_gradient_equals_central_differences(rules, shared):
    random = np.random.default_rng(0)
    weights, rows = _weights(rules.activation, shared, random), random.normal(0, 1, (2, 5, 4))
    valid = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    jitter, d_out = random.uniform(0.9, 1.1, rows.shape), random.normal(0, 1, rows.shape)

    def objective():
        result = moe_loop(rows, valid, weights, rules, jitter=jitter)
        return (result.out * d_out).sum() + 0.3 * result.balance + 0.2 * result.z

    gradients = moe_loop(rows, valid, weights, rules, (d_out, 0.3, 0.2), jitter).gradients
    step = 1e-6
    for name, value in (weights | {"rows": rows}).items():
        for index in random.permutation(value.size)[:25]:
            place = np.unravel_index(index, value.shape)
            kept, value[place] = value[place], value[place] + step
            above = objective()
            value[place] = kept - step
            below = objective()
            value[place] = kept
            assert gradients[name][place] == pytest.approx((above - below) / (2 * step), abs=1e-6), (name, place)


@pytest.mark.parametrize(
    ("experts", "factor", "percent"), [(8, 1.0, 3.30), (8, 1.1, 0.46), (64, 1.0, 9.84), (8, 2.0, 0.0)]
)
def test_capacity_law_figures(experts, factor, percent):
    assert 100 * drop_rate(1024, experts, factor) == pytest.approx(percent, abs=0.005)
