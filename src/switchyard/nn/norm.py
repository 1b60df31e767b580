"""RMSNorm and LayerNorm composed of operators whose gradients are fast on CPU.

A row scalar [N, 1] meets a row of width D through a matrix product with ones [1, D], not by broadcasting: the
gradient is then a matrix product too: half to a quarter of the time of the shipped operators, both ways together.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops.auto_generate import RmsNorm

from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.distributed.placement import axes_of
from switchyard.nn.fused import NONE
from switchyard.nn.norm_gradient import CentredRootMeanSquare, RootMeanSquare


class RMSNorm(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * gain (arXiv 1910.07467, eq. 4): [N, D] -> [N, D], in float32.

    Args:
        width: D.
        eps: as above.
        fused: by one operator of Ascend.
        own_gradient: with the gradient of nn.norm_gradient.
    """

    def __init__(self, width: int, eps: float, fused: bool = False, own_gradient: bool = False):
        super().__init__()
        self.own = RootMeanSquare(width, eps) if own_gradient else None
        self.eps, self.fused = eps, RmsNorm(eps) if fused else None
        self.gain = Parameter(Tensor(np.ones(width, np.float32)), name="gain")
        self.ones = Tensor(np.ones((1, width), np.float32))
        self.mean = ops.ReduceMean(keep_dims=True)
        self.rsqrt = ops.Rsqrt()
        self.broadcast = ops.MatMul()
        self.scale = ops.Mul()
        self.local = self.normalise

    def construct(self, x: Tensor) -> Tensor:
        return self.local(x, self.gain)

    def normalise(self, x: Tensor, gain: Tensor) -> Tensor:
        """The equation itself: x [N, D], gain [D]."""
        if self.fused is not None:
            return self.fused(x, gain)[0]
        if self.own is not None:
            return self.own(x, gain)
        return self.composed(x, gain)

    def composed(self, x: Tensor, gain: Tensor) -> Tensor:
        """The equation of operators that every device has."""
        scale = self.rsqrt(self.mean(x * x, -1) + self.eps)  # [N, 1]
        gains = self.broadcast(ops.ones_like(scale), ops.expand_dims(gain, 0))  # [N, D]; no Reshape: training.pipeline
        return self.scale(x * self.broadcast(scale, self.ones), gains)

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards rows as `mesh` shards rows, the parameters as `axes_of` says."""
        rows = mesh.layout("rows", None)
        weights = [mesh.layout(*axes_of(parameter.name, 1)) for parameter in self.get_parameters()]  # gain, then bias
        self.local = mesh.local(self.normalise, (rows, *weights), (rows,), first, first)


class LayerNorm(RMSNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias (arXiv 1607.06450, eq. 4): [N, D] -> [N, D], in float32.

    That is RMSNorm of the centred rows, and a bias. `fused`: by one operator, which is the faster one on a GPU.
    `own_gradient`: see RMSNorm.
    """

    def __init__(self, width: int, eps: float, fused: bool = False, own_gradient: bool = False):
        super().__init__(width, eps)
        self.own = CentredRootMeanSquare(width, eps) if own_gradient else None
        self.one = ops.LayerNorm(1, 1, eps) if fused else None
        self.bias = Parameter(Tensor(np.zeros(width, np.float32)), name="bias")

    def construct(self, x: Tensor) -> Tensor:
        return self.local(x, self.gain, self.bias)

    def normalise(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        """The equation itself: x [N, D], gain and bias [D]."""
        if self.one is not None:
            return self.one(x, gain, bias)[0]
        if self.own is not None:
            return self.own(x, gain, bias)
        mean = self.mean(x, -1)  # [N, 1]
        gained = self.composed(x - self.broadcast(mean, self.ones), gain)
        return gained + self.broadcast(ops.ones_like(mean), bias.reshape(1, -1))


def create_norm(kind: str, width: int, eps: float, fused: frozenset[str] = NONE) -> nn.Cell:
    """The norm that `model.norm` names; `fused`: see nn.fused."""
    if kind == "layernorm":
        return LayerNorm(width, eps, "LayerNorm" in fused, "NormGradient" in fused)
    return RMSNorm(width, eps, "RmsNorm" in fused, "NormGradient" in fused)
