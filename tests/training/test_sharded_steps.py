"""A step that the compiler shards over devices goes on from a checkpoint, saves its shards and evaluates."""

from pathlib import Path

import numpy as np
import pytest
from oracles.cluster_probe import OTHER, STEP

from switchyard.checkpoint import store as checkpoint
from switchyard.config import build
from switchyard.distributed.compiled_graph import sums_may_race
from switchyard.distributed.placement import ParallelDims, is_updater
from switchyard.models import create_model
from switchyard.simulation import compile as simulate
from switchyard.training.step import TrainStep

EXPERTS = {"expert_num": 4}
VOCAB = 17


def written(folder: Path, tree: dict) -> tuple[dict, dict]:
    """A checkpoint of one device with random numbers in it, in folder/tiny: (weights, optimizer's state)."""
    config = build(tree | {"parallel": {}})
    step, random = TrainStep(create_model(config, VOCAB), config), np.random.default_rng(0)
    weights = {p.name: random.random(p.shape, np.float32) for p in step.model.get_parameters()}
    state = {name: random.random(p.shape, np.float32) for name, p in step.optimizer_state().items()}
    state |= {"loss_scale": np.array(8.0, np.float32), "good_steps": np.array(5, np.int32)}
    checkpoint.save(folder / "tiny", config, "{}", weights, state, {"step": STEP, "data_index": STEP})
    return weights, state


def resumed(folder: Path, config, monkeypatch) -> tuple[list, dict, dict]:
    """All simulated ranks go on from folder/tiny and save: (their reports, weights, optimizer's state)."""
    checkpoint.begin(folder / OTHER, STEP)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    probe, count = "oracles.cluster_probe:resumed_and_saved", config.devices
    reports = simulate.compile_ranks(config, count, range(count), VOCAB, step=probe)
    checkpoint.finish(folder / OTHER, config, "{}", {"step": STEP, "data_index": STEP}, wait=0)
    again = checkpoint.read(folder / OTHER)
    return reports, again.weights, again.optimizer


def assert_same(held: dict, found: dict) -> None:
    assert held.keys() == found.keys()
    assert [name for name in held if not np.array_equal(held[name], found[name])] == []


@pytest.mark.slow
def test_every_rank_goes_on_from_its_shards_saves_them_and_evaluates(tmp_path, monkeypatch):
    """Four simulated ranks, experts and optimizer sharded, float16: what they write is bit for bit what they read."""
    model = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_length": 8, "compute_dtype": "float16"}
    tree = {"model": model | {"dropout": 0.1}, "moe": EXPERTS | {"layers": 2}, "data": {"batch_size": 8}}
    tree["train"] = {"name": "tiny", "output_dir": str(tmp_path)}
    weights, state = written(tmp_path, tree)
    config = build(tree | {"parallel": {"data_parallel": 4, "expert_parallel": 2, "optimizer_shard": 1}})
    reports, again, again_state = resumed(tmp_path, config, monkeypatch)
    assert_same(weights, again)
    assert_same(state, again_state)
    scores = reports[3]  # of evaluation; the rest are ZeRO's weights
    own = [one for one in scores.collectives if one.cause != "parallel_optimizer" and one.kind == "AlltoAll"]
    assert {one.group for one in own} == {ParallelDims.of(config.parallel).expert_group(3)}
    # nothing is dropped: tokens travel there and back with room for all 16 of a device to either of 2 ranks, and counts
    room = 2 * 16 * 16 * 2  # bytes of float16 of width 16
    assert sorted(one.bytes >= room for one in own) == [False, True, True]
    shapes = {node.output: node.shape for node in scores.graph.nodes}
    handed_out = next(node for node in reversed(scores.graph.nodes) if node.kind == "MakeTuple")
    found = [shapes[name] for name in handed_out.inputs]  # of the whole batch, on every rank; no choices
    assert found[:2] == [(8, 3), (6 + 2 * 4,)]
    assert not [one for one in scores.collectives if one.direction == "backward"]
    assert not sums_may_race(scores.graph)  # on GPUs, which do not wait for kernels with these degrees


@pytest.mark.slow
def test_stages_go_on_from_their_layers_and_save_them(tmp_path, monkeypatch):
    """Two simulated stages: bit for bit what they read, and each sets and writes what it updates, nothing else."""
    model = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_length": 8, "tie_word_embeddings": False}
    tree = {"model": model, "moe": EXPERTS | {"layers": 2}, "data": {"batch_size": 4}}
    tree["train"] = {"name": "tiny", "output_dir": str(tmp_path), "eval_every": 0}
    weights, state = written(tmp_path, tree)
    config = build(tree | {"parallel": {"pipeline_stage": 2, "micro_batch_num": 2}})
    reports, again, again_state = resumed(tmp_path, config, monkeypatch)
    assert_same(weights, again)
    assert_same(state, again_state)
    own = [{name for name in report.parameters if name in weights} for report in reports]
    assert own[0] | own[1] == set(weights) and not own[0] & own[1]
    assert {name for name in weights if is_updater(name, ParallelDims.of(config.parallel), 0, 2)} == own[0]
