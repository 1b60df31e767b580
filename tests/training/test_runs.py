"""Runs as users treat them: resumed with other keys or data, started twice, on a full disk, at a closed terminal."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from oracles.tiny_run import TEXT, losses_of, metrics_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.errors import Interrupted, UserError
from switchyard.moe.routing.replay import Recorder
from switchyard.training import trainer
from switchyard.training.lock import LOCK
from switchyard.training.loop import train

TRAIN = Path(__file__).parents[2] / "train.py"
EAGER = {"mode": "pynative"}


def _config(folder, **sections):
    return run_config(folder, **{"context": EAGER} | sections)


def _trained(folder, **train_keys) -> Path:
    """A run of two steps, and its folder."""
    write_text(folder)
    train(_config(folder, train={"steps": 2} | train_keys))
    return folder / "runs" / "tiny"


def _state(run: Path) -> dict:
    return checkpoint.read(run, with_optimizer=False).state


def test_resume_of_a_run_that_is_not_there_names_those_that_are(tmp_path, pynative):
    run = _trained(tmp_path)
    with pytest.raises(UserError) as caught:
        train(_config(tmp_path, train={"steps": 4, "name": "tine"}), resume=True)
    assert str(caught.value) == (
        f"--resume: train.name: tine; no such run in '{run.parent}': its runs are tiny; leave --resume out to start it"
    )
    assert [path.name for path in run.parent.iterdir()] == ["tiny"]
    with pytest.raises(UserError, match="it holds no run; leave --resume out"):
        train(_config(tmp_path, train={"output_dir": str(tmp_path / "nowhere")}), resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, pynative, capsys):
    """All that is there is the lock of a process that has ended."""
    write_text(tmp_path)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    dead = {"host": "here", "pid": 1, "started": 1.0, "boot": "", "space": ""}
    from switchyard.training.lock import Holder

    own = Holder.own()
    (run / LOCK).write_text(json.dumps(dead | {"host": own.host, "boot": own.boot, "space": own.space}))
    train(_config(tmp_path, train={"steps": 1}), resume=True)
    assert "contains no checkpoint yet; starting from step 0" in capsys.readouterr().out
    assert list(losses_of(run)) == [1] and not (run / LOCK).exists()


def test_keys_that_keep_the_optimizers_meaning_may_change_and_are_said(tmp_path, pynative, capsys):
    run = _trained(tmp_path)
    capsys.readouterr()
    changed = _config(
        tmp_path,
        schedule={"learning_rate": 0.5, "type": "constant", "total_steps": 9},
        optimizer={"clip_grad": None, "weight_decay": 0.0},
        model={"dropout": 0.1},
        train={"steps": 3},
    )
    train(changed, resume=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume: ")]
    assert sorted(said) == [
        "resume: model.dropout: 0.0 -> 0.1",
        "resume: optimizer.clip_grad: 1.0 -> null",
        "resume: optimizer.weight_decay: 0.1 -> 0.0",
        "resume: schedule.learning_rate: 0.01 -> 0.5",
        "resume: schedule.total_steps: null -> 9",
        "resume: schedule.type: cosine -> constant",
    ]
    (line,) = metrics_of(run, "resumed")
    assert line["step"] == 2 and line["data"] is None
    assert line["changes"]["schedule.learning_rate"] == [0.01, 0.5] and len(line["changes"]) == 6
    assert [step["learning_rate"] for step in metrics_of(run)] == [0.005, 0.001, 0.5]
    assert "learning_rate: 0.5" in (run / "config.yaml").read_text()
    train(changed.model_copy(update={"train": changed.train.model_copy(update={"steps": 4})}), resume=True)
    assert len(metrics_of(run, "resumed")) == 1  # nothing was changed this time
    assert "resume: " not in capsys.readouterr().out


def test_a_resumption_that_saved_nothing_leaves_no_line(tmp_path, pynative, monkeypatch):
    run = _trained(tmp_path)
    faster = {"schedule": {"learning_rate": 0.5}, "train": {"steps": 4}}

    def fail(config, step):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(trainer, "learning_rate", fail)
        train(_config(tmp_path, **faster), resume=True)
    train(_config(tmp_path, train={"steps": 3}), resume=True)
    assert not metrics_of(run, "resumed") and list(losses_of(run)) == [1, 2, 3]


def test_another_batch_size_goes_on_in_the_epoch(tmp_path, pynative):
    """Two steps of 4 windows, then two of 2 micro-batches of 6: 8 and 24 windows were read, none twice."""
    run = _trained(tmp_path)
    assert (_state(run)["data_index"], _state(run)["data_epoch"], _state(run)["data_window"]) == (2, 0, 8)
    sections = {"data": {"batch_size": 6}, "train": {"steps": 4, "gradient_accumulation_steps": 2}}
    result = train(_config(tmp_path, **sections), resume=True)
    state = _state(run)
    assert (state["data_index"], state["data_epoch"], state["data_window"]) == (6, 0, 32)
    assert state["tokens"] == 2 * 4 * 16 + 2 * 12 * 16
    assert result["tokens_per_second"] == pytest.approx(state["tokens"] / result["seconds"])


def test_a_checkpoint_of_an_earlier_version_knows_its_place(tmp_path, pynative, monkeypatch):
    """Its state has neither place nor fingerprint: the resumed run repeats the uninterrupted one."""
    write_text(tmp_path)
    train(_config(tmp_path, train={"steps": 4}))
    original = checkpoint.save

    def save(run, config, texts, weights, optimizer, state, *more, **others):
        new = ("data_epoch", "data_window", "corpus", "tokens")
        old = {k: v for k, v in state.items() if k not in new}
        return original(run, config, texts, weights, optimizer, old, *more, **others)

    monkeypatch.setattr(checkpoint, "save", save)
    halves = {"schedule": {"total_steps": 4}}
    train(_config(tmp_path, **halves, train={"steps": 2, "name": "old"}))
    assert "corpus" not in _state(tmp_path / "runs" / "old")
    train(_config(tmp_path, **halves, train={"steps": 4, "name": "old"}), resume=True)
    assert losses_of(tmp_path / "runs" / "old") == losses_of(tmp_path / "runs" / "tiny")


def test_another_text_is_refused_until_it_is_accepted(tmp_path, pynative, capsys):
    run = _trained(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    text = tmp_path / "text.txt"
    text.write_text(TEXT.replace("sheep", "goats"))
    for content in (TEXT.replace("sheep", "goats"), TEXT + "\N{SNOWMAN}"):  # the second has another vocabulary too
        text.write_text(content)
        with pytest.raises(
            UserError, match=rf"^data.path: {text}; not the data that the run was trained on: "
        ) as caught:
            train(_config(tmp_path, train={"steps": 3}), resume=True)
        assert "data.accept_changed=true" in str(caught.value) and "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    text.write_text(TEXT.replace("sheep", "goats"))
    train(_config(tmp_path, data={"accept_changed": True}, train={"steps": 3}), resume=True)
    assert (
        f"resume: data.accept_changed: continues with the new data, from a new epoch: '{text}' has other content"
        in (capsys.readouterr().out)
    )
    assert metrics_of(run, "resumed")[0]["data"] == f"'{text}' has other content"
    assert (_state(run)["data_epoch"], _state(run)["data_window"]) == (1, 4)
    text.write_text(TEXT)  # consent is for one resumption
    with pytest.raises(UserError, match="not the data that the run was trained on"):
        train(_config(tmp_path, train={"steps": 4}), resume=True)


def test_a_text_that_was_moved_is_no_other_text(tmp_path, pynative):
    run = _trained(tmp_path)
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    train(_config(tmp_path, data={"path": str(tmp_path / "moved.txt")}, train={"steps": 3}), resume=True)
    assert list(losses_of(run)) == [1, 2, 3]


def test_a_second_training_of_a_name_changes_nothing(tmp_path, pynative, monkeypatch):
    """Started while the first is at its second step, new or with --resume."""
    write_text(tmp_path)
    original, seen = trainer.learning_rate, []

    def start_another(config, step):
        if step == 2:
            before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
            for resume in (False, True):
                with pytest.raises(UserError, match=rf"is being trained by process {os.getpid()} on host "):
                    train(_config(tmp_path, train={"steps": 3}), resume=resume)
            assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before
            seen.append(step)
        return original(config, step)

    monkeypatch.setattr(trainer, "learning_rate", start_another)
    train(_config(tmp_path, train={"steps": 3}))
    run = tmp_path / "runs" / "tiny"
    assert seen == [2] and list(losses_of(run)) == [1, 2, 3] and not (run / LOCK).exists()


def test_a_record_from_before_the_first_checkpoint_is_taken_up_again(tmp_path, pynative, monkeypatch):
    """Killed between the record and the checkpoint of step 2."""
    write_text(tmp_path)
    record = str(tmp_path / "choices.safetensors")
    sections = {"moe": {"expert_num": 4, "record": record}, "train": {"steps": 3, "checkpoint_every": 2}}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(checkpoint, "save", lambda *arguments, **more: (_ for _ in ()).throw(RuntimeError("killed")))
        train(_config(tmp_path, **sections))
    assert Path(record).exists() and not checkpoint.listed(tmp_path / "runs" / "tiny")
    train(_config(tmp_path, **sections), resume=True)
    assert list(Recorder(record, _config(tmp_path, **sections), "training", 3, resume=True).rows) == [0, 1, 2]
    sections["train"]["name"] = "other"
    write_text(tmp_path)
    (tmp_path / "runs" / "other").mkdir()
    with pytest.raises(UserError, match=r"moe.record: .* was recorded by run '.*tiny': choose another name"):
        train(_config(tmp_path, **sections), resume=True)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("what", "file"),
    [
        ("switchyard.checkpoint.tensors.pieces", "optimizer.safetensors|weights.safetensors"),
        ("switchyard.training.metrics.append", "metrics.jsonl"),
        ("tensorboardX.event_file_writer.EventsWriter.write_event", "events.out.tfevents"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(what, file, tmp_path, pynative, monkeypatch):
    """Full from the third step on; what was saved is whole, and the resumed run repeats the uninterrupted one."""
    write_text(tmp_path)
    keys = {"steps": 4, "checkpoint_every": 1}
    train(_config(tmp_path, train=keys | {"name": "whole"}))
    original = trainer.learning_rate
    with monkeypatch.context() as patch:

        def fill(config, step):
            if step == 3:
                patch.setattr(what, lambda *arguments: (_ for _ in ()).throw(FULL))
            return original(config, step)

        patch.setattr(trainer, "learning_rate", fill)
        with pytest.raises(UserError, match=rf"^'.*({file})': No space left on device; free some space, ") as caught:
            train(_config(tmp_path, train=keys))
    assert "\n" not in str(caught.value)
    run = tmp_path / "runs" / "tiny"
    assert checkpoint.read(run).step == 2 and not list((run / "checkpoints").glob(".tmp-*"))
    train(_config(tmp_path, train=keys), resume=True)
    assert losses_of(run) == losses_of(tmp_path / "runs" / "whole")


def test_a_terminal_that_closes_saves_the_run(tmp_path, pynative, monkeypatch, usual_hangup):
    """SIGHUP comes twice, from the shell and from the system; the run is saved all the same."""
    write_text(tmp_path)
    original = trainer.learning_rate

    def hang_up(config, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
        return original(config, step)

    monkeypatch.setattr(trainer, "learning_rate", hang_up)
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(Interrupted, match="saved step 2"):
        train(_config(tmp_path))
    assert signal.getsignal(signal.SIGHUP) == before
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)  # as under nohup
    from switchyard.training.signals import StopSignals

    with StopSignals() as stop:
        assert signal.SIGHUP not in stop._before


@pytest.mark.slow
def test_a_training_whose_reader_ends_goes_on(tmp_path):
    """`train.py | head -n 1`, with a stderr on a full disk besides."""
    write_text(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(_config(tmp_path, train={"steps": 3}).to_yaml())
    command = f"{sys.executable} {TRAIN} --config {path} 2>/dev/full | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    run = tmp_path / "runs" / "tiny"
    assert list(losses_of(run)) == [1, 2, 3] and (run / "result.json").exists()
