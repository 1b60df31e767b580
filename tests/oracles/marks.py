"""Marks of cases: which of a table are run always, and which only by `scripts/run_tests.sh --long`."""

from collections.abc import Iterable

import pytest


def long_but(names: Iterable[str], short: Iterable[str]) -> list:
    """Returns the names as parameters of a test, marked `long` unless they stand in `short`.

    Raises:
        ValueError: `short` holds a name that the table has not.
    """
    names, short = list(names), set(short)
    if unknown := short - set(names):
        raise ValueError(f"no such case: {sorted(unknown)}")
    return [name if name in short else pytest.param(name, marks=pytest.mark.long) for name in names]
