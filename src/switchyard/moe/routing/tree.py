"""Two levels: first a group of experts, then an expert within it.

Legend: G groups that route for themselves, N rows of a group, E experts, K choices of a row, D width, Q groups of
experts.
"""

from mindspore import Tensor, ops

from switchyard.config.router_options import TwoLevelOptions
from switchyard.moe.routing.base import Choosing, LinearRouter, RouterSetting, by_rows, register, router_weight, shares
from switchyard.moe.routing.losses import log_partition
from switchyard.moe.routing.sigmoid import GroupLimit


@register("two_level")
class TwoLevel(LinearRouter):
    """Hierarchical mixture of experts (arXiv 1701.06538, appendix B): expert j of group i has p_i p_(j|i).

    Eq. 12 is the product. A primary gate is a softmax over the Q = `n_group` groups, a secondary one over the
    experts of each group, which stand one beside the other. A row goes to the K experts of the largest product within
    its `topk_group` most probable groups; with one group and K = 1 to the best expert of the best group.
    `norm_topk_prob` divides K >= 2 gates by their sum. The logits are the sum of both levels'.
    """

    paper = "arXiv 1701.06538, appendix B"
    Options = TwoLevelOptions
    score_num = 2

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        options = setting.options
        self.groups, self.size = options.n_group, self.expert_num // options.n_group
        self.group_weight = router_weight(setting.width, self.groups, setting.random, "group_weight")
        self.normalise = options.norm_topk_prob and self.choices > 1
        self.softmax = ops.Softmax(-1)
        self.limit = GroupLimit(options)
        self.choose = Choosing(self.expert_num, self.choices)

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores: of the groups of experts [N, Q], of the experts [N, E]."""
        return self.score(tokens, self.group_weight), self.logits(tokens)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        primary, secondary = scores  # [G, N, Q], [G, N, E]
        group_probabilities = self.softmax(primary)
        grouped = secondary.reshape(*primary.shape, self.size)  # [G, N, Q, E / Q]
        joint = ops.expand_dims(group_probabilities, -1) * self.softmax(grouped)  # eq. 12
        joint = joint.reshape(secondary.shape)  # [G, N, E]
        logarithm = ops.expand_dims(primary - log_partition(grouped), -1) + grouped  # of the product, less a constant
        logarithm = logarithm.reshape(secondary.shape)
        weighed = logarithm if self.normalise else joint
        experts, gates, chosen = self.choose(self.limit(logarithm, primary), weighed, context)
        if self.normalise:
            gates = shares(gates, context["valid"])
        return by_rows(experts, gates, chosen, joint, (ops.expand_dims(primary, -1) + grouped).reshape(secondary.shape))
