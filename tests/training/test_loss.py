"""The loss: what it adds up, and the figures that are made of micro-batches."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import NO_NOISE
from oracles.tiny_run import run_config, token_batch

from switchyard.distributed.mesh import LocalMesh
from switchyard.distributed.placement import ParallelDims
from switchyard.models import create_model
from switchyard.moe import metrics
from switchyard.training.loss import CROSS_ENTROPY, LOSS, TrainLoss, figures_num, name_figures

VOCABULARY = 17


def test_total_is_cross_entropy_plus_weighted_losses_of_layers(pynative):
    """Two conditional layers: the factors weigh sums over layers, the figures are means; padding costs nothing."""
    moe = {"expert_num": 4, "aux_loss_factor": 0.5, "z_loss_factor": 0.25}
    config = run_config(model={"num_layers": 2}, moe=moe)
    model = create_model(config, VOCABULARY)
    cell = TrainLoss(model, config).set_train(True)
    tokens, labels, valid = (part[0] for part in token_batch(1, 4, 16))
    valid[1, 5:] = 0
    noise, factor = Tensor(NO_NOISE), Tensor(np.array([[8.0]], np.float32))
    figures = cell(Tensor(tokens), Tensor(labels), Tensor(valid), noise, factor)
    logits, stats, _ = model(Tensor(tokens), Tensor(valid), noise)
    logits = logits.asnumpy().astype(np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(64), labels.reshape(-1)]
    wanted = (losses * valid.reshape(-1)).sum() / valid.sum()
    balance, z, *_ = metrics.by_layer(stats.asnumpy().sum(0), 4).T / valid.sum()  # [M] each
    found = name_figures(figures.asnumpy()[None], config, np.ones(1))
    assert found["loss"] == pytest.approx(wanted, abs=1e-5)
    assert found["balance_loss"] == pytest.approx(balance.mean(), abs=1e-6)
    assert found["z_loss"] == pytest.approx(z.mean(), abs=1e-6)
    wanted += 0.5 * balance.sum() + 0.25 * z.sum()
    assert figures.asnumpy()[LOSS] == pytest.approx(8 * wanted, abs=8e-5)


def test_recorded_choices_stand_behind_the_figures_at_the_place_of_the_device(pynative):
    """Of three devices the second one's: zeros before and behind, so that a sum over the devices is all of them."""
    config = run_config(model={"num_layers": 2}, moe={"expert_num": 4, "record": "choices.safetensors"})
    model, mesh = create_model(config, VOCABULARY), LocalMesh()
    mesh.degrees, mesh.data_slice = ParallelDims(data_parallel=3), lambda: 1
    tokens, labels, valid = (Tensor(part[0]) for part in token_batch(1, 4, 16))
    noise, factor = Tensor(NO_NOISE), Tensor(np.ones((1, 1), np.float32))
    figures = TrainLoss(model, config, mesh).set_train(True)(tokens, labels, valid, noise, factor).asnumpy()
    _, _, choices = model(tokens, valid, noise)  # [64, 2]: one choice of each layer
    own, rest = choices.asnumpy().reshape(-1), figures[figures_num(config) :].reshape(3, -1)
    np.testing.assert_array_equal(rest, [np.zeros(128), own, np.zeros(128)])
    assert set(own) <= {0, 1, 2, 3} and len(set(own)) > 1
    by_layer = metrics.recorded(rest[1:2], 2, 1)  # [1, M, N, K]
    np.testing.assert_array_equal(by_layer[0, :, :, 0], choices.asnumpy().T)


def test_figures_of_micro_batches_count_by_their_tokens():
    """Means by the share of the tokens, loads and importance as sums: a layer of 2 experts, by hand."""
    config = run_config(moe={"expert_num": 2})
    #        loss, cross-entropy; balance, z, auxiliary, entropy, num_kept, tokens; load; importance
    first = [9.0, 1.0, 2.0 * 4, 4.0 * 4, 0.0, 0.5 * 4, 0, 4, 3, 1, 2.5, 1.5]
    second = [9.0, 3.0, 4.0 * 12, 0.0, 0.0, 0.25 * 12, 12, 12, 6, 6, 5.0, 7.0]
    found = name_figures(np.array([first, second]), config, np.array([0.25, 0.75]))
    assert (found["loss"], found["balance_loss"], found["z_loss"]) == (2.5, 3.5, 1.0)
    routers = {name: value.tolist() for name, value in found["routers"].items()}
    assert routers["load"] == [[9, 7]] and routers["importance"] == [[7.5, 8.5]]
    assert routers["dropped"] == [0.25] and routers["entropy"] == [0.3125] and routers["z"] == [1.0]
    alone = name_figures(np.array([second]), config, np.ones(1))
    assert (alone["loss"], alone["balance_loss"], alone["routers"]["dropped"]) == (second[CROSS_ENTROPY], 4.0, [0.0])
    assert name_figures(np.array([[9.0, 2.0]]), run_config(), np.ones(1)) == {
        "loss": 2.0,
        "balance_loss": 0.0,
        "z_loss": 0.0,
        "routers": {},
    }
