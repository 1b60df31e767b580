"""Activations against their plain twins: values and gradients to 1e-5."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from oracles.twins import assert_twins, normal_rows

from switchyard.nn.activation import Gelu, Relu, Silu, create_activation


def _plain_gelu(x):
    return ops.gelu(x, approximate="tanh")


def _plain_silu(x):
    return x / (1.0 + ops.exp(-x))


ACTIVATIONS = {"relu": nn.ReLU, "gelu": Gelu, "silu": Silu, "relu of a GPU": Relu}


@pytest.mark.parametrize(
    ("kind", "twin"), [("relu", ops.relu), ("gelu", _plain_gelu), ("silu", _plain_silu), ("relu of a GPU", ops.relu)]
)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_activation_equals_its_twin(kind, twin, scale, pynative):
    assert_twins(ACTIVATIONS[kind](), twin, normal_rows(scale))


@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_activation_is_the_one_that_is_named(kind):
    assert type(create_activation(kind)) is ACTIVATIONS[kind]


def test_a_gpu_has_a_relu_of_its_own():
    assert type(create_activation("relu", frozenset({"AbsGrad"}))) is Relu


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_activation_far_out_is_finite(kind, pynative):
    """At +-1000: the identity and zero, slopes one and zero, no overflow of the exponential."""
    activation, x = ACTIVATIONS[kind](), Tensor(np.array([-1000.0, -88, 0, 88, 1000.0], np.float32))
    np.testing.assert_allclose(activation(x).asnumpy(), [0, 0, 0, 88, 1000], atol=1e-5)
    np.testing.assert_allclose(ms.grad(lambda x: activation(x).sum())(x).asnumpy(), [0, 0, 0.5, 1, 1], atol=1e-5)


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_activation_gradient_when_compiled(kind, graph):
    activation, x = ACTIVATIONS[kind](), normal_rows()
    twin = _plain_gelu if kind == "gelu" else _plain_silu
    got, wanted = ms.grad(activation)(x), ms.grad(twin)(x)
    np.testing.assert_allclose(got.asnumpy(), wanted.asnumpy(), atol=1e-5)
