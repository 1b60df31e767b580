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
    return ops.where(mask > 0, values, 0.0)  # zeros of the values' shape would be a constant of the compiled graph
