"""Rotary frequencies and their scaling against numbers worked out by hand from the public formulas.

A head of 8 columns with theta 10000 has four pairs, which turn by 1, 0.1, 0.01 and 0.001 a position.
"""

import math

import numpy as np
import pytest
from mindspore import Tensor, ops

from switchyard.config import build
from switchyard.nn.rotary import Rotary
from switchyard.nn.rotary_scaling import attention_factor, frequencies

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}


def scaling(**keys):
    return build({"model": {"rotary_scaling": keys}}).model.rotary_scaling


def test_without_scaling():
    np.testing.assert_allclose(frequencies(8, 10000.0), [1, 0.1, 0.01, 0.001], rtol=1e-12)
    assert attention_factor(None) == 1.0


def test_linear_divides_all():
    linear = scaling(type="linear", factor=4)
    np.testing.assert_allclose(frequencies(8, 10000.0, linear), [0.25, 0.025, 0.0025, 0.00025], rtol=1e-12)
    assert attention_factor(linear) == 1.0


def test_llama3_divides_the_slow_ones():
    """In 1024 positions the pairs turn 163, 16.3, 1.63 and 0.163 times: above 4 they stay, below 1 they are divided.

    The third is between: s = (1.62975 - 1) / (4 - 1) = 0.209915, (1 - s) * 0.01 / 8 + s * 0.01 = 0.00308676.
    """
    keys = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 1024}
    llama3 = scaling(type="llama3", factor=8, **keys)
    np.testing.assert_allclose(frequencies(8, 10000.0, llama3), [1, 0.1, 0.00308676, 0.000125], rtol=1e-5)
    assert attention_factor(llama3) == 1.0


def test_yarn_divides_along_a_ramp():
    """A pair turns 32 times in 1024 positions at place 0.71, once at 2.21: the ramp goes from 0 to 3.

    So a third of the second pair, 0.1 and 0.025, is divided, and two thirds of the third, 0.01 and 0.0025.
    """
    yarn = scaling(**YARN)
    np.testing.assert_allclose(frequencies(8, 10000.0, yarn), [1, 0.075, 0.005, 0.00025], rtol=1e-12)
    assert attention_factor(yarn) == pytest.approx(1.138629, abs=1e-6)  # 0.1 ln 4 + 1


def test_yarn_with_other_turns_and_equal_ends():
    """At 200 turns and more nothing stays, so the ramp is a step behind the first pair."""
    yarn = scaling(**YARN, beta_fast=400, beta_slow=200)
    np.testing.assert_allclose(frequencies(8, 10000.0, yarn), [1, 0.025, 0.0025, 0.00025], rtol=1e-12)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"attention_factor": 0.5}, 0.5),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.0, "mscale_all_dim": 0.0}, 0.1 * math.log(4) + 1),
    ],
)
def test_the_factor_of_yarn(keys, factor):
    assert attention_factor(scaling(**YARN, **keys)) == pytest.approx(factor, rel=1e-12)


def test_a_part_of_a_head_rotates(pynative):
    """Of 8 columns the first 4: at position 1 pair (0, 2) turns by 1, pair (1, 3) by 0.01, and both grow by 1.5."""
    yarn = {"type": "yarn", "factor": 1, "attention_factor": 1.5, "original_max_position_embeddings": 64}
    model = build({"model": {"head_size": 8, "partial_rotary": 0.5, "rotary_scaling": yarn}}).model
    rotary = Rotary(2, model)
    cos, sin = rotary.tables(ops.arange(2))
    x = np.array([[1, 2, 3, 4, 5, 6, 7, 8]] * 2, np.float32)
    turned = rotary(Tensor(x), cos, sin).asnumpy()
    first, second = (1.5 * np.array([math.cos(angle), math.sin(angle)]) for angle in (1.0, 0.01))
    wanted = [first @ [1, -3], second @ [2, -4], first @ [3, 1], second @ [4, 2]]
    np.testing.assert_allclose(turned[1], [*wanted, 5, 6, 7, 8], rtol=1e-6)
    np.testing.assert_allclose(turned[0], [1.5, 3, 4.5, 6, 5, 6, 7, 8], rtol=1e-6)
