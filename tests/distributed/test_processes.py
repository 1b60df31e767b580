"""Processes: what is refused, how a configuration is shared out, what one process alone does."""

import numpy as np
import pytest

from switchyard.config import build
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import (
    SINGLE,
    Processes,
    is_first,
    is_scheduler,
    local_config,
    must_block,
    on_one_device,
    own_rank,
    require_one_device,
    waits_for_nothing,
    world_size,
)
from switchyard.errors import UserError
from switchyard.training.limits import check_degrees

EXPERTS = {"expert_num": 4}


def test_what_msrun_says_of_a_process():
    assert world_size({}) == 1 and is_first({}) and not is_scheduler({})
    assert world_size({"MS_WORKER_NUM": "4"}) == 1  # a word of somebody else's
    worker = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "RANK_ID": "1"}
    assert own_rank(worker) == 1 and own_rank({"RANK_ID": "1"}) == 0
    assert world_size(worker) == 4 and not is_first(worker) and is_first(worker | {"RANK_ID": "0"})
    scheduler = worker | {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"}
    assert world_size(scheduler) == 4 and is_scheduler(scheduler) and not is_first(scheduler)


@pytest.mark.parametrize(
    ("tree", "count", "says"),
    [
        (
            {"parallel": {"data_parallel": 2}},
            1,
            r"data_parallel: 2; the degrees need 2 processes, 1 process runs: bash",
        ),
        (
            {"parallel": {"data_parallel": 1}},
            4,
            r"parallel.data_parallel: 1; the degrees need 1 processes, 4 processes run: set .*data_parallel=4",
        ),
        ({"parallel": {"optimizer_shard": 1}}, 1, "parallel.optimizer_shard: 1; .*leave it at its default"),
        ({"parallel": {"recompute": True}}, 1, "parallel.recompute: True; "),
        (
            {"parallel": {"data_parallel": 2, "model_parallel": 2}},
            4,
            "parallel.model_parallel: 2; training in processes shards data_parallel and expert_parallel only",
        ),
        (
            {"parallel": {"data_parallel": 2}, "moe": EXPERTS | {"groups": 1}},
            2,
            r"moe.groups: 1; must be a multiple of parallel.data_parallel \(2\)",
        ),
        (
            {"parallel": {"data_parallel": 2, "expert_parallel": 2}, "moe": EXPERTS | {"router": "merged"}},
            2,
            "parallel.expert_parallel: 2; merged experts need all",
        ),
    ],
)
def test_refused_in_one_line(tree, count, says):
    with pytest.raises(UserError, match=says) as caught:
        check_degrees(build(tree), count)
    assert "\n" not in str(caught.value)


def test_a_compiler_cuts_what_processes_cannot():
    tree = {"parallel": {"data_parallel": 2, "model_parallel": 2, "optimizer_shard": 1, "recompute": True}}
    check_degrees(build(tree), 4, compiled=True)
    experts = {"parallel": {"data_parallel": 2, "expert_parallel": 2}, "moe": EXPERTS | {"dispatch": "dropless"}}
    check_degrees(build(experts), 2, compiled=True)
    with pytest.raises(UserError, match=r"parallel.model_parallel: 2; .*leave it at its default \(for a reason\)"):
        check_degrees(build(tree), 4, why="for a reason")


def test_evaluation_works_alone():
    require_one_device(build({}))
    for key, value in (("data_parallel", 2), ("optimizer_shard", 1), ("recompute", True)):
        with pytest.raises(UserError, match=f"parallel.{key}: {value}; this command is one process"):
            require_one_device(build({"parallel": {key: value}}))


def test_accepted():
    check_degrees(build({}), 1)
    for further in ({}, {"record": "a"}, {"replay": "a"}, {"copies": 2}, {"dispatch": "dropless"}):
        tree = {"parallel": {"data_parallel": 4, "expert_parallel": 2}, "moe": EXPERTS | further}
        check_degrees(build(tree), 4)


def test_a_process_gets_its_share():
    config = build({"data": {"batch_size": 12}, "parallel": {"data_parallel": 2}, "moe": EXPERTS | {"groups": 4}})
    own = local_config(config, Processes(1, 2, ParallelDims.of(config.parallel)))
    assert (own.data.batch_size, own.groups, own.rows * 2) == (6, 2, config.rows)
    assert local_config(config, SINGLE) is config


def test_the_same_model_on_one_device():
    cut = {"data_parallel": 2, "expert_parallel": 2}
    single = on_one_device(build({"parallel": cut, "moe": EXPERTS}))
    assert single.devices == 1 and single.groups == 1  # without drops groups make no difference
    check_degrees(single, 1)
    assert on_one_device(build({"parallel": cut, "moe": EXPERTS | {"eval_capacity_factor": 1.5}})).groups == 2
    assert (
        on_one_device(build({"parallel": {"data_parallel": 2}, "moe": EXPERTS, "model": {"type": "vision"}})).groups
        == 2
    )
    plain = build({"moe": {"groups": 3}})
    assert on_one_device(plain) is plain


def test_parts_make_up_the_whole():
    whole = np.arange(24).reshape(2, 6, 2)
    parts = [Processes(rank, 3, ParallelDims(3)).part(whole, 1) for rank in range(3)]
    assert (np.concatenate(parts, 1) == whole).all() and parts[0].shape == (2, 2, 2)
    halves = [Processes(rank, 4, ParallelDims(2, model_parallel=2)).part(whole, 1) for rank in range(4)]
    assert all((halves[rank] == whole[:, rank // 2 * 3 :][:, :3]).all() for rank in range(4))  # model slices read alike


def test_one_alone_hears_itself():
    values = np.array([1.5, 2.5])
    assert SINGLE.gather(values).tolist() == [[1.5, 2.5]] and SINGLE.is_first
    assert SINGLE.any_rank(True) and not SINGLE.any_rank(False)
    SINGLE.barrier()


@pytest.mark.parametrize(
    ("parallel", "context", "blocks"),
    [
        ({"data_parallel": 2}, {}, True),
        ({"data_parallel": 2, "optimizer_shard": 1}, {}, False),
        ({"model_parallel": 2, "optimizer_shard": 1}, {}, True),
        ({"pipeline_stage": 2, "micro_batch_num": 2}, {}, False),  # of one device each: nothing is summed
        ({"data_parallel": 2}, {"launch_blocking": False}, False),
        ({"data_parallel": 2, "optimizer_shard": 3}, {"launch_blocking": True}, True),
    ],
)
def test_kernels_are_waited_for_where_sums_would_race(parallel, context, blocks):
    assert must_block(build({"parallel": parallel, "context": context})) is blocks


@pytest.mark.parametrize(
    ("target", "count", "blocking", "nothing"),
    [("GPU", 2, False, True), ("GPU", 2, None, False), ("GPU", 1, False, False), ("CPU", 2, False, False)],
)
def test_several_gpus_may_be_told_to_wait_for_nothing(target, count, blocking, nothing, monkeypatch):
    monkeypatch.setattr("mindspore.get_context", {"device_target": target}.get)
    config = build({"parallel": {"model_parallel": 2}, "context": {"launch_blocking": blocking}})
    assert waits_for_nothing(config, Processes(0, count)) is nothing
