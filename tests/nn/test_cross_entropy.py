"""Cross-entropy of each token against the shipped operator: values and gradients to 1e-5."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from switchyard.nn.cross_entropy import TokenLosses


def _inputs(rows: int, vocabulary: int, scale: float):
    random = np.random.default_rng(5)
    logits = (scale * random.normal(size=(rows, vocabulary))).astype(np.float32)
    labels = random.integers(0, vocabulary, rows).astype(np.int32)
    weights = random.random(rows).astype(np.float32)
    weights[::3] = 0  # padding
    return Tensor(logits), Tensor(labels), Tensor(weights / weights.sum())


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize("scale", [0.01, 3.0, 60.0])
def test_losses_equal_the_shipped_operator(mode, scale, request):
    request.getfixturevalue(mode)
    logits, labels, weights = _inputs(13, 29, scale)
    cell = TokenLosses()

    def weighted(logits):
        return (cell(logits, labels) * weights).sum()

    def plain(logits):
        return (ops.cross_entropy(logits, labels, reduction="none") * weights).sum()

    np.testing.assert_allclose(
        cell(logits, labels).asnumpy(), ops.cross_entropy(logits, labels, reduction="none").asnumpy(), atol=1e-5
    )
    gradient = ms.grad(weighted)(logits).asnumpy()
    np.testing.assert_allclose(gradient, ms.grad(plain)(logits).asnumpy(), atol=1e-5)
    assert not gradient[::3].any()  # a row of weight 0 gets exactly nothing


def test_hand_typed_losses(pynative):
    """Uniform logits cost log V; a logit far ahead costs nothing, or its whole lead."""
    logits = Tensor(np.array([[0, 0, 0, 0], [50, 0, 0, 0], [50, 0, 0, 0]], np.float32))
    losses = TokenLosses()(logits, Tensor(np.array([2, 0, 1], np.int32))).asnumpy()
    np.testing.assert_allclose(losses, [np.log(4), 0, 50], atol=1e-5)
