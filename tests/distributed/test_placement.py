"""Ranks, groups and slices, against numbers typed by hand."""

import numpy as np
import pytest

from switchyard.distributed.placement import (
    Coordinates,
    ParallelDims,
    kept_slices,
    layers_of_stages,
    optimizer_cut,
    optimizer_shards,
    placement,
    shard_slices,
    stages_of,
)
from switchyard.errors import UserError

CUBE = ParallelDims(data_parallel=4, expert_parallel=2, model_parallel=2, pipeline_stage=2)


def test_ranks_are_numbered_stage_by_stage_and_model_slices_are_neighbours():
    assert CUBE.devices == 16 and CUBE.outer == 2 and CUBE.stage_devices == 8
    assert CUBE.coordinates(13) == Coordinates(stage=1, outer=1, expert=0, model=1)
    assert [CUBE.along(rank) for rank in range(16)] == [(rank,) for rank in range(16)]
    assert [CUBE.data_shard(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_groups():
    assert CUBE.expert_group(13) == (13, 15) and CUBE.along(13, "outer") == (9, 13)
    assert CUBE.along(13, "outer", "expert") == (9, 11, 13, 15) and CUBE.model_group(13) == (12, 13)
    assert CUBE.along(13, "outer", "expert", "model") == tuple(range(8, 16))
    flat = ParallelDims(data_parallel=8, expert_parallel=4)
    assert flat.expert_group(5) == (4, 5, 6, 7) and flat.along(5, "outer") == (1, 5)


def test_a_rank_that_is_not_there():
    with pytest.raises(UserError, match="rank: 16; these degrees have ranks 0 to 15"):
        CUBE.coordinates(16)


@pytest.mark.parametrize(
    ("name", "shape", "cut"),
    [
        ("layers.0.attention.qkv.weight", (8, 24), (None, "model")),
        ("layers.0.attention.qkv.bias", (24,), ("model",)),
        ("layers.0.attention.out.weight", (8, 8), ("model", None)),
        ("layers.0.attention.out.bias", (8,), (None,)),
        ("layers.0.attention.qk_norm.queries.gain", (4,), (None,)),
        ("layers.1.feed_forward.experts.w_in", (4, 8, 6), ("expert", None, "model")),
        ("moment1.layers.1.feed_forward.experts.w_out", (4, 6, 8), ("expert", "model", None)),
        ("layers.1.feed_forward.shared.w_gate", (1, 8, 6), (None, None, "model")),
        ("layers.1.feed_forward.shared.gate", (1, 8, 1), (None, None, None)),
        ("layers.0.feed_forward.w_out", (1, 6, 8), (None, "model", None)),
        ("layers.1.feed_forward.router.weight", (8, 4), (None, None)),
        ("embedding.table", (13, 8), (None, None)),
        ("correction1", (), ()),
    ],
)
def test_what_cuts_a_parameter(name, shape, cut):
    assert placement(name, shape, CUBE) == cut


def test_an_axis_that_does_not_divide_is_named():
    with pytest.raises(UserError, match=r"experts.w_in: \(3, 8, 6\); expert_parallel \(2\) must divide 3"):
        placement("layers.1.feed_forward.experts.w_in", (3, 8, 6), CUBE)


def test_slices_of_a_stage_make_up_the_whole_once_per_replica():
    shape = (4, 8, 6)
    whole, seen = np.arange(192).reshape(shape), np.zeros(192, int)
    cut = placement("layers.1.feed_forward.experts.w_in", shape, CUBE)
    for rank in range(8):
        part = whole[shard_slices(shape, cut, CUBE, rank)]
        assert part.shape == (2, 8, 3)
        seen[part.reshape(-1)] += 1
    assert (seen == len(CUBE.replicas(cut, 0))).all() and CUBE.replicas(cut, 0) == (0, 4)
    assert shard_slices(shape, cut, CUBE, 3) == (slice(2, 4), slice(0, 8), slice(3, 6))


def test_zero_cuts_what_its_replicas_divide():
    zero = ParallelDims(data_parallel=8, expert_parallel=4, optimizer_shard=1)
    assert optimizer_shards((8, 6), (None, None), zero) == 8
    assert optimizer_shards((13, 6), (None, None), zero) == 1
    assert optimizer_shards((8, 6, 5), ("expert", None, "model"), zero) == 2
    assert optimizer_shards((8, 6), (None, None), CUBE) == 1


def test_zero_cuts_stacked_matrices_along_axis_1_where_axis_0_does_not_divide():
    """One expert a rank, 2 replicas; a dense feed-forward, 8 replicas; rows that do not divide stay whole."""
    zero = ParallelDims(data_parallel=8, expert_parallel=4, optimizer_shard=3)
    assert optimizer_cut((4, 6, 5), ("expert", None, "model"), zero) == (1, 2)
    assert optimizer_cut((1, 16, 5), (None, None, "model"), zero) == (1, 8)
    assert optimizer_cut((1, 6, 5), (None, None, "model"), zero) == (0, 1)
    assert optimizer_cut((1, 16, 1), (None, None, None), zero) == (0, 1)  # a gate, which no MatrixCast gathers
    assert optimizer_cut((4, 6, 5), ("expert", None, "model"), ParallelDims(8, 4)) == (0, 1)


def test_what_ranks_keep_with_zero_makes_up_the_whole_once():
    zero = ParallelDims(data_parallel=4, expert_parallel=2, model_parallel=2, optimizer_shard=1)
    for name in ("layers.0.feed_forward.w_out", "layers.1.feed_forward.experts.w_out", "layers.0.feed_forward.w_in"):
        shape = (2 if "experts" in name else 1, 16, 8)
        whole, seen = np.arange(np.prod(shape)).reshape(shape), np.zeros(np.prod(shape), int)
        for rank in range(8):
            seen[whole[kept_slices(shape, placement(name, shape, zero), zero, rank)].reshape(-1)] += 1
        assert (seen == 1).all()
    kept = kept_slices((2, 16, 8), ("expert", "model", None), zero, 7)  # expert 1, model shard 1, replica 1
    assert kept == (slice(1, 2), slice(12, 16), slice(0, 8))


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [(8, 4, [2, 2, 2, 2]), (3, 2, [2, 1]), (61, 8, [7, 8, 8, 8, 8, 8, 7, 7]), (7, 4, [2, 2, 2, 1]), (5, 1, [5])],
)
def test_stages_have_equal_runs_or_one_layer_more(layers, stages, counts):
    degrees = ParallelDims(pipeline_stage=stages)
    found = [stages_of(f"layers.{index}.norm.gain", layers, degrees)[0] for index in range(layers)]
    assert layers_of_stages(layers, stages) == counts == [found.count(stage) for stage in range(stages)]
    assert found == sorted(found)


def test_stages():
    names = ("embedding.table", "layers.1.attention.qkv.weight", "layers.2.feed_forward.w_in", "norm.gain")
    assert [stages_of(name, 4, CUBE) for name in names] == [(0, 1), (0,), (1,), (1,)]
    assert stages_of("embedding.table", 4, ParallelDims()) == (0,)
