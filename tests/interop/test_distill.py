"""Distillation: the loss by NumPy, the weights that a student takes over, and training with a teacher."""

import mindspore as ms
import numpy as np
import pytest
from oracles.tiny_run import losses_of, metrics_of, run_config, token_batch, write_text

from switchyard import cli
from switchyard.checkpoint import store as checkpoint
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.interop.distill import main, with_teacher
from switchyard.models import create_model
from switchyard.training.limits import of_several
from switchyard.training.loop import train
from switchyard.training.loss import CROSS_ENTROPY, LOSS, TrainLoss
from switchyard.training.teacher import SoftLoss, Teacher, read_teacher

MOE = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2, "layers": [1]}
QUICK = {"data": {"val_fraction": 0.01}, "context": {"mode": "pynative"}}
LOUD = {"num_layers": 2, "init_method_std": 0.3}


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("heat", [1.0, 2.5])
def test_the_soft_loss_is_that_of_numpy(heat, pynative):
    student, teacher = np.random.default_rng(0).normal(0, 3, (2, 6, 5)).astype(np.float32)
    expected = -(softmax(teacher / heat) * np.log(softmax(student / heat))).sum(-1) * heat**2
    np.testing.assert_allclose(SoftLoss(heat)(ms.Tensor(student), ms.Tensor(teacher)).asnumpy(), expected, rtol=1e-5)


def test_soft_and_hard_targets_are_mixed_over_the_real_tokens(pynative):
    """0.3 of one and 0.7 of the other, over what is no padding; the logged cross-entropy is the hard one alone."""
    config = with_teacher(run_config(model=LOUD), "x", 0.3, 2.0)
    student, teacher = create_model(config, 17), create_model(run_config(model=LOUD, moe=MOE, train={"seed": 5}), 17)
    tokens, labels, valid = (part[0] for part in token_batch(1, 4, 16))
    valid[:, 11:] = 0
    noise = np.zeros((1, 1, 1), np.float32)
    logits = [
        cell.set_train(False)(ms.Tensor(tokens), ms.Tensor(valid), ms.Tensor(noise))[0].asnumpy().astype(np.float64)
        for cell in (student, teacher)
    ]
    loss = TrainLoss(student, config, teacher=Teacher(teacher)).set_train()
    assert not loss.teacher.model.layers[1].feed_forward.training and loss.model.training
    inputs = (tokens, labels, valid, noise, np.ones((1, 1), np.float32))
    figures = loss(*map(ms.Tensor, inputs)).asnumpy()
    real = valid.reshape(-1) > 0
    hard = -np.log(softmax(logits[0]))[np.arange(64), labels.reshape(-1)][real].mean()
    soft = -4.0 * (softmax(logits[1] / 2) * np.log(softmax(logits[0] / 2))).sum(-1)[real].mean()
    assert figures[CROSS_ENTROPY] == pytest.approx(hard, rel=1e-5)
    assert figures[LOSS] == pytest.approx(0.7 * hard + 0.3 * soft, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a text, and a teacher that has read it."""
    path = tmp_path_factory.mktemp("distill")
    write_text(path)
    train(run_config(path, model=LOUD, moe=MOE, train={"name": "teacher", "steps": 1}, **QUICK))
    return path


def test_a_student_begins_with_the_weights_outside_the_experts(folder, capsys):
    """It trains to its end, and the teacher is in no checkpoint; the tokenizer is the teacher's."""
    student = run_config(folder, model=LOUD, train={"name": "student", "steps": 2}, **QUICK).model_dump()
    student["data"]["tokenizer"] = "byte"
    (folder / "student.yaml").write_text(build(student).to_yaml())
    place = folder / "runs" / "teacher"
    arguments = ["--teacher", str(place), "--student", str(folder / "student.yaml"), "--soft-weight", "0.5"]
    assert cli.run(main, arguments) == 0
    printed = capsys.readouterr().out
    assert "begins anew: layers.1.feed_forward.w_in, layers.1.feed_forward.w_out\n" in printed
    teacher = checkpoint.read(place)
    first, last = (checkpoint.read(path) for path in checkpoint.listed(folder / "runs" / "student"))
    for name, value in first.weights.items():
        assert ("layers.1.feed_forward.w_" in name) or (value == teacher.weights[name]).all()
    assert last.step == 2 and last.weights.keys() == first.weights.keys()
    assert last.config.train.distill.soft_weight == 0.5 and last.tokenizer_json == teacher.tokenizer_json
    assert losses_of(folder / "runs" / "student").keys() == {1, 2}
    assert metrics_of(folder / "runs" / "student", "evaluation")[-1]["loss"] > 0
    assert cli.run(main, arguments) == 2
    assert "already exists; choose another name, or continue with train.py --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher": "nowhere"}, r"^train\.distill\.teacher: checkpoint 'nowhere': does not exist"),
        ({}, r"^train\.distill\.teacher: '.*'; its vocabulary has 29 entries, that of the student 256"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_by_key(folder, changes, message):
    options = {"teacher": str(folder / "runs" / "teacher"), "soft_weight": 0.25, "temperature": 1.0} | changes
    with pytest.raises(UserError, match=message):
        read_teacher(with_teacher(run_config(), **options), 256)


def test_options_out_of_range_are_refused_by_key():
    with pytest.raises(UserError, match=r"^train\.distill\.soft_weight: 1\.5; input should be less than or equal to 1"):
        with_teacher(run_config(), "x", 1.5, 1.0)
    with pytest.raises(UserError, match=r"^train\.distill\.temperature: 0\.0; input should be greater than 0"):
        with_teacher(run_config(), "x", 0.5, 0.0)


def test_several_devices_refuse_it_by_key():
    config = with_teacher(run_config(parallel={"data_parallel": 2}), "x", 0.5, 1.0)
    assert "train.distill" in [refusal.key for refusal in of_several(config)]
