"""The image classifier: shapes, padding, tasks, depth, independence of the batch; training, resume and export."""

import json

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import NO_NOISE

from switchyard.cli import run
from switchyard.commands import eval_main, export_main, infer_main, train_main
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.moe import metrics
from switchyard.training.loss import LOSS, TrainLoss
from switchyard.training.randomness import draw_noise
from switchyard.training.step import TrainStep

UNITS = ["sample", "region", "channel", "task"]


def config(granularity="region", batch=4, vision=None, **moe):
    tasks = {"tasks": ["identity", "parity"]} if granularity == "task" else {}
    router = {"router": "task", "task_num": 2} if granularity == "task" else {}
    return build(
        {
            "model": {"type": "vision", "num_layers": 2, "hidden_size": 8, "intermediate_size": 4},
            "moe": {"expert_num": 4, "granularity": granularity, "layers": [1]} | router | moe,
            "vision": {"image_size": 4} | tasks | (vision or {}),
            "data": {"batch_size": batch},
        }
    )


def images(batch=4, side=4, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (batch, 1, side, side)).astype(np.float32)


def asked(config, batch=4):
    """Tasks in turn."""
    return np.eye(len(config.vision.tasks), dtype=np.float32)[np.arange(batch) % len(config.vision.tasks)]


def forward(model, pictures, valid):
    """(logits [B * T, V], metrics of the conditional layer)."""
    logits, stats, _ = model(Tensor(pictures), Tensor(valid), Tensor(NO_NOISE))
    return logits.asnumpy(), metrics.metrics(stats.asnumpy().sum(0), 4)


@pytest.mark.parametrize("granularity", UNITS)
def test_shapes_and_loads(graph, granularity):
    settings = config(granularity)
    model, valid = create_model(settings, 10).set_train(False), asked(settings)
    logits, found = forward(model, images(), valid)
    assert logits.shape == (4 * len(settings.vision.tasks), 10)
    assert found["load"].shape == (1, 4) and found["load"].sum() == 4 * settings.units and found["dropped"] == 0


@pytest.mark.parametrize("granularity", ["sample", "region", "channel"])
def test_an_image_does_not_depend_on_its_batch_and_padding_goes_nowhere(graph, granularity):
    model = create_model(config(granularity), 10).set_train(False)
    pictures, valid = images(), np.array([[1], [1], [0], [0]], np.float32)
    logits, found = forward(model, pictures, valid)
    changed = pictures.copy()
    changed[2:] = 9
    others, other = forward(model, changed, valid)
    assert np.allclose(logits[:2], others[:2], atol=1e-5)
    assert np.array_equal(found["load"], other["load"])
    assert found["load"].sum() == 2 * config(granularity).units


def test_a_task_goes_to_its_own_experts_and_has_its_own_classes(graph):
    settings = config("task", task_experts=[[1], [3]])
    logits, found = forward(create_model(settings, 10).set_train(False), images(), asked(settings))
    assert found["load"].tolist() == [[0, 2, 0, 2]]
    assert (logits.reshape(4, 2, 10)[:, 1, 2:] < -1e8).all() and (logits.reshape(4, 2, 10)[:, 0] > -1e8).all()


def test_routing_at_the_input(graph):
    settings = config("region", layers=[0])
    _, found = forward(create_model(settings, 10).set_train(False), images(), asked(settings))
    assert found["load"].sum() == 16


def test_pooling_after_the_input(graph):
    settings = config("region", vision={"image_size": 8, "pool": 2})
    logits, _ = forward(create_model(settings, 10).set_train(False), images(side=8), asked(settings))
    assert logits.shape == (4, 10)


@pytest.mark.parametrize("router", ["expert_choice", "soft", "dense", "merged", "top_k"])
def test_other_forms_in_groups_of_one_image(graph, router):
    settings = config("region", router=router, groups=4, shared_expert_num=1)
    model = create_model(settings, 10).set_train(False)
    logits, _ = forward(model, images(), asked(settings))
    changed = images()
    changed[1:] = 0.5
    others, _ = forward(model, changed, asked(settings))
    assert np.allclose(logits[0], others[0], atol=1e-5)
    assert not np.allclose(logits[1], others[1], atol=1e-3)


def test_a_step_moves_every_weight(graph):
    settings = config("region", jitter=0.1, capacity_factor=4.0)
    model = create_model(settings, 10)
    before = {weight.name: weight.asnumpy().copy() for weight in model.trainable_params()}
    noise = draw_noise(1, 0, 1, model.noise_slices, range(1), settings.rows, settings.model.hidden_size)
    labels = np.arange(4, dtype=np.int32)[None, :, None]
    figures = TrainStep(model, settings)(images(16)[None, :4], labels, np.ones((1, 4, 1), np.float32), noise, 0.01)
    assert np.isfinite(figures["loss"])
    still = [
        weight.name for weight in model.trainable_params() if np.array_equal(before[weight.name], weight.asnumpy())
    ]
    assert not still


def test_the_loss_is_that_of_the_asked_task(graph):
    settings = config("task", aux_loss_factor=0, z_loss_factor=0)
    model = create_model(settings, 10).set_train(False)
    valid, labels = asked(settings), np.array([[3, 1]] * 4, np.int32)
    logits, _ = forward(model, images(), valid)
    loss, factor = TrainLoss(model, settings).set_train(False), Tensor(np.ones((1, 1), np.float32))
    figures = loss(Tensor(images()), Tensor(labels), Tensor(valid), Tensor(NO_NOISE), factor)
    logits = logits.reshape(4, 2, 10).astype(np.float64)
    surprise = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[:, :, None], 2)[..., 0]
    assert figures.asnumpy()[LOSS] == pytest.approx((surprise * valid).sum() / valid.sum(), rel=1e-4)


@pytest.mark.parametrize("router", ["hash", "task", "multi_gate"])
def test_a_router_without_its_ids_is_refused(router):
    with pytest.raises(UserError, match=router):
        create_model(config("region", router=router), 10)


TRAIN = ["model.num_layers=2", "model.hidden_size=8", "moe.layers=[1]", "train.eval_every=0", "train.log_every=2"]


@pytest.mark.slow
def test_train_resume_eval_export_infer(graph, tmp_path, monkeypatch, capfd):
    """The command lines from one end to the other, a resumed run equal to an uninterrupted one."""
    monkeypatch.chdir(tmp_path)
    whole = ["--config", str(config_file("digits_region_cpu.yaml")), *TRAIN]
    assert run(train_main, [*whole, "train.steps=4", "train.name=one"]) == 0
    assert run(train_main, [*whole, "train.steps=2", "schedule.total_steps=4", "train.name=two"]) == 0
    assert run(train_main, [*whole, "train.steps=4", "train.name=two", "--resume"]) == 0
    results = [json.loads((tmp_path / "runs" / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["validation_loss"] == results[1]["validation_loss"]
    capfd.readouterr()
    assert run(eval_main, ["--checkpoint", "runs/one", "--json"]) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["loss"] == pytest.approx(results[0]["validation_loss"]) and 0 < figures["accuracy"] < 1
    assert figures["tokens"] == 359 and len(figures["layers"][0]["load"]) == 4
    assert run(export_main, ["--checkpoint", "runs/one", "--out", "out"]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["parity"]["max_abs_difference"] < 1e-4
    np.save("images.npy", images(3, 8))
    capfd.readouterr()
    assert run(infer_main, ["--model", "out", "--image", "images.npy", "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert len(lines) == 3 and sum(lines[0]["probabilities"]) == pytest.approx(1)
    assert run(infer_main, ["--model", "out", "--prompt", "text"]) == 2
    assert "this export takes --image FILE" in capfd.readouterr().err


def config_file(name):
    """A file of config/."""
    from pathlib import Path

    return Path(__file__).resolve().parents[2] / "config" / name
