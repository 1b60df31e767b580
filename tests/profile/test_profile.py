"""The profile: a row for each part of a step, beside what the part cannot do without."""

import json
import re

import pytest
from mindspore import nn

from switchyard.config import build
from switchyard.errors import UserError
from switchyard.profile import measure as measuring
from switchyard.profile.__main__ import main, render
from switchyard.profile.measure import COPIES, MORE, Row, measure, twin, without_calls
from switchyard.profile.parts import Function, Part

MODEL = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_length": 8}
TREE = {"model": MODEL, "moe": {"expert_num": 2, "layers": [1]}, "data": {"batch_size": 2}}
PARTS = {"attention", "positions", "norm", "embedding", "dense feed-forward", "router", "dispatch", "experts"}
PARTS |= {"combine", "head and loss", "gradient norm", "optimizer", "data"}


@pytest.mark.slow
def test_every_part_of_a_step_has_a_row(pynative):
    rows, step = measure(build(TREE), 11, rounds=1)
    found = {row.name: row for row in rows}
    assert found.keys() == PARTS and step > 0
    assert {name: row.times for name, row in found.items() if row.times > 1} == {
        "norm": 5,
        "attention": 2,
        "positions": 2,
    }
    assert all(row.floor > 0 for name, row in found.items() if name not in ("dispatch", "combine", "data"))
    assert found["gradient norm"].backward == found["optimizer"].backward == 0 and found["experts"].forward > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("moe", "names"),
    [
        ({"router": "dense"}, {"router and dispatch", "experts and combine"}),
        ({"granularity": "slice", "slice_length": 4}, {"router", "dispatch", "experts", "combine"}),
        ({"router": "top_k", "dispatch": "dropless", "shared_expert_num": 1}, {"experts", "combine", "shared experts"}),
    ],
)
def test_other_forms_of_routing_have_rows_of_their_own(pynative, moe, names):
    rows, _ = measure(build({"model": MODEL, "moe": {"expert_num": 2} | moe, "data": {"batch_size": 2}}), 11, rounds=1)
    assert names <= {row.name for row in rows}


def test_a_row_adds_its_passes_and_its_floors():
    assert Row("norm", 1.0, 2.0, 0.5, None).total == 3.0
    assert Row("norm", 1.0, 2.0, 0.5, None).floor == 0.5
    assert Row("data", 1.0, 0.0, None, None).floor is None


def test_what_one_copy_adds_is_the_part_without_its_call():
    """A call of 3 s with one norm, of 5 s with five: a norm takes 0.5 s, and 2.5 s were the call."""
    seconds = {"norm forward": 3.0, "norm forward" + MORE: 3.0 + 0.5 * (COPIES - 1), "step": 7.0}
    assert without_calls(seconds) == {"norm forward": 0.5, "step": 7.0}


def test_a_copy_has_weights_of_its_own_unless_the_part_is_of_the_whole_model():
    cell = nn.Dense(2, 3)
    copy = twin(Part("experts", cell, ()), 1)
    assert copy.weight is not cell.weight and (copy.weight.asnumpy() == cell.weight.asnumpy()).all()
    assert {p.name for p in copy.get_parameters()}.isdisjoint(p.name for p in cell.get_parameters())
    shared = Function(None, cell.construct)
    assert twin(Part("embedding", shared, ()), 1) is shared


@pytest.mark.slow
def test_a_device_runs_copies_of_each_part_in_one_graph(pynative, monkeypatch):
    monkeypatch.setattr(measuring, "COPIES", 2)
    monkeypatch.setattr(measuring, "copies", lambda: 2)
    timed = []
    monkeypatch.setattr(measuring, "without_calls", lambda seconds: timed.extend(seconds) or without_calls(seconds))
    rows, _ = measure(build(TREE), 11, rounds=1)
    assert {row.name for row in rows} == PARTS
    once = {name for name in timed if not name.endswith(MORE)}
    assert once - {"step", "data"} == {name.removesuffix(MORE) for name in timed if name.endswith(MORE)}


@pytest.mark.parametrize(("step", "warned"), [(2.0, False), (1.0, True)])
def test_parts_that_take_far_longer_than_the_step_are_no_measure(step, warned):
    rows = [Row("norm", 1.0, 1.0, 0.5, None), Row("data", 0.5, 0.0, None, None)]
    said = render(rows, step)
    assert said[-3 if warned else -1] == f"all parts: 2500.00 ms; whole step: {1e3 * step:.2f} ms (medians)"
    assert any(line.startswith("The parts take 2.5 times the step") for line in said) == warned


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (TREE | {"train": {"gradient_accumulation_steps": 2}}, "train.gradient_accumulation_steps: 2"),
        (TREE | {"parallel": {"data_parallel": 2}}, "parallel: 2 devices"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(tree, message):
    with pytest.raises(UserError, match=re.escape(message)):
        measure(build(tree), 11, rounds=1)


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="--rounds: 0; at least 1"):
        main(["--config", "quickstart", "--rounds", "0"])


def test_the_vocabulary_is_that_of_the_data_where_none_is_given(tmp_path, monkeypatch):
    asked = []

    def stop(config, vocabulary, rounds):
        asked.append(vocabulary)
        raise UserError("enough")

    monkeypatch.setattr("switchyard.profile.measure.measure", stop)
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps({"model": MODEL | {"type": "seq2seq"}, "context": {"mode": "pynative"}}))
    with pytest.raises(UserError, match="enough"):
        main(["--config", str(config)])
    assert asked == [256 + 2 + 100]


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_numbers_and_a_picture(tmp_path, capsys, pynative):
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps(TREE | {"context": {"mode": "pynative"}}))
    files = ["--json", str(tmp_path / "p.json"), "--picture", str(tmp_path / "p.png")]
    main(["--config", str(config), "--vocab", "11", "--rounds", "1", *files])
    lines, found = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "p.json").read_text())
    assert {part["part"] for part in found["parts"]} == PARTS
    assert any("; whole step: " in line for line in lines) and any(line.startswith("experts ") for line in lines)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
