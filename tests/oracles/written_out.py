"""A pipeline's step as GPUs compile it: every micro-batch written out in the graph, no function that they share, no
operator of Ascend's own."""

from switchyard.distributed import mesh
from switchyard.models import decoder
from switchyard.simulation.compile_worker import training_step


def step(config, vocab: int) -> tuple:
    """For switchyard.simulation.compile: (the training step, its inputs on one device)."""
    mesh.get_context = {"device_target": "GPU"}.get
    decoder.fused_operators = lambda *_: frozenset()
    return training_step(config, vocab)
