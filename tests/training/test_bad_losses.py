"""Bad losses: the rule, what is skipped or gone back from, and the same under resume."""

import math
import os
import shutil
import signal

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny_run import losses_of, metrics_of, run_config, token_batch, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.config import build
from switchyard.data import TrainBatches
from switchyard.errors import Interrupted, UserError
from switchyard.models import create_model
from switchyard.training import trainer
from switchyard.training.bad_losses import BadLosses
from switchyard.training.loop import train
from switchyard.training.randomness import draw_noise
from switchyard.training.step import TrainStep


def _bad(state=None, **train) -> BadLosses:
    return BadLosses(build({"train": {"on_bad_loss": "skip", "spike_factor": 2.0, "spike_window": 3} | train}), state)


def _figures(loss: float, norm: float = 1.0, scale: float = 1.0) -> dict:
    return {"loss": loss, "gradient_norm": norm, "loss_scale": scale}


def test_a_spike_is_above_the_median_of_a_full_window():
    bad = _bad()
    for loss in (4.0, 3.0):
        assert bad.fault(_figures(1000.0)) is None and bad.limit == math.inf  # too few losses are known
        bad.note(loss)
    bad.note(2.0)
    assert bad.limit == 6.0 and bad.fault(_figures(6.0)) is None
    assert bad.fault(_figures(6.1)) == "loss is 6.1000, more than 2 times the median 3.0000 of the last 3 losses"
    bad.note(2.0)  # 3, 2, 2
    assert bad.limit == 4.0


@pytest.mark.parametrize(
    "figures, fault",
    [
        (_figures(math.nan), "loss is nan"),
        (_figures(math.inf), "loss is inf"),
        (_figures(1.0, math.nan), "gradient norm is nan"),
        (_figures(1.0, math.inf, scale=2.0), None),  # float16 halves its scale
    ],
)
def test_what_is_not_finite_is_bad_without_a_factor(figures, fault):
    assert _bad(spike_factor=None).fault(figures) == fault


def test_the_limit_ends_the_run():
    bad = _bad(max_bad_losses=2)
    bad.permit(5, "loss is nan", "KEPT")
    bad.permit(9, "loss is nan", "KEPT")
    with pytest.raises(UserError, match=r"^train.max_bad_losses: 2; the loss is nan at step 12, after as many .*KEPT"):
        bad.permit(12, "loss is nan", "KEPT")


def test_the_state_goes_on_where_it_was():
    bad = _bad()
    for loss in (4.0, 3.0, 1.1):
        bad.note(loss)
    bad.permit(3, "loss is nan", "")
    again = _bad(bad.state())
    assert again.state() == bad.state() == {"losses": [4.0, 3.0, 1.1], "bad_losses": 1} and again.limit == bad.limit
    assert BadLosses(build({})).state() == {}


@pytest.mark.parametrize("state", [{"losses": "x", "bad_losses": "y"}, {"losses": [None, {}], "bad_losses": None}])
def test_a_state_of_another_kind_is_no_state(state):
    assert _bad(state).state() == {"losses": [], "bad_losses": 0}


def _weights(step) -> dict[str, np.ndarray]:
    found = {parameter.name: parameter for parameter in step.model.get_parameters()} | step.graph.optimizer.state()
    return {name: parameter.asnumpy().copy() for name, parameter in found.items()}


def _differ(before, after) -> bool:
    return any(not np.array_equal(value, after[name], equal_nan=True) for name, value in before.items())


@pytest.mark.parametrize("mode, micro_batches, dtype", [("graph", 2, "float32"), ("pynative", 1, "float16")])
def test_a_step_above_the_limit_changes_nothing(mode, micro_batches, dtype, request):
    """Of two micro-batches the loss of both counts."""
    request.getfixturevalue(mode)
    config = run_config(
        moe={"expert_num": 4, "router": "sigmoid", "num_experts_chosen": 2, "topk_bias_update_rate": 0.01},
        model={"compute_dtype": dtype},
        train={"gradient_accumulation_steps": micro_batches, "on_bad_loss": "skip", "init_loss_scale": 64.0},
    )
    step = TrainStep(create_model(config, 17), config)
    noise = draw_noise(1, 0, micro_batches, step.model.noise_slices, range(1), config.rows, config.model.hidden_size)
    batch = (*token_batch(micro_batches, 4, 16), noise)
    before = _weights(step)
    loss = step(*batch, 0.01, loss_limit=1.0)["loss"]
    assert loss > 1 and not _differ(before, _weights(step))
    assert step(*batch, 0.01, loss_limit=0.999 * loss)["skipped"] == 1 and not _differ(before, _weights(step))
    figures = step(*batch, 0.01, loss_limit=1.001 * loss)
    assert figures["skipped"] == 0 and figures["loss"] == loss and _differ(before, _weights(step))


STEPS = {"steps": 9, "checkpoint_every": 3, "keep_checkpoints": 9}


def _poison(monkeypatch, *indices: int) -> None:
    """Makes the loss of these micro-batches NaN: a weight is NaN while one of them is read."""
    read, call = TrainBatches.at, TrainStep.__call__

    def at(self, index):
        batch = read(self, index)
        return batch._replace(valid=batch.valid * 2) if index in indices else batch

    def poisoned(self, tokens, labels, valid, *rest):
        gain = next(one for one in self.model.get_parameters() if one.name == "norm.gain")
        kept = gain.asnumpy().copy()
        gain.set_data(Tensor(kept * np.nan))
        figures = call(self, tokens, labels, valid / 2, *rest)
        assert figures["skipped"] == 1 and math.isnan(figures["loss"])
        gain.set_data(Tensor(kept))
        return figures

    monkeypatch.setattr(TrainBatches, "at", at)
    monkeypatch.setattr(
        TrainStep, "__call__", lambda self, *batch: (poisoned if batch[2].max() == 2 else call)(self, *batch)
    )


def _stop_at(monkeypatch, stop: int) -> None:
    """Sends this process SIGTERM in the step after `stop`, once."""
    original, sent = trainer.learning_rate, []

    def rate(config, step):
        if step == stop and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(config, step)

    monkeypatch.setattr(trainer, "learning_rate", rate)


def _same(one, other) -> bool:
    first, second = checkpoint.read(one), checkpoint.read(other)
    arrays = [held.weights | held.optimizer for held in (first, second)]
    ignored = ("seconds",)
    states = [{key: value for key, value in held.state.items() if key not in ignored} for held in (first, second)]
    return states[0] == states[1] and not _differ(*arrays)


@pytest.mark.parametrize(
    "rule, kind, index",
    [("skip", "skipped", 9), ("rewind", "rewound", 11)],  # batches that were read: of the two steps undone too
)
def test_a_run_goes_on_after_a_bad_batch_and_a_resumed_one_repeats_it(
    rule, kind, index, tmp_path, monkeypatch, pynative, capsys
):
    """The batch of step 5 is bad; the checkpoint before it is that of step 3."""
    write_text(tmp_path)
    _poison(monkeypatch, 4)
    keys = STEPS | {"on_bad_loss": rule, "async_checkpoint": True}
    whole = run_config(tmp_path, train=keys, context={"mode": "pynative"})
    train(whole)
    run = tmp_path / "runs" / "tiny"
    assert "step 5: the loss is nan; " in capsys.readouterr().out
    lines = metrics_of(run, kind)
    assert [(line["step"], line["number"], line["fault"]) for line in lines] == [
        (5 if rule == "skip" else 3, 1, "loss is nan")
    ]
    assert list(losses_of(run)) == [step for step in range(1, 10) if (rule, step) != ("skip", 5)]
    assert checkpoint.read(run).state["data_index"] == index and checkpoint.read(run).state["bad_losses"] == 1
    with monkeypatch.context() as patch:
        _stop_at(patch, 4)  # after the checkpoint, before the bad batch
        other = run_config(tmp_path, train=keys | {"name": "other"}, context={"mode": "pynative"})
        with pytest.raises(Interrupted, match="saved step 4"):
            train(other)
    if rule == "rewind":  # the run that was left alone had no checkpoint of step 4
        shutil.rmtree(tmp_path / "runs" / "other" / "checkpoints" / checkpoint.name_of(4))
    with monkeypatch.context() as patch:
        _stop_at(patch, 8)
        with pytest.raises(Interrupted, match="saved step 8"):
            train(other, resume=True)
    train(other, resume=True)
    assert losses_of(tmp_path / "runs" / "other") == losses_of(run)
    assert _same(tmp_path / "runs" / "other", run)
    assert metrics_of(tmp_path / "runs" / "other", kind) == lines


@pytest.mark.long  # the limit by itself is held above
def test_a_run_that_goes_back_too_often_ends(tmp_path, monkeypatch, pynative):
    write_text(tmp_path)
    _poison(monkeypatch, *range(4, 20))
    keys = STEPS | {"on_bad_loss": "rewind", "max_bad_losses": 2}
    config = run_config(tmp_path, train=keys, context={"mode": "pynative"})
    with pytest.raises(UserError, match=r"train.max_bad_losses: 2; the loss is nan at step 4, .*step-00000003'"):
        train(config)
    run = tmp_path / "runs" / "tiny"
    assert [(line["step"], line["bad_step"]) for line in metrics_of(run, "rewound")] == [(3, 5), (3, 4)]
    assert list(losses_of(run)) == [1, 2, 3]
