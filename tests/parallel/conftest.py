"""What tests of several files look at: the compiled steps of the layouts, each compiled once."""

from collections.abc import Callable

import pytest
from oracles.layouts import DEVICES, DROPLESS, FURTHER, LAYOUTS, RANK, VOCAB

from switchyard.parallel.simulate import Report, compile_step


@pytest.fixture(scope="session")
def compile_layout() -> Callable[[str], Report]:
    """Name of a layout -> what the compiler makes of the step of its rank 5."""
    held = {}

    def compiled(name: str) -> Report:
        if name not in held:
            held[name] = compile_step((LAYOUTS | FURTHER | DROPLESS)[name], DEVICES, RANK, vocab=VOCAB)
        return held[name]

    return compiled
