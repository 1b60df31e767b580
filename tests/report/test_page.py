"""The report of runs whose files were typed by hand; of one that was trained: test_real_run.py."""

import json
import re

import pytest
from oracles.inspections import typed_inspection
from oracles.run_folders import evaluation_line, train_line, write_folder

from switchyard.cli import run
from switchyard.report import curves, experts, inspection
from switchyard.report.__main__ import main
from switchyard.report.page import write_report
from switchyard.report.records import read_records

MOE = {"expert_num": 4, "layers": [0, 2]}
LOAD = [[8, 0, 0, 0], [2, 2, 2, 2]]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def data_of(path) -> dict:
    """What the script of a report reads."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))


def shown_text(path) -> str:
    """The text of a report, without its style, its script and its tags."""
    text = re.sub(r"<(style|script).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


@pytest.fixture
def folder(tmp_path):
    lines = [train_line(1, LOAD), train_line(20, LOAD), evaluation_line(20, 2.5, [[30, 1, 1, 0], [8, 8, 8, 8]])]
    return write_folder(tmp_path / "typed", lines, moe=MOE)


def test_report_of_files_alone(folder):
    path = write_report([folder], tokens=0)
    assert path == folder / "report.html"
    assert list(folder.glob(".*")) == []
    text, data = shown_text(path), data_of(path)
    assert "at step 20 of 100" in text
    assert "2.5000 validation loss, nats" in text
    assert "layer 0: dead in the evaluation of step 20 (no choice at all): expert 3" in text
    assert "The model was not inspected (--no-inspect)." in text
    assert "None: train.sample_every is 0." in text
    assert data["charts"][0]["curves"][0]["y"] == ["2.99", "2.8"]
    assert data["runs"][0]["heat"]["steps"] == [1, 20]


def test_report_needs_no_network(folder):
    text = write_report([folder], tokens=0).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\(|@import|fetch\(|XMLHttpRequest""", text)


def test_heat_map_is_the_load_relative_to_the_mean(folder):
    found = curves.heat_maps(read_records(folder))
    maps = [list(curves.base64.b64decode(layer)) for layer in found["load"]]
    four_times = 4 * curves.UNIT
    assert maps == [[four_times, four_times, 0, 0, 0, 0, 0, 0], [curves.UNIT] * 8]  # [E, columns], row by row


def test_markup_in_every_text_of_a_run_stays_text(tmp_path):
    sample = {"kind": "sample", "step": 5, "prompt": EVIL, "text": EVIL}
    broken = write_folder(tmp_path / "<b>run<b>", [train_line(1), sample], data={"path": EVIL})
    text = write_report([broken], tokens=0).read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text and "<b>run" not in text
    assert text.count("&lt;/script&gt;&lt;script&gt;alert(1)") == 3  # prompt, text and data.path


def test_token_that_spells_a_tag_stays_text(folder, monkeypatch):
    monkeypatch.setattr(inspection, "inspect", lambda *rest: typed_inspection())
    path = write_report([folder])
    assert "<b>" not in re.sub(r"<b class.*?</b>|<b>[^<]*</b>", "", path.read_text(encoding="utf-8"))
    assert data_of(path)["runs"][0]["data"]["text"]["pieces"][:4] == ["<b>", "fox", " ", "jumps"]


def test_what_experts_do_by_hand(folder, monkeypatch):
    """Expert 1 of the first layer gets token 1 as a first choice and token 0 as a second: half and half."""
    found = experts.expert_data(typed_inspection())
    card = found["cards"][0][1]
    assert (card["load"], card["tokens"], card["gate"]) == (1.0, 32, 0.5)
    assert card["frequent"] == [["<b>", 16, 16], ["fox", 16, 16]]
    assert card["exclusive"] == [["<b>", 16, 16, 1.0], ["fox", 16, 16, 1.0]]  # twice as often as by chance: 1 bit
    assert card["contexts"][1] == ["<b>", "fox", "␣jumps<b>fox␣jumps<b>fox␣jumps<b>fox␣jumps", 0.7]
    assert found["coactivation"][0] == [[32, 16, 0, 16], [16, 32, 16, 0], [0, 16, 32, 16], [16, 0, 16, 32]]
    assert found["text"]["choices"][1][:2] == [[1, 2], [2, 3]]
    assert [flow.tolist() for flow in experts.flows(typed_inspection())] == [
        [[0, 16, 0, 0], [0, 0, 16, 0], [0, 0, 0, 16], [16, 0, 0, 0]]
    ]
    rows = experts.path_rows(typed_inspection())
    assert [row["experts"] for row in rows] == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert rows[0]["share"] == 25 and rows[0]["lift"] == 4 and rows[0]["tokens"] == ["<b>"]


def test_several_runs_show_curves_over_each_other_and_differences(tmp_path):
    one = write_folder(tmp_path / "one", [train_line(1), evaluation_line(1, 2.0)], train={"name": "one", "seed": 1})
    other = write_folder(tmp_path / "two", [train_line(1), evaluation_line(1, 3.0)], train={"name": "two", "seed": 2})
    path = write_report([one, other], tmp_path / "both.html", tokens=0)
    text = shown_text(path)
    names = [curve["name"] for curve in data_of(path)["charts"][0]["curves"]]
    assert names == ["one (training)", "one", "two (training)", "two"]
    assert "train.seed 1 2" in text
    assert "train.steps" not in text and "train.name" not in text  # the same, and the name is at the top
    assert re.search(r"one at step 1 of 2,000 2\.0000 .* two at step 1 of 2,000 3\.0000", text)


def test_more_than_four_runs_show_no_experts(tmp_path):
    folders = [write_folder(tmp_path / f"run{number}", [train_line(1, LOAD)], moe=MOE) for number in range(5)]
    text = shown_text(write_report(folders, tmp_path / "all.html"))
    assert "Experts are shown in reports of at most 4 runs" in text


def test_what_is_missing_is_said(tmp_path, capsys):
    folder = write_folder(tmp_path / "new", [train_line(1, LOAD)], moe=MOE)  # no checkpoint
    assert run(main, [str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(folder / "report.html")
    assert "note: run" in captured.err and "what the experts do is not shown" in captured.err
    assert "What the experts do is not shown: checkpoint" in shown_text(folder / "report.html")
    (folder / "config.yaml").unlink()
    text = shown_text(write_report([folder]))
    assert "new: config.yaml: No such file" in text
    assert "The configuration is missing, so the model cannot be built." in text


def test_dense_run_has_no_experts(tmp_path):
    folder = write_folder(tmp_path / "dense", [train_line(1)], moe={"expert_num": 1})
    assert "No layer is conditional: there are no experts to look at." in shown_text(write_report([folder]))


def test_large_report_stays_moderate(tmp_path, monkeypatch):
    """64 experts in four layers, 200 logged steps, 2,048 tokens of text."""
    lines, layers = [train_line(step, [list(range(64))] * 4) for step in range(200)], [0, 1, 2, 3]
    sizes = {"model": {"num_layers": 4}, "moe": {"expert_num": 64, "layers": layers}}
    folder = write_folder(tmp_path / "large", lines, **sizes)
    large = typed_inspection(64, (0, 1, 2, 3), 2, 2048)
    monkeypatch.setattr(inspection, "inspect", lambda *rest: large)
    assert write_report([folder]).stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run 'nowhere': no such folder"),
        (["."], "metrics.jsonl: No such file"),
        ([".", "--tokens", "0"], "--tokens: 0; at least 1"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
