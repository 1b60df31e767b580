"""History and picture of a run, from metrics that were made by hand."""

import json

import numpy as np
import pytest

from switchyard.cli import run
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.report import picture as picture_module
from switchyard.report.history import answers, read_history
from switchyard.report.picture import picture

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder, load_by_step, validation=((20, 2.7), (20, 2.5)), tail="", **moe):
    """A run folder whose training loss is 3 - step / 100."""
    config = build({"model": {"num_layers": 3}, "moe": moe})
    (folder / "config.yaml").write_text(config.to_yaml())
    lines = []
    for step, load in load_by_step.items():
        record = {"kind": "train", "step": step, "loss": 3 - step / 100}
        lines.append(record | ({"load": load} if load else {}))
    lines += [{"kind": "evaluation", "step": step, "loss": loss} for step, loss in validation]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


@pytest.fixture
def two_steps(tmp_path):
    load = {1: [[8, 0, 0, 0], [2, 2, 2, 2]], 20: [[1, 3, 2, 2], [0, 0, 0, 0]]}
    return write_run(tmp_path, load, tail='{"kind": "train", "step": 4', expert_num=4, layers=[0, 2])


def test_history_holds_what_was_written(two_steps):
    history = read_history(two_steps)
    assert history.steps.tolist() == [1, 20]
    assert history.losses.tolist() == [2.99, 2.8]
    assert (history.validation_steps.tolist(), history.validation_losses.tolist()) == ([20], [2.5])
    assert history.layers == (0, 2)
    assert history.load.shape == (2, 2, 4)
    np.testing.assert_allclose(history.relative_load[0], [[4, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(history.relative_load[1], [[0.5, 1.5, 1, 1], [0, 0, 0, 0]])


def test_picture_is_a_picture(two_steps, monkeypatch):
    drawn = {}

    def note(axes, history, layer):
        drawn[layer] = real(axes, history, layer)
        return drawn[layer]

    real = picture_module._draw_load
    monkeypatch.setattr(picture_module, "_draw_load", note)
    path = picture(two_steps)
    assert path == two_steps / "picture.png"
    assert path.read_bytes().startswith(PNG)
    assert list(two_steps.glob(".*")) == []
    np.testing.assert_allclose(np.ma.getdata(drawn[0].get_array()), [[4, 0.5], [0, 1.5], [0, 1], [0, 1]])  # [E, T]
    assert drawn.keys() == {0, 1}


def test_images_show_accuracy_beside_a_uniform_guess(tmp_path, monkeypatch):
    config = build({"model": {"type": "vision"}, "moe": {"granularity": "sample"}, "vision": {"classes": 10}})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    lines = [{"kind": "train", "step": step, "loss": 2.0} for step in (1, 20)]
    lines += [{"kind": "evaluation", "step": step, "loss": 1.0, "accuracy": step / 40} for step in (10, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_history(tmp_path)
    assert (history.accuracies.tolist(), history.choices) == ([0.25, 0.5], 10)
    drawn = {}
    real = picture_module._draw_accuracy
    monkeypatch.setattr(picture_module, "_draw_accuracy", lambda axes, own: (real(axes, own), drawn.update(axes=axes)))
    picture(tmp_path)
    curve, guess = drawn["axes"].get_lines()
    assert (list(curve.get_ydata()), list(guess.get_ydata())) == ([25, 50], [10, 10])
    assert drawn["axes"].get_ylim()[0] == 0


@pytest.mark.parametrize(
    ("tree", "choices"),
    [
        ({}, 256),
        ({"data": {"tokenizer": "char"}}, None),
        ({"data": {"tokenizer": "gone/tokenizer.json"}}, None),
        ({"model": {"type": "vision"}, "moe": {"granularity": "sample"}, "vision": {"classes": 7}}, 7),
    ],
)
def test_a_uniform_guess_is_known_where_the_answers_are(tree, choices):
    assert answers(build(tree)) == choices


@pytest.mark.parametrize("moe", [{"expert_num": 1}, {"expert_num": 2, "layers": "all"}], ids=["dense", "one step"])
def test_picture_of_little(tmp_path, moe):
    load = [[1, 3]] * 3 if moe["expert_num"] > 1 else None
    folder = write_run(tmp_path, {1: load}, validation=(), **moe)
    assert picture(folder, tmp_path / "other.png").read_bytes().startswith(PNG)


def test_nothing_to_draw_is_said(tmp_path, capsys):
    with pytest.raises(UserError, match=r"metrics\.jsonl: No such file"):
        read_history(tmp_path)
    write_run(tmp_path, {}, expert_num=4)
    assert run(picture_module.main, [str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "holds no logged step" in captured.err
    assert not (tmp_path / "picture.png").exists()
