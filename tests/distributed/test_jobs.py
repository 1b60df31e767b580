"""Several processes against one: the same losses, weights, figures and evaluation."""

import json
from pathlib import Path

import pytest
from oracles.jobs import largest_difference, run
from oracles.tiny_run import losses_of, metrics_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.training.evaluate import evaluate
from switchyard.training.loop import train

STEPS = 6
SECTIONS = {  # noise, drops, two choices, a clip that bites, micro-batches, a further loss
    "model": {"dropout": 0.1},
    "data": {"batch_size": 8},
    "optimizer": {"clip_grad": 0.5},
    "schedule": {"learning_rate": 0.001},
}
CONDITIONAL = {
    "router": "top_k",
    "expert_num": 4,
    "num_experts_chosen": 2,
    "jitter": 0.1,
    "losses": {"importance": 0.1},
}
TRAIN = {"steps": STEPS, "gradient_accumulation_steps": 2, "eval_every": 3, "eval_batches": 3}


def config_of(folder: Path, name: str, moe: dict, **parallel):
    """A few steps; without degrees one process with as many routing groups."""
    return run_config(folder, **SECTIONS, moe=moe, train=TRAIN | {"name": name}, parallel=parallel)


def compare(folder: Path, alone: str, job: str) -> dict[str, float]:
    """Largest differences of two runs: losses, gradient norms, evaluations, weights and moments; loads are equal."""
    runs = folder / "runs"
    one, other = (losses_of(runs / name) for name in (alone, job))
    assert one.keys() == other.keys() and len(one) == STEPS
    found = {"loss": max(abs(one[step] - other[step]) for step in one)}
    for kind, keys in (
        ("train", ("balance_loss", "gradient_norm", "dropped")),
        ("evaluation", ("loss", "bits_per_byte")),
    ):
        lines = list(zip(metrics_of(runs / alone, kind), metrics_of(runs / job, kind), strict=True))
        for key in keys:
            found[f"{kind}.{key}"] = max(abs(first[key] - second[key]) for first, second in lines if key in first)
        assert all(first.get("load") == second.get("load") for first, second in lines)
    first, second = (metrics_of(runs / name, "evaluation")[-1] for name in (alone, job))
    assert [layer["load"] for layer in first["layers"]] == [layer["load"] for layer in second["layers"]]
    return found | largest_difference(runs / alone, runs / job)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a text, and the runs of one process by routing groups as they are asked for."""
    path = tmp_path_factory.mktemp("jobs")
    write_text(path)
    return path


def alone(folder: Path, groups: int) -> str:
    """The run of one process, made once."""
    name = f"alone{groups}"
    if not (folder / "runs" / name / "result.json").exists():
        train(config_of(folder, name, CONDITIONAL | {"groups": groups}))
    return name


def ran(folder: Path, name: str, **parallel) -> str:
    """A job that has to end well."""
    done = run(config_of(folder, name, CONDITIONAL, **parallel), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("Logs of all ranks:")
    result = json.loads((folder / "runs" / name / "result.json").read_text())
    assert result["steps"] == STEPS
    return name


@pytest.mark.long
@pytest.mark.slow
def test_data_parallel_equals_one_process(folder, graph):
    differences = compare(folder, alone(folder, 2), ran(folder, "dp2", data_parallel=2))
    print(differences)
    assert max(differences.values()) <= 1e-6, differences


def test_expert_parallel_equals_one_process(folder, graph):
    name = ran(folder, "ep2", data_parallel=2, expert_parallel=2)
    newest = checkpoint.listed(folder / "runs" / name)[-1]  # each process has written its slices
    assert {f"weights-0000{rank}-of-00002.safetensors" for rank in range(2)} <= {path.name for path in newest.iterdir()}
    differences = compare(folder, alone(folder, 2), name)
    print(differences)
    assert max(differences.values()) <= 1e-5, differences
    last = metrics_of(folder / "runs" / name, "evaluation")[-1]  # eval.py reads what two processes have written
    assert abs(evaluate(folder / "runs" / name).loss - last["loss"]) <= 1e-6


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("experts", [2])  # 4 shards of the experts: as 2 of 2 processes, without replicas
def test_four_processes_equal_one(folder, graph, experts):
    name = ran(folder, f"dp4ep{experts}", data_parallel=4, expert_parallel=experts)
    differences = compare(folder, alone(folder, 4), name)
    print(differences)
    assert max(differences.values()) <= 1e-5, differences
