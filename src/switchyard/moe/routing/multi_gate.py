"""One learned gate for each task.

Legend: G groups, N rows of a group, E experts, K choices of a row, D width, T tasks.
"""

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from switchyard.config.router_options import MultiGateOptions
from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.moe.routing.base import Choosing, Router, RouterSetting, by_rows, register, shares, to_float32
from switchyard.nn.masks import keep_where


@register("multi_gate")
class MultiGate(Router):
    """Multi-gate mixture of experts (MMoE, KDD 2018): g = softmax(x W_t) with the gate of the row's task.

    The paper weighs all experts: K = E here. With 1 < K < E the K most probable work, their gates divided by their sum
    where `norm_topk_prob` says so; with K = 1 never, as a gate divided by itself learns nothing (see Switch, arXiv
    2101.03961, eq. 2).
    """

    paper = "KDD 2018 (Ma et al.)"
    Options = MultiGateOptions
    needs = ("task_ids",)

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.task_num, width = setting.options.task_num, setting.width
        shape = (width, self.task_num * self.expert_num)
        self.weight = setting.random.normal(0.1 / np.sqrt(width), shape, "weight")  # [D, T * E], the gates side by side
        self.normalise = setting.options.norm_topk_prob and self.choices > 1
        self.product, self.softmax, self.one_hot = ops.MatMul(), ops.Softmax(-1), ops.OneHot()
        self.choose = Choosing(self.expert_num, self.choices)
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        self.local_own = self.own_gate

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores: those of the token's own gate [N, E]."""
        return (self.local_own(self.product(to_float32(tokens), self.weight), task_ids),)

    def own_gate(self, logits: Tensor, task_ids: Tensor) -> Tensor:
        """Takes scores of all gates [N, T * E] and task ids [N], returns those of the token's own gate [N, E]."""
        own = self.one_hot(task_ids, self.task_num, self.on, self.off)  # [N, T]
        return keep_where(logits.reshape(-1, self.task_num, self.expert_num), own).sum(1)

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards tokens, leaves the gates full everywhere."""
        tokens, experts = mesh.layout("data", None), self.expert_num
        self.product.shard((tokens, mesh.layout(None, None)), (tokens,))

        def shape(logits, task_ids):
            return [logits[0], experts]

        self.local_own = mesh.local(self.own_gate, (tokens, mesh.layout("data")), (tokens,), shape, first)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        logits = scores[0]  # [G, N, E]
        probabilities = self.softmax(logits)
        weighed = logits if self.normalise else probabilities
        experts, gates, chosen = self.choose(logits, weighed, context)
        if self.normalise:
            gates = shares(gates, context["valid"])
        return by_rows(experts, gates, chosen, probabilities, logits)
