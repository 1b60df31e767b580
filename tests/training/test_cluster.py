"""The loop's side of a step that is cut over devices: which way a job takes, scale, figures, slices that are kept."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from oracles.cluster_probe import OTHER, STEP
from switchyard.training.cluster import ClusterStep, LossScale, joined
from switchyard.training.parallel_eval import evaluation_config

from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.layout import updates
from switchyard.config import build
from switchyard.distributed.compiled_graph import sums_may_race
from switchyard.distributed.placement import Degrees
from switchyard.errors import UserError
from switchyard.simulation import compile as simulate
from switchyard.training.limits import check_offered, why_not_compiled, with_defaults
from switchyard.training.step import GROWTH_INTERVAL, MAX_LOSS_SCALE

EXPERTS = {"expert_num": 4}
VOCAB = 17


@pytest.mark.parametrize(
    ("tree", "target", "says"),
    [
        ({}, "Ascend", None),
        ({"moe": EXPERTS | {"router": "top_k"}}, "GPU", None),
        ({}, "CPU", "for Ascend and GPU only"),
        ({"moe": EXPERTS | {"router": "expert_choice"}, "model": {"type": "vision"}}, "GPU", "model.type: vision"),
        ({"moe": EXPERTS | {"router": "tree"}}, "Ascend", "moe.router: tree; overrides `construct`"),
        ({"moe": {"router": "tree"}}, "Ascend", None),  # one expert: no router is asked
        ({"moe": EXPERTS | {"router_freeze_step": 0}}, "Ascend", "router_freeze_step"),
        ({"moe": EXPERTS | {"router_warmup_steps": 1}}, "Ascend", "router_warmup_steps"),
        ({"moe": EXPERTS | {"granularity": "slice"}}, "Ascend", "granularity"),
        ({"context": {"mode": "pynative"}}, "Ascend", "context.mode"),
        ({"moe": EXPERTS | {"router": "top_k", "copies": 2}}, "Ascend", "moe.copies: 2; 1 where parallel degrees cut"),
        ({"moe": EXPERTS | {"dispatch": "dropless"}}, "GPU", "moe.dispatch: dropless; the compiler cuts it for Ascend"),
        ({"moe": EXPERTS | {"dispatch": "dropless"}}, "Ascend", None),
        ({"moe": {"dispatch": "dropless"}}, "GPU", None),  # one expert
    ],
)
def test_the_compiler_cuts_what_it_can(tree, target, says):
    why = why_not_compiled(build(tree), target)
    assert why is None if says is None else says in why


def test_gpus_cut_the_optimizer_unless_told():
    usual, told = build({"parallel": {"data_parallel": 2}}), build({"parallel": {"optimizer_shard": 0}})
    assert with_defaults(usual, "GPU").parallel.optimizer_shard == 1
    assert with_defaults(usual, "Ascend").parallel.optimizer_shard == 0
    assert with_defaults(told, "GPU").parallel.optimizer_shard == 0
    assert with_defaults(build({"train": {"gradient_accumulation_steps": 2}}), "GPU").parallel.optimizer_shard == 0


@pytest.mark.parametrize("beside", [{"data_parallel": 2}, {"model_parallel": 2}])
def test_a_gpu_is_a_whole_stage(beside):
    stages, untied = {"pipeline_stage": 2, "micro_batch_num": 2}, {"tie_word_embeddings": False}
    config = build({"model": untied, "parallel": stages | beside})
    check_offered(config, "Ascend")
    check_offered(build({"model": untied, "parallel": stages}), "GPU")
    check_offered(build({"parallel": beside}), "GPU")
    with pytest.raises(UserError, match=r"^parallel\.pipeline_stage: 2; on GPU a stage is one device.*lazy_inline"):
        check_offered(config, "GPU")


def test_loss_scale_goes_by_the_rule_of_one_device():
    scale = LossScale(build({"model": {"compute_dtype": "float16"}, "train": {"init_loss_scale": 4.0}}))
    for _ in range(4):
        scale.adjust(False)
    assert scale.factor == 1.0  # and no less
    for _ in range(GROWTH_INTERVAL):
        scale.adjust(True)
    assert (scale.factor, scale.good_steps) == (2.0, 0)
    scale.adjust(True)
    other = LossScale(build({"model": {"compute_dtype": "float16"}}))
    other.load({name: tensor.asnumpy() for name, tensor in scale.state().items()})
    assert (other.value, other.good_steps) == (2.0, 1)
    other.value, other.good_steps = MAX_LOSS_SCALE, GROWTH_INTERVAL - 1
    other.adjust(True)
    assert other.factor == MAX_LOSS_SCALE
    plain = LossScale(build({}))
    plain.adjust(False)
    assert plain.factor == 1.0 and plain.value == 65536.0


def test_figures_of_micro_batches_count_by_their_tokens():
    parts = [
        {"loss": 1.0, "balance_loss": 2.0, "z_loss": 4.0, "audit": {"load": np.ones((1, 2)), "dropped": np.ones(1)}},
        {"loss": 3.0, "balance_loss": 4.0, "z_loss": 0.0, "audit": {"load": np.ones((1, 2)), "dropped": np.zeros(1)}},
    ]
    found = joined(parts, np.array([0.25, 0.75]))
    assert (found["loss"], found["balance_loss"], found["z_loss"]) == (2.5, 3.5, 1.0)
    assert found["audit"]["load"].tolist() == [[2.0, 2.0]] and found["audit"]["dropped"].tolist() == [0.25]
    assert joined(parts[:1], np.ones(1)) == parts[0]


def test_evaluation_has_no_randomness_and_the_capacity_of_evaluation():
    moe = EXPERTS | {"jitter": 0.1, "drop_order": "random", "capacity_factor": 1.5, "eval_capacity_factor": 3.0}
    found = evaluation_config(build({"model": {"dropout": 0.1}, "moe": moe}))
    assert found.model.dropout == 0 and found.moe.jitter == 0 and found.moe.drop_order == "position"
    assert found.moe.capacity_factor == 3.0
    assert evaluation_config(build({"moe": EXPERTS | {"capacity_factor": 1.5}})).moe.capacity_factor == 1.5


def written(folder: Path, tree: dict) -> tuple[dict, dict]:
    """A checkpoint of one device with random numbers in it, in folder/tiny: (weights, optimizer's state)."""
    from switchyard.models import create_model
    from switchyard.training.step import TrainStep

    config = build(tree | {"parallel": {}})
    step, random = TrainStep(create_model(config, VOCAB), config), np.random.default_rng(0)
    weights = {p.name: random.random(p.shape, np.float32) for p in step.model.get_parameters()}
    state = {name: random.random(p.shape, np.float32) for name, p in step.optimizer_state().items()}
    state |= {"loss_scale": np.array(8.0, np.float32), "good_steps": np.array(5, np.int32)}
    checkpoint.save(folder / "tiny", config, "{}", weights, state, {"step": STEP, "data_index": STEP})
    return weights, state


@pytest.mark.slow
def test_every_rank_goes_on_from_its_slices_saves_them_and_evaluates(tmp_path, monkeypatch):
    """Four simulated ranks, experts and optimizer cut, float16: what they write is bit for bit what they read."""
    model = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_length": 8, "compute_dtype": "float16"}
    tree = {"model": model | {"dropout": 0.1}, "moe": EXPERTS | {"layers": 2}, "data": {"batch_size": 8}}
    tree["train"] = {"name": "tiny", "output_dir": str(tmp_path)}
    weights, state = written(tmp_path, tree)
    config = build(tree | {"parallel": {"data_parallel": 4, "expert_parallel": 2, "optimizer_shard": 1}})
    checkpoint.begin(tmp_path / OTHER, STEP)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    probe = "oracles.cluster_probe:resumed_and_saved"
    reports = simulate.compile_ranks(config, 4, range(4), VOCAB, step=probe)
    checkpoint.finish(tmp_path / OTHER, config, "{}", {"step": STEP, "data_index": STEP}, wait=0)
    again = checkpoint.read(tmp_path / OTHER)
    for kind, held, found in (("weights", weights, again.weights), ("optimizer", state, again.optimizer)):
        assert held.keys() == found.keys(), kind
        assert all(np.array_equal(held[name], found[name]) for name in held), kind
    scores = reports[3]  # of evaluation: two AlltoAll, the sums of tallies, the scores; ZeRO's weights
    met = Counter((one.kind, one.group) for one in scores.collectives if one.cause != "parallel_optimizer")
    shapes = {node.output: node.shape for node in scores.graph.nodes}
    handed_out = next(node for node in reversed(scores.graph.nodes) if node.kind == "MakeTuple")
    assert [shapes[name] for name in handed_out.inputs] == [(8, 2), (6 + 2 * 4,)]  # of the whole batch, on every rank
    assert met[("AlltoAll", Degrees.of(config.parallel).expert_group(3))] == 2
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
    checkpoint.begin(tmp_path / OTHER, STEP)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    reports = simulate.compile_ranks(config, 2, range(2), VOCAB, step="oracles.cluster_probe:resumed_and_saved")
    checkpoint.finish(tmp_path / OTHER, config, "{}", {"step": STEP, "data_index": STEP}, wait=0)
    again = checkpoint.read(tmp_path / OTHER)
    for kind, held, found in (("weights", weights, again.weights), ("optimizer", state, again.optimizer)):
        assert held.keys() == found.keys(), kind
        assert all(np.array_equal(held[name], found[name]) for name in held), kind
    own = [{name for name in report.parameters if name in weights} for report in reports]
    assert own[0] | own[1] == set(weights) and not own[0] & own[1]
    assert {name for name in weights if updates(name, Degrees.of(config.parallel), 0, 2)} == own[0]


def test_a_pipeline_is_not_evaluated_while_it_trains():
    config = build({"parallel": {"pipeline_stage": 2, "micro_batch_num": 2}})
    with pytest.raises(UserError, match=r"train\.eval_every: 500; 0 with parallel\.pipeline_stage \(2\)"):
        ClusterStep(config, VOCAB, None)
