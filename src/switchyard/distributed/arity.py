"""Functions of a fixed number of arguments: `ops.Morph` takes no others."""

import inspect
from collections.abc import Callable


def fixed(work: Callable, count: int) -> Callable:
    """Returns `work` as a function of `count` arguments, itself where it takes no `*arguments`."""
    kinds = {parameter.kind for parameter in inspect.signature(work).parameters.values()}
    return _FIXED[count](work) if inspect.Parameter.VAR_POSITIONAL in kinds else work


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


_FIXED = {4: _of_four, 5: _of_five, 6: _of_six, 7: _of_seven, 8: _of_eight, 9: _of_nine, 10: _of_ten}
