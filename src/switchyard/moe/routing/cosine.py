"""Other scores, other softmaxes: the angle between row and expert, and prototypes.

Legend: G groups, N rows of a group, E experts, K choices of a row, D width, d width of the angle's space.
"""

import math

import numpy as np
from mindspore import Parameter, Tensor, ops

from switchyard.config.router_options import PrototypeOptions
from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.moe.routing.base import Choosing, LinearRouter, RouterSetting, TopChoices, by_rows, register
from switchyard.moe.routing.softmax import NormalisedRouter

FAR = 1e30  # taken from a score, it is never chosen
FIRST_TEMPERATURE, LOWEST_TEMPERATURE = 0.07, 0.01


@register("cosine")
class Cosine(NormalisedRouter):
    """Cosine router (X-MoE, arXiv 2204.09179, section 3.1): logits are cos(x W, e_i) / tau.

    Rows are projected to d = E / 2 dimensions, at least 2, rows and experts are divided by their lengths
    (eq. 7), and the temperature tau is learned (eq. 8), so that neither the width of the model nor the length of a row
    draws the rows together around few experts. What is learned is log(1 / tau); tau starts at 0.07 and stays above
    0.01. Gates as in top_k.
    """

    paper = "arXiv 2204.09179"

    def __init__(self, setting: RouterSetting):
        width = max(2, setting.moe.expert_num // 2)
        super().__init__(setting, width)
        self.embeddings = setting.random.normal(1.0, (width, self.expert_num), "embeddings")
        scale = np.array([math.log(1.0 / FIRST_TEMPERATURE)], np.float32)
        self.scale = Parameter(Tensor(scale), name="scale")
        self.inner = ops.MatMul()
        self.local_compare = self.compare

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores tokens [N, D] by cosines over the temperature: [N, E]."""
        return self.local_compare(self.score(tokens, self.weight), self.embeddings, self.scale)

    def compare(self, projected: Tensor, embeddings: Tensor, scale: Tensor) -> Tensor:
        """Compares tokens [N, d] with experts [d, E]: cosines of all pairs over the temperature [N, E]."""
        cosine = self.inner(directions(projected, -1), directions(embeddings, 0))
        return cosine * ops.exp(ops.minimum(scale, math.log(1.0 / LOWEST_TEMPERATURE)))

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards tokens, leaves the experts' directions and the temperature full everywhere."""
        super().shard(mesh)
        tokens, experts = mesh.layout("data", None), self.expert_num

        def shape(projected, embeddings, scale):
            return [projected[0], experts]

        inputs = (tokens, mesh.layout(None, None), mesh.layout(None))
        self.local_compare = mesh.local(self.compare, inputs, (tokens,), shape, first)


def directions(vectors: Tensor, axis: int) -> Tensor:
    """Divides vectors along an axis by their lengths; a zero stays one."""
    return vectors / ops.sqrt((vectors * vectors).sum(axis, keepdims=True) + 1e-12)


@register("prototype")
class Prototype(LinearRouter):
    """K top-1 routers over E / K experts each (M6-T, arXiv 2105.15082: expert prototyping).

    The experts stand in K groups, one beside the other. A row goes to the best of each group; its gate is the softmax
    within the group, so the gates of a row sum to at most K. Cheaper than top-k of K, which looks for one maximum after
    the other. The probabilities are those of the groups divided by K.
    """

    paper = "arXiv 2105.15082"
    Options = PrototypeOptions

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.size = self.expert_num // self.choices
        self.softmax = ops.Softmax(-1)
        self.best = TopChoices(self.size, 1)
        self.choose = Choosing(self.expert_num, self.choices)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        logits = scores[0]  # [G, N, E]
        groups, count, experts = logits.shape
        grouped = logits.reshape(groups, count * self.choices, self.size)  # [G, N * K, E / K]
        within = self.softmax(grouped).reshape(groups, count, experts)  # [G, N, E]
        _, masks = self.best(grouped)
        ranked = within - (1.0 - masks[0].reshape(groups, count, experts)) * FAR
        experts, gates, chosen = self.choose(ranked, within, context)
        probabilities = within / self.choices
        return by_rows(experts, gates, chosen, probabilities, logits)
