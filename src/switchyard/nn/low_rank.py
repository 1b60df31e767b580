"""Low-rank adapters of weights (LoRA, arXiv 2106.09685).

Legend: N rows, E experts, S rows of an expert, I and O widths of the input and of the result, r rank, P blocks of rows.
"""

from contextlib import nullcontext

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer

from switchyard.nn.cast import Cast
from switchyard.nn.initializers import NormalStream, shapes_only

ADAPTER_STREAM = 0x4C6F5241  # keeps these keys apart from those of weights and of noise


class LowRank(nn.Cell):
    """Adds (x A) B * scale to what a weight W makes of x: together x (W + A B * scale), section 4.1.

    A is normal with variance 1 / I, B is zero, so that nothing changes before the first step.

    Args:
        shape: of the weight, [I, O] or [E, I, O].
        rank: r.
        scale: alpha / r.
        key: of the random numbers of A, [2] uint64.
        dtype: of the products.
        drawn: False: A has a shape and no numbers, see nn.initializers.

    Examples:
        >>> from mindspore import dtype as mstype
        >>> adapter = LowRank((4, 6), 2, 1.0, np.zeros(2, np.uint64), mstype.float32)
        >>> out = adapter(ops.ones((3, 4)), ops.zeros((3, 6)))
        >>> out.shape, float(out.sum())
        ((3, 6), 0.0)
    """

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float, key: np.ndarray, dtype, drawn=True):
        super().__init__()
        *experts, size_in, size_out = shape
        stream = NormalStream(key, size_in**-0.5, (*experts, size_in, rank))
        with nullcontext() if drawn else shapes_only():
            values = Tensor.from_numpy(stream.draw()) if drawn else initializer("zeros", stream.shape, mstype.float32)
            self.a = Parameter(values, name="a")
        self.a.initial = stream
        self.b = Parameter(Tensor(np.zeros((*experts, rank, size_out), np.float32)), name="b")
        self.scale = scale
        self.first, self.second = (ops.BatchMatMul() if experts else ops.MatMul() for _ in range(2))
        self.cast_a, self.cast_b, self.take, self.add = Cast(dtype), Cast(dtype), ops.Gather(), ops.Add()

    def construct(self, rows: Tensor, out: Tensor, block_expert: Tensor = None) -> Tensor:
        """Adds to `out` [N, O], or [E, S, O], what the adapter makes of rows [N, I], or [E, S, I], in the type of the
        products; with `block_expert` [P] rows are [P, b, I], each block of one expert."""
        a, b = self.a, self.b
        if block_expert is not None:
            a, b = self.take(a, block_expert, 0), self.take(b, block_expert, 0)  # [P, I, r], [P, r, O]
        thin = self.first(rows, self.cast_a(a))  # [N, r]
        return self.add(out, self.second(thin, self.cast_b(b)) * self.scale)


def adapter_key(seed: int, index: int) -> np.ndarray:
    """Returns the key of the random numbers of an adapter: [2] uint64."""
    return np.random.SeedSequence((ADAPTER_STREAM, seed, index)).generate_state(2, np.uint64)
