"""The keyed permutation of an epoch: a bijection for every size and key."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchyard.data.permutation import Permutation


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 5000), key=st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_every_number_has_exactly_one_place(count, key):
    assert sorted(Permutation(count, key)(np.arange(count)).tolist()) == list(range(count))


def test_the_key_alone_decides():
    places = np.arange(1000)
    one, again, other = (Permutation(1000, key)(places) for key in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.9


def test_a_place_is_mapped_alone_as_among_others():
    permuted = Permutation(777, (5,))
    assert [int(permuted(np.array([place]))[0]) for place in range(777)] == permuted(np.arange(777)).tolist()


def test_neighbours_are_parted_and_halves_mixed():
    numbers = Permutation(10_000, (7,))(np.arange(10_000))
    assert (np.abs(np.diff(numbers)) == 1).mean() < 0.005  # of a random order 0.0002
    assert abs((numbers[:5000] < 5000).mean() - 0.5) < 0.03


def test_each_first_number_is_about_as_frequent():
    firsts = [int(Permutation(8, (seed,))(np.array([0]))[0]) for seed in range(4000)]
    assert np.bincount(firsts, minlength=8).min() > 400  # 500 expected, standard deviation 21


def test_sizes_beyond_any_array():
    count = 3 * 10**13
    places = np.arange(0, count, count // 1000)
    numbers = Permutation(count, (1,))(places)
    assert len(set(numbers.tolist())) == len(places) and numbers.min() >= 0 and numbers.max() < count


def test_nothing_to_permute_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, (1,))
