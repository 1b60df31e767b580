"""Jobs of several CPU processes, started by the script as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

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
