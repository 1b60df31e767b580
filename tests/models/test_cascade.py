"""The cascade: exits by threshold, work that is not done, the curve, training of all exits."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import NO_NOISE

from switchyard.cli import run
from switchyard.commands import eval_main, train_main
from switchyard.config import build
from switchyard.distributed.mesh import LOCAL
from switchyard.models import create_model
from switchyard.models.cascade import EarlyExit, curve, flops_to, probabilities
from switchyard.training.loss import LOSS, TrainLoss

CONFIG = Path(__file__).resolve().parents[2] / "config" / "digits_cascade_cpu.yaml"


def cascade(threshold=0.5):
    """Three stages with exits that disagree."""
    settings = build(
        {
            "model": {"type": "cascade"},
            "cascade": {"stages": [2, 3, 4], "threshold": threshold},
            "vision": {"image_size": 4, "classes": 3},
            "data": {"batch_size": 6},
        }
    )
    model = create_model(settings, 3)
    for stage in model.stages:  # few channels: none of them may be dead
        last = stage.convolutions.network.w_out
        last.set_data(Tensor(np.abs(last.asnumpy())))
        stage.exit.weight.set_data(Tensor(stage.exit.weight.asnumpy() * 8))
    return settings, model


def images(batch=6):
    return np.random.default_rng(0).uniform(0, 1, (batch, 1, 4, 4)).astype(np.float32)


def exits_of(model, pictures):
    return np.stack([logits.asnumpy() for logits in model.set_train(False).all_exits(Tensor(pictures))])  # [X, B, V]


@pytest.mark.parametrize("threshold", [0.34, 0.6, 0.9, 1.0])
def test_a_sample_leaves_at_the_first_exit_that_is_sure(graph, threshold):
    _, model = cascade(threshold)
    logits, found = exits_of(model, images()), []
    for sample in range(6):
        sure = [probabilities(logits[stage, sample]).max() >= threshold for stage in range(3)]
        found.append(([*sure[:2], True]).index(True))
    early, exits = EarlyExit(model)(images())
    assert exits.tolist() == found
    assert np.allclose(early, logits[found, np.arange(6)], atol=1e-5)
    fixed = model.set_train(False)(Tensor(images()), Tensor(np.ones((6, 1), np.float32)), Tensor(NO_NOISE))[0]
    assert np.allclose(fixed.asnumpy(), early, atol=1e-5)


def test_skipped_stages_get_no_samples(graph):
    _, model = cascade()
    runner = EarlyExit(model, threshold=0.34)  # three classes: the first exit is always sure
    reached = []

    def watched(index, stage):
        def work(maps):
            reached.append((index, maps.shape[0]))
            return stage(maps)

        return work

    runner.stages = [watched(index, stage) for index, stage in enumerate(runner.stages)]
    for stage, made in zip(runner.stages, model.stages):
        stage.classes = made.classes
    runner(images())
    assert reached == [(0, 6)]


def test_curve_counts_what_the_runner_does(graph):
    _, model = cascade()
    labels, flops = np.array([0, 1, 2, 0, 1, 2]), flops_to(model.stages)
    points = curve(exits_of(model, images()), labels, flops, [0.34, 0.6, 1.0])
    for point in points:
        logits, exits = EarlyExit(model, point.threshold)(images())
        assert point.accuracy == pytest.approx((logits.argmax(1) == labels).mean())
        assert point.mean_flops == pytest.approx(flops[exits].mean())
    assert points[0].mean_flops == flops[0] and [p.mean_flops for p in points] == sorted(p.mean_flops for p in points)


def test_flops_by_hand():
    _, model = cascade()
    # 16 places, 9 * 1 values to 4 channels to 2; the exit sees 4 x 4 squares of 2 channels and has 3 classes
    assert model.stages[0].flops == 2 * (16 * (9 * 4 + 4 * 2) + 32 * 3)


def test_training_is_the_mean_over_all_exits(graph):
    settings, model = cascade()
    labels = np.array([[0], [1], [2], [0], [1], [2]], np.int32)
    valid = np.array([[1], [1], [1], [1], [0], [0]], np.float32)
    logits = exits_of(model, images()).astype(np.float64)
    surprise = -np.log(probabilities(logits)[:, np.arange(6), labels[:, 0]])  # [X, B]
    loss, weights = TrainLoss(model, settings).set_train(True), ms.ParameterTuple(model.trainable_params())
    inputs = [Tensor(part) for part in (images(), labels, valid, NO_NOISE, np.ones((1, 1), np.float32))]
    figures, gradients = LOCAL.differentiate(loss, weights)(*inputs)
    assert figures.asnumpy()[LOSS] == pytest.approx(surprise[:, :4].mean(), rel=1e-4)
    assert all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)


@pytest.mark.slow
def test_train_and_eval(graph, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run(train_main, ["--config", str(CONFIG), "train.steps=3", "train.eval_every=0"]) == 0
    capfd.readouterr()
    assert run(eval_main, ["--checkpoint", "runs/digits_cascade", "--json", "cascade.threshold=0.01"]) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["exits"] == [1, 0, 0] and figures["threshold"] == 0.01 and 0 < figures["accuracy"] < 1
