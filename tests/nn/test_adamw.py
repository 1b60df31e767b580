"""AdamW against its NumPy twin, both kernels, updates that are refused among them."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype

from switchyard.nn.adamw import AdamW, plain_adamw

SHAPES = [(3, 5), (7,), (2, 3, 4), (1, 1)]
BETA1, BETA2, EPS, DECAY, RATE = 0.9, 0.99, 1e-8, 0.1, 0.01


def _arrays(seed: int, scale: float = 1.0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [(scale * random.normal(size=shape)).astype(np.float32) for shape in SHAPES]


def _optimizer(target: str) -> AdamW:
    parameters = [Parameter(Tensor(value), name=f"p{index}") for index, value in enumerate(_arrays(0))]
    return AdamW(parameters, BETA1, BETA2, EPS, DECAY, target)


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize("target", ["CPU", "GPU"])
@pytest.mark.parametrize("refuses", [False, True])
def test_updates_equal_the_plain_twin(mode, target, refuses, request):
    """Six updates; two of them are refused, the first included, and only the others count."""
    request.getfixturevalue(mode)
    optimizer = _optimizer(target)
    wanted = [(value.astype(np.float64), np.zeros(value.shape), np.zeros(value.shape)) for value in _arrays(0)]
    applied = 0
    for step in range(6):
        gradients, alive = _arrays(step + 1, 0.1), not (refuses and step in (0, 3))
        if not alive:
            gradients[0][0, 0], gradients[1][2] = np.inf, np.nan
        optimizer(tuple(map(Tensor, gradients)), Tensor(RATE, mstype.float32), Tensor(alive))
        if alive:
            applied += 1
            for index, gradient in enumerate(gradients):
                decay = DECAY if gradient.ndim >= 2 else 0.0
                wanted[index] = plain_adamw(*wanted[index], gradient, applied, RATE, BETA1, BETA2, EPS, decay)
    state = optimizer.state()
    for index, parameter in enumerate(optimizer.parameters):
        np.testing.assert_allclose(parameter.asnumpy(), wanted[index][0], atol=2e-6)
        np.testing.assert_allclose(state[f"moment1.p{index}"].asnumpy(), wanted[index][1], atol=1e-6)
        np.testing.assert_allclose(state[f"moment2.p{index}"].asnumpy(), wanted[index][2], atol=1e-7)
    np.testing.assert_allclose(state["correction1"].asnumpy(), 1 - BETA1**applied, rtol=1e-6)
    np.testing.assert_allclose(state["correction2"].asnumpy(), 1 - BETA2**applied, rtol=1e-6)


def test_refused_update_changes_nothing(pynative):
    optimizer = _optimizer("CPU")
    optimizer(tuple(map(Tensor, _arrays(1))), Tensor(RATE, mstype.float32), Tensor(True))
    everything = [*optimizer.parameters, *optimizer.state().values()]
    before = [parameter.asnumpy().copy() for parameter in everything]
    broken = tuple(Tensor(np.full(shape, np.nan, np.float32)) for shape in SHAPES)
    optimizer(broken, Tensor(RATE, mstype.float32), Tensor(False))
    for parameter, value in zip(everything, before):
        np.testing.assert_array_equal(parameter.asnumpy(), value)


@pytest.mark.parametrize("target", ["CPU", "GPU"])
def test_a_scale_multiplies_the_gradients_however_small_it_is(target, pynative):
    """The inverse of a loss scale of 2^24 is 6e-8."""
    one, other = _optimizer(target), _optimizer(target)
    plain, scaled = _arrays(1), [gradient * np.float32(2.0**24) for gradient in _arrays(1)]
    rate, alive = Tensor(RATE, mstype.float32), Tensor(True)
    one(tuple(map(Tensor, plain)), rate, alive)
    other(tuple(map(Tensor, scaled)), rate, alive, None, Tensor(2.0**-24, mstype.float32))
    for first, second in zip(one.parameters, other.parameters):
        np.testing.assert_array_equal(first.asnumpy(), second.asnumpy())


def test_only_matrices_decay(pynative):
    """With gradients of 0 nothing but decay moves a parameter, and vectors do not decay."""
    optimizer = _optimizer("CPU")
    zeros = tuple(Tensor(np.zeros(shape, np.float32)) for shape in SHAPES)
    optimizer(zeros, Tensor(RATE, mstype.float32), Tensor(True))
    for parameter, before in zip(optimizer.parameters, _arrays(0)):
        factor = 1 - RATE * DECAY if before.ndim >= 2 else 1.0
        np.testing.assert_allclose(parameter.asnumpy(), before * factor, rtol=1e-6)


def test_first_update_by_hand(pynative):
    """The first update of Adam is the learning rate, whatever the gradient's size (m / c1 = g, v / c2 = g^2)."""
    vector = Parameter(Tensor(np.array([1.0, 1.0], np.float32)), name="v")
    optimizer = AdamW([vector], BETA1, BETA2, EPS, DECAY)
    optimizer((Tensor(np.array([1e-3, -100.0], np.float32)),), Tensor(RATE, mstype.float32), Tensor(True))
    np.testing.assert_allclose(vector.asnumpy(), [0.99, 1.01], atol=1e-6)
