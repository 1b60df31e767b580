"""A pipeline's step as GPUs compile it: every micro-batch written out in the graph, no function that they share, no
operator of Ascend's own."""

from switchyard.models import decoder
from switchyard.parallel import mesh
from switchyard.parallel.worker import training_step


def step(config, vocab: int) -> tuple:
    """For switchyard.parallel.simulate: (the training step, its inputs on one device)."""
    mesh.get_context = {"device_target": "GPU"}.get
    decoder.fused_operators = lambda *_: frozenset()
    return training_step(config, vocab)
