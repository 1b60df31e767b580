"""Functions of a fixed number of arguments."""

import pytest

from switchyard.distributed.arity import fixed
from switchyard.errors import UserError


def joined(first, *rest):
    return (first, *rest)


@pytest.mark.parametrize("count", range(4, 13))
def test_arguments_arrive_in_order(count):
    work = fixed(joined, count)
    assert work.__code__.co_argcount == count and work(*range(count)) == tuple(range(count))


def test_a_function_without_a_star_is_handed_back():
    assert fixed(abs, 1) is abs


def test_more_routers_than_an_operator_takes_are_refused():
    with pytest.raises(UserError, match=r"^moe\.copies: the routers of a layer hand 13 tensors .* at most 12: lower"):
        fixed(joined, 13)
