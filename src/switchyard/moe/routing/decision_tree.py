"""A binary tree of logistic decisions whose leaves are the experts.

Legend: G groups, N rows of a group, E experts, D width. Node n has the children 2n + 1 (left) and 2n + 2 (right); node
E - 1 + e is the leaf of expert e, so the first decision is the highest bit of the expert's number.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config.router_options import OneCell
from switchyard.moe.routing.base import Router, RouterSetting, register
from switchyard.moe.routing.fixed import Assign
from switchyard.moe.routing.soft import everyone
from switchyard.nn.masks import keep_where


def decisions(experts: int) -> int:
    """Nodes on the way from the root to a leaf: log2 E, of the E - 1 in the tree."""
    return experts.bit_length() - 1


class Descent(nn.Cell):
    """Follows one path down the tree: rows [n, D], weight [E - 1, D], bias [E - 1] -> experts [n] int32.

    Only the nodes on a row's own way are computed: log2 E products of gathered weights, not E - 1.
    """

    def __init__(self, experts: int):
        super().__init__()
        self.experts, self.depth = experts, decisions(experts)
        self.take = ops.Gather()

    def construct(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        node = ops.zeros((rows.shape[0],), mstype.int32)
        for _ in range(self.depth):
            logit = (self.take(weight, node, 0) * rows).sum(-1) + self.take(bias, node, 0)  # [n]
            node = 2 * node + 1 + (logit > 0).astype(mstype.int32)
        return node - (self.experts - 1)


@register("tree")
class DecisionTree(Router):
    """A tree of logistic nodes (hierarchical mixture, Jordan and Jacobs, 1994; fast feedforward, arXiv 2308.14711).

    In training soft: a leaf's probability is the product of the decisions on its way, and every expert works, weighted
    by it (arXiv 2308.14711, training). At evaluation each node sends the row one way, and the one
    expert at the end works with gate 1: log2 E decisions a row (the same, inference).
    """

    paper = "Jordan and Jacobs 1994, arXiv 2308.14711"
    Options = OneCell
    form, eval_form = "dense", "token_choice"
    losses = ("importance", "mutual_information")

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        nodes = max(self.expert_num - 1, 1)
        self.weight = setting.random.normal(setting.width**-0.5, (nodes, setting.width), "weight")  # [E - 1, D]
        self.bias = Parameter(Tensor(np.zeros((nodes,), np.float32)), name="bias")
        self.depth = decisions(self.expert_num)
        self.product, self.sigmoid = ops.MatMul(transpose_b=True), ops.Sigmoid()
        self.descent, self.assign = Descent(self.expert_num), Assign(self.expert_num, 1)

    def construct(self, rows: Tensor, context: dict) -> dict:
        """See Router.construct."""
        groups, count, width = rows.shape
        flat = rows.reshape(-1, width).astype(mstype.float32)  # [G * N, D]
        if not self.training:
            experts = ops.stop_gradient(self.descent(flat, self.weight, self.bias))  # [G * N]
            return self.assign(experts.reshape(groups, count, 1), context["valid"])
        right = self.sigmoid(self.product(flat, self.weight) + self.bias)  # [G * N, E - 1]
        leaves = ops.ones((groups * count, 1), mstype.float32)  # the root
        for level in range(self.depth):
            turn = right[:, 2**level - 1 : 2 ** (level + 1) - 1]  # [G * N, 2^level]
            leaves = ops.stack((leaves * (1.0 - turn), leaves * turn), -1)  # [G * N, 2^level, 2]
            leaves = leaves.reshape(groups * count, -1)  # [G * N, 2^(level + 1)]
        probabilities = leaves.reshape(groups, count, self.expert_num)  # [G, N, E]
        return {
            "gates": keep_where(probabilities, context["valid"]),
            "probabilities": probabilities,
            "logits": ops.zeros_like(probabilities),
            "importance": probabilities,
            "expert_mask": everyone(probabilities, context["valid"]),
        }
