"""Losses and figures of padded batches: the same however a batch is cut into groups, batches, processes, devices."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from oracles.tiny import run_layer, tiny_config, tiny_layer, tiny_rows
from oracles.tiny_run import run_config, token_batch

from switchyard.data import Batch
from switchyard.distributed.collectives import Joint
from switchyard.models import create_model
from switchyard.training.evaluate import Evaluator
from switchyard.training.parallel_step import row_means, unpack
from switchyard.training.step import LossCell

VOCABULARY = 17
NO_NOISE = Tensor(np.zeros((1, 1, 1), np.float32))
MOE = {"expert_num": 4, "aux_loss_factor": 0.5, "z_loss_factor": 0.25, "losses": {"sequence": 0.1, "importance": 0.2}}


def _batch(sequences=4):
    """tokens, labels, valid [B, S]: the second half has 5 and 1 real tokens of 16, the first all."""
    tokens, labels, valid = (part[0] for part in token_batch(1, sequences, 16))
    valid[sequences // 2 :, 5:], valid[sequences - 1, 1:] = 0, 0
    return tokens, labels, valid


def _config(batch, groups, **moe):
    return run_config(model={"num_layers": 2}, data={"batch_size": batch}, moe={**MOE, "groups": groups, **moe})


class Process(nn.Cell):
    """The joint of one of two processes: `count` adds what the other one counts."""

    parts = Joint.parts

    def __init__(self, others):
        super().__init__()
        self.others = Tensor(np.array(others, np.float32))

    def count(self, values):
        return values + self.others


def _loss(config, joint, tokens, labels, valid):
    """(total, figures, gradients) as arrays."""
    cell = LossCell(create_model(config, VOCABULARY), config, joint).set_train(True)
    weights = ms.ParameterTuple(cell.model.trainable_params())
    inputs = [Tensor(part) for part in (tokens, labels, valid)]
    call = ms.value_and_grad(lambda *batch: cell(*batch, NO_NOISE), None, weights, has_aux=True)
    (total, figures), gradients = call(*inputs)
    return total.asnumpy(), [part.asnumpy() for part in figures], [part.asnumpy() for part in gradients]


def test_two_processes_of_unequal_padding_add_up_to_the_whole(pynative):
    """32 and 6 real tokens: the second process counts 6 / 38 of the balance losses, not half."""
    tokens, labels, valid = _batch()
    total, figures, gradients = _loss(_config(4, 2), None, tokens, labels, valid)
    half, parts = _config(2, 1), []
    for own, other in ((slice(0, 2), 6), (slice(2, 4), 32)):
        parts.append(_loss(half, Process([other, other]), tokens[own], labels[own], valid[own]))
    assert sum(part[0] for part in parts) == pytest.approx(float(total), abs=1e-5)
    for place, name in enumerate(
        ("loss", "balance", "z", "load", "importance", "dropped", "entropy", "violation", "z")
    ):
        if name not in ("dropped", "violation"):  # which Joint.figures makes of the loads
            np.testing.assert_allclose(parts[0][1][place] + parts[1][1][place], figures[place], atol=1e-4, err_msg=name)
    for one, two, wanted in zip(parts[0][2], parts[1][2], gradients):
        np.testing.assert_allclose(one + two, wanted, atol=1e-5)


def test_windows_count_by_their_first_tokens(pynative):
    """Windows of 4: 5 and 1 real tokens are 2 and 1 real windows, 32 tokens 8: 3 / 11, while tokens are 6 / 38."""
    config = _config(2, 1, granularity="slice", slice_length=4)
    cell = LossCell(create_model(config, VOCABULARY), config, Process([32, 8]))
    valid = Tensor(_batch()[2][2:])
    count, part = cell.counts(valid.reshape(-1), valid)
    assert (float(count.asnumpy()), float(part.asnumpy())) == pytest.approx((38, 3 / 11))


def test_evaluation_does_not_depend_on_groups_or_batches(pynative):
    """Six sequences, two of them partly padded, in one batch of one group, in groups of one, in uneven batches."""
    tokens, labels, valid = _batch(6)
    found = []
    for groups, ends in ((1, []), (6, []), (1, [4]), (1, [1, 4])):
        config = _config(6, groups)
        model = create_model(config, VOCABULARY)
        parts = [Batch(tokens[b], labels[b], valid[b]) for b in np.split(np.arange(6), ends)]
        found.append(Evaluator(model, config.moe_layers, 1.0)(parts))
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, abs=1e-6) and other.tokens == found[0].tokens
        for one, two in zip(other.layers, found[0].layers):
            assert one["load"] == two["load"]
            for name in ("importance", "dropped", "entropy", "max_violation", "z"):
                np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)


def test_tallies_of_data_slices_add_up_to_the_figures_of_the_whole(pynative):
    """Two slices of a group each, one of them half padded: what the compiled cluster sums, against one device."""
    config = tiny_config(num_experts_chosen=2, capacity_factor=0.7)
    layer = tiny_layer(config)
    rows, valid = tiny_rows(2, 8)
    valid[1, 3:] = 0
    _, balance, z, audit = run_layer(layer, rows, valid)
    tally = 0.0
    for own in (slice(0, 1), slice(1, 2)):
        x, real = Tensor(rows[own]), Tensor(valid[own])
        routing = layer.router(x, {"valid": real, "noise": NO_NOISE, "token_ids": None, "task_ids": None})
        served = layer.train_path.served(routing, layer.train_path.plan(routing))
        tally = tally + layer.tally(routing, served, real).asnumpy()[0]
    of_rows = row_means(config)
    figures = np.concatenate((np.zeros(2), tally * (of_rows / valid.sum() + 1 - of_rows)))
    one_layer = config.model_copy(update={"moe": config.moe.model_copy(update={"layers": [0]})})
    found = unpack(figures.astype(np.float32), one_layer)
    assert (found["balance_loss"], found["z_loss"]) == pytest.approx((balance, z), rel=1e-5)
    for name, value in found["audit"].items():
        np.testing.assert_allclose(value[0], audit[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_content_of_padded_logits_does_not_reach_the_loss(pynative):
    """NaN at a padded place: the mean over the real ones is what it was."""

    class Fixed(nn.Cell):
        def __init__(self, logits):
            super().__init__()
            self.logits = Tensor(logits.astype(np.float32))

        def construct(self, tokens, valid, noise):
            return self.logits, (), {}

    logits = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
    logits[2] = np.nan
    dense = run_config(moe={"expert_num": 1})
    labels, valid = Tensor(np.array([[0, 1, 0]], np.int32)), Tensor(np.array([[1, 1, 0]], np.float32))
    total, _ = LossCell(Fixed(logits), dense)(labels, labels, valid, NO_NOISE)
    assert float(total.asnumpy()) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2, rel=1e-5)
