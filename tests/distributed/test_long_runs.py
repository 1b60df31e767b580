"""A job of two CPU processes that is left alone: a rank is killed, another one stopped; the losses are the same."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from oracles.tiny_run import losses_of, metrics_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = 400


def _worker(job: psutil.Process, rank: int) -> psutil.Process:
    """The process of a rank, once it runs."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for child in job.children(recursive=True):
            try:
                environment = child.environ()
            except psutil.Error:
                continue
            names = (environment.get("MS_ROLE"), environment.get("RANK_ID"))
            if names == ("MS_WORKER", str(rank)) and child.name() != "tail":
                return child
        time.sleep(0.1)
    raise AssertionError(f"no rank {rank}")


def _until_step(run: Path, step: int, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not any(checkpoint.step_of(path) >= step for path in checkpoint.listed(run)):
        assert time.monotonic() < end, f"step {step} was not saved"
        time.sleep(0.1)


def _start(folder: Path, name: str, *options: str) -> subprocess.Popen:
    command = ["bash", ROOT / "scripts" / "run_distribute_train_ascend.sh", "--config", folder / "config.yaml"]
    more = ["--devices", "2", "--log-dir", folder / f"logs-{name}", *options, f"train.name={name}"]
    environment = os.environ | {"DEVICE": "cpu", "SWITCHYARD_VENV": sys.prefix}
    return subprocess.Popen(
        [*command, *more], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=folder
    )


@pytest.mark.long
def test_a_job_that_is_left_alone_ends_as_the_undisturbed_one(tmp_path):
    write_text(tmp_path)
    keys = {"steps": STEPS, "checkpoint_every": 20, "async_checkpoint": True, "stall_seconds": 15.0}
    config = run_config(tmp_path, moe={"expert_num": 4}, train=keys)
    sections = yaml.safe_load(config.to_yaml())
    del sections["parallel"]  # the devices decide
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    alone = _start(tmp_path, "alone")
    assert alone.wait(600) == 0, alone.stderr.read()
    job = _start(tmp_path, "hit", "--max-restarts", "3")
    tree, run = psutil.Process(job.pid), tmp_path / "runs" / "hit"
    _until_step(run, 60)
    _worker(tree, 1).kill()
    _until_step(run, 160)
    _worker(tree, 1).send_signal(signal.SIGSTOP)
    assert job.wait(600) == 0, job.stderr.read()
    merged = (tmp_path / "logs-hit" / "all.log").read_text()
    assert "rank 1 was killed by signal 9" in merged and "rank 1 was stopped by a signal" in merged
    assert merged.count("launcher | restart ") == 2
    assert losses_of(run) == losses_of(tmp_path / "runs" / "alone") and len(losses_of(run)) == STEPS
    doubled = Counter((line["kind"], line["step"]) for kind in ("train", "exchanges") for line in metrics_of(run, kind))
    assert max(doubled.values()) == 1
    shutil.rmtree(tmp_path / "runs")
