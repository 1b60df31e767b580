"""The matrix of what trains with what: every cell is an answer of the program."""

import inspect
import re

import pytest

from switchyard import cli
from switchyard.moe.routing import known_routers
from switchyard.report import support
from switchyard.report.support import COMPILED, DEGREES, DISPATCHES, EXPLICIT, TARGETS, answer
from switchyard.training import limits


@pytest.mark.parametrize(
    ("router", "dispatch", "degree", "target", "expected"),
    [
        ("switch", "capacity", "tensor", "Ascend", COMPILED),
        ("switch", "dropless", "expert", "Ascend", COMPILED),
        ("switch", "dropless", "expert", "GPU", EXPLICIT),
        ("switch", "dropless", "tensor", "GPU", "parallel.model_parallel: 2; training in processes shards"),
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


@pytest.mark.parametrize(
    ("keys", "degree", "target", "expected"),
    [
        ("moe.record=a.safetensors", "data", "Ascend", COMPILED),
        (
            "moe.record=a.safetensors",
            "stages",
            "Ascend",
            "moe.record: a.safetensors; null with parallel.pipeline",
        ),
        ("model.tie_word_embeddings=true", "stages", "GPU", "model.tie_word_embeddings: True; False with"),
        ("model.compute_dtype=bfloat16", "data", "GPU", "model.compute_dtype: bfloat16; MindSpore cannot"),
        ("train.gradient_accumulation_steps=2", "stages", "Ascend", COMPILED),
    ],
)
def test_further_keys_are_asked_too(keys, degree, target, expected):
    assert answer("switch", "capacity", "text", DEGREES[degree], target, keys).startswith(expected)


def test_every_refusal_of_the_limits_shows_in_the_tables():
    """Every key that `training.limits` names in a refusal is tried: a new one fails here until it is."""
    named = set(re.findall(r"Refusal\(f?\"([a-z_.]+)\"", inspect.getsource(limits)))
    tried = {word.split("=")[0] for keys in support.KEYS for word in keys.split()}
    tried |= {f"parallel.{key}" for keys in DEGREES.values() for key in keys} | {"moe.router", "moe.dispatch"}
    assert named - tried == {"model.type", "moe.router.consistency_loss_factor"}  # by network; by router random


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


def test_the_command_prints_the_tables(capsys):
    assert cli.run(support.main, []) == 0
    assert capsys.readouterr().out == support.render() + "\n"
    assert cli.run(support.main, ["--all"]) == 2
    assert capsys.readouterr().err.startswith("error: unrecognized arguments: --all")
