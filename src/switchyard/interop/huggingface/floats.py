"""Converts the floating-point types of safetensors files; NumPy has no bfloat16, whose bits stand in uint16."""

import numpy as np

from switchyard.errors import UserError

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of a file -> the word in config.json


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Returns numbers of a file as float32, which holds each exactly.

    Args:
        array: as `checkpoint.tensors` reads it: bits in uint16 where the type is BF16.
        dtype: a key of FLOATS.
    """
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def from_float32(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Returns finite float32 numbers in a type of a file, rounded to the nearest, to even where two are as near.

    Args:
        array: float32, contiguous.
        dtype: a key of FLOATS.
        name: of the tensor, for the message.

    Returns:
        float32 or float16; the bits in uint16 where the type is BF16.

    Raises:
        UserError: a number that the type cannot hold.
    """
    if dtype == "F32":
        return array
    if dtype == "BF16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        found = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
        fits = (found & 0x7F80) != 0x7F80
    else:
        with np.errstate(over="ignore"):
            found = array.astype(np.float16)
        fits = np.isfinite(found)
    if not fits.all():
        raise UserError(f"'{name}': holds numbers that {FLOATS[dtype]} cannot; use --dtype float32")
    return found
