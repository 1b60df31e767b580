"""A job of two CPU processes that is left alone: a rank is killed, another one stopped; the losses are the same."""

import shutil
import signal
import time
from collections import Counter

import psutil
import pytest
import yaml
from oracles.jobs import start_alone, worker_of
from oracles.tiny_run import losses_of, metrics_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint

STEPS = 400


def _until_step(run, step: int, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not any(checkpoint.step_of(path) >= step for path in checkpoint.listed(run)):
        assert time.monotonic() < end, f"step {step} was not saved"
        time.sleep(0.1)


@pytest.mark.long
def test_a_job_that_is_left_alone_ends_as_the_undisturbed_one(tmp_path):
    write_text(tmp_path)
    keys = {"steps": STEPS, "checkpoint_every": 20, "async_checkpoint": True, "stall_seconds": 15.0}
    config = run_config(tmp_path, moe={"expert_num": 4}, train=keys)
    sections = yaml.safe_load(config.to_yaml())
    del sections["parallel"]  # the devices decide
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    alone = start_alone(tmp_path, "alone")
    assert alone.wait(600) == 0, alone.stderr.read()
    job = start_alone(tmp_path, "hit", "--max-restarts", "3")
    tree, run = psutil.Process(job.pid), tmp_path / "runs" / "hit"
    _until_step(run, 60)
    worker_of(tree, 1).kill()
    _until_step(run, 160)
    worker_of(tree, 1).send_signal(signal.SIGSTOP)
    assert job.wait(600) == 0, job.stderr.read()
    merged = (tmp_path / "logs-hit" / "all.log").read_text()
    assert "rank 1 was killed by signal 9" in merged and "rank 1 was stopped by a signal" in merged
    assert merged.count("launcher | restart ") == 2
    assert losses_of(run) == losses_of(tmp_path / "runs" / "alone") and len(losses_of(run)) == STEPS
    doubled = Counter((line["kind"], line["step"]) for kind in ("train", "exchanges") for line in metrics_of(run, kind))
    assert max(doubled.values()) == 1
    shutil.rmtree(tmp_path / "runs")
