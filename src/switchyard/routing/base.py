"""What a router is, what it returns, and how its YAML name finds it.

Legend: G groups that route for themselves, N rows of a group, E experts, K choices of a row, D width.
"""

from typing import TypedDict

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.errors import UserError


class Routing(TypedDict):
    """What a token-choice router decided, before any capacity (a dict: compiled graphs keep its gradients).

    experts [G, N, K] int32: the choices, best first; E, which is no expert, for a padded row.
    gates [G, N, K] float32: what a choice's output is multiplied by; 0 for a padded row.
    probabilities [G, N, E] float32, logits [G, N, E] float32.
    chosen [G, N, E] float32: 1 where a real row chose an expert.
    """

    experts: Tensor
    gates: Tensor
    probabilities: Tensor
    logits: Tensor
    chosen: Tensor


class Context(TypedDict):
    """What a router may look at besides the rows. valid [G, N] float32: 1 for a real row, 0 for padding."""

    valid: Tensor


_ROUTERS: dict[str, type] = {}


def register(name: str):
    """Class decorator: makes a Router known under its YAML name."""

    def add(cls):
        cls.name = name
        _ROUTERS[name] = cls
        return cls

    return add


def known_routers() -> dict[str, type]:
    """Name -> class of every registered router."""
    return dict(sorted(_ROUTERS.items()))


def create_router(config, random: np.random.Generator) -> nn.Cell:
    """The router that `moe.router` names.

    Raises:
        UserError: no router has that name.
    """
    name = config.moe.router
    if name not in _ROUTERS:
        raise UserError(f"moe.router: {name!r}; known routers: {', '.join(known_routers())}")
    return _ROUTERS[name](config.moe, config.model.hidden_size, random)


class Router(nn.Cell):
    """Rows in, Routing out. Arithmetic is float32 whatever the model computes in (arXiv 2101.03961, section 2.4).

    A subclass states what it is in the class attributes and implements `construct(rows, context) -> Routing`.
    `batch_independent`: the same row gets the same experts and gates whatever batch it stands in.
    """

    name = ""
    learnable = True
    causal = True
    batch_independent = True

    def __init__(self, moe, width: int, random: np.random.Generator):
        super().__init__()
        self.expert_num, self.choices = moe.expert_num, moe.num_experts_chosen

    def construct(self, rows: Tensor, context: dict) -> dict:
        """Rows [G, N, D] float32 and a Context -> Routing."""
        raise NotImplementedError


def router_weight(width: int, experts: int, random: np.random.Generator) -> Parameter:
    """The gate's matrix [D, E], small so that no expert starts ahead (arXiv 2101.03961, section 2.4: scale 0.1)."""
    scale = 0.1 / np.sqrt(width)
    return Parameter(Tensor(random.normal(0.0, scale, (width, experts)).astype(np.float32)), name="weight")


class TopChoices(nn.Cell):
    """The K largest of E, best first: scores [G, N, E] -> (experts [G, N, K] int32, one-hot of each, K x [G, N, E]).

    K passes of argmax: 1.2 to 5 times faster than TopK on CPU and GPU for the small K of routing.
    """

    def __init__(self, experts: int, choices: int):
        super().__init__()
        self.experts, self.choices = experts, choices
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, scores: Tensor):
        scores = ops.stop_gradient(scores)
        experts, masks = (), ()
        for _ in range(self.choices):
            expert = self.argmax(scores)  # [G, N]
            mask = self.one_hot(expert, self.experts, self.on, self.off)  # [G, N, E]
            scores = scores - mask * 1e30
            experts, masks = (*experts, expert), (*masks, mask)
        return ops.stack(experts, -1), masks
