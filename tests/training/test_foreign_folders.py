"""A checkpoint of somebody else names classes in a file: no command that reads it runs the file without consent."""

import sys

import numpy as np
import pytest
from oracles.tiny_export import MODEL, quiet
from oracles.tiny_run import run_config, write_text

from switchyard.api.models import load_checkpoint
from switchyard.checkpoint import store as checkpoint
from switchyard.data import load_data
from switchyard.errors import UserError
from switchyard.inference.export import export
from switchyard.inference.export_job import export_in_job
from switchyard.inference.export_streamed import export_streamed
from switchyard.report.inspection import inspect
from switchyard.training import launch
from switchyard.training.evaluate import evaluate
from switchyard.training.evaluate_job import evaluate_in_job

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('')\n"
NAMED = {
    "moe.router": {"router": "stranger.Mine"},
    "moe.experts": {"experts": "stranger.Mine"},
    "moe.dispatcher": {"dispatcher": "stranger.Mine"},
    "moe.losses": {"losses": {"stranger.mine": 0.5}},
}
COMMANDS = {
    "eval.py": lambda run, out: evaluate(run, say=quiet),
    "eval.py in a job": lambda run, out: evaluate_in_job(run, ["parallel.data_parallel=2"], say=quiet),
    "export.py": lambda run, out: export(run, out, say=quiet),
    "export.py --streamed": lambda run, out: export_streamed(run, out, say=quiet),
    "export.py in a job": lambda run, out: export_in_job(run, out, ["parallel.expert_parallel=2"], say=quiet),
    "report": lambda run, out: inspect(run, 100, say=quiet),
    "load_checkpoint": lambda run, out: load_checkpoint(run),
    "--eval --dry-run": lambda run, out: launch.main(["--eval", str(run), "--devices", "2", "--target", "Ascend"]),
    "--export --dry-run": lambda run, out: launch.main(["--export", str(run), "--devices", "2", "--target", "GPU"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Key -> a run folder whose checkpoint names a class by that key; and where the file lies."""
    folder, found = tmp_path_factory.mktemp("foreign"), {}
    write_text(folder)
    (folder / "stranger.py").write_text(CODE)
    for key, names in NAMED.items():
        moe = {"expert_num": 4, "router": "top_k"} | names
        config = run_config(folder, model=MODEL, moe=moe, data={"batch_size": 4}, train={"name": key})
        tokenizer = load_data(run_config(folder, model=MODEL, data={"batch_size": 4})).tokenizer.to_json()
        state = {"step": 1, "data_index": 1, "train_seed": 1, "noise_rule": "", "best_loss": None, "seconds": 0.0}
        found[key] = folder / "runs" / key
        checkpoint.save(found[key], config, tokenizer, {"a": np.ones(1, np.float32)}, {}, state)
    return folder, found


@pytest.mark.parametrize("key", NAMED)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_of_a_strangers_file_runs(command, key, runs, tmp_path, monkeypatch):
    folder, found = runs
    monkeypatch.chdir(folder)
    if "job" in command:
        monkeypatch.setenv("MS_ROLE", "MS_WORKER")
        monkeypatch.setenv("MS_WORKER_NUM", "2")
    with pytest.raises(
        UserError, match=rf"^{key}: 'stranger\.[Mm]ine'; the checkpoint asks to import and run"
    ) as caught:
        COMMANDS[command](found[key], tmp_path / "out")
    assert str(folder / "stranger.py") in str(caught.value) and "--trust-code" in str(caught.value)
    assert not (folder / "ran").exists() and "stranger" not in sys.modules and not (tmp_path / "out").exists()
