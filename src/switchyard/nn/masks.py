"""Hiding values behind a mask by selection: a product with 0 lets NaN and Inf through, for 0 times either is NaN.

Legend: G groups, N rows of a group.
"""

from mindspore import Tensor, nn, ops

from switchyard.distributed.mesh import CompiledMesh


def keep_where(values: Tensor, mask: Tensor) -> Tensor:
    """Keeps values where the mask is above 0, else 0: [G, N, ...] and a mask of its first axes, or of all.

    The gradient is selected, too. It stops a NaN behind the mask only where what made the value is finite: hide the
    inputs as well.
    """
    for _ in range(len(values.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, -1)
    # ops.zeros_like would be a constant as large as the values, and a scalar does not compile in a pipeline on GPU
    zeros = ops.broadcast_to(ops.zeros((1,) * len(values.shape), values.dtype), values.shape)
    return ops.where(mask > 0, values, zeros)


class Selection(nn.Cell):
    """Keeps values where a mask is above 0, else 0, by one operator: values and mask are broadcast to a shape.

    The plain twin is `keep_where`, which also has a gradient; this one is for cells with a gradient of their own.
    """

    def __init__(self):
        super().__init__()
        # operators alone, and no branch: both fail in a compiled `bprop`
        self.select, self.zeros, self.ones = ops.Select(), ops.Zeros(), ops.Ones()
        self.selected = self.broadcast

    def construct(self, values: Tensor, mask: Tensor, shape: tuple) -> Tensor:
        """Values and mask of the axes of `shape`, which is that of the result."""
        return self.selected(values, mask, shape)

    def broadcast(self, values: Tensor, mask: Tensor, shape: tuple) -> Tensor:
        """Leaves it to the operator to broadcast."""
        return self.select(mask > 0, values, self.zeros((1,) * len(shape), values.dtype))

    def of_one_shape(self, values: Tensor, mask: Tensor, shape: tuple) -> Tensor:
        """Broadcasts by a product with ones."""
        values, mask = values * self.ones(shape, values.dtype), mask * self.ones(shape, mask.dtype)
        return self.select(mask > 0, values, self.zeros(shape, values.dtype))

    def shard(self, mesh: CompiledMesh) -> None:
        """Broadcasts before the operator where a compiler sees it, whose Select takes tensors of one shape alone."""
        if mesh.alone:
            self.selected = self.of_one_shape


class Hide(nn.Cell):
    """`keep_where` of rows with a gradient of its own, which is one operator: values [F, D], mask [F] -> [F, D]."""

    def __init__(self):
        super().__init__()
        self.select = Selection()

    def construct(self, values: Tensor, mask: Tensor) -> Tensor:
        """Keeps the rows whose mask is above 0."""
        return self.select(values, mask.reshape(-1, 1), values.shape)

    def bprop(self, values, mask, out, d_out):
        return self.select(d_out, mask.reshape(-1, 1), d_out.shape), ops.zeros_like(mask)


def learned(valid: Tensor, labels: Tensor) -> Tensor:
    """Returns the weights of predictions: `valid` where a label is an id, 0 where it is below 0; all of one shape."""
    return valid * (labels >= 0).astype(valid.dtype)
