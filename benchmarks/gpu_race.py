"""train.py with one operator more: it reads the sum of figures, which leaves the graph of a step as it is otherwise.

MindSpore's GPU backend gives the AllReduce of a graph a stream of their own where there are several and each is read by
an operator, and then they race. In the graph of train.py with data slices one is not read. What is asked here is
whether that is all that keeps it right; `benchmarks/gpus.py --parts guard` starts it.
"""

import sys

import numpy as np
from mindspore import Tensor, nn, ops

from switchyard.cli import run
from switchyard.commands import train_main
from switchyard.distributed.mesh import Mesh
from switchyard.training import parallel_step


class ReadSum(nn.Cell):
    """A sum over the devices, and an addition of next to nothing behind it.

    Args:
        total: ReduceSum, cut.
        width: of what it gives.
    """

    def __init__(self, total, width: int):
        super().__init__()
        self.total, self.add = total, ops.Add().shard(((1,), (1,)))
        self.next_to_nothing = Tensor(np.full(width, 1e-30, np.float32))

    def construct(self, rows: Tensor, axis: int) -> Tensor:
        return self.add(self.total(rows, axis), self.next_to_nothing)


class FiguresAreRead(parallel_step.ParallelLoss):
    """ParallelLoss whose sum of figures is read."""

    def shard(self, mesh: Mesh) -> None:
        super().shard(mesh)
        self.total = ReadSum(self.total, self.width)


def main(arguments: list[str]) -> None:
    """As train.py."""
    parallel_step.ParallelLoss = FiguresAreRead
    train_main(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
