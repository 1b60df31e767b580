"""Balance losses and figures against hand-typed values."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from switchyard.moe import metrics
from switchyard.moe.routing import losses as balance


def _tensor(values):
    return Tensor(np.array(values, np.float32))


def _value(tensor):
    return float(tensor.asnumpy())


def _chosen(experts, of):
    return _tensor([np.eye(of + 1)[experts][:, :of]])  # expert `of` is nowhere


def test_switch_balance_is_one_when_uniform(pynative):
    probabilities, valid = _tensor(np.full((1, 4, 4), 0.25)), _tensor(np.ones((1, 4)))
    assert _value(balance.switch_balance(_chosen([0, 1, 2, 3], 4), probabilities, valid, 1)) == pytest.approx(1.0)


def test_switch_balance_is_the_number_of_experts_when_collapsed(pynative):
    probabilities, valid = _tensor(np.eye(4)[[[2, 2, 2]]]), _tensor(np.ones((1, 3)))
    assert _value(balance.switch_balance(_chosen([2, 2, 2], 4), probabilities, valid, 1)) == pytest.approx(4.0)


def test_switch_balance_by_hand(pynative):
    """f = (2/3, 1/3), P = (1.7/3, 1.3/3): 2 * (2/3 * 1.7/3 + 1/3 * 1.3/3) = 9.4/9."""
    probabilities = _tensor([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]])
    valid = _tensor([[1, 1, 1]])
    assert _value(balance.switch_balance(_chosen([0, 0, 1], 2), probabilities, valid, 1)) == pytest.approx(9.4 / 9)


def test_switch_balance_divides_by_the_choices(pynative):
    """Two of two experts chosen: f = (1/2, 1/2), and the loss is 1 whatever P."""
    probabilities = _tensor([[[0.9, 0.1], [0.6, 0.4]]])
    assert _value(balance.switch_balance(_tensor(np.ones((1, 2, 2))), probabilities, _tensor([[1, 1]]), 2)) == 1.0


def test_switch_balance_leaves_padding_out(pynative):
    probabilities = _tensor([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]]])
    padded = balance.switch_balance(_chosen([0, 0, 1, 2], 2), probabilities, _tensor([[1, 1, 1, 0]]), 1)
    assert _value(padded) == pytest.approx(9.4 / 9)


def test_switch_balance_gradient_pushes_towards_the_idle(pynative):
    """d loss / d p[n, e] = E * f_e / N: only P carries a gradient."""
    chosen, valid = _chosen([0, 0, 1], 2), _tensor([[1, 1, 1]])
    gradient = ms.grad(lambda p: balance.switch_balance(chosen, p, valid, 1))(_tensor([[[0.9, 0.1]] * 3]))
    np.testing.assert_allclose(gradient.asnumpy(), [[[4 / 9, 2 / 9]] * 3], atol=1e-6)


def test_switch_balance_is_the_mean_over_groups(pynative):
    """One collapsed group (2), one balanced (1)."""
    chosen = _tensor([np.eye(2)[[0, 0]], np.eye(2)[[0, 1]]])
    probabilities = _tensor([np.eye(2)[[0, 0]], np.full((2, 2), 0.5)])
    assert _value(balance.switch_balance(chosen, probabilities, _tensor(np.ones((2, 2))), 1)) == pytest.approx(1.5)


def test_log_partition_of_large_logits(pynative):
    logits = _tensor([[[0, 0], [1000, 1000], [-1000, -1000]]])
    wanted = np.array([[0, 1000, -1000]]) + np.log(2)
    np.testing.assert_allclose(balance.log_partition(logits).asnumpy(), wanted, rtol=1e-6)


def test_z_loss_by_hand(pynative):
    """Logits log 1 + log 3 sum to 4, twice log 2 also: z = log(4)^2; the padded row counts nothing."""
    logits = _tensor([[[0, np.log(3)], [np.log(2), np.log(2)], [50, 50]]])
    assert _value(balance.z_loss(logits, _tensor([[1, 1, 0]]))) == pytest.approx(np.log(4) ** 2, rel=1e-5)


def test_z_loss_gradient_is_twice_the_log_partition_times_softmax(pynative):
    gradient = ms.grad(lambda logits: balance.z_loss(logits, _tensor([[1]])))(_tensor([[[0, np.log(3)]]]))
    np.testing.assert_allclose(gradient.asnumpy(), [[[2 * np.log(4) / 4, 2 * np.log(4) * 3 / 4]]], rtol=1e-5)


def test_entropy(pynative):
    """Uniform over four: log 4; certain: 0; padding: not counted."""
    probabilities = _tensor([[[0.25] * 4, [1, 0, 0, 0], [0.25] * 4]])
    assert _value(balance.entropy(probabilities, _tensor([[1, 1, 0]]))) == pytest.approx(np.log(4) / 2, rel=1e-5)
    assert _value(balance.entropy(probabilities, _tensor([[1, 0, 1]]))) == pytest.approx(np.log(4), rel=1e-5)


@pytest.mark.parametrize(("loads", "wanted"), [([2, 2, 2], 0.0), ([6, 0, 0], 2.0), ([3, 2, 1], 0.5)])
def test_max_violation(loads, wanted):
    assert metrics.max_violation(np.array(loads)) == pytest.approx(wanted)


def test_load_and_importance(pynative):
    probabilities = _tensor([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]])
    np.testing.assert_array_equal(balance.load(_chosen([0, 0, 1], 2)).asnumpy(), [[2, 1]])
    importance = balance.importance(probabilities, _tensor([[1, 1, 0]])).asnumpy()
    np.testing.assert_allclose(importance, [[1.5, 0.5]], atol=1e-6)


# Two groups of three rows: all real, then one real and two of padding with loud or broken contents.
MASK = [[1, 1, 1], [1, 0, 0]]
LOGITS = [[[0, np.log(3)], [np.log(2), np.log(2)], [0, 0]], [[0, 0], [50, 50], [np.nan, np.inf]]]
SHARES = [[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [[0.3, 0.7], [0.5, 0.5], [np.nan, np.inf]]]


def test_every_real_row_counts_alike_whatever_its_group(pynative):
    """z: (2 log(4)^2 + 2 log(2)^2) / 4. Entropy: of the four real rows. A mean of groups weighs the fourth thrice."""
    z = (2 * np.log(4) ** 2 + 2 * np.log(2) ** 2) / 4
    assert _value(balance.z_loss(_tensor(LOGITS), _tensor(MASK))) == pytest.approx(z, rel=1e-5)
    rows = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    wanted = -(rows * np.log(rows)).sum() / 4
    assert _value(balance.entropy(_tensor(SHARES), _tensor(MASK))) == pytest.approx(wanted, rel=1e-5)


def test_balance_of_a_group_counts_by_its_real_rows(pynative):
    """9.4 / 9 of three rows and, f = (1, 0), P = (.3, .7), 0.6 of one row: (3 * 9.4 / 9 + 0.6) / 4."""
    chosen = _tensor([np.eye(3)[[0, 0, 1]][:, :2], np.eye(3)[[0, 2, 2]][:, :2]])
    found = balance.switch_balance(chosen, _tensor(SHARES), _tensor(MASK), 1)
    assert _value(found) == pytest.approx((3 * 9.4 / 9 + 0.6) / 4, rel=1e-5)


def test_a_group_of_padding_halves_nothing(pynative):
    """The first group alone, and with a second that is all padding: the same figures."""
    chosen = np.eye(3)[[0, 0, 1]][:, :2]
    both, alone = _tensor([chosen, np.zeros((3, 2))]), _tensor([chosen])
    mask = _tensor([[1, 1, 1], [0, 0, 0]])
    pairs = (
        (
            balance.switch_balance(both, _tensor(SHARES), mask, 1),
            balance.switch_balance(alone, _tensor(SHARES[:1]), mask[:1], 1),
        ),
        (balance.z_loss(_tensor(LOGITS), mask), balance.z_loss(_tensor(LOGITS[:1]), mask[:1])),
        (balance.entropy(_tensor(SHARES), mask), balance.entropy(_tensor(SHARES[:1]), mask[:1])),
    )
    for found, wanted in pairs:
        assert _value(found) == pytest.approx(_value(wanted), rel=1e-6) and _value(wanted) > 0.4


def test_figures_by_loop(pynative):
    """Against loops over groups and rows, at random padding."""
    random = np.random.default_rng(0)
    for _ in range(5):
        logits = random.normal(0, 2, (4, 6, 3))
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        valid = (random.random((4, 6)) < random.random((4, 1))).astype(np.float32)
        chosen = np.eye(3)[p.argmax(-1)] * valid[..., None]
        entropies, squares, balances = [], [], []
        for group in range(4):
            real = np.flatnonzero(valid[group])
            entropies += [-(p[group, n] * np.log(p[group, n])).sum() for n in real]
            squares += [np.log(np.exp(logits[group, n]).sum()) ** 2 for n in real]
            if len(real):
                share = chosen[group, real].mean(0) @ p[group, real].mean(0)
                balances += [3 * share] * len(real)
        assert _value(balance.entropy(_tensor(p), _tensor(valid))) == pytest.approx(np.mean(entropies), rel=1e-5)
        assert _value(balance.z_loss(_tensor(logits), _tensor(valid))) == pytest.approx(np.mean(squares), rel=1e-5)
        found = balance.switch_balance(_tensor(chosen), _tensor(p), _tensor(valid), 1)
        assert _value(found) == pytest.approx(np.mean(balances), rel=1e-5)


def test_gradients_leave_padding_out_and_count_rows_alike(pynative):
    """d z / d logits = 2 log-partition * softmax / 4 at each real row, exactly 0 at padding that is finite."""
    logits = np.array(LOGITS)
    logits[1, 2] = 7
    gradient = ms.grad(lambda x: balance.z_loss(x, _tensor(MASK)))(_tensor(logits)).asnumpy()
    sums = np.exp(logits).sum(-1, keepdims=True)
    wanted = 2 * np.log(sums) * np.exp(logits) / sums / 4 * np.array(MASK)[..., None]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_sums_of_groups_make_the_means(pynative):
    """By hand, of MASK's two groups: balance 3 * 9.4 / 9 and 0.6, z 2 log(4)^2 + log(2)^2 and log(2)^2."""
    chosen = _tensor([np.eye(3)[[0, 0, 1]][:, :2], np.eye(3)[[0, 2, 2]][:, :2]])
    found = balance.balance_sums(chosen, _tensor(SHARES), _tensor(MASK), 1).asnumpy()
    np.testing.assert_allclose(found, [3 * 9.4 / 9, 0.6], rtol=1e-5)
    found = balance.z_sums(_tensor(LOGITS), _tensor(MASK)).asnumpy()
    np.testing.assert_allclose(found, [2 * np.log(4) ** 2 + np.log(2) ** 2, np.log(2) ** 2], rtol=1e-5)
    rows = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    entropies = -(rows * np.log(rows)).sum(-1)
    found = balance.entropy_sums(_tensor(SHARES), _tensor(MASK)).asnumpy()
    np.testing.assert_allclose(found, [entropies[:3].sum(), entropies[3]], rtol=1e-5)
