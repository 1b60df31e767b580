"""Activations with the numerics of the shipped ones and a fraction of their time on CPU."""

from mindspore import Tensor, nn, ops


class Gelu(nn.Cell):
    """GELU in its tanh form (arXiv 1606.08415, section 2): 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Written as x * sigmoid(2 u), which is the same function: `ops.gelu` takes three times the matrix product before it
    on CPU, and `ops.tanh` is good to 1e-4 only. The plain twin is `ops.gelu(x, approximate="tanh")`.
    """

    def __init__(self):
        super().__init__()
        self.sigmoid = ops.Sigmoid()

    def construct(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x * (1.5957691216 + 0.0713548163 * (x * x)))

    def bprop(self, x, out, d_out):
        square = x * x
        gate = self.sigmoid(x * (1.5957691216 + 0.0713548163 * square))
        slope = x * (1.5957691216 + 0.2140644488 * square)  # x times the derivative of the sigmoid's argument
        return (d_out * gate * (1.0 + slope * (1.0 - gate)),)


class Silu(nn.Cell):
    """x * sigmoid(x), the gate of SwiGLU (arXiv 2002.05202, eq. 5)."""

    def __init__(self):
        super().__init__()
        self.sigmoid = ops.Sigmoid()

    def construct(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)

    def bprop(self, x, out, d_out):
        gate = self.sigmoid(x)
        return (d_out * (gate + out * (1.0 - gate)),)


def create_activation(kind: str) -> nn.Cell:
    """The non-linearity that `model.activation` names (SwiGLU's is its gate's)."""
    return {"relu": nn.ReLU, "gelu": Gelu, "swiglu": Silu}[kind]()
