"""Runs of an encoder-decoder on corrupted text: exact resume, the figures of an evaluation, what is refused."""

import math

import pytest
from oracles.tiny_run import losses_of, metrics_of, run_config, write_text

from switchyard.errors import UserError
from switchyard.training.evaluate import evaluate
from switchyard.training.loop import train

MODEL = {"type": "seq2seq", "dropout": 0.1}
MOE = {"expert_num": 4, "router": "switch", "jitter": 0.1}


def config_of(folder, **train):
    more = {"data": {"val_fraction": 0.02}, "schedule": {"total_steps": 4}, "context": {"mode": "pynative"}}
    return run_config(folder, model=MODEL, moe=MOE, train=train, **more)


def test_a_run_that_goes_on_repeats_the_uninterrupted_one(tmp_path, pynative):
    write_text(tmp_path)
    train(config_of(tmp_path, steps=4, name="whole"))
    train(config_of(tmp_path, steps=2, name="halves", checkpoint_every=2))
    train(config_of(tmp_path, steps=4, name="halves"), resume=True)
    whole = losses_of(tmp_path / "runs" / "whole")  # operators one by one may sum in another order: 1e-11 was seen
    assert losses_of(tmp_path / "runs" / "halves") == pytest.approx(whole, rel=1e-6)
    result = metrics_of(tmp_path / "runs" / "whole", "evaluation")[-1]
    other = metrics_of(tmp_path / "runs" / "halves", "evaluation")[-1]
    assert result["loss"] == pytest.approx(other["loss"], rel=1e-6) and len(result["layers"]) == 2
    scored = evaluate(tmp_path / "runs" / "whole", say=lambda line: None)
    assert scored.loss == pytest.approx(result["loss"], abs=1e-6)
    assert scored.perplexity == pytest.approx(math.exp(scored.loss))
    with pytest.raises(UserError, match=r"seq2seq\.sentinels: 50"):
        evaluate(tmp_path / "runs" / "whole", ["seq2seq.sentinels=50"], say=lambda line: None)
