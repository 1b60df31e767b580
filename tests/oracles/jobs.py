"""Jobs of several CPU processes, started by the script as a user starts them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from switchyard.checkpoint import store as checkpoint
from switchyard.config import Config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "run_distribute_train_ascend.sh"


def command_of(config: Config, folder: Path, *arguments: str) -> list[str]:
    """The script's command for a configuration, which is written into `folder`; logs go to folder/logs."""
    path = folder / f"{config.train.name}.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    devices = ["--devices", str(config.devices), "--log-dir", str(folder / "logs" / config.train.name)]
    return ["bash", str(SCRIPT), "--config", str(path), *devices, *arguments]


def start(command: list[str]) -> subprocess.Popen:
    """Starts a command on this machine's CPU, in this environment's Python (msrun calls `python`)."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "DEVICE": "cpu", "SWITCHYARD_VENV": sys.prefix}
    environment["PYTHONPATH"] = str(ROOT / "src")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(config: Config, folder: Path, *arguments: str, timeout: float = 150) -> subprocess.CompletedProcess:
    """Runs a job to its end."""
    job = start(command_of(config, folder, *arguments))
    try:
        out, err = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        job.terminate()
        job.terminate()
        raise
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def start_alone(folder: Path, name: str, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts a job of two processes that is left alone, by folder/config.yaml; logs go to folder/logs-NAME."""
    command = [
        "bash",
        SCRIPT,
        "--config",
        folder / "config.yaml",
        "--devices",
        "2",
        "--log-dir",
        folder / f"logs-{name}",
    ]
    ours = {"DEVICE": "cpu", "SWITCHYARD_VENV": sys.prefix} | (environment or {})
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    return subprocess.Popen([*command, *options, f"train.name={name}"], env=os.environ | ours, cwd=folder, **pipes)


def worker_of(job: psutil.Process, rank: int, seconds: float = 120.0) -> psutil.Process:
    """Returns the process of a rank of a job, once it runs."""
    end = time.monotonic() + seconds
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


def largest_difference(one: Path, other: Path) -> dict[str, float]:
    """Largest absolute difference of the newest checkpoints of two runs: of the weights, and of Adam's moments."""
    first, second = checkpoint.read(one), checkpoint.read(other)
    assert first.step == second.step
    found = {}
    for what in ("weights", "optimizer"):
        held, got = getattr(first, what), getattr(second, what)
        assert held.keys() == got.keys()
        found[what] = max(float(np.abs(held[name] - got[name]).max()) for name in held)
    return found
