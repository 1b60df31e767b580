"""What every test shares: quiet logs, one hypothesis profile, the two execution modes as fixtures.

The folder of this file is on `sys.path`, so tests import the references that they compare with from `oracles`.
"""

import fcntl
import gc
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # read once, when MindSpore is imported

import pytest
from hypothesis import settings

settings.register_profile("switchyard", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("switchyard")


def pytest_addoption(parser):
    """Adds --long."""
    parser.addoption("--long", action="store_true", help="run the tests marked `long` instead of the others")


def pytest_collection_modifyitems(config, items):
    """Keeps the tests marked `long` for --long, and the others for all else, whatever -m says besides."""
    wanted = config.getoption("--long")
    chosen, others = [], []
    for item in items:
        (chosen if (item.get_closest_marker("long") is not None) == wanted else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.fixture(autouse=True)
def own_routers(monkeypatch):
    """Forgets what a test registers: tables that list every router are the same whatever ran before them."""
    if routing := sys.modules.get("switchyard.moe.routing.base"):
        monkeypatch.setattr(routing, "_ROUTERS", dict(routing._ROUTERS))


@pytest.fixture
def usual_hangup():
    """SIGHUP ends a process, though nohup may have started the tests, and what is ignored stays so in children."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def frozen():
    """Leaves what the imports made out of later collections: a tenth of a second each, one a compile."""
    import switchyard.training.loop  # noqa: F401  imports nearly everything

    gc.collect()
    gc.freeze()


def _in_mode(mode: int):
    import mindspore as ms

    gc.collect()  # the Cells of earlier tests: one that is collected between two calls makes a graph compile again
    before = ms.get_context("mode")
    # Synchronous: an error names its own line, and small operators run several times faster.
    ms.set_context(mode=mode, pynative_synchronize=True)
    yield
    ms.set_context(mode=before, pynative_synchronize=False)


@pytest.fixture
def pynative(frozen):
    """Operators run one by one: right for a shape that is used once."""
    yield from _in_mode(1)


@pytest.fixture
def graph(frozen):
    """Cells are compiled: right for one shape with many contents, and for what only a compiler gets wrong."""
    yield from _in_mode(0)


@pytest.fixture(scope="session")
def workers():
    """Compiles and references run as forks of processes that have imported MindSpore, see oracles.workers."""
    from oracles.workers import Workers

    from switchyard.simulation import compile as simulate

    ready = Workers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "run_child", ready.run_child)
        yield
    ready.end()


@pytest.fixture(scope="session")
def compile_layout(tmp_path_factory, workers) -> Callable:
    """Name of a layout -> what the compiler makes of the step of its rank; test processes share a folder for it."""
    from oracles.layouts import DROPLESS, FURTHER, LAYOUTS, rank_of

    base, held = tmp_path_factory.getbasetemp(), {}
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "layouts"
    folder.mkdir(exist_ok=True)

    def compiled(name: str):
        if name not in held:
            tree = (LAYOUTS | FURTHER | DROPLESS)[name]
            held[name] = shared(folder / name.replace(" ", "_"), tree, rank_of(name))
        return held[name]

    return compiled


def shared(path: Path, tree: dict, rank: int):
    """Reads a report, or compiles and writes it while another process waits."""
    from oracles.layouts import DEVICES, VOCAB

    from switchyard.simulation.compile import compile_step

    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            path.write_bytes(pickle.dumps(compile_step(tree, DEVICES, rank, vocab=VOCAB)))
        return pickle.loads(path.read_bytes())
