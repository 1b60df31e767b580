"""The global norm of gradients against a sum written out."""

import numpy as np
import pytest
from mindspore import Tensor

from switchyard.distributed.gradients import GlobalNorm


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_global_norm(mode, request):
    request.getfixturevalue(mode)
    random = np.random.default_rng(4)
    gradients = [random.normal(size=shape).astype(np.float32) for shape in [(3, 5), (7,), (2, 3, 4), (1, 1)]]
    norm = GlobalNorm()
    wanted = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in gradients))
    np.testing.assert_allclose(norm(tuple(map(Tensor, gradients))).asnumpy(), wanted, rtol=1e-6)
    gradients[2][0, 0, 0] = np.inf
    assert not np.isfinite(norm(tuple(map(Tensor, gradients))).asnumpy())
