"""Sigmoid scores, balanced by a bias instead of a loss, and choice within the best groups of experts.

Legend: G groups that route for themselves, N rows of a group, E experts, K choices of a row, D width, Q groups of
experts.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from switchyard.config.router_options import BestGroupOptions, SigmoidOptions
from switchyard.moe.metrics import bias_step
from switchyard.moe.routing.base import (
    Choosing,
    LinearRouter,
    RouterSetting,
    TopChoices,
    by_rows,
    register,
    scaled,
    shares,
)
from switchyard.nn.softmax import log_sigmoid

FAR = 1e30  # taken from a score, it is never chosen


@register("sigmoid")
class Sigmoid(LinearRouter):
    """s = sigmoid(x W) (DeepSeek-V3, arXiv 2412.19437, eq. 15), gates of the K experts with the largest s + b (eq. 16).

    b is no weight: after each training step it rises by u = `topk_bias_update_rate` where an expert had less than
    the mean load and falls by u where it had more (arXiv 2408.15664, algorithm 1), so no balance loss is needed: set
    moe.aux_loss_factor to 0. Only the choice sees b, never the gate. It is a parameter without gradient, and kept in
    checkpoints. The host updates it by the load of the whole step on all devices, see `update`.

    `norm_topk_prob` divides K >= 2 gates by their sum (eq. 13), `routed_scaling_factor` multiplies them. With
    `n_group` > 1 a row chooses within `topk_group` groups only, those whose two best scores sum highest.
    """

    paper = "arXiv 2408.15664, 2412.19437"
    Options = SigmoidOptions

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        options = setting.options
        self.normalise, self.factor = options.norm_topk_prob and self.choices > 1, options.routed_scaling_factor
        self.rate = options.topk_bias_update_rate
        bias = Tensor(np.zeros(self.expert_num, np.float32))
        self.bias = Parameter(bias, name="bias", requires_grad=False)
        self.limit = BestGroups(options, self.expert_num) if options.n_group > options.topk_group else None
        self.choose = Choosing(self.expert_num, self.choices)
        self.sigmoid, self.softmax = ops.Sigmoid(), ops.Softmax(-1)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        logits = scores[0]  # [G, N, E]
        affinity = self.sigmoid(logits)  # s, eq. 15
        biased = ops.stop_gradient(affinity) + context["state"][0]  # eq. 16
        if self.limit is not None:
            biased = self.limit(biased, biased)
        logarithm = log_sigmoid(logits)
        experts, gates, chosen = self.choose(biased, logarithm if self.normalise else affinity, context)
        if self.normalise:
            gates = shares(gates, context["valid"])  # eq. 13
        probabilities = self.softmax(logarithm)  # s' = s / sum of s, eq. 19
        return by_rows(experts, scaled(gates, self.factor), chosen, probabilities, logits)

    def state(self) -> tuple:
        """See Router.state: the bias [E]."""
        return (self.bias,)

    def update(self, load: np.ndarray) -> None:
        """Moves the bias against the load [E] of a training step (arXiv 2408.15664, algorithm 1)."""
        if self.rate > 0:
            ops.assign(self.bias, Tensor(self.bias.asnumpy() + bias_step(load, self.rate)))  # see Router.update


class GroupLimit(nn.Cell):
    """Leaves a row the experts of its best groups: scores [G, N, E], of groups [G, N, Q] -> [G, N, E].

    The experts stand in Q = `n_group` groups, one beside the other; scores outside the `topk_group` best are
    moved out of reach.
    """

    def __init__(self, options: BestGroupOptions):
        super().__init__()
        self.groups = options.n_group
        self.top = TopChoices(self.groups, options.topk_group)

    def construct(self, scores: Tensor, group_scores: Tensor) -> Tensor:
        _, masks = self.top(group_scores)  # K x [G, N, Q]
        inside = masks[0]
        for mask in masks[1:]:
            inside = inside + mask
        grouped = scores.reshape(*group_scores.shape, -1)  # [G, N, Q, E / Q]
        return (grouped - (1.0 - ops.expand_dims(inside, -1)) * FAR).reshape(scores.shape)


class BestGroups(nn.Cell):
    """Node-limited routing (DeepSeek-V3, arXiv 2412.19437): what experts are ranked by, [G, N, E] -> [G, N, E].

    A group's score is the sum of its two best experts' scores [G, N, E], see GroupLimit.
    """

    def __init__(self, options: BestGroupOptions, experts: int):
        super().__init__()
        self.groups, self.size = options.n_group, experts // options.n_group
        self.best = TopChoices(self.size, min(2, self.size))
        self.limit = GroupLimit(options)

    def construct(self, scores: Tensor, ranked: Tensor) -> Tensor:
        groups, count, _ = scores.shape
        grouped = scores.reshape(groups, count * self.groups, self.size)  # [G, N * Q, E / Q]
        _, masks = self.best(grouped)
        total = (grouped * masks[0]).sum(-1)  # [G, N * Q]
        for mask in masks[1:]:
            total = total + (grouped * mask).sum(-1)
        return self.limit(ranked, total.reshape(groups, count, self.groups))
