"""What tests of several files look at: the compiled steps of the layouts, each compiled once."""

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from oracles.layouts import DEVICES, DROPLESS, FURTHER, LAYOUTS, VOCAB, rank_of

from switchyard.parallel.simulate import Report, compile_step


@pytest.fixture(scope="session")
def compile_layout(tmp_path_factory) -> Callable[[str], Report]:
    """Name of a layout -> what the compiler makes of the step of its rank; test processes share a folder for it."""
    base, held = tmp_path_factory.getbasetemp(), {}
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "layouts"
    folder.mkdir(exist_ok=True)

    def compiled(name: str) -> Report:
        if name not in held:
            tree = (LAYOUTS | FURTHER | DROPLESS)[name]
            held[name] = shared(folder / name.replace(" ", "_"), tree, rank_of(name))
        return held[name]

    return compiled


def shared(path: Path, tree: dict, rank: int) -> Report:
    """Reads a report, or compiles and writes it while another process waits."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            path.write_bytes(pickle.dumps(compile_step(tree, DEVICES, rank, vocab=VOCAB)))
        return pickle.loads(path.read_bytes())
