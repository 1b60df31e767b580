"""The examples in the docstrings of the layer, of dispatchers and of routers say what happens."""

import doctest

import pytest

from switchyard.moe import layer
from switchyard.moe.dispatch import dispatchers
from switchyard.moe.routing import base


@pytest.mark.parametrize("module", [layer, dispatchers, base], ids=lambda module: module.__name__)
def test_the_examples_run_as_they_are_written(module, pynative):
    found = doctest.testmod(module)
    assert found.attempted >= 5 and found.failed == 0
