"""The loop: exact resume, what it refuses, what it writes, and kills at any moment."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from oracles.tiny_run import losses_of, metrics_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.data import EvalBatches
from switchyard.errors import Interrupted, UserError
from switchyard.training.loop import train
from switchyard.training.signals import StopSignals

TRAIN = Path(__file__).parents[2] / "train.py"
EVERYTHING = {  # all that draws or remembers: noise, capacity, accumulation, a changing learning rate
    "model": {"dropout": 0.1},
    "moe": {"expert_num": 4, "jitter": 0.1},
}


@pytest.mark.slow
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path, graph):
    """Bit for bit, over an epoch's end, with evaluations in between; the checkpoints are equal too."""
    write_text(tmp_path)
    sections = {"train": {"steps": 12, "gradient_accumulation_steps": 2, "eval_every": 4, "eval_batches": 2}}
    whole = run_config(tmp_path, **EVERYTHING, **sections)
    train(whole)
    part = {"train": sections["train"] | {"name": "part", "steps": 5}, "schedule": {"total_steps": 12}}
    train(run_config(tmp_path, **EVERYTHING, **part))
    part["train"]["steps"] = 12
    train(run_config(tmp_path, **EVERYTHING, **part), resume=True)
    runs = tmp_path / "runs"
    assert losses_of(runs / "part") == losses_of(runs / "tiny") and len(losses_of(runs / "tiny")) == 12
    first, second = (checkpoint.read(runs / name) for name in ("tiny", "part"))
    assert first.step == second.step == 12
    for held, other in ((first.weights, second.weights), (first.optimizer, second.optimizer)):
        assert {name: value.tobytes() for name, value in held.items()} == {
            name: value.tobytes() for name, value in other.items()
        }
    evaluations = [
        {line["step"]: line["loss"] for line in metrics_of(runs / name, "evaluation")} for name in ("tiny", "part")
    ]
    assert evaluations[0].items() <= evaluations[1].items()  # the part was also evaluated where it ended first


def test_gpus_that_wait_for_nothing_are_warned_once(tmp_path, monkeypatch, capsys):
    write_text(tmp_path)
    monkeypatch.setattr("switchyard.training.trainer.waits_for_nothing", lambda config, processes: processes.size == 1)
    train(run_config(tmp_path, train={"steps": 2, "replica_check_every": 7}))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: launch: ")]
    assert len(said) == 1 and "context.launch_blocking=true" in said[0] and "train.replica_check_every=7)" in said[0]


def test_what_a_run_leaves(tmp_path, graph, capsys):
    write_text(tmp_path)
    config = run_config(tmp_path, train={"steps": 5, "log_every": 2, "eval_every": 2, "checkpoint_every": 2})
    result = train(config)
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "result.json").read_text()) == result
    assert result["steps"] == 5 and result["seconds"] > 0 and result["tokens_per_second"] > 0
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 4]
    evaluations = metrics_of(run, "evaluation")
    assert [line["step"] for line in evaluations] == [2, 4, 5] and evaluations[-1]["whole"]
    assert result["validation_loss"] == evaluations[-1]["loss"]
    assert {path.name for path in checkpoint.listed(run)} >= {"step-00000004", "step-00000005"}
    best, loss = checkpoint.best(run)
    assert best.name == result["best_checkpoint"] and loss == min(line["loss"] for line in evaluations)
    held = checkpoint.read(run)
    assert held.config == config and held.state["data_index"] == 5
    assert (run / "config.yaml").read_text() == config.to_yaml()
    said = capsys.readouterr().out
    for text in ("device: ", "compiling the training step: takes about", "compiled and ran step 1 in"):
        assert text in said
    assert "step 2/5  loss " in said and "validation loss" in said and "lr " in said and "tokens/s" in said
    # a run that is there is never overwritten, and a finished one is left alone
    with pytest.raises(
        UserError, match=r"train.name: tiny; the run .* already exists; choose another name, or continue with --resume"
    ):
        train(config)
    before = (run / "metrics.jsonl").read_bytes()
    assert train(config, resume=True) == result and (run / "metrics.jsonl").read_bytes() == before


def test_save_best_false_writes_no_checkpoint_at_an_evaluation(tmp_path, graph):
    """checkpoint_every=0 alone still saves the best weights; what a run measures is the same."""
    write_text(tmp_path)
    names, steps = {}, {"steps": 4, "eval_every": 1, "checkpoint_every": 0, "keep_checkpoints": 9}
    for saves in (True, False):
        run = tmp_path / "runs" / f"best-{saves}"
        result = train(run_config(tmp_path, train={**steps, "name": run.name, "save_best": saves}))
        names[saves] = {path.name for path in checkpoint.listed(run)}
        losses = [line["loss"] for line in metrics_of(run, "evaluation")]
        assert (checkpoint.best(run) is not None) == saves == (result["best_checkpoint"] is not None)
        names[saves, "losses"] = losses
    assert names[False] == {"step-00000004"} and len(names[True]) > 1
    assert names[False, "losses"] == names[True, "losses"]


REFUSED = [
    ({"model": {"hidden_size": 32}}, "model.hidden_size: 32; the run was trained with 16"),
    ({"moe": {"expert_num": 4}}, "moe.expert_num: 4; the run was trained with 1"),
    ({"optimizer": {"beta1": 0.5}}, "optimizer.beta1: 0.5; the run was trained with 0.9"),
    ({"optimizer": {"eps": 1e-6}}, "optimizer.eps: 1e-06; the run was trained with 1e-08"),
    ({"data": {"val_fraction": 0.2}}, "data.val_fraction: 0.2; the run was trained with 0.1"),
    ({"train": {"seed": 2}}, "train.seed: 2; the run was trained with 1"),
    ({"train": {"steps": 1}}, "train.steps: 1; the run .* is already at step 3"),
    (
        {"parallel": {"data_parallel": 2}, "data": {"batch_size": 4}},
        "parallel.data_parallel: 2; the degrees need 2 processes",
    ),
]


def test_resume_refuses_another_model_and_survives_damage(tmp_path, graph, capsys):
    """One run of three steps, then: refused changes; a damaged newest checkpoint; no whole checkpoint at all."""
    write_text(tmp_path)
    steps = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 3}
    train(run_config(tmp_path, train=steps))
    for sections, text in REFUSED:
        changed = sections | {"train": steps | sections.get("train", {})}
        with pytest.raises(UserError, match=text) as caught:
            train(run_config(tmp_path, **changed), resume=True)
        assert "\n" not in str(caught.value)
    run = tmp_path / "runs" / "tiny"
    losses = losses_of(run)
    weights = run / "checkpoints" / "step-00000003" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    (run / "result.json").unlink()
    train(run_config(tmp_path, train=steps), resume=True)
    said = capsys.readouterr().out
    assert "step-00000003': weights.safetensors has" in said and "resumed after step 2" in said
    assert losses_of(run) == losses and checkpoint.read(run).step == 3
    assert [path.name for path in checkpoint.listed(run)] == [checkpoint.name_of(step) for step in (1, 2, 3)]
    for path in checkpoint.listed(run):
        (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint of .* is complete; train again under another train.name"):
        train(run_config(tmp_path, train=steps | {"steps": 9}), resume=True)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, pynative):
    """The checkpoints before it are left as they were."""
    write_text(tmp_path)
    config = run_config(
        tmp_path,
        schedule={"learning_rate": 1e30, "lr_end": 0.0, "warmup_steps": 0, "type": "constant"},
        optimizer={"clip_grad": None},
        train={"steps": 50, "checkpoint_every": 1},
        context={"mode": "pynative"},
    )
    with pytest.raises(
        UserError,
        match=r"train: the (loss|gradient norm) is (nan|inf) at step \d+[,;].* '.*' is unchanged and good; reduce",
    ) as caught:
        train(config)
    step = int(re.search(r"at step (\d+)", str(caught.value))[1])
    assert checkpoint.read(tmp_path / "runs" / "tiny").step == step - 1


def test_resume_without_a_checkpoint_starts_anew(tmp_path, pynative, capsys):
    """As after a kill before the first checkpoint."""
    write_text(tmp_path)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 9}\n{"ki')
    train(run_config(tmp_path, train={"steps": 2}, context={"mode": "pynative"}), resume=True)
    assert "contains no checkpoint yet; starting from step 0" in capsys.readouterr().out
    assert list(losses_of(run)) == [1, 2] and losses_of(run)[1] != 9


def test_signals_are_noted_once_and_then_have_their_usual_effect():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert not stop.came
        assert signal.getsignal(signal.SIGINT) != before[1]
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.came
        assert signal.getsignal(signal.SIGTERM) == before[0]
    assert signal.getsignal(signal.SIGINT) == before[1]  # which a shell in the background has set to "ignore"


def test_a_signal_saves_and_a_resumed_run_repeats_the_rest(tmp_path, pynative, monkeypatch):
    """Raised by the third step, as if it had come from outside: that step is finished and saved."""
    write_text(tmp_path)
    config = run_config(tmp_path, train={"steps": 5}, context={"mode": "pynative"})
    train(config)
    other = run_config(tmp_path, train={"steps": 5, "name": "other"}, context={"mode": "pynative"})
    from switchyard.training import trainer

    def rate_and_signal(config, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(config, step)

    original = trainer.learning_rate
    monkeypatch.setattr(trainer, "learning_rate", rate_and_signal)
    with pytest.raises(Interrupted, match=r"saved step 3 of .*; continue with --resume"):
        train(other)
    monkeypatch.setattr(trainer, "learning_rate", original)
    runs = tmp_path / "runs"
    assert checkpoint.read(runs / "other").step == 3 and list(losses_of(runs / "other")) == [1, 2, 3]
    train(other, resume=True)
    assert losses_of(runs / "other") == losses_of(runs / "tiny")


def test_a_signal_in_an_evaluation_saves_and_the_evaluation_is_made_up_for(tmp_path, pynative, monkeypatch):
    write_text(tmp_path)
    config = run_config(tmp_path, train={"steps": 4, "eval_every": 2, "eval_batches": 2}, context={"mode": "pynative"})
    original = EvalBatches.at

    def batch_and_signal(self, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(EvalBatches, "at", batch_and_signal)
    with pytest.raises(Interrupted, match="saved step 2"):
        train(config)
    monkeypatch.setattr(EvalBatches, "at", original)
    run = tmp_path / "runs" / "tiny"
    assert not metrics_of(run, "evaluation")
    train(config, resume=True)
    assert [line["step"] for line in metrics_of(run, "evaluation")] == [2, 4, 4]  # the last over the whole set
    assert list(losses_of(run)) == [1, 2, 3, 4]


def _command(folder: Path, *arguments: str) -> list[str]:
    """train.py on the configuration of `folder`, a step of which takes milliseconds and saves a checkpoint."""
    return [sys.executable, str(TRAIN), "--config", str(folder / "config.yaml"), *arguments]


def _prepare(folder: Path, **train_keys) -> Path:
    write_text(folder)
    steps = {"steps": 100_000, "checkpoint_every": 1, "log_every": 1}
    config = run_config(folder, train=steps | train_keys, context={"mode": "pynative"})
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder / "runs" / "tiny"


def _wait_for(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _newest(run: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    found = checkpoint.listed(run)
    return int(found[-1].name.removeprefix("step-")) if found else 0


@pytest.mark.slow
def test_a_signal_from_outside_ends_with_its_own_exit_code(tmp_path):
    run = _prepare(tmp_path)
    process = subprocess.Popen(_command(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    _wait_for(lambda: checkpoint.listed(run), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert errors.count("\n") == 1 and errors.startswith("interrupted: saved step ")
    assert checkpoint.read(run).step == max(losses_of(run))


@pytest.mark.long
def test_five_kills_leave_a_run_that_resumes(tmp_path):
    """SIGKILL at random moments of training and saving; afterwards the run ends as one that was left alone."""
    run = _prepare(tmp_path)
    moments = random.Random(3)
    step = 0
    for attempt in range(5):
        process = subprocess.Popen(
            _command(tmp_path, *(["--resume"] if attempt else [])), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _wait_for(lambda after=step: _newest(run) > after, process)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.wait()
        held = checkpoint.read(run)  # the newest is whole
        assert held.step > step
        step = held.step
    last = step + 3
    overrides = ["context.mode=pynative", f"train.steps={last}", "schedule.total_steps=null"]
    finished = subprocess.run(_command(tmp_path, "--resume", *overrides), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    assert checkpoint.read(run).step == last
    assert not list((run / "checkpoints").glob(".tmp-*"))


def test_the_scheduler_of_one_worker_leaves_the_run_alone(tmp_path, monkeypatch):
    write_text(tmp_path)
    config = run_config(tmp_path)
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    monkeypatch.setenv("MS_WORKER_NUM", "1")
    (tmp_path / "runs" / "tiny" / "checkpoints").mkdir(parents=True)  # by the worker, meanwhile
    assert train(config) == {}
