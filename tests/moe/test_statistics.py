"""The statistics of a layer and their hand-written gradient, held to the plain functions and their autodiff."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from switchyard.moe.metrics import ENTROPY
from switchyard.moe.routing import losses
from switchyard.moe.statistics import Summed

CHOICES, EXPERTS = 2, 3


def plain(switch, z):
    """The functions that `Summed` stands for, of the same arguments."""

    def statistics(logits, probabilities, chosen, mass, valid, num_kept, auxiliary):
        stop = ops.stop_gradient
        balance = losses.balance_sums(chosen, probabilities, valid, CHOICES) if switch else ops.zeros_like(num_kept)
        squares = losses.z_sums(logits if z else stop(logits), valid)
        entropies = stop(losses.entropy_sums(probabilities, valid))
        scalars = ops.stack((balance, squares, auxiliary, entropies, num_kept, valid.sum(1)), 1)  # [G, 6]
        return ops.concat((scalars, losses.load(chosen), stop(losses.importance(mass, valid))), 1)

    return statistics


def arguments(groups, padded):
    """A Routing of random logits; padded rows hold NaN and Inf."""
    random = np.random.default_rng(groups)
    logits = random.normal(0, 3, (groups, 7, EXPERTS))
    probabilities, mass = random.random((2, groups, 7, EXPERTS))
    valid = np.ones((groups, 7))
    valid[0, 7 - padded :] = 0
    chosen = (random.random(logits.shape) < 0.5) * valid[..., None]
    for values, bad in ((logits, np.inf), (probabilities, np.nan), (mass, -np.inf)):
        values[valid == 0] = bad
    rest = random.random((2, groups))
    return tuple(Tensor(part.astype(np.float32)) for part in (logits, probabilities, chosen, mass, valid, *rest))


@pytest.mark.parametrize(("groups", "padded"), [(1, 0), (2, 3), (2, 7)])
@pytest.mark.parametrize(("switch", "z"), [(True, True), (False, False)])
def test_values_and_gradients_equal_the_plain_functions(groups, padded, switch, z, pynative):
    given, summed, other = arguments(groups, padded), Summed(CHOICES, switch, z), plain(switch, z)
    weight = Tensor(np.random.default_rng(0).normal(0, 1, (groups, 6 + 2 * EXPERTS)).astype(np.float32))
    weight[:, ENTROPY:] = 0  # the columns behind carry no gradient

    def ours(*parts):
        return (summed(*parts)[0] * weight).sum()

    def theirs(*parts):
        return (other(*parts) * weight).sum()

    np.testing.assert_allclose(summed(*given)[0].asnumpy(), other(*given).asnumpy(), rtol=2e-6, atol=2e-6)
    for place in (0, 1, 6):  # logits, probabilities, auxiliary
        wanted, got = (ms.grad(loss, place)(*given).asnumpy() for loss in (theirs, ours))
        np.testing.assert_allclose(got, np.where(np.isfinite(wanted), wanted, 0), rtol=2e-6, atol=2e-6)
