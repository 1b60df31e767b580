"""RMSNorm of queries and keys before they rotate (Query-Key normalization, arXiv 2010.04245; OLMoE, arXiv 2409.02060).

Legend: N tokens, J key/value heads, R query heads of each, h head size, W = J * (R + 2) * h.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import ModelConfig
from switchyard.nn.fused import NONE
from switchyard.nn.norm import RMSNorm


class QueryKeyNorm(nn.Cell):
    """Normalises queries and keys within projections [N, W] -> [N, W]; values stay.

    `model.qk_norm` "head": over the h columns of each head, one gain [h] for all query heads and one for all key heads.
    "full": over all query heads together, gain [J * R * h], and over all key heads together, gain [J * h].

    Args:
        model: its section of the configuration; qk_norm is not None.
        fused: operators of the device, see nn.fused.
    """

    def __init__(self, model: ModelConfig, fused: frozenset[str] = NONE):
        super().__init__()
        self.repeat, self.size = model.num_heads // model.kv_heads, model.size_of_head
        full, one = model.qk_norm == "full", "RmsNorm" in fused
        widths = (model.num_heads * self.size, model.kv_heads * self.size) if full else (self.size, self.size)
        self.queries, self.keys = (RMSNorm(width, model.norm_eps, one) for width in widths)
        self.join = ops.Concat(1)

    def construct(self, qkv: Tensor) -> Tensor:
        return self.work(qkv, self.queries.gain, self.keys.gain)

    def work(self, qkv: Tensor, query_gain: Tensor, key_gain: Tensor) -> Tensor:
        """Does the same with the gains as arguments, on the heads of one device."""
        grouped = qkv.reshape(-1, self.repeat + 2, self.size)  # [N * J, R + 2, h]
        query, key, value = ops.split(grouped, [self.repeat, 1, 1], 1)
        query = self.normalised(self.queries, query, query_gain, qkv)
        key = self.normalised(self.keys, key, key_gain, qkv)
        return self.join((query, key, value)).reshape(qkv.shape)

    def normalised(self, norm: nn.Cell, part: Tensor, gain: Tensor, qkv: Tensor) -> Tensor:
        """Applies a norm to a part [N * J, X, h] of the projections, in rows of the width of its gain."""
        rows = part.reshape(-1, gain.shape[0]).astype(mstype.float32)
        return norm.normalise(rows, gain).astype(qkv.dtype).reshape(part.shape)
