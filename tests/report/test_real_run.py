"""A tiny run from training to its report: sampled texts, the experts of its checkpoint, and what resuming does."""

import json
import re

import numpy as np
import pytest
from oracles.tiny_run import TEXT, metrics_of, run_config, untimed, write_text

from switchyard.report.inspection import inspect
from switchyard.report.page import write_report
from switchyard.training.evaluate import evaluate
from switchyard.training.loop import train

MOE = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2, "layers": "all"}
SMALL = {"model": {"seq_length": 8}, "data": {"batch_size": 64}}  # few batches: each costs a second in PyNative mode
SECTIONS = SMALL | {"moe": MOE, "context": {"mode": "pynative"}}

pytestmark = pytest.mark.slow  # trains twice


def settings(folder, **keys):
    """Four steps; a text every two, a checkpoint every two."""
    base = {"steps": 4, "sample_every": 2, "checkpoint_every": 2, "eval_every": 2, "eval_batches": 1, "log_every": 1}
    return run_config(folder, **SECTIONS | {"train": base | keys, "schedule": {"total_steps": 4}})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder)
    train(settings(folder))
    return folder


def test_inspection_agrees_with_the_evaluation(trained):
    """Load of every expert and mean loss over the whole validation set, counted in two ways."""
    run = trained / "runs" / "tiny"
    found = inspect(run, 1 << 20, say=lambda line: None)
    exact = evaluate(run, ["data.batch_size=256"], say=lambda line: None)  # one batch
    assert found.losses.size == exact.tokens
    assert found.losses.mean() == pytest.approx(exact.loss, rel=1e-5)
    for place, layer in enumerate(exact.layers):
        assert np.bincount(found.choices[place].reshape(-1), minlength=4).tolist() == layer["load"]
    assert len(found.pieces) == found.tokens.size and "".join(found.pieces) in TEXT


def test_report_of_a_run(trained):
    path = write_report([trained / "runs" / "tiny"], trained / "report.html", tokens=200)
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))["runs"][0]
    assert data["layers"] == [0] and len(data["data"]["cards"][0]) == 4
    assert sum(card["load"] for card in data["data"]["cards"][0]) == pytest.approx(4, abs=0.01)
    assert "finished after 4 steps" in text
    for sample in metrics_of(trained / "runs" / "tiny", "sample"):
        assert f"step {sample['step']}</span>" in text


def test_texts_are_sampled(trained):
    samples = metrics_of(trained / "runs" / "tiny", "sample")
    assert [line["step"] for line in samples] == [2, 4]
    assert all(len(line["prompt"]) == 4 and len(line["text"]) == 4 for line in samples)  # of seq_length 8
    assert samples[0]["text"] != samples[1]["text"]


def test_texts_change_no_figure_of_the_training_and_a_resumed_run_writes_the_same(trained, tmp_path):
    """Two steps without texts, then two with them, which makes up for the missing one of step 2."""
    write_text(tmp_path)
    train(settings(tmp_path, steps=2, sample_every=0))
    run, whole = tmp_path / "runs" / "tiny", trained / "runs" / "tiny"
    assert metrics_of(run, "sample") == []
    train(settings(tmp_path), resume=True)
    assert metrics_of(run, "sample") == metrics_of(whole, "sample")
    assert figures(run) == figures(whole)


def figures(run) -> list[dict]:
    """The lines of a run's training without their speed."""
    return [untimed(line) for line in metrics_of(run)]
