"""Routers whose matrix is the identity, so that a row is its own logits."""

import numpy as np
from mindspore import Tensor
from oracles.tiny import tiny_config

from switchyard.moe.routing import create_router
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices


def identity_router(name: str, choices: int, experts: int, train: bool = False, **moe):
    """A router of D = E with `weight` the identity."""
    config = tiny_config(width=experts, router=name, expert_num=experts, num_experts_chosen=choices, **moe)
    cell = create_router(config, InitialWeights(0), NoiseSlices())
    cell.weight.set_data(Tensor(np.eye(experts, dtype=np.float32)))
    return cell.set_train(train)


def route(router, logits, valid=None, noise=None) -> dict[str, np.ndarray]:
    """The Routing of one group: logits [N, E], valid [N], noise [J, N, E], as arrays without the group axis."""
    logits = np.array(logits, np.float32)
    valid = np.ones(len(logits)) if valid is None else valid
    context = {"valid": Tensor(np.array([valid], np.float32))}
    if noise is not None:
        context["noise"] = Tensor(np.array(noise, np.float32))
    routing = router(Tensor(logits[None]), context)
    return {name: value.asnumpy()[0] for name, value in routing.items()}
