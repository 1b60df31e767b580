"""Holding a fast kernel against the plain operators that it stands for."""

import mindspore as ms
import numpy as np
from mindspore import Tensor


def normal_rows(scale: float = 2.0, shape: tuple[int, ...] = (11, 16), seed: int = 0) -> Tensor:
    """Random float32 values of a given standard deviation."""
    return Tensor(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def assert_twins(kernel, twin, *arguments, tolerance: float = 1e-5):
    """Same value, and same gradient of every argument under a random upstream gradient."""
    value = kernel(*arguments)
    np.testing.assert_allclose(value.asnumpy(), twin(*arguments).asnumpy(), atol=tolerance, rtol=tolerance)
    upstream = normal_rows(1.0, value.shape, seed=9)
    places = tuple(range(len(arguments)))
    got = ms.grad(lambda *a: (kernel(*a) * upstream).sum(), places)(*arguments)
    wanted = ms.grad(lambda *a: (twin(*a) * upstream).sum(), places)(*arguments)
    for one, two in zip(got, wanted):
        np.testing.assert_allclose(one.asnumpy(), two.asnumpy(), atol=tolerance, rtol=tolerance)
