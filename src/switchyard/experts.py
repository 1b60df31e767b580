"""WHAT works: feed-forward experts stacked on one axis, run as one batched matrix product.

Legend: E experts, S rows of an expert, D width, F hidden width, P blocks, b rows of a block.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.kernels.activation import create_activation


class FeedForwardExperts(nn.Cell):
    """E feed-forward networks: [E, S, D] -> [E, S, D], parameters stacked on E (never a loop over experts).

    ReLU and GELU: act(x W_in) W_out. SwiGLU (arXiv 2002.05202, eq. 6): (silu(x W_gate) * x W_in) W_out.

    Args:
        std: (of the first matrices, of the last) initial standard deviation.
        random: numpy generator of the initial weights.
        dtype: of the matrix products; parameters and result stay float32.
        out: width of the result, where it is not D.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: str,
        std: tuple[float, float],
        random,
        dtype,
        out: int | None = None,
    ):
        super().__init__()
        self.dtype = dtype
        self.gated = activation == "swiglu"

        def weight(name: str, shape: tuple[int, ...], scale: float) -> Parameter:
            return Parameter(Tensor(random.normal(0.0, scale, shape).astype(np.float32)), name=name)

        self.w_in = weight("w_in", (experts, width, hidden), std[0])
        self.w_gate = weight("w_gate", (experts, width, hidden), std[0]) if self.gated else None
        self.w_out = weight("w_out", (experts, hidden, out or width), std[1])
        self.product_in = ops.BatchMatMul()
        self.product_gate = ops.BatchMatMul()
        self.product_out = ops.BatchMatMul()
        self.activation = create_activation(activation)
        self.take = ops.Gather()
        self.mix = ops.MatMul()

    def construct(self, rows: Tensor) -> Tensor:
        """Rows [E, S, D], those of expert e in slice e."""
        return self._work(rows, self.w_in, self.w_gate, self.w_out)

    def blocks(self, rows: Tensor, block_expert: Tensor) -> Tensor:
        """Rows [P, b, D], those of block p all of expert `block_expert` [P]: the chosen experts' weights only."""
        w_gate = self.take(self.w_gate, block_expert, 0) if self.gated else None  # [P, D, F]
        return self._work(rows, self.take(self.w_in, block_expert, 0), w_gate, self.take(self.w_out, block_expert, 0))

    def merged(self, rows: Tensor, gates: Tensor) -> Tensor:
        """Rows [G, N, D] through one network a group: the experts' parameters weighted by gates [G, E] and summed."""
        w_gate = self._mean(self.w_gate, gates) if self.gated else None  # [G, D, F]
        return self._work(rows, self._mean(self.w_in, gates), w_gate, self._mean(self.w_out, gates))

    def _mean(self, weight, gates):
        experts, rows, columns = weight.shape
        return self.mix(gates, weight.reshape(experts, -1)).reshape(-1, rows, columns)  # [G, D, F]

    def _work(self, rows, w_in, w_gate, w_out):
        rows = rows.astype(self.dtype)
        hidden = self.product_in(rows, w_in.astype(self.dtype))  # [E, S, F]
        if self.gated:
            hidden = self.activation(self.product_gate(rows, w_gate.astype(self.dtype))) * hidden
        else:
            hidden = self.activation(hidden)
        return self.product_out(hidden, w_out.astype(self.dtype)).astype(mstype.float32)  # [E, S, D]
