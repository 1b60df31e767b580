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
from switchyard.distributed.mesh import LocalMesh
from switchyard.training import step
from switchyard.training.loss import STATISTICS, TrainLoss


class ReadSum(nn.Cell):
    """A sum over the devices, and an addition of next to nothing behind it.

    Args:
        total: the cell that sums over the devices.
        width: of what it gives.
    """

    def __init__(self, total, width: int):
        super().__init__()
        self.total, self.add = total, ops.Add().shard(((1,), (1,)))
        self.next_to_nothing = Tensor(np.full(width, 1e-30, np.float32))

    def construct(self, rows: Tensor) -> Tensor:
        return self.add(self.total(rows), self.next_to_nothing)


class FiguresAreRead(TrainLoss):
    """TrainLoss whose sum of figures is read."""

    def shard(self, mesh: LocalMesh) -> None:
        super().shard(mesh)
        self.total = ReadSum(self.total, STATISTICS + self.layers * self.columns)


def main(arguments: list[str]) -> None:
    """As train.py."""
    step.TrainLoss = FiguresAreRead
    train_main(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
