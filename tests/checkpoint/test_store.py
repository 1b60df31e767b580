"""Checkpoints: whole or absent, verified, rotated; one line for everything that can be wrong with one."""

import json
import shutil

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from oracles.tiny_run import run_config

from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.store import DamagedError
from switchyard.errors import UserError


def _save(run, step: int, keep: int = 2):
    config = run_config(train={"keep_checkpoints": keep})
    weights = {"w": np.full((3, 2), step, np.float32)}
    optimizer = {"moment1.w": np.zeros((3, 2), np.float32), "good_steps": np.array(step, np.int32)}
    state = {"step": step, "data_index": step, "train_seed": 1, "noise_rule": "none", "best_loss": None, "seconds": 0.5}
    return checkpoint.save(run, config, '{"kind": "byte"}', weights, optimizer, state)


def _names(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_read(tmp_path):
    path = _save(tmp_path, 7)
    held = checkpoint.read(tmp_path)
    assert path.name == "step-00000007" and held.path == path and held.step == 7
    assert held.config == run_config(train={"keep_checkpoints": 2}) and held.tokenizer_json == '{"kind": "byte"}'
    np.testing.assert_array_equal(held.weights["w"], np.full((3, 2), 7, np.float32))
    assert held.optimizer["good_steps"] == 7 and held.state["seconds"] == 0.5
    assert checkpoint.read(path, with_optimizer=False).optimizer == {}
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {entry.name for entry in path.iterdir()} - {"manifest.json"}


def test_newest_and_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, step)
        if step == 2:
            checkpoint.mark_best(tmp_path, 2, 1.25)
    assert _names(tmp_path) == ["best.json", "step-00000002", "step-00000004", "step-00000005"]
    assert checkpoint.best(tmp_path) == (tmp_path / "checkpoints" / "step-00000002", 1.25)
    assert checkpoint.resolve(tmp_path).name == "step-00000005"
    checkpoint.mark_best(tmp_path, 5, 1.0)
    _save(tmp_path, 6)
    assert _names(tmp_path) == ["best.json", "step-00000005", "step-00000006"]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        _save(tmp_path, step)
    assert checkpoint.resolve(tmp_path).name == "step-100000000"


def test_leftovers_of_a_killed_save_are_no_checkpoint_and_are_cleared(tmp_path):
    _save(tmp_path, 1)
    stale = tmp_path / "checkpoints" / ".tmp-step-00000002-4711"
    stale.mkdir()
    (stale / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.resolve(tmp_path).name == "step-00000001"
    _save(tmp_path, 3)
    assert _names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_step_that_is_reached_again_replaces_its_damaged_self(tmp_path):
    path = _save(tmp_path, 4)
    (path / "state.json").unlink()
    _save(tmp_path, 4)
    assert checkpoint.read(tmp_path).step == 4 and _names(tmp_path) == ["step-00000004"]


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*checkpoint.FILES, "manifest.json"])
@pytest.mark.parametrize("damage", [_cut, _flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_damage_is_named_with_the_way_out(tmp_path, name, damage):
    """Each file, cut, altered in one bit, removed or emptied: one line with the file and the checkpoint before."""
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    damage(path / name)
    with pytest.raises(DamagedError) as caught:
        checkpoint.read(tmp_path)
    line = str(caught.value)
    assert "\n" not in line and name in line and "step-00000002" in line
    assert "use the previous checkpoint" in line and "step-00000001" in line
    checkpoint.read(tmp_path / "checkpoints" / "step-00000001")


def test_a_lone_damaged_checkpoint_says_that_nothing_is_before_it(tmp_path):
    path = _save(tmp_path, 2)
    _cut(path / "weights.safetensors")
    with pytest.raises(
        UserError, match=r"weights.safetensors has \d+ bytes instead of \d+: it is truncated; no earlier"
    ):
        checkpoint.read(path)


def test_the_optimizer_is_not_needed_for_evaluation(tmp_path):
    path = _save(tmp_path, 2)
    _flip(path / "optimizer.safetensors")
    assert checkpoint.read(path, with_optimizer=False).weights["w"].sum() == 12


def test_a_copied_checkpoint_reads_anywhere(tmp_path):
    path = _save(tmp_path / "run", 2)
    shutil.copytree(path, tmp_path / "elsewhere")
    assert checkpoint.read(tmp_path / "elsewhere").step == 2


def test_another_format_version_is_refused(tmp_path):
    path = _save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 3}))
    with pytest.raises(UserError, match="format version 3; this version of Switchyard reads 1 and 2"):
        checkpoint.read(path)


def test_paths_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"nowhere': does not exist; give a run folder"):
        checkpoint.resolve(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"contains no checkpoint; train first"):
        checkpoint.resolve(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        checkpoint.resolve(tmp_path / "file")


def test_best_that_points_nowhere_is_none(tmp_path):
    _save(tmp_path, 1)
    assert checkpoint.best(tmp_path) is None
    for text in ("{", "[]", '{"checkpoint": "step-00000009", "loss": 1}', '{"checkpoint": "../..", "loss": 1}'):
        (tmp_path / "checkpoints" / "best.json").write_text(text)
        assert checkpoint.best(tmp_path) is None


class _Model(nn.Cell):
    def __init__(self):
        super().__init__()
        self.w = Parameter(Tensor(np.zeros((3, 2), np.float32)), name="w")
        self.buffer = Parameter(Tensor(np.zeros(2, np.float32)), name="buffer", requires_grad=False)


def test_weights_are_loaded_strictly():
    model, good = _Model(), {"w": np.ones((3, 2), np.float32), "buffer": np.ones(2, np.float32)}
    checkpoint.load_weights(model, good)
    assert model.w.asnumpy().sum() == 6 and model.buffer.asnumpy().sum() == 2
    table = [
        ({"w": good["w"]}, "weight 'buffer': missing in the checkpoint"),
        (good | {"x": good["w"]}, "weight 'x': unknown to this configuration"),
        (good | {"w": np.ones((2, 3), np.float32)}, r"weight 'w': shape \(2, 3\) in the checkpoint, \(3, 2\) by this"),
    ]
    for weights, text in table:
        with pytest.raises(UserError, match=text):
            checkpoint.load_weights(model, weights)
