"""Images for an exported classifier: read from files whose layout and value range are declared, never guessed.

    .npy    [H, W] for a model of one channel, [C, H, W] or [N, C, H, W]: channels before height and width
            unsigned bytes are 0 to 255; floats are 0 to 1; anything else, or another range, needs a declared range
    other   a picture that matplotlib reads: grey for one channel, colour for three, opaque

Values are mapped so that the lower end of the range becomes 0 and the upper end 1, each image by itself.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from switchyard.errors import UserError
from switchyard.files import UnfitError, open_regular
from switchyard.optional import require

Range = tuple[float, float]
OPTION = "--value-range"
RANGES = {"uint8": (0.0, 255.0), "float": (0.0, 1.0)}  # what types of values declare


def parse_range(text: str) -> Range:
    """Parses LOW,HIGH as two numbers (UserError)."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = np.nan
    if not (np.isfinite((low, high)).all() and low < high):
        raise UserError(f"{OPTION}: {text!r}; two finite numbers, the smaller first, such as 0,255")
    return low, high


@dataclass(frozen=True)
class ImageFile:
    """Holds the content of a file: an array as it was saved, or a picture as [C, H, W] (`is_picture`)."""

    path: str
    values: np.ndarray
    is_picture: bool = False

    def images(
        self, shape: tuple[int, int, int], declared: Range | None = None, ranges: Mapping[str, Range] = RANGES
    ) -> np.ndarray:
        """Returns the images in the form of the model: [N, C, H, W] float32 from 0 to 1.

        Args:
            shape: [C, H, W] of an image of the model.
            declared: the values that mean 0 and 1; None = what the type of the values declares.
            ranges: what types declare, as the manifest of the model has it.

        Raises:
            UserError: another shape, a type that declares no range, a value that is not finite or outside the range;
                names the image, counted from 0.
        """
        values = self._one_channel() if self.is_picture and shape[0] == 1 else self.values
        if values.dtype.kind not in "uif":
            raise UserError(f"--image: '{self.path}'; holds values of type {values.dtype}; wants bytes or floats")
        images = _as_images(self.path, values, shape)  # [N, C, H, W]
        low, high = _range_of(self.path, values.dtype, declared, ranges)
        for index, image in enumerate(images):
            _check_values(self.path, index, image, (low, high))
        return ((images.astype(np.float64) - low) / (high - low)).astype(np.float32)

    def _one_channel(self) -> np.ndarray:
        """Returns a picture as [1, H, W] (UserError: it is in colour)."""
        if (self.values != self.values[:1]).any():
            raise UserError(f"--image: '{self.path}'; is in colour, the model takes 1 channel: convert it to grey")
        return self.values[:1]


def read_file(path: str | Path) -> ImageFile:
    """Reads a .npy array or a picture (UserError: it cannot be read)."""
    if str(path).endswith(".npy"):
        return ImageFile(str(path), _read_array(path))
    return ImageFile(str(path), _read_picture(path), is_picture=True)


def _range_of(path: str, dtype: np.dtype, declared: Range | None, ranges: Mapping[str, Range]) -> Range:
    """Returns the values that mean 0 and 1 (UserError: neither the type nor the user gives them)."""
    name = "float" if dtype.kind == "f" else dtype.name
    if declared is not None or name in ranges:
        return declared or ranges[name]
    example = f"{OPTION} 0,{np.iinfo(dtype).max}"
    raise UserError(f"--image: '{path}'; {dtype} says no range of values: declare it, such as {example}")


def _check_values(path: str | Path, index: int, image: np.ndarray, allowed: Range) -> None:
    """Refuses values that are not finite or outside the range (UserError names the image and the value)."""
    low, high = allowed
    wrong = ~np.isfinite(image)
    if wrong.any():
        raise UserError(f"--image: '{path}'; image {index} holds {image[wrong][0]}: every value must be finite")
    wrong = (image < low) | (image > high)
    if wrong.any():
        raise UserError(
            f"--image: '{path}'; image {index} holds {image[wrong][0]:g}, outside {low:g} to {high:g}: "
            f"declare the range with {OPTION} LOW,HIGH, or correct the image"
        )


def _as_images(path: str | Path, values: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns an array as [N, C, H, W] (UserError: the shape is not that of the model)."""
    images = values[None] if values.ndim == 2 and shape[0] == 1 else values  # [1, H, W]
    images = images[None] if images.ndim == 3 else images  # [1, C, H, W]
    if images.ndim != 4 or images.shape[1:] != tuple(shape) or not len(images):
        wanted = f"{list(shape)} or [N, {', '.join(map(str, shape))}]"
        raise UserError(f"--image: '{path}'; an array of {list(values.shape)}; the model takes {wanted}")
    return images


def _read_array(path: str | Path) -> np.ndarray:
    """Maps the array of a .npy file, so that a header that promises more than the file holds costs nothing."""
    try:
        with open_regular(Path(path)) as file:
            if not os.fstat(file.fileno()).st_size:
                raise UnfitError("is empty")
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's parser raises what it meets
        raise UserError(f"--image: '{path}'; cannot be read: {_flat(error)}") from None
    if not isinstance(values, np.ndarray):
        raise UserError(f"--image: '{path}'; holds several arrays; save one with numpy.save")
    return values


def _read_picture(path: str | Path) -> np.ndarray:
    """Reads a picture as [C, H, W]: floats from 0 to 1, or bytes."""
    imread = require("matplotlib.image", "matplotlib", f"--image: '{path}'").imread
    try:
        with open_regular(Path(path)):
            values = imread(path)
    except Exception as error:  # there are many readers, each with its own
        raise UserError(f"--image: '{path}'; cannot be read: {_flat(error)}") from None
    if values.ndim == 2:
        values = values[..., None]  # [H, W, 1]
    values = _opaque(path, values)  # [H, W, 1] or [H, W, 3]
    return np.ascontiguousarray(values.transpose(2, 0, 1))  # [C, H, W]


def _opaque(path: str | Path, values: np.ndarray) -> np.ndarray:
    """Returns a picture [H, W, X] without its alpha channel (UserError: a part of it is transparent)."""
    if values.shape[2] not in (2, 4):
        return values
    full = 255 if values.dtype == np.uint8 else 1.0
    if (values[..., -1] != full).any():
        raise UserError(f"--image: '{path}'; is transparent in places: save it without transparency")
    return values[..., :-1]


def _flat(error: Exception) -> str:
    """Returns an error as one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
