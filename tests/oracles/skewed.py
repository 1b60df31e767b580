"""A router that can send every row to the first experts, named in configurations as `oracles.skewed.Skewed`."""

import numpy as np
from mindspore import Parameter, Tensor, ops

from switchyard.config.router_options import TopKOptions
from switchyard.moe.routing.base import RouterSetting
from switchyard.moe.routing.softmax import TopK


class SkewedOptions(TopKOptions):
    """Of `Skewed`."""

    first_bias: float = 0.0


class Skewed(TopK):
    """Top-k whose first K experts have `moe.router.first_bias` added to their score; their gates stay live.

    The bias is a weight that nobody trains, so graphs with and without it are one.
    """

    Options = SkewedOptions

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        bias = np.zeros(setting.moe.expert_num, np.float32)
        bias[: self.choices] = setting.options.first_bias
        self.bias, self.add = Parameter(Tensor(bias), "bias", False), ops.Add()

    def logits(self, tokens):
        """See LinearRouter.logits."""
        return self.add(super().logits(tokens), self.bias)

    def shard(self, mesh):
        """See LinearRouter.shard."""
        super().shard(mesh)
        self.add.shard(((mesh.degrees.data_parallel, 1), (1,)))
