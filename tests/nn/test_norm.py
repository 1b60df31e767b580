"""Norms against their plain twins: values and gradients to 1e-5."""

import itertools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from oracles.twins import normal_rows

from switchyard.nn.norm import create_norm


def _plain_rms(eps):
    def rms(x, gain):
        return x / ops.sqrt((x * x).mean(-1, keep_dims=True) + eps) * gain

    return rms


def _plain_layer_norm(eps):
    primitive = ops.LayerNorm(begin_norm_axis=1, begin_params_axis=1, epsilon=eps)
    return lambda x, gain, bias: primitive(x, gain, bias)[0]


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("fused", [frozenset(), frozenset({"NormGradient"})])
def test_norm_equals_its_twin(kind, scale, fused, pynative):
    """Value, and the gradients of the rows, the gain and the bias."""
    norm = create_norm(kind, 16, 1e-5, fused)
    random = np.random.default_rng(1)
    names, parameters = zip(*norm.parameters_and_names())
    assert names == (("gain",) if kind == "rmsnorm" else ("gain", "bias"))
    for parameter in parameters:
        parameter.set_data(Tensor(random.normal(1, 0.5, 16).astype(np.float32)))
    x, upstream = normal_rows(scale) + 0.5 * scale, normal_rows(1.0, seed=9)
    plain = {"rmsnorm": _plain_rms, "layernorm": _plain_layer_norm}[kind](1e-5)
    values = [Tensor(parameter.asnumpy()) for parameter in parameters]

    np.testing.assert_allclose(norm(x).asnumpy(), plain(x, *values).asnumpy(), atol=1e-5)
    d_x, d_parameters = ms.grad(lambda x: (norm(x) * upstream).sum(), 0, ms.ParameterTuple(parameters))(x)
    wanted = ms.grad(lambda *a: (plain(*a) * upstream).sum(), tuple(range(1 + len(values))))(x, *values)
    for got, want in zip((d_x, *d_parameters), wanted):
        np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), atol=1e-5, rtol=1e-4)


def test_layer_norm_equals_the_shipped_cell(pynative):
    np.testing.assert_allclose(
        create_norm("layernorm", 16, 1e-5)(normal_rows()).asnumpy(),
        nn.LayerNorm([16], epsilon=1e-5)(normal_rows()).asnumpy(),
        atol=1e-5,
    )


def test_norm_of_zeros_is_finite(pynative):
    for kind, fused in itertools.product(("rmsnorm", "layernorm"), (frozenset(), frozenset({"NormGradient"}))):
        norm, zeros = create_norm(kind, 16, 1e-5, fused), ops.zeros((2, 16))
        assert np.isfinite(norm(zeros).asnumpy()).all()
        assert np.isfinite(ms.grad(lambda x, norm=norm: norm(x).sum())(zeros).asnumpy()).all()


class Weighed(nn.Cell):
    """A sum of what a norm gives, weighted."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def construct(self, x, weight):
        return (self.norm(x) * weight).sum()


def test_a_compiled_gradient_of_its_own_equals_the_derived_one(graph):
    random, results = np.random.default_rng(2), []
    x, weight = (Tensor(random.standard_normal((5, 16)).astype(np.float32)) for _ in range(2))
    for fused in (frozenset(), frozenset({"NormGradient"})):
        norm = create_norm("layernorm", 16, 1e-5, fused)
        gradients = ops.GradOperation(get_all=True, get_by_list=True)(Weighed(norm), norm.trainable_params())
        (d_x, _), d_parameters = gradients(x, weight)
        results.append([part.asnumpy() for part in (norm(x), d_x, *d_parameters)])
    for expected, found in zip(*results):
        np.testing.assert_allclose(found, expected, atol=1e-5)
