"""Makes functions of a fixed number of arguments: `ops.Morph` takes no others."""

import inspect
from collections.abc import Callable

from switchyard.errors import UserError


def fixed(work: Callable, count: int) -> Callable:
    """Returns `work` as a function of `count` arguments, itself where it takes no `*arguments`."""
    kinds = {parameter.kind for parameter in inspect.signature(work).parameters.values()}
    return _function_of(count)(work) if inspect.Parameter.VAR_POSITIONAL in kinds else work


def _of_four(work: Callable) -> Callable:
    def call(a, b, c, d):
        return work(a, b, c, d)

    return call


def _of_five(work: Callable) -> Callable:
    def call(a, b, c, d, e):
        return work(a, b, c, d, e)

    return call


def _of_six(work: Callable) -> Callable:
    def call(a, b, c, d, e, f):
        return work(a, b, c, d, e, f)

    return call


def _of_seven(work: Callable) -> Callable:
    def call(a, b, c, d, e, f, g):
        return work(a, b, c, d, e, f, g)

    return call


def _of_eight(work: Callable) -> Callable:
    def call(a, b, c, d, e, f, g, h):
        return work(a, b, c, d, e, f, g, h)

    return call


def _of_nine(work: Callable) -> Callable:
    def call(a, b, c, d, e, f, g, h, i):
        return work(a, b, c, d, e, f, g, h, i)

    return call


def _of_ten(work: Callable) -> Callable:
    def call(a, b, c, d, e, f, g, h, i, j):
        return work(a, b, c, d, e, f, g, h, i, j)

    return call


def _of_eleven(work: Callable) -> Callable:
    def call(a, b, c, d, e, f, g, h, i, j, k):
        return work(a, b, c, d, e, f, g, h, i, j, k)

    return call


def _of_twelve(work: Callable) -> Callable:
    def call(a, b, c, d, e, f, g, h, i, j, k, m):
        return work(a, b, c, d, e, f, g, h, i, j, k, m)

    return call


_FIXED = (_of_four, _of_five, _of_six, _of_seven, _of_eight, _of_nine, _of_ten, _of_eleven, _of_twelve)
LEAST, MOST = 4, 12  # arguments


def _function_of(count: int) -> Callable:
    """Returns what fixes `count` arguments (UserError: more than MOST, as only many routers of a layer have)."""
    if not LEAST <= count <= MOST:
        raise UserError(
            f"moe.copies: the routers of a layer hand {count} tensors to one operator of a compiled program, at most "
            f"{MOST}: lower it"
        )
    return _FIXED[count - LEAST]
