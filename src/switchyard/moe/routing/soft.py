"""Routing in which every expert has a part: the dense mixture, Soft MoE, and merged experts.

Legend: G groups, N rows of a group, E experts, S slots of an expert, D width.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config.router_options import SoftOptions
from switchyard.moe.routing.base import LinearRouter, Router, RouterSetting, register
from switchyard.nn.masks import keep_where

EXCLUDED = -1e30  # the logit of a padded row, which a softmax over rows leaves out


def everyone(probabilities: Tensor, valid: Tensor) -> Tensor:
    """Returns what is chosen where every expert works for every real row: [G, N, E] of 1 and 0."""
    return ops.zeros_like(ops.stop_gradient(probabilities)) + ops.expand_dims(valid, -1)


@register("dense")
class Dense(LinearRouter):
    """Mixes all experts (Jacobs et al., 1991; arXiv 1701.06538, eq. 1 with no gate closed): the reference.

    y = sum over all E experts of softmax(x W)_e * expert_e(x): E times the work of one expert, and what a sparse router
    saves or loses is measured against it.
    """

    paper = "Jacobs et al. 1991, arXiv 1701.06538"
    form = "dense"
    losses = ("z", "importance", "mutual_information")

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.softmax = ops.Softmax(-1)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        logits = scores[0]  # [G, N, E]
        probabilities = self.softmax(logits)
        return {
            "gates": keep_where(probabilities, context["valid"]),
            "probabilities": probabilities,
            "logits": logits,
            "importance": probabilities,
            "expert_mask": everyone(probabilities, context["valid"]),
        }


@register("merged")
class Merged(LinearRouter):
    """SMEAR (arXiv 2306.03745): one expert for a whole group, its parameters the experts' weighted mean.

    The weights are the softmax gate of the group's mean row, so the work is that of one expert plus the averaging. The
    unit is the group: with `moe.groups` = the batch each sample has a mixture of its own, as in the paper. A row's
    output depends on all rows of its group, later ones too.
    """

    paper, unit = "arXiv 2306.03745", "group"
    form = "merged"
    causal, batch_independent = False, False
    losses = ("z", "importance", "mutual_information")

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.softmax = ops.Softmax(-1)

    def construct(self, rows: Tensor, context: dict) -> dict:
        """See Router.construct."""
        valid = ops.expand_dims(context["valid"], -1)  # [G, N, 1]
        total = keep_where(rows.astype(mstype.float32), context["valid"]).sum(1, keepdims=True)  # [G, 1, D]
        mean = total / ops.maximum(valid.sum(1, keepdims=True), 1.0)
        logits = self.score(mean, self.weight)  # [G, 1, E]
        gates = self.softmax(logits)
        spread = ops.ones_like(valid)  # [G, N, 1]
        probabilities = gates * spread  # [G, N, E]
        return {
            "gates": gates.squeeze(1),  # [G, E]
            "probabilities": probabilities,
            "logits": logits * spread,
            "importance": probabilities,
            "expert_mask": everyone(probabilities, context["valid"]),
        }


@register("soft")
class Soft(Router):
    """Soft MoE (arXiv 2308.00951): a slot is a mixture of rows, a row a mixture of the slots' outputs.

    Each expert has `slots_per_expert` slots in a group. Rows and slots are l2-normalised and scaled, as there,
    so that the softmaxes do not become one-hot in wide models. A row's output depends on all rows of its group, later
    ones too. No row is dropped and no expert is idle, so there is nothing to balance.
    """

    paper = "arXiv 2308.00951"
    Options = SoftOptions
    form = "soft"
    causal, batch_independent = False, False
    losses = ("importance", "mutual_information")

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.slots, width = setting.options.slots_per_expert, setting.width
        shape = (width, self.expert_num * self.slots)
        self.weight = setting.random.normal(width**-0.5, shape, "weight")  # Phi [D, E * S]
        self.scale = Parameter(Tensor(np.ones((1,), np.float32)), name="scale")
        self.product, self.over_rows, self.over_slots = ops.MatMul(), ops.Softmax(1), ops.Softmax(-1)
        self.normalise = Normalise()

    def construct(self, rows: Tensor, context: dict) -> dict:
        """See Router.construct."""
        groups, count, width = rows.shape
        valid = ops.expand_dims(context["valid"], -1)  # [G, N, 1]
        rows = self.normalise(rows.reshape(-1, width).astype(mstype.float32), -1)  # [G * N, D]
        logits = self.product(rows, self.scale * self.normalise(self.weight, 0))  # X Phi, [G * N, E * S]
        logits = logits.reshape(groups, count, -1)  # [G, N, E * S]
        logits = keep_where(logits, valid)
        over_rows = self.over_rows(ops.where(valid > 0, logits, ops.full_like(logits, EXCLUDED)))
        dispatch = keep_where(over_rows, valid)  # a slot's weights sum to 1
        combine = keep_where(self.over_slots(logits), valid)  # a row's weights sum to 1
        shape = (groups, count, self.expert_num, self.slots)
        probabilities = self.over_slots(logits).reshape(shape).sum(-1)  # [G, N, E]
        return {
            "dispatch": dispatch.reshape(shape),
            "combine": combine.reshape(shape),
            "probabilities": probabilities,
            "logits": ops.zeros_like(probabilities),
            "importance": probabilities,
            "expert_mask": everyone(probabilities, context["valid"]),
        }


class Normalise(nn.Cell):
    """Vectors along an axis divided by their length; a vector of zeros stays zero."""

    def __init__(self):
        super().__init__()
        self.sum, self.rsqrt = ops.ReduceSum(keep_dims=True), ops.Rsqrt()

    def construct(self, vectors: Tensor, axis: int) -> Tensor:
        return vectors * self.rsqrt(self.sum(vectors * vectors, axis) + 1e-12)
