"""A pipeline's step as GPUs compile it: every micro-batch written out in the graph, no function that they share."""

from switchyard.parallel import mesh
from switchyard.parallel.worker import training_step


def step(config, vocab: int) -> tuple:
    """For switchyard.parallel.simulate: (the training step, its inputs on one device)."""
    mesh.get_context = {"device_target": "GPU"}.get
    return training_step(config, vocab)
