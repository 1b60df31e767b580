"""Says when routers decide and when they learn: random choices in the first steps, no updates from some step on.

Both are pure functions of the step's number, so a resumed run goes on as the uninterrupted one would have.

Legend: A micro-batches, M conditional layers, G groups that route for themselves, N rows of a micro-batch, K choices of
a row, E experts.
"""

import numpy as np

from switchyard.config import Config
from switchyard.moe.routing.replay import Replayer

WARM_UP_STREAM = 0x7761_726D  # sets these draws apart from other draws of the same seed


class WarmUp:
    """Gives even random choices for the first `moe.router_warmup_steps` steps, as Replayer gives recorded ones.

    In each group and layer the rows, in random order, take the experts in turn: every expert gets as many choices as
    any other (one more at most) and a row K different ones. The gates stay the router's own probabilities, so its
    weights learn from the task and from all losses meanwhile; they only do not choose.
    """

    def __init__(self, config: Config):
        moe, train = config.moe, config.train
        self.steps, self.seed, self.micro_batches = moe.router_warmup_steps, train.seed, config.micro_batches
        self.layers, self.groups, self.rows = len(config.moe_layers), config.groups, config.rows
        self.replicas, self.each, self.size = moe.copies, moe.num_experts_chosen, moe.expert_num // moe.copies

    def at(self, step: int, tokens: np.ndarray) -> np.ndarray | None:
        """Draws the choices of a step, counted from 0: [A, M, N, K] int32; None once the warm-up is over.

        No token is read."""
        if step >= self.steps:
            return None
        rng = np.random.default_rng((WARM_UP_STREAM, self.seed, step))
        shape = (self.micro_batches, self.layers, self.groups, self.rows // self.groups)
        choices = []  # of each group of replicas
        for replica in range(self.replicas):
            order = np.broadcast_to(np.arange(shape[-1]), shape)
            order = rng.permuted(order, axis=-1)[..., None]  # [A, M, G, N / G, 1]
            first = rng.integers(self.size, size=(*shape[:3], 1, 1))  # nobody is always the one with one more
            choices.append((first + order * self.each + np.arange(self.each)) % self.size + replica * self.size)
        experts = np.concatenate(choices, -1).astype(np.int32)  # [A, M, G, N / G, K]
        return experts.reshape(self.micro_batches, self.layers, self.rows, -1)


def forced_choices(config: Config) -> Replayer | WarmUp | None:
    """Returns the source of the choices that replace those of the routers: a record, the warm-up, or None.

    Raises:
        UserError: see Replayer.
    """
    if config.moe.replay:
        return Replayer(config.moe.replay, config, "training")
    if config.moe.router_warmup_steps and config.moe_layers:
        return WarmUp(config)
    return None


def routers_learn(config: Config, step: int) -> bool:
    """Returns whether step `step`, from 0, updates the parameters of the routers."""
    frozen_from = config.moe.router_freeze_step
    return frozen_from is None or step < frozen_from
