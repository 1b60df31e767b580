"""Good checkpoints: what is not finite is never written, a damaged one is passed over, and messages name a good one."""

import os
import shutil

import numpy as np
import pytest
from oracles.tiny_run import run_config

from switchyard.checkpoint import health
from switchyard.checkpoint import reshard as recut
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.health import Healthy
from switchyard.distributed.processes import Processes
from switchyard.errors import UserError
from switchyard.training.resume import agreed, find_start, newest

NAMES = [checkpoint.name_of(step) for step in range(6)]


def _save(run, step: int, keep: int = 9, value: float = 1.0, moment: float = 0.0, healthy: Healthy | None = None):
    weights = {"norm.weight": np.full((3, 2), step + value, np.float32)}
    optimizer = {"moment1.norm.weight": np.full((3, 2), moment, np.float32), "good_steps": np.array(step, np.int32)}
    state = {"step": step, "data_index": step, "train_seed": 1, "noise_rule": "none", "best_loss": None, "seconds": 0.5}
    config = run_config(train={"keep_checkpoints": keep})
    return checkpoint.save(run, config, '{"kind": "byte"}', weights, optimizer, state, healthy)


def _save_unseen(run, step: int, monkeypatch, **values):
    """A whole checkpoint, with a right manifest, of numbers that are not finite."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "first_not_finite", lambda arrays: None)
        return _save(run, step, **values)


def _names(run) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


@pytest.mark.parametrize("values", [{"value": np.nan}, {"value": np.inf}, {"moment": np.nan}, {"moment": -np.inf}])
def test_what_is_not_finite_is_never_written(tmp_path, values):
    """Weights and moments; the checkpoint before stays although one only is kept."""
    _save(tmp_path, 1, keep=1)
    words = r"checkpoint of step 2: '(moment1\.)?norm\.weight' holds numbers that are not finite, so it was not written"
    with pytest.raises(UserError, match=rf"{words}; '.*{NAMES[1]}' is unchanged and good; reduce"):
        _save(tmp_path, 2, keep=1, **values)
    assert _names(tmp_path) == [NAMES[1]]
    assert checkpoint.read(tmp_path).step == 1


class _Rank(Processes):
    """One of two processes, whose partner says what it is told to."""

    def any_rank(self, flag: bool) -> bool:
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_refuse_what_one_of_them_cannot_write(tmp_path, rank):
    good, state = {"norm.weight": np.ones((3, 2), np.float32)}, {"step": 4}
    with pytest.raises(UserError, match="checkpoint of step 4: 'a shard of another rank' holds numbers that are not"):
        checkpoint.save(tmp_path, run_config(), "{}", good, {}, state, processes=_Rank(rank, 2))
    assert not (tmp_path / "checkpoints").exists()
    bad = {"norm.weight": good["norm.weight"] * np.nan}
    with pytest.raises(UserError, match=r"'norm\.weight' holds numbers that are not finite"):
        checkpoint.save(tmp_path, run_config(), "{}", bad, {}, state, processes=_Rank(rank, 2))


def _flip(path):
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[-3] ^= 1
    (path / "weights.safetensors").write_bytes(content)


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path, monkeypatch):
    """One is altered, one holds NaN: two good ones are kept besides, until two newer ones are there."""
    for step in (1, 2):
        _save(tmp_path, step)
    _flip(_save(tmp_path, 3))
    _save_unseen(tmp_path, 4, monkeypatch, value=np.nan)
    _save(tmp_path, 5, keep=2)
    assert _names(tmp_path) == NAMES[2:6]
    _save(tmp_path, 6, keep=2)
    assert _names(tmp_path) == [NAMES[5], checkpoint.name_of(6)]


def test_the_last_good_checkpoint_stays_whatever_is_newer(tmp_path):
    """Of a run whose every checkpoint is spoilt after it was written, by a process that knew them as good."""
    healthy = Healthy()
    _save(tmp_path, 1, keep=1, healthy=healthy)
    _flip(_save(tmp_path, 2, keep=2, healthy=healthy))
    assert not healthy.is_good(tmp_path / "checkpoints" / NAMES[2])
    assert healthy.newest(tmp_path).name == NAMES[1]


def test_a_checkpoint_is_read_in_full_once(tmp_path, monkeypatch):
    """A save reads none of those that this process has written."""
    healthy, read = Healthy(), []
    original = health.fault
    monkeypatch.setattr(health, "fault", lambda path: read.append(path.name) or original(path))
    for step in range(4):
        _save(tmp_path, step, keep=2, healthy=healthy)
    assert not read and _names(tmp_path) == NAMES[2:4]
    other = Healthy()
    assert [other.newest(tmp_path).name for _ in range(3)] == [NAMES[3]] * 3 and read == [NAMES[3]]


def test_messages_name_a_checkpoint_that_is_good(tmp_path, monkeypatch):
    """Not the newest folder, and not the one before it, which are damaged as well."""
    _save(tmp_path, 1)
    _save_unseen(tmp_path, 2, monkeypatch, moment=np.inf)
    _flip(_save(tmp_path, 3))
    _flip(_save(tmp_path, 4))
    assert Healthy().kept(tmp_path) == f"'{tmp_path / 'checkpoints' / NAMES[1]}' is unchanged and good"
    with pytest.raises(checkpoint.DamagedError) as caught:
        checkpoint.read(tmp_path)
    assert str(caught.value).endswith(
        f"use the previous checkpoint '{tmp_path / 'checkpoints' / NAMES[1]}', which is good"
    )
    _flip(tmp_path / "checkpoints" / NAMES[1])
    assert str(caught.value).endswith("no earlier checkpoint is good: train again")
    assert Healthy().kept(tmp_path) == f"no checkpoint of '{tmp_path}' is good"
    assert Healthy().kept(tmp_path / "elsewhere") == "no checkpoint was written"


def _replace(path, make) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


UNREADABLE = {
    "a directory in place of a file": lambda path: _replace(path / "weights.safetensors", lambda p: p.mkdir()),
    "a directory in place of the manifest": lambda path: _replace(path / "manifest.json", lambda p: p.mkdir()),
    "a pipe in place of a file": lambda path: _replace(path / "optimizer.safetensors", os.mkfifo),
    "a pipe in place of the manifest": lambda path: _replace(path / "manifest.json", os.mkfifo),
    "a file in place of the directory": lambda path: _replace(path, lambda p: p.write_text("x")),
    "a link to nowhere": lambda path: _replace(path, lambda p: p.symlink_to("nowhere")),
    "a link to itself": lambda path: _replace(path, lambda p: p.symlink_to(p.name)),
    "a file that links to nowhere": lambda path: _replace(path / "state.json", lambda p: p.symlink_to("nowhere")),
    "an altered byte": _flip,
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_resume_passes_over_what_cannot_be_read(tmp_path, damage, capsys):
    """It goes on from the one before, puts the other out of the way, and whoever reads it gets one line."""
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    UNREADABLE[damage](path)
    for attempt in (lambda: checkpoint.read(tmp_path), lambda: recut.convert(path, "{}", tmp_path / "out")):
        with pytest.raises(UserError) as caught:
            attempt()
        assert "\n" not in str(caught.value) and NAMES[2] in str(caught.value) and NAMES[1] in str(caught.value)
    held = find_start(tmp_path, run_config(), resume=True)
    assert held.step == 1 and f"warning: checkpoint '{path}'" in capsys.readouterr().out
    assert agreed(held, tmp_path, run_config(), Processes()) is held
    assert [found.name for found in checkpoint.listed(tmp_path)] == [NAMES[1]]
    assert [name for name in _names(tmp_path) if name.startswith(f"damaged-{NAMES[2]}-")]
    _save(tmp_path, 2)
    assert checkpoint.read(tmp_path).step == 2


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("where", ["manifest.json", "config.yaml", "weights.safetensors", "optimizer.safetensors"])
def test_resume_passes_over_what_the_system_does_not_hand_out(tmp_path, error, where, monkeypatch, capsys):
    _save(tmp_path, 1)
    path, original = _save(tmp_path, 2) / where, os.open

    def refusing(file, *arguments, **more):
        if os.fspath(file) == str(path) if isinstance(file, (str, os.PathLike)) else False:
            raise error
        return original(file, *arguments, **more)

    monkeypatch.setattr("os.open", refusing)  # by which files of checkpoints are opened
    assert newest(tmp_path, run_config()).step == 1
    said = capsys.readouterr().out
    assert f"{NAMES[2]}': {where} cannot be read ({error.strerror}); use the previous checkpoint" in said


@pytest.mark.parametrize("values", [{"value": np.nan}, {"moment": np.inf}])
def test_numbers_that_are_not_finite_count_as_damage(tmp_path, values, monkeypatch, capsys):
    _save(tmp_path, 1)
    path = _save_unseen(tmp_path, 2, monkeypatch, **values)
    assert newest(tmp_path, run_config()).step == 1
    assert "norm.weight' of its" in (said := capsys.readouterr().out) and "that are not finite; use the prev" in said
    with pytest.raises(checkpoint.DamagedError, match="numbers that are not finite"):
        recut.convert(path, "{}", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]
    if "moment" in values:
        assert checkpoint.read(path, with_optimizer=False).step == 2  # its weights can be evaluated
        return
    for path in checkpoint.listed(tmp_path):
        shutil.rmtree(path)
    _save_unseen(tmp_path, 3, monkeypatch, **values)
    with pytest.raises(UserError, match=r"no checkpoint of .* is complete; train again under another train.name"):
        find_start(tmp_path, run_config(), resume=True)


def test_a_best_loss_that_is_no_number_is_none(tmp_path):
    _save(tmp_path, 1)
    for loss in ("NaN", "Infinity", "null"):
        text = f'{{"checkpoint": "{NAMES[1]}", "loss": {loss}}}'
        (tmp_path / "checkpoints" / "best.json").write_text(text)
        assert checkpoint.best(tmp_path) is None


class _Talk(Processes):
    """Rank 0 of two; the other's steps are told beforehand."""

    def gather(self, array):
        return np.stack([array, np.full_like(array, self.others.pop(0))])


def test_all_processes_start_from_the_same_checkpoint(tmp_path):
    """One has found damage in its slices of the newest, which this one does not read."""
    for step in (1, 2, 3):
        _save(tmp_path, step)
    processes = _Talk(0, 2)
    object.__setattr__(processes, "others", [2, 2])
    held = agreed(newest(tmp_path, run_config()), tmp_path, run_config(), processes)
    assert held.step == 2 and [path.name for path in checkpoint.listed(tmp_path)] == NAMES[1:3]
    object.__setattr__(processes, "others", [-1])
    with pytest.raises(UserError, match="not all processes find a good checkpoint"):
        agreed(held, tmp_path, run_config(), processes)
