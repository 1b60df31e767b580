"""Finds tensors that are not finite: a checkpoint with another number in it is neither written nor read."""

from collections.abc import Mapping

import numpy as np

PIECE = 1 << 20  # elements that are looked at together: no mask of a full tensor
REMEDY = (
    "reduce schedule.learning_rate or set optimizer.clip_grad, then continue with --resume; if the weights have "
    "already diverged, use another train.name"
)


def is_finite(array: np.ndarray) -> bool:
    """Returns whether all numbers of an array are finite; whole numbers always are."""
    if array.dtype.kind not in "fc":
        return True
    flat = array.reshape(-1)
    return all(np.isfinite(flat[start : start + PIECE]).all() for start in range(0, flat.size, PIECE))


def first_not_finite(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Returns the name of the first array with a number that is not finite; None where there is none."""
    return next((name for name, array in arrays.items() if not is_finite(array)), None)
