"""RMSNorm and LayerNorm with a gradient of their own, of operators that are fast on CPU.

A scalar of each row meets the row in two ways: multiplied through an outer product with a row, added by BiasAdd, which
takes the rows as channels. Both take half to 0.8 of the time of a broadcasting operator. The sums of the gradient over
a row and over all rows are matrix products.

Legend: N rows, D width.
"""

import numpy as np
from mindspore import Tensor, nn, ops


class RootMeanSquare(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * gain (arXiv 1910.07467, eq. 4): x [N, D], gain [D] -> [N, D], float32.

    With s = 1 / sqrt(mean(x^2) + eps) of a row:
        dx = s gain dy - x s^3 mean(x gain dy),  dgain = sum over rows of s x dy.
    The plain twin is `nn.norm.RMSNorm.normalise`.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.shares = eps, Tensor(np.full((1, width), 1.0 / width, np.float32))
        self.mean, self.rsqrt, self.expand = ops.ReduceMean(keep_dims=True), ops.Rsqrt(), ops.ExpandDims()
        self.product, self.t_product = ops.MatMul(), ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, gain: Tensor) -> Tensor:
        return x * self.product(self.scale(x), self.expand(gain, 0))

    def scale(self, x: Tensor) -> Tensor:
        """Returns s of each row of x [N, D]: [N, 1]."""
        return self.rsqrt(self.mean(x * x, -1) + self.eps)

    def gradients(self, x: Tensor, gain: Tensor, d_out: Tensor) -> tuple:
        """Returns (dx [N, D], dgain [D])."""
        scale, both = self.scale(x), x * d_out
        d_gain = self.t_product(scale, both).reshape(-1)  # [1, D] -> [D]
        sums = self.product(both, self.expand(gain, 1))  # [N, 1]
        back = x * self.product(scale * scale * scale * sums, self.shares)  # [N, D]
        return d_out * self.product(scale, self.expand(gain, 0)) - back, d_gain

    def bprop(self, x, gain, out, d_out):
        return self.gradients(x, gain, d_out)


class CentredRootMeanSquare(RootMeanSquare):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias (arXiv 1607.06450, eq. 4): [N, D] -> [N, D], float32.

    It is RootMeanSquare of the centred rows, and a bias; the gradient of centring is centring. The plain twin is
    `nn.norm.LayerNorm.normalise`.
    """

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.add, self.add_to_rows, self.sum = ops.BiasAdd(), ops.BiasAdd("NCHW"), ops.ReduceSum()
        self.minus_shares = Tensor(np.full((width, 1), -1.0 / width, np.float32))

    def construct(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        centred = self.centre(x)
        return self.add(centred * self.product(self.scale(centred), self.expand(gain, 0)), bias)

    def centre(self, x: Tensor) -> Tensor:
        """Returns rows [N, D] minus their means."""
        minus_means = self.product(x, self.minus_shares).reshape(-1)  # [N]
        return self.add_to_rows(self.expand(x, 0), minus_means).reshape(x.shape)  # [1, N, D] -> [N, D]

    def bprop(self, x, gain, bias, out, d_out):
        d_centred, d_gain = self.gradients(self.centre(x), gain, d_out)
        return self.centre(d_centred), d_gain, self.sum(d_out, 0)
