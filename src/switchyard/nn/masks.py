"""Hiding values behind a mask by selection: a product with 0 lets NaN and Inf through, for 0 times either is NaN.

Legend: G groups, N rows of a group.
"""

from mindspore import Tensor, ops


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


def learned(valid: Tensor, labels: Tensor) -> Tensor:
    """Returns the weights of predictions: `valid` where a label is an id, 0 where it is below 0; all of one shape."""
    return valid * (labels >= 0).astype(valid.dtype)
