"""Shared experts, which every token visits.

Legend: N tokens, D width.
"""

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.moe.experts import FeedForwardExperts
from switchyard.nn.fused import NONE
from switchyard.nn.initializers import InitialWeights


class SharedExperts(FeedForwardExperts):
    """Computes what every token gets besides its chosen experts.

    `moe.shared_expert_num` experts that all tokens go to are one expert of as many times the width, or of
    `moe.shared_intermediate_size` where that is given. With
    `moe.use_shared_expert_gating` its output is weighted by sigmoid(x w) (Qwen2-MoE, arXiv 2407.10671).

    Args:
        config: the whole configuration.
        std: (first, last) initial standard deviation of the matrices.
        random: hands out the initial weights.
        dtype: of the matrix products.
        fused: operators of the device, see nn.fused.
    """

    def __init__(
        self, config: Config, std: tuple[float, float], random: InitialWeights, dtype, fused: frozenset[str] = NONE
    ):
        moe, width = config.moe, config.model.hidden_size
        super().__init__(1, width, config.shared_width, config.model.activation, std, random, dtype, fused=fused)
        self.gate = None
        if moe.use_shared_expert_gating:
            self.gate = random.normal(std[0], (1, width, 1), "gate")
        self.product, self.sigmoid = ops.BatchMatMul(), ops.Sigmoid()
        self.local_weigh = self.weigh

    def construct(self, rows: Tensor) -> Tensor:
        """Applies the shared experts to rows [1, N, D]: [1, N, D]."""
        out = self._work(rows, self.w_in, self.w_gate, self.w_out)
        if self.gate is not None:
            out = self.local_weigh(out, self.product(rows.astype(mstype.float32), self.gate))  # [1, N, 1]
        return out

    def weigh(self, out: Tensor, scores: Tensor) -> Tensor:
        """Weights out [1, N, D] by the gate of each token."""
        return out * self.sigmoid(scores)

    def shard(self, mesh: CompiledMesh) -> None:
        """Declares the layouts: tokens are sharded by data shards, the hidden width by model shards."""
        super().shard(mesh)
        rows = mesh.layout(None, "data", None)
        self.product.shard((rows, mesh.layout(None, None, None)), (rows,))
        self.local_weigh = mesh.local(self.weigh, (rows, rows), (rows,), first, first)
