"""Hiding values behind a mask by selection: a product with 0 lets NaN and Inf through, for 0 times either is NaN.

Legend: G groups, N rows of a group.
"""

from mindspore import Tensor, nn, ops


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


class Hide(nn.Cell):
    """`keep_where` of rows with a gradient of its own, which is one operator: values [F, D], mask [F] -> [F, D]."""

    def __init__(self):
        super().__init__()
        self.select, self.zeros = ops.Select(), ops.Zeros()  # functions fail in a compiled `bprop`

    def construct(self, values: Tensor, mask: Tensor) -> Tensor:
        """Keeps the rows whose mask is above 0."""
        return self.select(mask.reshape(-1, 1) > 0, values, self.zeros((1, 1), values.dtype))

    def bprop(self, values, mask, out, d_out):
        d_values = self.select(mask.reshape(-1, 1) > 0, d_out, self.zeros((1, 1), d_out.dtype))
        return d_values, ops.zeros_like(mask)


def learned(valid: Tensor, labels: Tensor) -> Tensor:
    """Returns the weights of predictions: `valid` where a label is an id, 0 where it is below 0; all of one shape."""
    return valid * (labels >= 0).astype(valid.dtype)
