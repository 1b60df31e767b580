"""Learned token choice by a softmax gate: Switch and top-k.

Legend: G groups, N rows of a group, E experts, K choices of a row, D width.
"""

from mindspore import Tensor, ops

from switchyard.routing.base import Choosing, LinearRouter, RouterSetting, register


class SoftmaxRouter(LinearRouter):
    """p = softmax(x W) (arXiv 2101.03961, eq. 1), the K most probable experts, gates made of their probabilities."""

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.softmax = ops.Softmax(-1)
        self.choose = Choosing(self.expert_num, self.choices)

    def construct(self, rows: Tensor, context: dict) -> dict:
        logits = self.score(rows, self.weight)  # [G, N, E]
        probabilities = self.softmax(logits)  # arXiv 2101.03961, eq. 1
        experts, gates, chosen = self.choose(logits, probabilities, context["valid"])
        return {
            "experts": experts,
            "gates": self.weigh(gates),
            "probabilities": probabilities,
            "logits": logits,
            "mass": probabilities,
            "chosen": chosen,
        }

    def weigh(self, gates: Tensor) -> Tensor:
        """Gates of the chosen experts' probabilities [G, N, K]."""
        return gates


@register("switch")
class Switch(SoftmaxRouter):
    """Switch Transformer (arXiv 2101.03961, section 2.1): K = 1, the gate is the probability itself (eq. 2).

    Not renormalised: a single gate divided by itself is 1, and the router would get no gradient from the task.
    """

    paper = "arXiv 2101.03961"


@register("top_k")
class TopK(SoftmaxRouter):
    """Top-k softmax gate (arXiv 1701.06538, section 2.1; Mixtral, arXiv 2401.04088, section 2.1).

    `norm_topk_prob` divides the K gates by their sum. With K = 1 it does not, for the reason that Switch gives.
    """

    paper = "arXiv 1701.06538, 2401.04088"

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.normalise = setting.moe.norm_topk_prob and self.choices > 1

    def weigh(self, gates: Tensor) -> Tensor:
        if self.normalise:
            return gates / ops.maximum(gates.sum(-1, keepdims=True), 1e-20)  # a padded row's gates are 0
        return gates
