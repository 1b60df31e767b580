"""Convolutional experts against Conv2D, its gradient, and the three ways to call them against each other."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from switchyard.moe.conv_experts import ConvolutionExperts, SliceExperts, Windows
from switchyard.moe.experts import FeedForwardExperts
from switchyard.nn.initializers import InitialWeights

SHAPE, OUT, HIDDEN, EXPERTS, ROWS = (3, 4, 2), 5, 6, 3, 2
pytestmark = pytest.mark.usefixtures("pynative")


def experts(activation="relu") -> ConvolutionExperts:
    random = InitialWeights(0)
    return ConvolutionExperts(EXPERTS, SHAPE, OUT, HIDDEN, activation, random, ms.float32)


def rows(count: int = EXPERTS) -> Tensor:
    values = np.random.default_rng(1).normal(0, 1, (count, ROWS, 3 * 4 * 2))
    return Tensor(values.astype(np.float32))


def grouped_convolution(cell: ConvolutionExperts, x: Tensor) -> np.ndarray:
    """The same as one Conv2D with E groups and one 1 x 1 Conv2D with E groups: the plain twin."""
    maps = x.asnumpy().reshape(EXPERTS, ROWS, *SHAPE).transpose(1, 0, 4, 2, 3)  # [S, E, c, h, w]
    first = cell.network.w_in.asnumpy().reshape(EXPERTS, 3, 3, SHAPE[2], HIDDEN).transpose(0, 4, 3, 1, 2)
    last = cell.network.w_out.asnumpy().transpose(0, 2, 1)[..., None, None]  # [E, o, F, 1, 1]
    hidden = ops.Conv2D(EXPERTS * HIDDEN, 3, pad_mode="same", group=EXPERTS)(
        Tensor(maps.reshape(ROWS, -1, 3, 4)), Tensor(first.reshape(EXPERTS * HIDDEN, SHAPE[2], 3, 3))
    )
    out = ops.Conv2D(EXPERTS * OUT, 1, group=EXPERTS)(
        ops.relu(hidden), Tensor(last.reshape(EXPERTS * OUT, HIDDEN, 1, 1))
    )
    return out.asnumpy().reshape(ROWS, EXPERTS, OUT, 3, 4).transpose(1, 0, 3, 4, 2).reshape(EXPERTS, ROWS, -1)


def test_equals_one_grouped_convolution():
    cell, x = experts(), rows()
    assert np.allclose(cell(x).asnumpy(), grouped_convolution(cell, x), atol=1e-5)


def test_windows_have_the_gradient_of_their_twin():
    windows, x = Windows(3, 4), Tensor(np.random.default_rng(2).normal(0, 1, (2, 12, 3)).astype(np.float32))
    weight = Tensor(np.random.default_rng(3).normal(0, 1, (2, 12, 27)).astype(np.float32))

    def twin(x):
        maps = ops.pad(x.reshape(2, 3, 4, 3), (0, 0, 1, 1, 1, 1))
        taps = [maps[:, i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
        return (ops.cat(taps, 3).reshape(2, 12, 27) * weight).sum()

    found, d_found = ms.value_and_grad(lambda x: (windows(x) * weight).sum())(x)
    expected, d_expected = ms.value_and_grad(twin)(x)
    assert np.allclose(found.asnumpy(), expected.asnumpy(), rtol=1e-5)
    assert np.allclose(d_found.asnumpy(), d_expected.asnumpy(), atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_blocks_and_certain_mixtures_are_the_experts_themselves(activation):
    cell, x = experts(activation), rows()
    expected = cell(x).asnumpy()
    order = np.array([2, 0, 1])
    blocks = cell.blocks(Tensor(x.asnumpy()[order]), Tensor(order, ms.int32)).asnumpy()
    assert np.allclose(blocks, expected[order], atol=1e-5)
    merged = cell.merged(x, Tensor(np.eye(EXPERTS, dtype=np.float32))).asnumpy()
    assert np.allclose(merged, expected, atol=1e-5)


def test_slices_work_token_by_token():
    network = FeedForwardExperts(2, 4, 3, "relu", (1.0, 1.0), InitialWeights(0), ms.float32)
    x = Tensor(np.random.default_rng(1).normal(0, 1, (2, 3, 20)).astype(np.float32))
    found = SliceExperts(network, 5)(x).asnumpy().reshape(2, 15, 4)
    assert np.allclose(found, network(Tensor(x.asnumpy().reshape(2, 15, 4))).asnumpy(), atol=1e-6)
