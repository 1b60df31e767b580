"""Noisy top-k: normals, gates, the smooth load and its gradient."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from oracles.routers import identity_router, route
from scipy.stats import kstest, norm

from switchyard.nn.noise import NoiseSlices, NormalRows, UniformRows

SOFTPLUS_0 = np.log(2)  # the deviation of an untrained router, whose noise_weight is 0
LOGITS = np.array([[2.0, 1.0, 0.0], [0.0, 0.5, 3.0]])
# Box-Muller with U1 = 1 - exp(-1/2), so a radius of 1, and U2 = 0 or 1/4: normals (1, 0) or (0, 1) of a pair.
RADIUS_1 = 1 - np.exp(-0.5)


def _noise(first, second):
    """Rows of three normals need two pairs: columns U1, U1', U2, U2', three in each slice."""
    columns = np.array([[RADIUS_1, RADIUS_1, a, b, 0.9, 0.9] for a, b in zip(first, second)])
    return np.stack([columns[:, :3], columns[:, 3:]])


def test_uniform_rows_take_as_many_slices_as_they_need(pynative):
    slices = NoiseSlices()
    slices.take(True)
    cell = UniformRows(slices, 3, 4)
    assert ([int(one.index) for one in cell.slices], slices.count) == ([1, 2], 3)
    noise = np.arange(18).reshape(3, 2, 3).astype(np.float32)
    np.testing.assert_array_equal(cell(Tensor(noise)).asnumpy(), [[6, 7, 8, 12], [9, 10, 11, 15]])


def test_normals_by_hand(pynative):
    """Radius 1 at the angles 0 and 90 degrees: (cos, cos', sin, sin') without the fourth."""
    normals = NormalRows(NoiseSlices(), 3, 3)(Tensor(_noise([0.0, 0.25], [0.25, 0.5]).astype(np.float32))).asnumpy()
    np.testing.assert_allclose(normals, [[1, 0, 0], [0, -1, 1]], atol=1e-6)


def test_normals_are_normal(pynative):
    uniform = np.random.default_rng(0).random((2, 20000, 4)).astype(np.float32)
    uniform[0, 0] = 0.0  # the smallest that a generator of [0, 1) gives
    normals = NormalRows(NoiseSlices(), 4, 5)(Tensor(uniform)).asnumpy()
    assert np.isfinite(normals).all() and normals.shape == (20000, 5)
    assert kstest(normals.ravel(), "norm").pvalue > 0.01
    np.testing.assert_allclose(np.corrcoef(normals.T), np.eye(5), atol=0.03)


def test_evaluation_is_the_softmax_of_the_largest(pynative):
    routing = route(identity_router("noisy_top_k", 2, 3), LOGITS, [1, 1])
    first = 1 / (1 + np.exp(-1))
    second = 1 / (1 + np.exp(-2.5))
    np.testing.assert_array_equal(routing["expert_index"], [[0, 1], [2, 1]])
    np.testing.assert_allclose(routing["gates"], [[first, 1 - first], [second, 1 - second]], atol=1e-6)
    np.testing.assert_allclose(routing["importance"], [[first, 1 - first, 0], [0, 1 - second, second]], atol=1e-6)
    np.testing.assert_array_equal(routing["smooth_load"], routing["expert_mask"])


def test_noise_moves_scores_by_the_deviation(pynative):
    """H = x W + normal * log 2; the normals of the two rows are (1, 0, 0) and (0, -1, 1)."""
    router = identity_router("noisy_top_k", 2, 3, True)
    routing = route(router, LOGITS, None, _noise([0.0, 0.25], [0.25, 0.5]))
    scores = LOGITS + SOFTPLUS_0 * np.array([[1, 0, 0], [0, -1, 1]])
    np.testing.assert_allclose(routing["logits"], scores, atol=1e-5)
    np.testing.assert_array_equal(
        routing["expert_index"], [[0, 1], [2, 0]]
    )  # the noise changed the second row's choice
    kept = np.exp(np.stack([scores[0, [0, 1]], scores[1, [2, 0]]]))
    np.testing.assert_allclose(routing["gates"], kept / kept.sum(-1, keepdims=True), atol=1e-5)


def test_learned_deviation(pynative):
    router = identity_router("noisy_top_k", 2, 3, True)
    router.noise_weight.set_data(Tensor(np.eye(3, dtype=np.float32)))
    routing = route(router, LOGITS, None, _noise([0.0, 0.25], [0.25, 0.5]))
    deviation = np.log1p(np.exp(LOGITS))
    np.testing.assert_allclose(routing["logits"], LOGITS + deviation * np.array([[1, 0, 0], [0, -1, 1]]), atol=1e-5)


def test_smooth_load_by_hand(pynative):
    """Appendix A, eq. 8 and 9, K = 1: against the second score where an expert is the first, else against the first."""
    router = identity_router("noisy_top_k", 1, 3, True)
    routing = route(router, LOGITS, [1, 0], _noise([0.0, 0.25], [0.25, 0.5]))
    first, second = 2 + SOFTPLUS_0, 1.0  # noisy scores of row 0: 2.69, 1, 0
    wanted = norm.cdf(np.array([2 - second, 1 - first, 0 - first]) / SOFTPLUS_0)
    np.testing.assert_allclose(routing["smooth_load"], [wanted, [0, 0, 0]], atol=1e-5)
    np.testing.assert_allclose(routing["gates"][0], np.exp(first) / (np.exp(first) + np.e + 1), atol=1e-5)


def test_smooth_load_is_the_chance_of_being_chosen(pynative):
    """Its mean over the noise is the share of draws in which an expert is among the two (the definition, eq. 8)."""
    router = identity_router("noisy_top_k", 2, 4, True)
    noise = np.random.default_rng(1).random((1, 20000, 4))
    routing = route(router, np.repeat([[0.3, -0.2, 0.9, 0.0]], 20000, 0), None, noise)
    np.testing.assert_allclose(routing["smooth_load"].mean(0), routing["expert_mask"].mean(0), atol=0.01)
    assert routing["expert_mask"].mean(0).min() > 0.1


def test_every_expert_chosen_has_load_one(pynative):
    router = identity_router("noisy_top_k", 3, 3, True)
    routing = route(router, LOGITS, None, _noise([0.0, 0.25], [0.25, 0.5]))
    np.testing.assert_array_equal(routing["smooth_load"], np.ones((2, 3)))


@pytest.mark.parametrize("choices", [1, 2])
def test_load_moves_both_matrices(choices, pynative):
    """The gradient that load has, and that the choices themselves have not."""
    router = identity_router("noisy_top_k", choices, 3, True)
    weights = ms.ParameterTuple([router.weight, router.noise_weight])
    rows, valid = Tensor(LOGITS[None].astype(np.float32)), Tensor(np.ones((1, 2), np.float32))
    context = {"valid": valid, "noise": Tensor(_noise([0.1, 0.2], [0.3, 0.4]).astype(np.float32))}

    def objective(rows):
        return (router(rows, context)["smooth_load"] * Tensor(np.array([1, 2, 4], np.float32))).sum()

    for gradient in ms.grad(objective, None, weights)(rows):
        assert np.isfinite(gradient.asnumpy()).all() and np.abs(gradient.asnumpy()).max() > 1e-3
