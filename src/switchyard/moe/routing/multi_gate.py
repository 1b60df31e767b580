"""One learned gate for each task.

Legend: G groups, N rows of a group, E experts, K choices of a row, D width, T tasks.
"""

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from switchyard.moe.routing.base import Choosing, Router, RouterSetting, by_rows, register, shares
from switchyard.nn.masks import keep_where


@register("multi_gate")
class MultiGate(Router):
    """Multi-gate mixture of experts (MMoE, KDD 2018): g = softmax(x W_t) with the gate of the row's task.

    The paper weighs all experts: K = E here. With 1 < K < E the K most probable work, their gates divided by their sum
    where `norm_topk_prob` says so; with K = 1 never, as a gate divided by itself learns nothing (see Switch, arXiv
    2101.03961, eq. 2).
    """

    paper = "KDD 2018 (Ma et al.)"
    needs = ("task_ids",)

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.task_num, width = setting.moe.task_num, setting.width
        shape = (width, self.task_num * self.expert_num)
        self.weight = setting.random.normal(0.1 / np.sqrt(width), shape, "weight")  # [D, T * E], the gates side by side
        self.normalise = setting.moe.norm_topk_prob and self.choices > 1
        self.product, self.softmax, self.one_hot = ops.MatMul(), ops.Softmax(-1), ops.OneHot()
        self.choose = Choosing(self.expert_num, self.choices)
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, rows: Tensor, context: dict) -> dict:
        """See Router.construct."""
        groups, count, width = rows.shape
        logits = self.product(rows.reshape(groups * count, width).astype(mstype.float32), self.weight)  # [G * N, T * E]
        logits = logits.reshape(groups, count, self.task_num, self.expert_num)  # [G, N, T, E]
        own = self.one_hot(context["task_ids"], self.task_num, self.on, self.off)  # [G, N, T]
        logits = keep_where(logits, own).sum(2)  # [G, N, E], those of the row's own gate
        probabilities = self.softmax(logits)
        weighed = logits if self.normalise else probabilities
        experts, gates, chosen = self.choose(logits, weighed, context)
        if self.normalise:
            gates = shares(gates, context["valid"])
        return by_rows(experts, gates, chosen, probabilities, logits)
