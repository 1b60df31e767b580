"""Softmax against its plain twin: values and gradients to 1e-5."""

import numpy as np
import pytest
from mindspore import Tensor, ops
from oracles.twins import assert_twins, normal_rows

from switchyard.nn.softmax import Softmax


@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 5, 8)])
def test_softmax_equals_its_twin(shape, pynative):
    assert_twins(Softmax(), lambda x: ops.softmax(x, -1), normal_rows(5.0, shape))


def test_softmax_of_a_masked_row(pynative):
    """Masked positions get exactly nothing, large scores do not overflow."""
    scores = Tensor(np.array([[300.0, -1e9, -1e9], [0.0, 0.0, -1e9]], np.float32))
    np.testing.assert_allclose(Softmax()(scores).asnumpy(), [[1, 0, 0], [0.5, 0.5, 0]], atol=2e-6)
