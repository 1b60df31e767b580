"""Distributions by hand, draws that follow them, and bad settings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchyard.errors import UserError
from switchyard.inference.sampling import Sampler, Sampling, choose, probabilities

MASS = np.array([[0.1, 0.4, 0.2, 0.3]])
LOGITS = np.log(MASS).astype(np.float32) + 5


def test_plain_softmax():
    np.testing.assert_allclose(probabilities(LOGITS), MASS, rtol=1e-6)


def test_temperature_sharpens_and_flattens():
    """At 1/2 masses are squared: 1, 16, 4, 9 of 30. At 1e9 all are equal; near 0 the largest has everything."""
    np.testing.assert_allclose(probabilities(LOGITS, 0.5), MASS**2 / (MASS**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(probabilities(LOGITS, 1e9), np.full((1, 4), 0.25), rtol=1e-6)
    np.testing.assert_allclose(probabilities(LOGITS, 1e-3), [[0, 1, 0, 0]], atol=1e-12)


def test_top_k():
    np.testing.assert_allclose(probabilities(LOGITS, top_k=2), [[0, 4 / 7, 0, 3 / 7]], rtol=1e-6)
    np.testing.assert_allclose(probabilities(LOGITS, top_k=9), MASS, rtol=1e-6)
    np.testing.assert_allclose(probabilities(LOGITS, top_k=0), MASS, rtol=1e-6)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.3, [0, 1, 0, 0]),  # 0.4 reaches 0.3 alone
        (0.45, [0, 4 / 7, 0, 3 / 7]),  # 0.4 does not, 0.4 + 0.3 does
        (0.8, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_top_p(top_p, expected):
    np.testing.assert_allclose(probabilities(LOGITS, top_p=top_p), [expected], rtol=1e-6)


def test_top_p_counts_what_top_k_left():
    """Of 0.4 and 0.3 the first has 4/7 = 0.571 of the mass, which reaches 0.5; of all it has 0.4, which does not."""
    np.testing.assert_allclose(probabilities(LOGITS, top_k=2, top_p=0.5), [[0, 1, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(probabilities(LOGITS, top_p=0.5), [[0, 4 / 7, 0, 3 / 7]], rtol=1e-6)


def test_equal_logits_go_by_id():
    np.testing.assert_allclose(probabilities(np.zeros((1, 4), np.float32), top_k=2), [[0.5, 0.5, 0, 0]])
    assert choose(np.zeros((1, 4), np.float32), Sampling(temperature=0), np.zeros(1)).tolist() == [0]


def test_draws_by_hand():
    """The draw falls into the cumulated mass 0.1, 0.5, 0.7, 1.0."""
    sampling = Sampling(temperature=1.0)
    draws = np.array([0.0, 0.05, 0.15, 0.45, 0.55, 0.69, 0.75, 0.999999])
    found = choose(np.repeat(LOGITS, 8, 0), sampling, draws)
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and found.dtype == np.int32


def test_greedy_is_the_largest_whatever_is_drawn():
    for sampling in (Sampling(temperature=0), Sampling(top_k=1)):
        assert choose(LOGITS, sampling, np.array([0.99])).tolist() == [1]


def test_draws_follow_the_distribution():
    sample = Sampler(Sampling(temperature=1.0, seed=3), 2)
    counts = np.zeros(4)
    for _ in range(5000):
        for token in sample(np.repeat(LOGITS, 2, 0)):
            counts[token] += 1
    np.testing.assert_allclose(counts / 10000, MASS[0], atol=0.02)  # four standard deviations


def test_a_seed_repeats_and_rows_have_their_own_stream():
    def drawn(seed, batch):
        sample = Sampler(Sampling(temperature=1.0, seed=seed), batch)
        return np.array([sample(np.repeat(LOGITS, batch, 0)) for _ in range(40)])

    three = drawn(5, 3)
    np.testing.assert_array_equal(three, drawn(5, 3))
    np.testing.assert_array_equal(three[:, :1], drawn(5, 1))  # a row does not see its neighbours
    assert (three[:, 0] != three[:, 1]).any() and (three != drawn(6, 3)).any()


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12),
    st.floats(0.05, 5),
    st.integers(0, 14),
    st.floats(0.01, 1),
)
def test_what_is_drawn_has_mass(logits, temperature, top_k, top_p):
    logits = np.array([logits], np.float32)
    mass = probabilities(logits, temperature, top_k, top_p)
    assert mass.sum() == pytest.approx(1) and (mass >= 0).all()
    assert mass[0, logits.argmax()] == mass.max() > 0
    if top_k:
        assert (mass > 0).sum() <= top_k
    for draw in (0.0, 0.5, np.nextafter(1, 0)):
        assert mass[0, choose(logits, Sampling(temperature, top_k, top_p), np.array([draw]))[0]] > 0


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"temperature": -0.1}, "--temperature: -0.1"),
        ({"temperature": float("nan")}, "--temperature: nan"),
        ({"temperature": float("inf")}, "--temperature: inf"),
        ({"top_k": -1}, "--top-k: -1"),
        ({"top_p": 0.0}, "--top-p: 0.0"),
        ({"top_p": 1.1}, "--top-p: 1.1"),
        ({"seed": -1}, "--seed: -1"),
    ],
)
def test_bad_settings(setting, field):
    with pytest.raises(UserError, match=f"^{field}; "):
        Sampling(**setting)
