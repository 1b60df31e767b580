"""Learned token choice by a softmax gate: Switch and top-k.

Legend: G groups, N rows of a group, E experts, K choices of a row, D width.
"""

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from switchyard.routing.base import Router, TopChoices, register, router_weight


class SoftmaxRouter(Router):
    """p = softmax(x W) (arXiv 2101.03961, eq. 1), the K most probable experts, gates made of their probabilities."""

    def __init__(self, moe, width: int, random: np.random.Generator):
        super().__init__(moe, width, random)
        self.weight = router_weight(width, self.expert_num, random)
        self.score = ops.MatMul()
        self.softmax = ops.Softmax(-1)
        self.top = TopChoices(self.expert_num, self.choices)
        self.sum = ops.ReduceSum()

    def construct(self, rows: Tensor, context: dict) -> dict:
        valid = ops.expand_dims(context["valid"], -1)  # [G, N, 1]
        groups, count, width = rows.shape
        logits = self.score(rows.reshape(groups * count, width).astype(mstype.float32), self.weight)  # [G * N, E]
        logits = logits.reshape(groups, count, self.expert_num)  # [G, N, E]
        probabilities = self.softmax(logits)  # arXiv 2101.03961, eq. 1
        experts, masks = self.top(logits)  # [G, N, K]
        gates, chosen = (), masks[0]
        for mask in masks:
            gates = (*gates, self.sum(probabilities * mask, -1))  # [G, N]
        for mask in masks[1:]:
            chosen = chosen + mask
        gates = self.weigh(ops.stack(gates, -1)) * valid  # [G, N, K]
        return {
            "experts": ops.where(valid > 0, experts, ops.full_like(experts, self.expert_num)),
            "gates": gates,
            "probabilities": probabilities,
            "logits": logits,
            "chosen": chosen * valid,
        }

    def weigh(self, gates: Tensor) -> Tensor:
        """Gates of the chosen experts' probabilities [G, N, K]."""
        return gates


@register("switch")
class Switch(SoftmaxRouter):
    """Switch Transformer (arXiv 2101.03961, section 2.1): K = 1, the gate is the probability itself (eq. 2).

    Not renormalised: a single gate divided by itself is 1, and the router would get no gradient from the task.
    """


@register("top_k")
class TopK(SoftmaxRouter):
    """Top-k softmax gate (arXiv 1701.06538, section 2.1; Mixtral, arXiv 2401.04088, section 2.1).

    `norm_topk_prob` divides the K gates by their sum. With K = 1 it does not, for the reason that Switch gives.
    """

    def __init__(self, moe, width: int, random: np.random.Generator):
        super().__init__(moe, width, random)
        self.normalise = moe.norm_topk_prob and self.choices > 1

    def weigh(self, gates: Tensor) -> Tensor:
        if self.normalise:
            return gates / gates.sum(-1, keepdims=True)
        return gates
