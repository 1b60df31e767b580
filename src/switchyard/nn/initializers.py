"""Initial weights, or their shapes alone.

A simulated compile of a trillion parameters wants their shapes: it never reads a number of them.
"""

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer


def normal(random: np.random.Generator | None, std: float, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers of mean 0, float32.

    Args:
        random: draws them; None: a tensor that has that shape and no memory, for a graph that is only compiled.
        std: standard deviation.
        shape: of the whole tensor, before it is cut over devices.
    """
    if random is None:
        return initializer("zeros", shape, mstype.float32)
    return Tensor(random.normal(0.0, std, shape).astype(np.float32))
