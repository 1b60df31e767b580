"""The losses of `moe.losses` against hand-typed values, and who may ask for which."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import tiny_config

from switchyard.errors import UserError
from switchyard.moe.routing import create_router
from switchyard.moe.routing import losses as balance
from switchyard.nn.initializers import InitialWeights


def _tensor(values):
    return Tensor(np.array(values, np.float32))


def _value(tensor):
    return float(tensor.asnumpy())


def _routing(probabilities, experts, of=2):
    chosen = np.eye(of + 1)[np.array(experts)][..., :of]  # expert `of` is nowhere
    probabilities = _tensor(probabilities)
    return {
        "probabilities": probabilities,
        "importance": probabilities,
        "expert_mask": _tensor(chosen),
        "logits": probabilities,
    }


# Two sequences of two rows: the first all to expert 0, the second all to expert 1. Together they are balanced.
OPPOSITE = _routing([[[1, 0], [1, 0], [0, 1], [0, 1]]], [[0, 0, 1, 1]])
ALL = _tensor([[1, 1, 1, 1]])


def test_sequence_loss_sees_what_the_whole_does_not(pynative):
    assert _value(balance.switch_balance(OPPOSITE["expert_mask"], OPPOSITE["probabilities"], ALL, 1)) == pytest.approx(
        1.0
    )
    assert _value(balance.sequence_sums(OPPOSITE, ALL, 1, 2) / 4) == pytest.approx(2.0)
    assert _value(balance.sequence_sums(OPPOSITE, ALL, 1, 4) / 4) == pytest.approx(1.0)


def test_sequence_loss_by_hand(pynative):
    """First sequence: f = (1, 0), P = (.75, .25), 2 * .75; second: one real row, f = (0, 1), P = (.4, .6), 2 * .6.

    The first counts by its two real rows, the second by its one.
    """
    routing = _routing([[[0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.9, 0.1]]], [[0, 0, 1, 2]])
    assert _value(balance.sequence_sums(routing, _tensor([[1, 1, 1, 0]]), 1, 2)) == pytest.approx(2 * 1.5 + 1.2)


def test_importance_loss_by_hand(pynative):
    """Importance (3, 1): mean 2, variance 1, CV^2 = 1/4. Balanced: 0."""
    routing = _routing([[[1, 0], [1, 0], [0.5, 0.5], [0.5, 0.5]]], [[0, 0, 0, 0]])
    assert _value(balance.importance_sums(routing, ALL, 1, 4) / 4) == pytest.approx(0.25)
    assert _value(balance.importance_sums(OPPOSITE, ALL, 1, 4) / 4) == pytest.approx(0.0, abs=1e-6)


def test_load_loss_by_hand(pynative):
    routing = OPPOSITE | {"smooth_load": _tensor([[[1, 0], [1, 0], [0.5, 0.5], [0.5, 0.5]]])}
    assert _value(balance.load_sums(routing, ALL, 1, 4) / 4) == pytest.approx(0.25)


def test_mutual_information_loss_by_hand(pynative):
    """Certain rows, balanced experts: H(E|X) = 0, H(E) = log 2. Uniform rows: both log 2."""
    assert _value(balance.mutual_information_sums(OPPOSITE, ALL, 1, 4) / 4) == pytest.approx(-np.log(2))
    uniform = _routing(np.full((1, 4, 2), 0.5), [[0, 1, 0, 1]])
    assert _value(balance.mutual_information_sums(uniform, ALL, 1, 4) / 4) == pytest.approx(0.0, abs=1e-6)


def _losses(**losses):
    config = tiny_config(router="top_k", expert_num=2, losses=losses)
    return balance.AuxiliaryLosses(config.moe, create_router(config, InitialWeights(0)), 2)


def test_weights_multiply_and_add_up_in_training_only(pynative):
    cell = _losses(sequence=0.5, mutual_information=0.1, importance=0.0)
    assert _value(cell.set_train(True)(OPPOSITE, ALL)) == pytest.approx(4 * (0.5 * 2 - 0.1 * np.log(2)))
    assert _value(cell.set_train(False)(OPPOSITE, ALL)) == 0.0


def test_a_loss_that_the_router_cannot_give_is_one_line():
    with pytest.raises(
        UserError, match=r"^moe\.losses\.load: not available; router 'top_k' gives importance, .*sequence"
    ):
        _losses(load=0.1)
    with pytest.raises(UserError, match=r"^moe\.losses\.entropy: unknown; router 'top_k' gives "):
        _losses(entropy=0.1)
    with pytest.raises(UserError, match=r"^moe\.losses\.importance: -1\.0; .*greater than or equal to 0"):
        _losses(importance=-1.0)


def test_each_group_hands_on_its_sum_over_real_rows(pynative):
    """Two groups, one of two real rows: what one group gives alone, it gives beside another; padding gives 0."""
    shares = [[[0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.9, 0.1]], [[0.2, 0.8], [0.7, 0.3], [np.nan, 9], [9, 9]]]
    experts, valid = [[0, 0, 1, 0], [1, 0, 2, 2]], [[1, 1, 1, 1], [1, 1, 0, 0]]
    cell = _losses(sequence=0.5, mutual_information=0.25, importance=0.125).set_train(True)
    both = cell(_routing(shares, experts), _tensor(valid))
    for index in range(2):
        alone = cell(_routing(shares[index : index + 1], experts[index : index + 1]), _tensor(valid[index : index + 1]))
        assert both.shape == (2,) and alone.shape == (1,)
        assert float(both[index].asnumpy()) == pytest.approx(float(alone[0].asnumpy()), rel=1e-5)
    nothing = cell(_routing(shares[:1], [[2, 2, 2, 2]]), _tensor([[0, 0, 0, 0]]))
    assert _value(nothing) == 0
