"""THOR's consistency loss: two passes with other random experts, held against two passes by hand."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny_run import run_config, token_batch

from switchyard.models import create_model
from switchyard.training.loss import CROSS_ENTROPY, LOSS, TrainLoss
from switchyard.training.randomness import draw_noise
from switchyard.training.step import TrainStep

VOCABULARY = 17
THOR = {"expert_num": 4, "router": "random", "random_draw": "step", "capacity_factor": 4.0}


def _model(factor, **model):
    config = run_config(moe=THOR | {"consistency_loss_factor": factor}, model={"init_method_std": 0.3} | model)
    return config, create_model(config, VOCABULARY)


def _log_softmax(logits):
    logits = logits.asnumpy().astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_total_is_the_mean_of_two_passes_and_their_divergence(pynative):
    config, model = _model(3.0)
    assert model.noise_slices == 2  # one layer that draws, twice
    tokens, labels, valid = (part[0] for part in token_batch(1, 4, 16))
    valid[1, 5:] = 0
    noise = draw_noise(1, 0, 1, model.noise_slices, range(1), 64, 16)[0]
    inputs = Tensor(tokens), Tensor(labels), Tensor(valid)
    factor = Tensor(np.ones((1, 1), np.float32))
    figures = TrainLoss(model, config).set_train(True)(*inputs, Tensor(noise), factor).asnumpy()
    one, other = (_log_softmax(model(inputs[0], inputs[2], Tensor(noise[half : half + 1]))[0]) for half in (0, 1))
    weights, rows = valid.reshape(-1) / valid.sum(), np.arange(64)
    wanted = -(weights * (one + other)[rows, labels.reshape(-1)]).sum() / 2
    assert figures[CROSS_ENTROPY] == pytest.approx(wanted, abs=1e-5)
    forth, back = ((np.exp(p) * (p - q)).sum(-1) for p, q in ((one, other), (other, one)))
    divergence = (weights * (forth + back)).sum() / 2
    assert divergence > 0.1  # the two passes differ
    assert figures[LOSS] == pytest.approx(wanted + 3.0 * divergence, rel=1e-5)


def test_factor_zero_is_one_pass(pynative):
    assert _model(0.0)[1].noise_slices == 1
    assert _model(0.5, dropout=0.1)[1].noise_slices == 2 * (1 + 3)


def test_training_brings_the_passes_together(graph):
    """Compiled: without the loss the two outputs stay apart, with it they come near each other."""
    apart = []
    for factor in (0.0, 5.0):
        config, model = _model(factor)
        step, batch = TrainStep(model, config), token_batch(1, 4, 16)
        for number in range(25):
            step(*batch, draw_noise(1, number, 1, model.noise_slices, range(1), 64, 16), 0.01)
        ms.set_context(mode=ms.PYNATIVE_MODE)  # one pass of each: not worth a compile
        noise, valid = draw_noise(1, 99, 1, 2, range(1), 64, 16)[0], Tensor(batch[2][0])
        model.set_train(True)
        logits = [_log_softmax(model(Tensor(batch[0][0]), valid, Tensor(noise[half : half + 1]))[0]) for half in (0, 1)]
        apart.append(np.abs(logits[0] - logits[1]).mean())
        ms.set_context(mode=ms.GRAPH_MODE)
    assert apart[1] < 0.6 * apart[0]
