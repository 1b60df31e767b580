"""WHAT works on more than one place at a time: convolutional experts, and experts of whole windows of tokens.

A row is then a small map [h, w, c], or a window of tokens, as one vector. It is unfolded to the places that a
feed-forward network sees, and folded again; the stacked parameters are those of `experts.FeedForwardExperts`.

Legend: E experts, S rows of an expert, X experts or blocks or groups, P = h * w places of a map, c channels in,
o channels out, D width.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.distributed.placement import axes_of
from switchyard.moe.experts import FeedForwardExperts

SIDE = 3  # of a convolution's window


def neighbours(height: int, width: int) -> np.ndarray:
    """Returns the positions under a 3 x 3 window around each position, in reading order: [P, 9] int64; P means
    outside."""
    found = np.full((height, width, SIDE * SIDE), height * width)
    rows, columns = np.mgrid[:height, :width]
    for tap in range(SIDE * SIDE):
        above, left = rows + tap // SIDE - 1, columns + tap % SIDE - 1
        inside = (above >= 0) & (above < height) & (left >= 0) & (left < width)
        found[..., tap][inside] = (above * width + left)[inside]
    return found.reshape(height * width, -1)


class Windows(nn.Cell):
    """Gathers the 3 x 3 window around each position, with zeros outside the map: [M, P, c] -> [M, P, 9 c].

    A gather of whole channel vectors, whose gradient is a gather too. Conv2D with E groups is the plain twin of a
    convolution made of it; forward and backward on two busy CPU cores, 8 experts, 64 maps each, 8 x 8 x 16 to 32:
    Conv2D with groups 2,126 ms, slices and Concat 205 ms, this 79 ms.
    """

    def __init__(self, height: int, width: int):
        super().__init__()
        self.places, self.taps = height * width, SIDE * SIDE
        near = neighbours(height, width)
        self.index = Tensor(near.reshape(-1), mstype.int32)  # [P * 9]
        mirrored = near[:, ::-1]  # place p is under tap k of the place that lies at tap 8 - k of p
        backward = np.where(mirrored == self.places, self.places * self.taps, mirrored * self.taps + np.arange(9))
        self.backward = Tensor(backward.reshape(-1), mstype.int32)  # [P * 9]
        self.take, self.join, self.sum = ops.Gather(), ops.Concat(1), ops.ReduceSum()

    def construct(self, maps: Tensor) -> Tensor:
        channels = maps.shape[2]
        framed = self.join((maps, maps[:, :1] * 0.0))  # [M, P + 1, c]
        return self.take(framed, self.index, 1).reshape(-1, self.places, self.taps * channels)

    def bprop(self, maps, out, d_out):
        channels = maps.shape[2]
        d_out = d_out.reshape(-1, self.places * self.taps, channels)  # [M, P * 9, c]
        framed = self.join((d_out, d_out[:, :1] * 0.0))
        d_taps = self.take(framed, self.backward, 1).reshape(-1, self.places, self.taps, channels)
        return (self.sum(d_taps, 2),)


class ConvolutionExperts(nn.Cell):
    """Applies E networks of a 3 x 3 and a 1 x 1 convolution with an activation between: [E, S, P * c] -> [E, S, P * o].

    One grouped convolution: all experts' windows are one matrix product over E (see Windows for why not Conv2D).

    Args:
        experts: E.
        shape: (height, width, channels) of a row's map.
        out: channels o of the result.
        hidden: channels between.
        activation, random, dtype: see FeedForwardExperts.
        scale: of the last convolution's initial weights; 1 keeps the variance.
    """

    def __init__(self, experts: int, shape: tuple, out: int, hidden: int, activation: str, random, dtype, scale=1.0):
        super().__init__()
        height, width, self.channels = shape
        self.places, self.out = height * width, out
        fan_in = SIDE * SIDE * self.channels
        std = (np.sqrt(2.0 / fan_in), scale / np.sqrt(hidden))  # He et al., arXiv 1502.01852, eq. 10
        self.windows = Windows(height, width)
        self.network = FeedForwardExperts(experts, fan_in, hidden, activation, std, random, dtype, out)

    def construct(self, rows: Tensor) -> Tensor:
        """Applies expert e to slice e of rows [E, S, P * c]."""
        return self.fold(self.network(self.unfold(rows)), rows)

    def blocks(self, rows: Tensor, block_expert: Tensor) -> Tensor:
        """Applies expert `block_expert` [X] to the rows of each block, [X, b, P * c]."""
        return self.fold(self.network.blocks(self.unfold(rows), block_expert), rows)

    def merged(self, rows: Tensor, gates: Tensor) -> Tensor:
        """Applies one network per group to rows [G, N, P * c], see FeedForwardExperts.merged."""
        return self.fold(self.network.merged(self.unfold(rows), gates), rows)

    def unfold(self, rows: Tensor) -> Tensor:
        """Unfolds rows into windows: [X, S, P * c] -> [X, S * P, 9 c]."""
        maps = rows.reshape(-1, self.places, self.channels)  # [X * S, P, c]
        return self.windows(maps).reshape(rows.shape[0], -1, SIDE * SIDE * self.channels)

    def fold(self, places: Tensor, rows: Tensor) -> Tensor:
        """Folds positions back into rows: [X, S * P, o] -> [X, S, P * o]."""
        return places.reshape(rows.shape[0], -1, self.places * self.out)


class SliceExperts(nn.Cell):
    """Applies E feed-forward networks to windows of tokens, each token by itself: [E, S, length * D] -> the same shape.

    Args:
        network: FeedForwardExperts of width D.
        length: tokens of a window.
    """

    def __init__(self, network: FeedForwardExperts, length: int):
        super().__init__()
        self.network, self.length = network, length
        self.local_unfold, self.local_fold = self.unfold, self.fold

    def construct(self, rows: Tensor) -> Tensor:
        """Applies expert e to slice e of rows [E, S, length * D]."""
        return self.local_fold(self.network(self.local_unfold(rows)))

    def blocks(self, rows: Tensor, block_expert: Tensor) -> Tensor:
        """Applies the expert of each block to rows [X, b, length * D], see FeedForwardExperts.blocks."""
        return self.network.blocks(self.unfold(rows), block_expert).reshape(rows.shape)

    def merged(self, rows: Tensor, gates: Tensor) -> Tensor:
        """Applies one network per group to rows [G, N, length * D], see FeedForwardExperts.merged."""
        return self.network.merged(self.unfold(rows), gates).reshape(rows.shape)

    def unfold(self, rows: Tensor) -> Tensor:
        """Unfolds windows into tokens: [X, S, length * D] -> [X, S * length, D]."""
        return rows.reshape(rows.shape[0], -1, rows.shape[2] // self.length)

    def fold(self, rows: Tensor) -> Tensor:
        """Folds tokens back into windows: [X, S * length, D] -> [X, S, length * D]."""
        return rows.reshape(rows.shape[0], -1, rows.shape[2] * self.length)

    def shard(self, mesh: CompiledMesh) -> None:
        """Windows are sharded as the network's rows are; a window lies within one device."""
        self.network.shard(mesh)
        experts = axes_of(self.network.w_in.name, 3)[0]
        layout, length = mesh.layout(experts, "data" if experts is None else "outer", None), self.length

        def tokens(rows):
            return [rows[0], rows[1] * length, rows[2] // length]

        def windows(rows):
            return [rows[0], rows[1] // length, rows[2] * length]

        self.local_unfold = mesh.local(self.unfold, (layout,), (layout,), tokens, first)
        self.local_fold = mesh.local(self.fold, (layout,), (layout,), windows, first)
