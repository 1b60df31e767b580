"""Randomness is an input: the host draws it by (seed, step), so that a resumed run repeats it on any device."""

import math

import numpy as np
from mindspore import Tensor, nn, ops


class NoiseSlices:
    """Hands out the slices of the noise tensor while a model is built; `count` is how many one training pass reads."""

    def __init__(self):
        self.count = 0

    def take(self, used: bool) -> int:
        """Returns the index of a slice of one's own, or 0 for a reader that will not read."""
        if not used:
            return 0
        self.count += 1
        return self.count - 1


class NoiseSlice(nn.Cell):
    """Takes one slice of the noise for a reader: [J, N, D] -> [N, D].

    By a gather: an index of the first axis alone takes 16 times as long on CPU.

    Args:
        slices: of the model that is built.
        used: whether the reader will read.
    """

    def __init__(self, slices: NoiseSlices, used: bool = True):
        super().__init__()
        self.index = Tensor(np.array(slices.take(used), np.int32))
        self.take = ops.Gather()

    def construct(self, noise: Tensor) -> Tensor:
        return self.take(noise, self.index, 0)


class UniformRows(nn.Cell):
    """Takes some columns of U(0, 1) a row for a reader of noise: [J, N, D] -> [N, columns].

    Args:
        slices: as many are taken as the columns need.
        width: D of the noise.
        columns: how many a row gets.
    """

    def __init__(self, slices: NoiseSlices, width: int, columns: int):
        super().__init__()
        self.columns = columns
        self.slices = nn.CellList([NoiseSlice(slices) for _ in range(-(-columns // width))])

    def construct(self, noise: Tensor) -> Tensor:
        parts = ()
        for part in self.slices:
            parts = (*parts, part(noise))  # [N, D]
        rows = parts[0] if len(parts) == 1 else ops.concat(parts, 1)
        return rows[:, : self.columns]


class NormalRows(nn.Cell):
    """Makes standard normals of uniforms by the Box-Muller transform: noise [J, N, D] -> [N, columns]."""

    def __init__(self, slices: NoiseSlices, width: int, columns: int):
        super().__init__()
        self.columns, self.half = columns, -(-columns // 2)
        self.uniform = UniformRows(slices, width, 2 * self.half)

    def construct(self, noise: Tensor) -> Tensor:
        uniform = self.uniform(noise)  # [N, 2 * half]
        radius = ops.sqrt(-2.0 * ops.log(1.0 - uniform[:, : self.half]))  # U is below 1, so the logarithm is finite
        angle = 2.0 * math.pi * uniform[:, self.half :]
        return ops.concat((radius * ops.cos(angle), radius * ops.sin(angle)), 1)[:, : self.columns]
