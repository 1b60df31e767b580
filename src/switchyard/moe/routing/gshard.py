"""GShard: two experts, of which the second is sometimes left out.

Legend: G groups, N rows of a group, E experts, D width.
"""

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from switchyard.config.router_options import GShardOptions
from switchyard.moe.routing.base import RouterSetting, by_rows, register, shares
from switchyard.moe.routing.softmax import SoftmaxRouter
from switchyard.nn.masks import keep_where
from switchyard.nn.noise import UniformRows


@register("gshard")
class GShard(SoftmaxRouter):
    """Top-2 gating (GShard, arXiv 2006.16668, algorithm 1): gates g1 / (g1 + g2) and g2 / (g1 + g2).

    `second_expert` says which second choices count: `all`; `sampling`: each with the probability min(1, 2 g2), in
    training, and all at evaluation; `threshold`: those with g2 above `second_expert_threshold` (the policy of the
    same name in Mesh-TensorFlow). One that does not count is like a choice never made: expert E, gate 0, and it takes
    no slot; the first gate stays as it is.
    """

    paper = "arXiv 2006.16668"
    Options = GShardOptions

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.policy, self.threshold = setting.options.second_expert, setting.options.second_expert_threshold
        self.may_skip_tokens = self.policy == "threshold"
        self.uniform = None
        if self.policy == "sampling":
            self.uniform = UniformRows(setting.slices, setting.width, 1)
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        logits = scores[0]  # [G, N, E]
        probabilities = self.softmax(logits)
        experts, gates, chosen = self.choose(logits, logits, context)
        gates = shares(gates, context["valid"])  # [G, N, 2]
        if self.policy == "threshold":
            experts, gates, chosen = self.refuse(gates[..., 1] > self.threshold, experts, gates, chosen)
        if self.policy == "sampling" and self.training:
            drawn = self.uniform(context["noise"]).reshape(gates.shape[:2])  # [G, N]
            experts, gates, chosen = self.refuse(2.0 * gates[..., 1] > drawn, experts, gates, chosen)  # algorithm 1
        return by_rows(experts, gates, chosen, probabilities, logits)

    def refuse(self, kept: Tensor, experts: Tensor, gates: Tensor, chosen: Tensor):
        """Takes out the second choices that are not kept [G, N] (bool)."""
        second = experts[..., 1]  # [G, N]
        alone = 1.0 - kept.astype(mstype.float32)  # 1 where the second is refused
        mask = self.one_hot(second, self.expert_num, self.on, self.off)  # [G, N, E]; nothing for a padded row
        nowhere = ops.full_like(second, self.expert_num)
        experts = ops.stack((experts[..., 0], ops.where(kept, second, nowhere)), -1)
        gates = ops.stack((gates[..., 0], keep_where(gates[..., 1], kept.astype(mstype.float32))), -1)
        return experts, gates, chosen - mask * ops.expand_dims(alone, -1)
