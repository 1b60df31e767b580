"""Runs that save in the background: a disk that fails, what the log says, and launchers that start a run again."""

import errno

import pytest
from oracles.tiny_run import losses_of, metrics_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.errors import UserError
from switchyard.training.loop import train

KEYS = {"checkpoint_every": 2, "keep_checkpoints": 9, "async_checkpoint": True, "peak_tflops": 1.0}
PYNATIVE = {"mode": "pynative"}


def _fail_at(monkeypatch, *steps: int) -> None:
    original = checkpoint.save_shard

    def save_shard(run, config, step, *rest, **options):
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(run, config, step, *rest, **options)

    monkeypatch.setattr(checkpoint, "save_shard", save_shard)


def _steps(run) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.listed(run)]


def test_a_run_on_a_disk_that_was_full_for_a_while(tmp_path, monkeypatch, pynative, capsys):
    """It says so, goes on, and is started again with `restarted`, as a launcher does, at first and later."""
    write_text(tmp_path)
    keys = KEYS | {"steps": 6, "on_save_error": "continue"}
    with monkeypatch.context() as patch:
        _fail_at(patch, 2)
        train(run_config(tmp_path, train=keys, context=PYNATIVE), restarted=True)
    run = tmp_path / "runs" / "tiny"
    assert _steps(run) == [4, 6]
    words = "a file without a name: No space left on device; free some space, or write to another disk"
    assert metrics_of(run, "save_failed") == [{"kind": "save_failed", "step": 2, "fault": words}]
    said = capsys.readouterr().out
    assert f"warning: the checkpoint of step 2 was not written: {words}; the run goes on" in said
    for part in ("tokens/s", "mfu 0.0%", "GB", "data 0.0", "compute 0.", "saving 0."):
        assert part in said
    line = metrics_of(run)[-1]
    assert line["tokens_per_second_device"] == line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1
    assert line["compute_seconds"] > line["data_seconds"] > 0 and line["memory_peak"] > 1e7
    with monkeypatch.context() as patch:
        _fail_at(patch, 8)  # the last one must be written
        with pytest.raises(OSError, match="No space left"):
            train(run_config(tmp_path, train=keys | {"steps": 8}, context=PYNATIVE), restarted=True)
    assert _steps(run) == [4, 6] and not (run / "checkpoints" / ".tmp-step-00000008").exists()
    train(run_config(tmp_path, train=keys | {"steps": 8}, context=PYNATIVE), restarted=True)
    assert _steps(run) == [4, 6, 8] and list(losses_of(run)) == list(range(1, 9))


def test_a_run_that_ends_by_its_disk_says_so_at_the_next_step(tmp_path, monkeypatch, pynative):
    write_text(tmp_path)
    _fail_at(monkeypatch, 4)
    with pytest.raises(OSError, match="No space left"):
        train(run_config(tmp_path, train=KEYS | {"steps": 40}, context=PYNATIVE))
    run = tmp_path / "runs" / "tiny"
    assert _steps(run) == [2] and max(losses_of(run)) <= 6


@pytest.mark.long
def test_a_restarted_run_that_had_no_checkpoint_yet_keeps_its_first_weights(tmp_path, monkeypatch, pynative):
    """A launcher repeats --init; it counts until the run has a checkpoint of its own."""
    write_text(tmp_path)
    train(run_config(tmp_path, train={"steps": 2, "name": "source"}, context=PYNATIVE))
    config = run_config(tmp_path, train={"steps": 2, "name": "new"}, context=PYNATIVE)
    source, run = tmp_path / "runs" / "source", tmp_path / "runs" / "new"
    with monkeypatch.context() as patch:
        _fail_at(patch, 0)
        with pytest.raises(OSError, match="No space left"):
            train(config, init=source)
    assert _steps(run) == []
    train(config, init=source, restarted=True)
    first = losses_of(run)
    train(run_config(tmp_path, train={"steps": 2, "name": "plain"}, context=PYNATIVE), init=source)
    assert losses_of(tmp_path / "runs" / "plain") == first and checkpoint.read(run).state["init"]
    with pytest.raises(UserError, match="--init"):
        train(config, init=source, resume=True)
