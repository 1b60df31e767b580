"""Losses and figures of padded batches: the same however a batch is cut into groups, batches, processes, devices."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from oracles.tiny import tiny_config, tiny_layer, tiny_rows
from oracles.tiny_run import run_config, token_batch

from switchyard.data import Batch
from switchyard.distributed.mesh import LOCAL
from switchyard.models import create_model
from switchyard.moe.metrics import metrics
from switchyard.training.evaluate import Evaluator
from switchyard.training.loss import LOSS, TrainLoss

VOCABULARY = 17
NO_NOISE, FACTOR = Tensor(np.zeros((1, 1, 1), np.float32)), Tensor(np.ones((1, 1), np.float32))
MOE = {"expert_num": 4, "aux_loss_factor": 0.5, "z_loss_factor": 0.25, "losses": {"sequence": 0.1, "importance": 0.2}}


def _batch(sequences=4):
    """tokens, labels, valid [B, S]: the second half has 5 and 1 real tokens of 16, the first all."""
    tokens, labels, valid = (part[0] for part in token_batch(1, sequences, 16))
    valid[sequences // 2 :, 5:], valid[sequences - 1, 1:] = 0, 0
    return tokens, labels, valid


def _config(batch, groups, **moe):
    return run_config(model={"num_layers": 2}, data={"batch_size": batch}, moe={**MOE, "groups": groups, **moe})


class CountsOfOthers(nn.Cell):
    """Sums over two processes, of which the other one counts `others` [2]."""

    def __init__(self, others):
        super().__init__()
        self.others = Tensor(np.array(others, np.float32))

    def construct(self, counts):
        return counts.sum(0) + self.others


def _loss(config, others, tokens, labels, valid):
    """(figures [W], gradients) as arrays, of one of two processes if the other one counts something."""
    cell = TrainLoss(create_model(config, VOCABULARY), config).set_train(True)
    if others is not None:
        cell.total_counts = CountsOfOthers(others)
    call = LOCAL.differentiate(cell, ms.ParameterTuple(cell.model.trainable_params()))
    figures, gradients = call(*map(Tensor, (tokens, labels, valid)), NO_NOISE, FACTOR)
    return figures.asnumpy(), [part.asnumpy() for part in gradients]


def test_two_processes_of_unequal_padding_add_up_to_the_whole(pynative):
    """32 and 6 real tokens: the second process counts 6 / 38 of the balance losses, not half."""
    tokens, labels, valid = _batch()
    figures, gradients = _loss(_config(4, 2), None, tokens, labels, valid)
    half, parts = _config(2, 1), []
    for own, other in ((slice(0, 2), 6), (slice(2, 4), 32)):
        parts.append(_loss(half, [other, other], tokens[own], labels[own], valid[own]))
    np.testing.assert_allclose(parts[0][0] + parts[1][0], figures, atol=1e-4, rtol=1e-5)
    for one, two, wanted in zip(parts[0][1], parts[1][1], gradients):
        np.testing.assert_allclose(one + two, wanted, atol=1e-5)


def test_windows_count_by_their_first_tokens(pynative):
    """Windows of 4: 5 and 1 real tokens are 2 and 1 real windows, 32 tokens 8."""
    config = _config(2, 1, granularity="slice", slice_length=4)
    cell, valid = TrainLoss(create_model(config, VOCABULARY), config), _batch()[2]
    assert cell.counts(Tensor(valid[2:])).asnumpy().tolist() == [[6, 3]]
    assert cell.counts(Tensor(valid[:2])).asnumpy().tolist() == [[32, 8]]


def test_evaluation_does_not_depend_on_groups_or_batches(pynative):
    """Six sequences, two of them partly padded, in one batch of one group, in groups of one, in uneven batches."""
    tokens, labels, valid = _batch(6)
    found = []
    for groups, ends in ((1, []), (6, []), (1, [4]), (1, [1, 4])):
        config = _config(6, groups)
        model = create_model(config, VOCABULARY)
        parts = [Batch(tokens[b], labels[b], valid[b]) for b in np.split(np.arange(6), ends)]
        found.append(Evaluator(model, config, 1.0)(parts))
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, abs=1e-6) and other.tokens == found[0].tokens
        for one, two in zip(other.layers, found[0].layers):
            assert one["load"] == two["load"]
            for name in ("importance", "dropped", "entropy", "max_violation", "z"):
                np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)


def test_statistics_of_data_shards_add_up_to_those_of_the_whole(pynative):
    """Two shards of a group each, one of them half padded: what a cluster sums, against one device."""
    layer = tiny_layer(tiny_config(num_experts_chosen=2, capacity_factor=0.7))
    rows, valid = tiny_rows(2, 8)
    valid[1, 3:] = 0
    _, whole, _ = layer(Tensor(rows), Tensor(valid), NO_NOISE)
    parts = [layer(Tensor(rows[own]), Tensor(valid[own]), NO_NOISE)[1].asnumpy() for own in (slice(0, 1), slice(1, 2))]
    np.testing.assert_allclose(sum(parts)[0], whole.asnumpy().sum(0), rtol=1e-5, atol=1e-6)
    found = metrics(sum(parts), 4)
    assert found["load"].sum() == 2 * (8 + 3) and 0 < found["dropped"][0] < 1


def test_content_of_padded_logits_does_not_reach_the_loss(pynative):
    """NaN at a padded place: the mean over the real ones is what it was."""

    class Fixed(nn.Cell):
        def __init__(self, logits):
            super().__init__()
            self.logits = Tensor(logits.astype(np.float32))

        def construct(self, tokens, valid, noise):
            return self.logits, (), ()

    logits = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
    logits[2] = np.nan
    dense = run_config(moe={"expert_num": 1})
    labels, valid = Tensor(np.array([[0, 1, 0]], np.int32)), Tensor(np.array([[1, 1, 0]], np.float32))
    figures = TrainLoss(Fixed(logits), dense)(labels, labels, valid, NO_NOISE, FACTOR)
    assert figures.asnumpy()[LOSS] == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2, rel=1e-5)
