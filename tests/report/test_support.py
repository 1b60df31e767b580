"""The matrix of what trains with what: every cell is an answer of the program."""

import subprocess
import sys

import pytest

from switchyard.moe.routing import known_routers
from switchyard.report import support
from switchyard.report.support import COMPILED, DEGREES, DISPATCHES, EXPLICIT, TARGETS, answer


@pytest.mark.parametrize(
    ("router", "dispatch", "degree", "target", "expected"),
    [
        ("switch", "capacity", "tensor", "Ascend", COMPILED),
        ("switch", "dropless", "expert", "Ascend", COMPILED),
        ("switch", "dropless", "expert", "GPU", EXPLICIT),
        ("switch", "dropless", "tensor", "GPU", "parallel.model_parallel: 2; training in processes cuts"),
        ("switch", "capacity", "expert", "CPU", EXPLICIT),
        ("switch", "capacity", "stages, data", "GPU", "parallel.pipeline_stage: 2; on GPU a stage is one device"),
        ("tree", "capacity", "data", "Ascend", EXPLICIT),
        ("dense", "dropless", "data", "Ascend", "moe.dispatch: dropless; router 'dense' does not choose experts"),
        (
            "mixture_of_depths",
            "capacity",
            "expert",
            "Ascend",
            "parallel.expert_parallel: 2; must divide moe.expert_num",
        ),
    ],
)
def test_answers_known_by_hand(router, dispatch, degree, target, expected):
    assert answer(router, dispatch, "text", DEGREES[degree], target).startswith(expected)


@pytest.mark.parametrize("target", TARGETS)
def test_every_router_and_dispatch_has_one_row(target):
    found = [(router, one) for row in support.rows(target) for router in row.routers for one in row.dispatches]
    assert len(found) == len(set(found))
    alone = {"random_in_group"}  # needs token ids and task ids: no network has both
    assert set(found) == {(router, one) for router in set(known_routers()) - alone for one in DISPATCHES}
    assert all(len(row.answers) == len(DEGREES) for row in support.rows(target))


def test_a_new_refusal_shows_in_the_matrix(monkeypatch):
    """The matrix asks `check_mesh`: no table beside it says what trains."""
    before = answer("switch", "capacity", "text", DEGREES["data"], "Ascend")

    def refuses(config, count, target):
        raise support.UserError("moe.router: switch; not today (a test)")

    monkeypatch.setattr(support, "check_mesh", refuses)
    assert (before, answer("switch", "capacity", "text", DEGREES["data"], "Ascend")) == (
        COMPILED,
        "moe.router: switch; not today (a test)",
    )
    assert support.reason("moe.router: switch; not today (a test)", "switch") == "not today"


def test_the_command_prints_the_tables():
    done = subprocess.run(
        [sys.executable, "-m", "switchyard.report.support"], capture_output=True, text=True, check=True
    )
    assert done.stdout == support.render() + "\n"
