"""Evaluation: interval by hand, the whole set once, router metrics, overrides that are refused."""

import math

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny_run import TEXT, run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.data import load_data
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.training.evaluate import Evaluator, evaluate, evenly_spaced, mean_with_interval

MOE = {"model": {"num_layers": 2}, "moe": {"expert_num": 4, "layers": [1]}}


def _saved(folder, **sections):
    """(run folder, configuration, data, model) of an untrained checkpoint."""
    write_text(folder)
    config = run_config(folder, **sections)
    data = load_data(config)
    model = create_model(config, data.tokenizer.vocab_size)
    weights = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    run = folder / "runs" / "tiny"
    state = {"step": 1, "data_index": 1, "train_seed": 1, "noise_rule": "", "best_loss": None, "seconds": 0.0}
    checkpoint.save(run, config, data.tokenizer.to_json(), weights, {"a": np.zeros(1, np.float32)}, state)
    return run, config, data, model


def test_interval_by_hand():
    """Equal sequences: mean +- 1.96 standard errors. A sequence without tokens counts for nothing."""
    mean, (low, high) = mean_with_interval(np.array([10.0, 20.0, 30.0, 0.0]), np.array([10.0, 10.0, 10.0, 0.0]))
    error = 1.0 / math.sqrt(3)  # the means 1, 2, 3 have a standard deviation of 1
    assert (mean, low, high) == pytest.approx((2.0, 2 - 1.96 * error, 2 + 1.96 * error))
    mean, _ = mean_with_interval(np.array([10.0, 3.0]), np.array([10.0, 1.0]))
    assert mean == pytest.approx(13 / 11)  # weighted by tokens
    assert mean_with_interval(np.array([4.0]), np.array([2.0])) == (2.0, (2.0, 2.0))


def test_interval_covers_the_truth_19_times_of_20():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        _, (low, high) = mean_with_interval(random.normal(30, 5, 40), np.full(40, 10.0))
        hits += low <= 3.0 <= high
    assert 0.92 <= hits / 1000 <= 0.97


def test_batches_are_spread_over_the_set():
    assert evenly_spaced(10, 0) == evenly_spaced(10, 10) == evenly_spaced(10, 99) == list(range(10))
    assert evenly_spaced(10, 3) == [0, 3, 6] and evenly_spaced(1000, 4) == [0, 250, 500, 750]


def test_the_whole_set_once(tmp_path, graph):
    """Against logits of the plain model: every token but the first is scored once; loads count choices."""
    _, config, data, model = _saved(tmp_path, **MOE)
    found = Evaluator(model, config, data.validation_tokens / data.validation_bytes)(data.validation())
    losses = []
    for batch in data.validation():
        logits, _, _ = model(Tensor(batch.tokens), Tensor(batch.valid), Tensor(np.zeros((1, 1, 1), np.float32)))
        logits, labels = logits.asnumpy().astype(np.float64), batch.labels.reshape(-1)
        loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
        losses.append(loss[batch.valid.reshape(-1) > 0])
    losses = np.concatenate(losses)
    assert found.tokens == len(losses) == data.validation_tokens
    assert found.loss == pytest.approx(losses.mean(), abs=1e-5)
    assert found.loss_ci95[0] < found.loss < found.loss_ci95[1]
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))  # one byte a character in this text
    (layer,) = found.layers
    assert set(layer) == {"layer", "load", "importance", "dropped", "entropy", "max_violation", "z"}
    assert layer["layer"] == 1 and sum(layer["load"]) == found.tokens and layer["dropped"] == 0
    assert sum(layer["importance"]) == pytest.approx(found.tokens, rel=1e-4)
    assert layer["max_violation"] == pytest.approx(max(layer["load"]) / (found.tokens / 4) - 1)


def test_a_text_that_is_given_is_scored_whole_with_the_checkpoint_s_tokenizer(tmp_path, pynative):
    """200 characters are 199 predictions, whatever the batch size; the run's own set is its last tenth."""
    run, _, data, _ = _saved(tmp_path, context={"mode": "pynative"})
    (tmp_path / "other.txt").write_text(TEXT[:200], encoding="utf-8")
    said = []
    found = evaluate(run, [f"data.path={tmp_path / 'other.txt'}"], say=said.append)
    again = evaluate(run, [f"data.path={tmp_path / 'other.txt'}", "data.batch_size=7"], say=said.append)
    assert found.tokens == again.tokens == 199 and found.loss == pytest.approx(again.loss, abs=1e-5)
    assert any("other.txt': 200 bytes, evaluated in full; the checkpoint's vocabulary" in line for line in said)
    assert found.tokens != data.validation_tokens
    (tmp_path / "other.txt").write_text(TEXT[:200] + "é", encoding="utf-8")
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\) at position 200 is not in the vocabulary"):
        evaluate(run, [f"data.path={tmp_path / 'other.txt'}"], say=said.append)


def test_a_checkpoint_is_evaluated_with_overrides(tmp_path, pynative):
    """Another batch size changes nothing; a capacity at evaluation drops choices."""
    run, *_ = _saved(tmp_path, **MOE, context={"mode": "pynative"})
    said = []
    plain = evaluate(run, say=said.append)
    other = evaluate(run, ["data.batch_size=7"], say=said.append)
    assert plain.loss == pytest.approx(other.loss, abs=1e-5) and plain.tokens == other.tokens
    assert plain.layers[0]["load"] == other.layers[0]["load"]
    tight = evaluate(run, ["moe.eval_capacity_factor=0.25"], say=said.append)
    assert tight.layers[0]["dropped"] > 0.3
    assert any("step-00000001" in line for line in said) and any(line.startswith("device:") for line in said)


REFUSED = [
    ("model.hidden_size=32", "model.hidden_size: 32; the checkpoint's weights were trained with 16"),
    ("moe.expert_num=8", "moe.expert_num: 8; the checkpoint's weights were trained with 4"),
    ("model.num_layers=3", "model.num_layers: 3; "),
    ("model.activation=swiglu", "model.activation: swiglu; "),
    ("parallel.data_parallel=2", "parallel.data_parallel: 2; this command is one process"),
    ("model.hiden_size=32", "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
    ("data.path=/nowhere.txt", "/nowhere.txt"),
]


def test_overrides_that_cannot_be(tmp_path, pynative):
    run, *_ = _saved(tmp_path, **MOE)
    for override, text in REFUSED:
        with pytest.raises(UserError) as caught:
            evaluate(run, [override], say=lambda line: None)
        assert text in str(caught.value) and "\n" not in str(caught.value), override
