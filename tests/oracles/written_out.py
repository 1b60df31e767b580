"""A pipeline's step as GPUs compile it: every micro-batch written out in the graph, no function that they share, no
operator of Ascend's own."""

from switchyard.distributed import mesh
from switchyard.models import decoder
from switchyard.nn.fused import of_gpu
from switchyard.simulation.compile_worker import training_step


def step(config, vocab: int) -> tuple:
    """For switchyard.simulation.compile: (the training step, its inputs on one device)."""
    return of_gpus(config, vocab, frozenset())


def fast_step(config, vocab: int) -> tuple:
    """The same of the operators that are fast on a GPU."""
    return of_gpus(config, vocab, of_gpu(config.model))


def of_gpus(config, vocab: int, fused: frozenset) -> tuple:
    """Makes the step as on GPUs, of those operators."""
    mesh.get_context = {"device_target": "GPU"}.get
    decoder.fused_operators = lambda *_: fused
    return training_step(config, vocab)
