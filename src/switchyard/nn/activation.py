"""Activations with the numerics of the shipped ones and a fraction of their time on CPU."""

from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import SiLU, Swiglu
from mindspore.ops.operations._grad_ops import AbsGrad

from switchyard.nn.fused import NONE


class Relu(nn.Cell):
    """max(x, 0), with the gradient sign(relu(x)) * d of AbsGrad: on a GPU it takes half the time of ReluGrad."""

    def __init__(self):
        super().__init__()
        self.relu, self.gradient = ops.ReLU(), AbsGrad()

    def construct(self, x: Tensor) -> Tensor:
        return self.relu(x)

    def bprop(self, x, out, d_out):
        return (self.gradient(out, d_out),)


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


class SwiGLU(nn.Cell):
    """silu(gate) * hidden, both [..., F] (arXiv 2002.05202, eq. 5).

    Args:
        fused: by one operator of Ascend, which reads them side by side, the gate first.
        silu: the gate's function by one operator, which is the faster one on a GPU.
    """

    def __init__(self, fused: bool = False, silu: bool = False):
        super().__init__()
        self.silu, self.join, self.fused = SiLU() if silu else Silu(), ops.Concat(-1), Swiglu() if fused else None

    def construct(self, gate: Tensor, hidden: Tensor) -> Tensor:
        if self.fused is not None:
            return self.fused(self.join((gate, hidden)), -1)  # [..., 2 F] -> [..., F]
        return self.silu(gate) * hidden


def create_activation(kind: str, fused: frozenset[str] = NONE) -> nn.Cell:
    """The non-linearity that `model.activation` names: of one matrix's rows, with swiglu of a gate and those.

    `fused`: operators of the device, see nn.fused.
    """
    if kind == "swiglu":
        return SwiGLU("Swiglu" in fused, "SiLU" in fused)
    return {"relu": Relu if "AbsGrad" in fused else nn.ReLU, "gelu": Gelu}[kind]()
