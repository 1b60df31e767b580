"""Softmax against its plain twin: values and gradients to 1e-5."""

import numpy as np
import pytest
from mindspore import Tensor, ops
from oracles.twins import assert_twins, normal_rows

from switchyard.nn.softmax import Softmax


@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 5, 8)])
def test_softmax_of_training_equals_its_twin(shape, pynative):
    assert_twins(Softmax().set_train(), lambda x: ops.softmax(x, -1), normal_rows(5.0, shape))


@pytest.mark.parametrize(("training", "bound"), [(True, 1e-5), (False, 1e-6)])
def test_softmax_of_evaluation_is_as_exact_as_float32_allows(training, bound, pynative):
    """Against float64. Attention without a scale, as T5 has it, multiplies what is missing in its logits."""
    scores = np.random.default_rng(0).normal(0, 20, (512, 16)).astype(np.float32)
    powers = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    found = Softmax().set_train(training)(Tensor(scores)).asnumpy()
    assert np.abs(found - powers / powers.sum(-1, keepdims=True)).max() < bound


@pytest.mark.parametrize("training", [True, False])
def test_softmax_of_a_masked_row(training, pynative):
    """Masked positions get exactly nothing, large scores do not overflow."""
    scores = Tensor(np.array([[300.0, -1e9, -1e9], [0.0, 0.0, -1e9]], np.float32))
    np.testing.assert_allclose(Softmax().set_train(training)(scores).asnumpy(), [[1, 0, 0], [0.5, 0.5, 0]], atol=2e-6)
