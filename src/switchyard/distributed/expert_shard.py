"""Lets the processes of a job share the experts of a graph that generates: each computes those that it holds.

All processes read the same rows. A process computes what its own experts make of them, and a sum over all processes
(AllReduce) gives each the full result. So shapes may change from call to call, and a batch needs no even division.
"""

from collections.abc import Iterable

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from switchyard.distributed.placement import placement, shard_slices
from switchyard.distributed.processes import Processes


class ExpertShard(nn.Cell):
    """Tells which choices are of this process's experts, and sums what the processes have computed.

    Args:
        experts: E of all processes together.
        processes: which share the experts evenly; nothing else is sharded.
    """

    def __init__(self, experts: int, processes: Processes):
        super().__init__()
        self.count = experts // processes.size
        self.first = processes.rank * self.count
        self.sum = ops.AllReduce()

    def own(self, experts: Tensor) -> Tensor:
        """Numbers experts [C] int32 from this process's first one: [C], `count` where it holds no such expert."""
        own = experts - self.first
        here = ops.logical_and(own >= 0, own < self.count)
        return ops.select(here, own, ops.zeros_like(own) + self.count)

    def total(self, rows: Tensor) -> Tensor:
        """Sums rows over the processes: the same shape."""
        return self.sum(rows)


def keep_shards(parameters: Iterable[Parameter], processes: Processes) -> None:
    """Leaves parameters, before they are compiled, the shards of this process.

    Raises:
        UserError: an axis that the degrees do not divide.
    """
    degrees, rank = processes.degrees, processes.rank
    for parameter in parameters:
        shape = tuple(parameter.shape)
        box = shard_slices(shape, placement(parameter.name, shape, degrees), degrees, rank)
        if parameter.has_init:  # its numbers were not drawn
            parameter.set_data(Tensor(parameter.initial.draw(box)), slice_shape=True)
        elif any(part.stop - part.start != size for part, size in zip(box, shape)):
            parameter.set_data(Tensor(np.ascontiguousarray(parameter.asnumpy()[box])), slice_shape=True)
