"""Learned token choice by a softmax gate: Switch and top-k.

Legend: G groups, N rows of a group, E experts, K choices of a row, D width.
"""

from mindspore import Tensor, ops

from switchyard.config.router_options import GroupedTopKOptions, Scaled, SwitchOptions, TopKOptions
from switchyard.moe.routing.base import Choosing, LinearRouter, RouterSetting, by_rows, register, scaled, shares
from switchyard.moe.routing.sigmoid import BestGroups


class SoftmaxRouter(LinearRouter):
    """p = softmax(x W) (arXiv 2101.03961, eq. 1), the K most probable experts, gates made of their probabilities."""

    Options = Scaled

    def __init__(self, setting: RouterSetting, columns: int | None = None):
        super().__init__(setting, columns)
        self.factor = getattr(setting.options, "routed_scaling_factor", 1.0)  # gshard has none
        self.softmax = ops.Softmax(-1)
        self.choose = Choosing(self.expert_num, self.choices)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        logits = scores[0]  # [G, N, E]
        probabilities = self.softmax(logits)  # arXiv 2101.03961, eq. 1
        ranked = self.rank(logits, context["valid"])
        experts, gates, chosen = self.chosen(ranked, logits, probabilities, context)
        return by_rows(experts, scaled(self.weigh(gates), self.factor), chosen, probabilities, logits)

    def rank(self, logits: Tensor, valid: Tensor) -> Tensor:
        """Returns what the choice goes by: logits [G, N, E] and valid [G, N] -> [G, N, E]."""
        return logits

    def chosen(self, scores: Tensor, logits: Tensor, probabilities: Tensor, context: dict):
        """Returns what Choosing returns for scores [G, N, E]; the gates are the chosen experts' probabilities."""
        return self.choose(scores, probabilities, context)

    def weigh(self, gates: Tensor) -> Tensor:
        """Returns what becomes of the gates [G, N, K]."""
        return gates


@register("switch")
class Switch(SoftmaxRouter):
    """Switch Transformer (arXiv 2101.03961, section 2.1): K = 1, the gate is the probability itself (eq. 2).

    Not renormalised: a single gate divided by itself is 1, and the router would get no gradient from the task.
    """

    paper = "arXiv 2101.03961"
    Options = SwitchOptions


class NormalisedRouter(SoftmaxRouter):
    """`norm_topk_prob` divides K >= 2 gates by their sum; one alone it does not, for the reason that Switch gives."""

    Options = TopKOptions

    def __init__(self, setting: RouterSetting, columns: int | None = None):
        super().__init__(setting, columns)
        self.normalise = setting.options.norm_topk_prob and self.choices > 1

    def chosen(self, scores: Tensor, logits: Tensor, probabilities: Tensor, context: dict):
        """Returns what SoftmaxRouter does, with gates that sum to 1, or as they are."""
        if not self.normalise:
            return self.choose(scores, probabilities, context)
        experts, gates, chosen = self.choose(scores, logits, context)
        return experts, shares(gates, context["valid"]), chosen


@register("top_k")
class TopK(NormalisedRouter):
    """Top-k softmax gate (arXiv 1701.06538; Mixtral, arXiv 2401.04088).

    With `n_group` > 1 a row chooses within `topk_group` groups of experts only, those whose two most probable experts
    have the largest sum (arXiv 2412.19437, section 2.1.2, there with sigmoid scores).
    """

    paper = "arXiv 1701.06538, 2401.04088"
    Options = GroupedTopKOptions

    def __init__(self, setting: RouterSetting, columns: int | None = None):
        super().__init__(setting, columns)
        options = setting.options  # those of a router of one's own need no groups
        limited = getattr(options, "n_group", 1) > getattr(options, "topk_group", 1)
        self.limit = BestGroups(options, self.expert_num) if limited else None

    def rank(self, logits: Tensor, valid: Tensor) -> Tensor:
        """See SoftmaxRouter.rank."""
        if self.limit is None:
            return logits
        return self.limit(ops.stop_gradient(self.softmax(logits)), logits)
