"""RMSNorm of queries and keys before they rotate (Query-Key normalization, arXiv 2010.04245; OLMoE, arXiv 2409.02060).

Legend: N tokens, J key/value heads, R query heads of each, h head size, W = J * (R + 2) * h, T model shards.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import ModelConfig
from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.distributed.placement import MODEL
from switchyard.nn.fused import NONE
from switchyard.nn.norm import RMSNorm


class HeadNorm(nn.Cell):
    """Normalises each query and key by itself: projections [N, W] -> [N, W]; values stay.

    Over the h columns of a head, with a gain [h] for all query heads and one for all key heads (Qwen3).

    Args:
        model: its section of the configuration.
        fused: operators of the device, see nn.fused.
    """

    def __init__(self, model: ModelConfig, fused: frozenset[str] = NONE):
        super().__init__()
        self.repeat, self.size = model.num_heads // model.kv_heads, model.size_of_head
        kinds = "RmsNorm" in fused, "NormGradient" in fused
        self.queries, self.keys = (RMSNorm(self.size, model.norm_eps, *kinds) for _ in range(2))
        self.join = ops.Concat(1)

    def construct(self, qkv: Tensor) -> Tensor:
        return self.work(qkv, *self.inputs(qkv))

    def inputs(self, qkv: Tensor) -> tuple:
        """Returns what `work` reads besides the projections: both gains."""
        return self.queries.gain, self.keys.gain

    def work(self, qkv: Tensor, query_gain: Tensor, key_gain: Tensor) -> Tensor:
        """Does what the class says with the heads of one device; reads no Parameter."""
        grouped = qkv.reshape(-1, self.repeat + 2, self.size)  # [N * J, R + 2, h]
        query, key, value = ops.split(grouped, [self.repeat, 1, 1], 1)
        query = self.normalised(self.queries, query, query_gain)
        return self.join((query, self.normalised(self.keys, key, key_gain), value)).reshape(qkv.shape)

    def normalised(self, norm: nn.Cell, part: Tensor, gain: Tensor) -> Tensor:
        """Applies a norm to heads [N * J, X, h], in float32."""
        rows = part.reshape(-1, self.size).astype(mstype.float32)
        return norm.normalise(rows, gain).astype(part.dtype).reshape(part.shape)

    def shard(self, mesh: CompiledMesh) -> tuple:
        """Leaves the gains full everywhere, and returns the layouts of `inputs`."""
        return mesh.layout(None), mesh.layout(None)


class FullNorm(nn.Cell):
    """Normalises all queries of a token together, and all keys: projections [N, W] -> [N, W]; values stay.

    Over J * R * h columns of queries and J * h of keys, with gains of these sizes (OLMoE). Model shards, which hold a
    part of the heads each, add up their sums of squares.

    Args:
        model: its section of the configuration.
    """

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.repeat, self.size, self.eps = model.num_heads // model.kv_heads, model.size_of_head, model.norm_eps
        widths = [model.num_heads * self.size, model.kv_heads * self.size]
        self.queries, self.keys = (RMSNorm(width, model.norm_eps) for width in widths)
        self.shares = Tensor(1 / np.array([widths], np.float32))  # [1, 2]
        which = np.zeros((2, self.repeat + 2), np.float32)
        which[0, : self.repeat] = which[1, self.repeat] = 1
        self.which = Tensor(which)  # of queries, of keys
        self.is_value = Tensor(np.eye(1, self.repeat + 2, self.repeat + 1, np.float32))
        self.sum, self.rsqrt, self.product = ops.ReduceSum(), ops.Rsqrt(), ops.MatMul()
        self.which_t, self.join = Tensor(which.T.copy()), ops.Concat(1)
        self.local_squares, self.local_gains = self.squares, self.gains

    def construct(self, qkv: Tensor) -> Tensor:
        return self.work(qkv, *self.inputs(qkv))

    def inputs(self, qkv: Tensor) -> tuple:
        """Returns what `work` reads besides the projections: sums of squares and the gains of all columns."""
        return self.local_squares(qkv), self.local_gains(self.queries.gain, self.keys.gain)

    def squares(self, qkv: Tensor) -> Tensor:
        """Returns the sums of the squares of a token's queries and keys, those of one device: [N, 2]."""
        heads = qkv.astype(mstype.float32).reshape(qkv.shape[0], -1, self.repeat + 2, self.size)  # [N, J, R + 2, h]
        each = self.sum(self.sum(heads * heads, -1), 1)  # [N, R + 2]
        return self.product(each, self.which_t)

    def gains(self, query_gain: Tensor, key_gain: Tensor) -> Tensor:
        """Returns the gains of all columns, 1 for values: [W]."""
        key = key_gain.reshape(-1, 1, self.size)  # [J, 1, h]
        query = query_gain.reshape(-1, self.repeat, self.size)  # [J, R, h]
        return self.join((query, key, ops.ones_like(key))).reshape(-1)

    def work(self, qkv: Tensor, squares: Tensor, gains: Tensor) -> Tensor:
        """Does what the class says with the heads of one device; squares [N, 2 T]; reads no Parameter."""
        total = self.sum(squares.reshape(squares.shape[0], -1, 2), 1)  # [N, 2]
        scale = self.rsqrt(total * self.shares + self.eps)
        scale = self.product(scale, self.which) + self.is_value  # [N, R + 2]
        heads = qkv.astype(mstype.float32).reshape(qkv.shape[0], -1, self.repeat + 2, self.size)  # [N, J, R + 2, h]
        normed = heads * ops.expand_dims(ops.expand_dims(scale, 1), -1)
        return (normed.reshape(qkv.shape) * gains).astype(qkv.dtype)

    def shard(self, mesh: CompiledMesh) -> tuple:
        """Leaves the gains full everywhere, and returns the layouts of `inputs`."""
        tensor, full = mesh.degrees.model_parallel, mesh.layout(None)

        def squares(qkv):
            return [qkv[0], 2 * tensor]

        def float32(qkv):
            return mstype.float32

        def width(query_gain, key_gain):
            return [query_gain[0] + 2 * key_gain[0]]

        heads = mesh.layout("data", MODEL)
        self.local_squares = mesh.local(self.squares, (heads,), (heads,), squares, float32)
        self.local_gains = mesh.local(self.gains, (full, full), (full,), width, first)
        return mesh.layout("data", None), mesh.layout(MODEL)


def create_query_key_norm(model: ModelConfig, fused: frozenset[str] = NONE) -> nn.Cell | None:
    """Returns the norm that `model.qk_norm` names; None where it is null."""
    if model.qk_norm is None:
        return None
    return HeadNorm(model, fused) if model.qk_norm == "head" else FullNorm(model)
