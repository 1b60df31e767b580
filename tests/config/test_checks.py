"""ParallelDims that do not fit the model, the batch or each other are refused in one line, before anything is built."""

import pytest

from switchyard.config import build
from switchyard.errors import UserError

MODEL = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 20, "seq_length": 6}
FITS = {"data_parallel": 4, "expert_parallel": 2, "model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 2}


def _build(parallel, model=None, moe=None, batch=8):
    tree = {"model": MODEL | (model or {}), "moe": {"expert_num": 4} | (moe or {}), "data": {"batch_size": batch}}
    return build(tree | {"parallel": parallel})


def test_degrees_that_fit():
    config = _build(FITS)
    assert config.devices == 16 and config.groups == 4


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        ({"expert_parallel": 8, "data_parallel": 8}, {}, "expert_parallel: 8; must divide moe.expert_num"),
        (
            {"expert_parallel": 4, "data_parallel": 2},
            {},
            r"expert_parallel: 4; must divide parallel.data_parallel \(2\)",
        ),
        ({"model_parallel": 3}, {}, r"model_parallel: 3; must divide the key/value heads \(4\)"),
        ({"model_parallel": 2}, {"model": {"intermediate_size": 21}}, r"hidden width of a dense feed-forward \(21\)"),
        (
            {"model_parallel": 2},
            {"moe": {"moe_intermediate_size": 7}},
            r"must divide the hidden width of an expert \(7\)",
        ),
        ({"pipeline_stage": 3}, {}, r"pipeline_stage: 3; at most model.num_layers \(2\)"),
        ({"pipeline_stage": 2}, {}, "micro_batch_num: 1; at least parallel.pipeline_stage"),
        ({"micro_batch_num": 2}, {}, "micro_batch_num: 2; needs parallel.pipeline_stage of 2 or more"),
        ({"data_parallel": 4}, {"batch": 6}, r"data.batch_size: 6; must be a multiple of the routing groups \(4"),
        ({"data_parallel": 4}, {"moe": {"groups": 2}}, r"moe.groups: 2; must be a multiple of .*data_parallel \(4\)"),
        (
            {"data_parallel": 8, "model_parallel": 4, "sequence_parallel": True},
            {},
            r"sequence_parallel: True; model_parallel \(4\) must divide the rows of a data-parallel shard \(6\)",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_named(parallel, changes, message):
    with pytest.raises(UserError, match=message):
        _build(parallel, **changes)


@pytest.mark.parametrize(
    ("parallel", "devices", "slices"),
    [
        ({}, None, 1),
        ({}, 1, 1),
        ({}, 4, 4),
        ({"data_parallel": None, "model_parallel": 2}, 8, 4),
        ({"model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 2}, 4, 1),
        ({"expert_parallel": 2}, None, 2),  # the smallest that experts in two slices allow
        ({"expert_parallel": 2}, 8, 8),
        ({"data_parallel": 2}, 8, 2),  # what is written stays, and is refused where training starts
    ],
)
def test_null_is_all_devices_that_the_other_degrees_leave(parallel, devices, slices):
    config = build({"moe": {"expert_num": 8}, "data": {"batch_size": 16}, "parallel": parallel}, devices=devices)
    assert config.parallel.data_parallel == slices
    assert build(config.model_dump(), devices=64).parallel == config.parallel  # a written configuration holds a number


@pytest.mark.parametrize(
    ("parallel", "says"),
    [
        ({"model_parallel": 2}, r"model_parallel: 2; model_parallel \* pipeline_stage \(2 \* 1\) must divide .* \(9\)"),
        (
            {"pipeline_stage": 2, "micro_batch_num": 2},
            r"pipeline_stage: 2; .*\(1 \* 2\) must divide the number of devices",
        ),
        ({"expert_parallel": 2}, r"expert_parallel: 2; must divide parallel.data_parallel \(9\)"),
    ],
)
def test_degrees_that_leave_no_whole_number_of_devices_are_one_line(parallel, says):
    with pytest.raises(UserError, match=says):
        build({"moe": {"expert_num": 8}, "data": {"batch_size": 18}, "parallel": parallel}, devices=9)
