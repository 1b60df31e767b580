"""Runs that start from other weights, train adapters or hold parameters back: two processes against one."""

import pytest
from oracles.jobs import largest_difference, run
from oracles.tiny_run import losses_of, run_config, write_text

from switchyard.config import build
from switchyard.training.loop import train

MOE = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2}
CASES = {"weights": {}, "adapters": {"lora": {"rank": 2, "targets": ["attention.qkv", "experts", "router"]}}}
CASES["frozen"] = {"freeze": ["embedding.*", "*.experts.w_in"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a text, and a run of one process that has read it."""
    path = tmp_path_factory.mktemp("tuned")
    write_text(path)
    train(run_config(path, data={"batch_size": 8}, moe=MOE, train={"name": "base", "steps": 2}))
    return path


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_two_processes_tune_as_one_does(folder, case, graph):
    """Experts are read as shards; losses, weights and moments are those of one process."""
    keys = {"name": f"{case}-alone", "steps": 3} | CASES[case]
    alone = run_config(folder, data={"batch_size": 8}, moe=MOE | {"groups": 2}, train=keys)
    train(alone, init=folder / "runs" / "base")
    job = alone.model_dump() | {"parallel": {"data_parallel": 2, "expert_parallel": 2}}
    job["train"] = job["train"] | {"name": f"{case}-job"}
    done = run(build(job), folder, "--init", str(folder / "runs" / "base"))
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    one, other = (losses_of(folder / "runs" / f"{case}-{name}") for name in ("alone", "job"))
    assert max(abs(one[step] - other[step]) for step in one) < 1e-5 and len(one) == 3
    found = largest_difference(folder / "runs" / f"{case}-alone", folder / "runs" / f"{case}-job")
    assert found["weights"] < 1e-5 and found["optimizer"] < 1e-5
