"""Evaluation by several processes: what is refused before they start; the figures are those of one process."""

import json

import pytest
from oracles.jobs import SCRIPT, start
from oracles.tiny_run import run_config, write_text

from switchyard.config import build
from switchyard.errors import UserError
from switchyard.simulation.compile import compile_ranks
from switchyard.training.evaluate import evaluate
from switchyard.training.evaluate_keys import degrees_of_job
from switchyard.training.loop import train

MOE = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2}
TREE = {"moe": MOE, "data": {"batch_size": 8}}


def job(overrides=(), count=8, target="Ascend", **tree):
    """What `count` processes evaluate a checkpoint of these keys with."""
    return degrees_of_job(build(TREE | tree), overrides, count, lambda context: target)


def test_degrees_are_those_of_the_overrides_and_not_those_of_the_run():
    stages = {"pipeline_stage": 2, "micro_batch_num": 2, "optimizer_shard": 1, "data_parallel": 2}
    untied = {"model": {"tie_word_embeddings": False}, "train": {"eval_every": 0}}
    config, compiled = job(["parallel.expert_parallel=2", "parallel.model_parallel=2"], parallel=stages, **untied)
    parallel = config.parallel
    assert compiled and (parallel.data_parallel, parallel.expert_parallel, parallel.model_parallel) == (4, 2, 2)
    assert (parallel.pipeline_stage, parallel.optimizer_shard) == (1, 0)
    assert not job(["parallel.expert_parallel=2"], count=2, target="CPU")[1]  # explicit collectives


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["parallel.optimizer_shard=1"], "parallel.optimizer_shard: 1; evaluation has no optimizer: 0, and more"),
        (["parallel.recompute=true"], "parallel.recompute: True; evaluation has no backward pass"),
        (["moe.replay=a"], "moe.replay: a; choices are replayed by one process"),
        (["moe.expert_num=8"], "moe.expert_num: 8; the checkpoint's weights were trained with 4"),
        (["parallel.data_parallel=4"], "parallel.data_parallel: 4; the degrees need 4 processes, 8 processes run"),
    ],
)
def test_what_several_processes_do_not_evaluate_with(overrides, says):
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        job(overrides)


@pytest.mark.slow
def test_the_compiler_shards_the_weights_of_an_evaluation():
    """Rank 3 of 4: two experts of four, half of their hidden width; scores of all sequences everywhere."""
    model = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seq_length": 8, "intermediate_size": 16}
    tree = TREE | {"model": model, "moe": MOE | {"layers": [0]}}
    parallel = {"data_parallel": 2, "expert_parallel": 2, "model_parallel": 2}
    step = "switchyard.training.evaluate_job:simulated"
    (report,) = compile_ranks(build(tree | {"parallel": parallel}), 4, [3], 32, step=step)
    assert report.parameters["layers.0.feed_forward.experts.w_in"] == (2, 16, 8)
    assert report.count("AlltoAll") and not [one for one in report.collectives if one.direction == "backward"]


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_score_as_one_does(tmp_path, graph):
    write_text(tmp_path)
    train(run_config(tmp_path, **TREE, train={"steps": 2, "name": "one"}))
    run = tmp_path / "runs" / "one"
    alone = evaluate(run).to_dict()
    command = ["bash", str(SCRIPT), "--eval", str(run), "--devices", "2", "--log-dir", str(tmp_path / "logs")]
    done = start([*command, "--json", "parallel.expert_parallel=2"])
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, out + err
    line = next(line for line in (tmp_path / "logs" / "worker_0.log").read_text().splitlines() if line.startswith("{"))
    found = json.loads(line)
    assert abs(found["loss"] - alone["loss"]) < 1e-6 and found["tokens"] == alone["tokens"]
    assert [layer["load"] for layer in found["layers"]] == [layer["load"] for layer in alone["layers"]]
