"""Computes the global norm of gradients, also where every device holds a shard of them."""

import mindspore as ms
from mindspore import Tensor, nn, ops

from switchyard.distributed.placement import ParallelDims, optimizer_shards, placement


class GlobalNorm(nn.Cell):
    """Computes the root of the sum of squares over all gradients: tuple of float32 tensors -> [] float32.

    It is not finite when any gradient is not. On a GPU a product of each row with itself sums its squares, in three
    quarters of the time; on CPU it does so for a vector, which is one operator in place of three.
    """

    def __init__(self):
        super().__init__()
        self.sum, self.sqrt, self.add = ops.ReduceSum(), ops.Sqrt(), ops.AddN()
        self.axes = {"GPU": (2, 3, 4, 5), "CPU": (1,)}.get(ms.get_context("device_target"), ())  # of what is multiplied
        self.dot = ops.BatchMatMul(transpose_b=True)

    def construct(self, gradients: tuple) -> Tensor:
        sums = ()
        for gradient in gradients:
            sums = (*sums, self.sum_of_squares(gradient))
        return self.sqrt(self.add(sums))

    def sum_of_squares(self, gradient: Tensor) -> Tensor:
        """[..., n] -> []; one axis at a time: far quicker on CPU than two."""
        axes, length = len(gradient.shape), gradient.shape[-1]
        if axes in self.axes:
            rows = gradient.reshape(-1, 1, length)  # [rows, 1, n]
            products = self.dot(rows, rows)  # [rows, 1, 1]
            return products.reshape(()) if axes == 1 else self.sum(products)
        rows = gradient.reshape(-1, length)  # [rows, n]
        return self.sum(self.sum(rows * rows, -1))  # Square takes half as long again


class ShardedNorm(nn.Cell):
    """Computes the global norm of gradients of which every device holds a shard: one AllReduce of a scalar.

    Args:
        parameters: those that the gradients are of.
        degrees: how they are sharded; a shard that several devices hold counts once.
    """

    def __init__(self, parameters, degrees: ParallelDims):
        super().__init__()
        self.shares = tuple(share_of(p.name, p.shape, degrees) for p in parameters)
        self.square, self.sum, self.sqrt, self.over_devices = ops.Square(), ops.ReduceSum(), ops.Sqrt(), ops.AllReduce()

    def construct(self, gradients: tuple) -> Tensor:
        total = 0.0
        for index, gradient in enumerate(gradients):
            total = total + self.sum(self.square(gradient)) * self.shares[index]
        return self.sqrt(self.over_devices(total))


def share_of(name: str, shape: tuple[int, ...], degrees: ParallelDims) -> float:
    """Returns one by the devices of a stage that hold the same shard of a parameter's gradient."""
    axes = placement(name, shape, degrees)
    return optimizer_shards(shape, axes, degrees) / len(degrees.replicas(axes, 0))
