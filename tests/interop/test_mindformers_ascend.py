"""The YAML file of MindFormers with a parallel section, compiled through MindFormers' Trainer for simulated Ascend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from switchyard.optional import is_installed
from switchyard.simulation.fake_cann import simulation_environment

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model.model_config.num_layers=2",
    "model.model_config.hidden_size=32",
    "model.model_config.seq_length=16",
    "train_dataset.data_loader.seq_length=16",
    "train_dataset.data_loader.steps=2",
    "callbacks=[]",
)

pytestmark = [
    pytest.mark.long,  # 40 s of a core each; other tests compile these layouts without MindFormers
    pytest.mark.skipif(not is_installed("mindformers"), reason="needs mindformers: pip install mindformers==1.9.0"),
]


def compile_rank(folder: Path, rank: int, *overrides: str) -> dict:
    """Returns what the compiler made of one rank's step, of 4."""
    text, out = folder / "text.txt", folder / f"rank{rank}.json"
    text.write_text("routers choose experts and experts compute " * 400)
    environment = {**os.environ, **simulation_environment(), "RANK_SIZE": "4", "RANK_ID": str(rank)}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests"), environment["PYTHONPATH"]))
    keys = (*SMALL, f"train_dataset.data_loader.path={text}", f"output_dir={folder / 'run'}", *overrides)
    command = [sys.executable, "-m", "oracles.mindformers_compile", str(out), *keys]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_experts_are_exchanged_and_nothing_is_gathered(tmp_path):
    """Data parallel 4, expert parallel 2: two AlltoAll forward, two backward, and sums of gradients; no AllGather."""
    found = compile_rank(tmp_path, 3, "parallel_config.data_parallel=4", "parallel_config.expert_parallel=2")
    kinds = {name: number for name, number in found["collectives"].items() if not name.startswith("AllReduce")}
    assert kinds == {"AlltoAll forward (2, 3)": 2, "AlltoAll backward (2, 3)": 2}
    assert found["collectives"]["AllReduce backward (1, 3)"] == 2  # the gradients of the experts
    parameters = found["parameters"]
    assert parameters["layers.0.feed_forward.experts.w_in"] == [32, 32, 128]  # of 64 experts
    assert parameters["adam_m.layers.0.feed_forward.experts.w_in"] == [32, 32, 128]
    assert parameters["layers.0.attention.qkv.weight"][0] == 32
    assert parameters["figures"] == [2 + 6 + 2 * 64]  # of all devices, on each


def test_heads_and_hidden_widths_are_divided_by_model_parallel(tmp_path):
    found = compile_rank(tmp_path, 0, "parallel_config.data_parallel=2", "parallel_config.model_parallel=2")
    assert not any(name.startswith("AllGather") for name in found["collectives"])
    assert found["parameters"]["layers.0.feed_forward.experts.w_in"] == [64, 32, 64]
