"""Noisy top-k: learned noise on the scores, and a smooth estimate of the load.

Legend: G groups, N rows of a group, E experts, K choices of a row, D width.
"""

import math

import numpy as np
from mindspore import Parameter, Tensor, ops

from switchyard.moe.routing.base import Choosing, LinearRouter, RouterSetting, TopChoices, register
from switchyard.nn.masks import keep_where
from switchyard.nn.noise import NormalRows

FAR = 1e30  # taken from a score, it has no part in a softmax
SMALLEST_DEVIATION = 1e-4  # a divisor of the smooth load; smaller ones make steps of it


@register("noisy_top_k")
class NoisyTopK(LinearRouter):
    """Noisy top-k gating (arXiv 1701.06538), with its smooth load (appendix A).

    H = x W + StandardNormal * softplus(x W_noise), the gates are the softmax of the K largest of H alone. The noise is
    drawn anew at each training step; at evaluation H = x W, and the load is that of the choices. The paper starts W and
    W_noise at zero; here W_noise does, and W is small instead, so that an untrained router at evaluation does not send
    every row to the first expert. With K = 1 the softmax of one score would be 1 and have no gradient: the gate is
    then the expert's probability among all (as arXiv 2101.03961, eq. 2).

    `importance` is the gates alone (eq. 6), so that importance counts what the experts are weighted with.
    """

    paper = "arXiv 1701.06538"
    score_num = 2
    losses = (*LinearRouter.losses, "load")

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        shape = (setting.width, self.expert_num)
        self.noise_weight = Parameter(Tensor(np.zeros(shape, np.float32)), name="noise_weight")
        self.normal = NormalRows(setting.slices, setting.width, self.expert_num)
        self.top = TopChoices(self.expert_num, min(self.choices + 1, self.expert_num))
        self.choose = Choosing(self.expert_num, self.choices)
        self.softmax, self.softplus, self.erf = ops.Softmax(-1), ops.Softplus(), ops.Erf()

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores: x W and x W_noise, each [N, E]."""
        return self.logits(tokens), self.score(tokens, self.noise_weight)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        clean, spread = scores  # [G, N, E]
        scores, deviation = clean, clean
        if self.training:
            deviation = self.softplus(spread)  # [G, N, E]
            scores = clean + self.normal(context["noise"]).reshape(clean.shape) * deviation  # eq. 4
        experts, masks = self.top(scores)  # [G, N, K + 1]
        probabilities = self.softmax(scores)
        kept = self.kept(masks)
        first, own = self.choose.replayed(experts[..., : self.choices], context), kept
        if "replay" in context:
            own = self.choose.marks(first).sum(2)  # [G, N, E]
        sparse = probabilities
        if self.choices > 1:  # softmax of the K largest alone: eq. 3 and 5
            sparse = self.softmax(scores - (1.0 - own) * FAR)
        sparse = keep_where(sparse, own)  # [G, N, E]
        experts, gates, chosen = self.choose.weigh(first, sparse, context)
        smooth_load = chosen
        if self.training and self.choices < self.expert_num:
            smooth_load = self.chance(clean, scores, deviation, masks, kept)
        return {
            "expert_index": experts,
            "gates": gates,
            "probabilities": probabilities,
            "logits": scores,
            "importance": sparse,
            "expert_mask": chosen,
            "smooth_load": keep_where(smooth_load, context["valid"]),
        }

    def kept(self, masks: tuple) -> Tensor:
        """Returns 1 where an expert is among the K: [G, N, E]."""
        kept = masks[0]
        for mask in masks[1 : self.choices]:
            kept = kept + mask
        return kept

    def chance(self, clean: Tensor, scores: Tensor, deviation: Tensor, masks: tuple, kept: Tensor):
        """Returns P(x, i): that expert i is among the K if its own noise is drawn again (eq. 8 and 9): [G, N, E]."""
        last = (scores * masks[self.choices - 1]).sum(-1, keepdims=True)  # the K-th largest score, [G, N, 1]
        following = (scores * masks[self.choices]).sum(-1, keepdims=True)  # the one after it
        threshold = kept * following + (1.0 - kept) * last  # kth_excluding(H, K, i)
        distance = (clean - threshold) / ops.maximum(deviation, SMALLEST_DEVIATION)
        return 0.5 * (1.0 + self.erf(distance / math.sqrt(2.0)))  # the normal distribution function
