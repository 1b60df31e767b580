"""What experts do, from choices that were typed by hand, and against literal loops."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchyard.report import analysis

# six tokens of a vocabulary of three, two choices each among three experts; -1 is no expert
TOKENS = np.array([0, 0, 1, 1, 2, 2])
CHOICES = np.array([[0, 1], [0, 2], [1, 0], [1, -1], [2, 1], [-1, -1]])
COUNTS = [[2, 1, 1], [1, 2, 0], [0, 1, 1]]  # token, expert


def routings(experts: int = 4, layers: int = 3):
    """Choices [M, N, K] of N tokens, different experts for each token, some of them none."""
    token = st.permutations(range(-1, experts)).map(lambda order: order[:2])
    row = st.lists(token, min_size=layers, max_size=layers)
    return st.lists(row, min_size=1, max_size=12).map(lambda rows: np.array(rows).transpose(1, 0, 2))


def test_counts_of_tokens_and_experts():
    assert analysis.count_choices(TOKENS, CHOICES, 3, 3).tolist() == COUNTS


def test_mutual_information_by_its_definition():
    found = analysis.mutual_information(np.array(COUNTS))
    total = 9  # choices
    for token, row in enumerate(COUNTS):
        for expert, count in enumerate(row):
            of_token, of_expert = sum(row) / total, sum(other[expert] for other in COUNTS) / total
            exact = math.log2(count / total / (of_token * of_expert)) if count else -math.inf
            assert found[token, expert] == pytest.approx(exact)


def test_frequent_tokens_begin_with_the_most_frequent():
    counts = np.array([[5, 1], [9, 9], [0, 4]])
    occurrences = np.array([6, 10, 4])  # token 1 chose two experts at 8 of its 10 places
    found = analysis.frequent_tokens(counts, occurrences, 0, 5)
    assert [(use.token, use.count, use.total) for use in found] == [(1, 9, 10), (0, 5, 6)]
    assert [use.token for use in analysis.frequent_tokens(counts, occurrences, 1, 2)] == [1, 2]


def test_exclusive_tokens_need_a_count_and_more_than_chance():
    """Token 2 goes to expert 0 alone but twice only; token 1 goes everywhere."""
    counts = np.array([[20, 2], [40, 40], [2, 0]])

    def exclusive(expert: int, most: int, least: int) -> list[int]:
        return [use.token for use in analysis.exclusive_tokens(counts, counts.sum(1), expert, most, least)]

    assert exclusive(0, 5, 3) == [0]
    assert exclusive(0, 5, 1) == [2, 0]
    assert exclusive(0, 1, 1) == [2]
    assert exclusive(1, 5, 1) == [1]


@given(routings())
def test_coactivation_against_a_loop(choices):
    found, exact = analysis.coactivation(choices[0], 4), np.zeros((4, 4), int)
    for token in choices[0]:
        for one in token:
            for other in token:
                if one >= 0 and other >= 0:
                    exact[one, other] += 1
    assert found.tolist() == exact.tolist()


def test_lift_is_one_where_loads_explain_the_pairs():
    pairs = np.array([[20, 10, 10], [10, 20, 10], [10, 10, 20]])
    np.testing.assert_allclose(analysis.pair_lift(pairs), 1 - np.eye(3))


def test_lift_of_pairs_by_hand():
    """Loads 30, 20, 10: products 600, 300, 200 of 1,100 in all; 30 tokens with two experts each."""
    pairs = np.array([[30, 20, 10], [20, 20, 0], [10, 0, 10]])
    lift = analysis.pair_lift(pairs)
    assert lift[0, 1] == lift[1, 0] == pytest.approx(20 / (30 * 600 / 1100))
    assert lift[0, 2] == pytest.approx(10 / (30 * 300 / 1100))
    assert lift[1, 2] == 0


@given(routings())
def test_flow_against_a_loop(choices):
    first = choices[:, :, 0]
    for before, after in pairwise(first):
        exact = np.zeros((4, 4), int)
        for one, other in zip(before, after):
            if one >= 0 and other >= 0:
                exact[one, other] += 1
        assert analysis.flow(before, after, 4).tolist() == exact.tolist()


@given(routings())
def test_paths_against_a_loop(choices):
    first, exact = choices[:, :, 0], {}
    for token in first.T:
        if (token >= 0).all():
            exact[tuple(token)] = exact.get(tuple(token), 0) + 1
    found = analysis.frequent_paths(first, 100)
    assert {path.experts: path.count for path in found} == exact
    assert [path.count for path in found] == sorted(exact.values(), reverse=True)
    for path in found:
        assert tuple(first[:, path.first]) == path.experts


def test_expectation_of_a_path_by_hand():
    """Layer 1 sends 3 of 4 tokens to expert 0, layer 2 sends 2 of 4 to expert 1: 4 * 3/4 * 2/4 = 1.5."""
    path = analysis.frequent_paths(np.array([[0, 0, 0, 1], [1, 1, 0, 0]]), 1)[0]
    assert (path.experts, path.count, path.expected, path.first) == ((0, 1), 2, 1.5, 0)


def test_bins_of_equal_size():
    values, losses = np.array([0.9, 0.1, 0.2, 0.8]), np.array([1.0, 4.0, 2.0, 3.0])
    low, high = analysis.binned(values, losses, 2)
    assert low == pytest.approx((0.15, 3.0, 1.0))  # the standard error of 4 and 2 is 1
    assert high == pytest.approx((0.85, 2.0, 1.0))
    assert len(analysis.binned(values, losses, 10)) == 4


def test_dead_and_starved_experts():
    load = np.array([0, 100, 3, 97])
    assert analysis.dead_experts(load) == [0]
    assert analysis.starved_experts(load, 0.1) == [2]
    assert analysis.dead_experts(np.zeros(3)) == []
