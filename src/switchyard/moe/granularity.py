"""Converts units of routing to rows and back: an image, a part of it, a group of its channels, a window of a sequence.

Every function here only moves values; `back(fold(x)) == x` for each pair. Maps have their channels last.

Legend: B batch, H and W height and width, C channels, S sequence, D width, N rows, U units (rows) of an image.
"""

from mindspore import Tensor, nn, ops

from switchyard.config import Config


def to_regions(maps: Tensor, parts: int) -> Tensor:
    """Cuts each image into parts x parts regions, in reading order: [B, H, W, C] -> [B * parts^2, H/parts, W/parts, C].

    parts = 2 makes quadrants, parts = H / p patches of p x p pixels.
    """
    _, height, width, channels = maps.shape
    high, wide = height // parts, width // parts
    maps = maps.reshape(-1, parts, high, parts, wide, channels)  # [B, parts, h, parts, w, C]
    return ops.transpose(maps, (0, 1, 3, 2, 4, 5)).reshape(-1, high, wide, channels)


def from_regions(rows: Tensor, parts: int) -> Tensor:
    """Returns the inverse of `to_regions`: [B * parts^2, h, w, C] -> [B, parts * h, parts * w, C]."""
    _, high, wide, channels = rows.shape
    rows = rows.reshape(-1, parts, parts, high, wide, channels)  # [B, parts, parts, h, w, C]
    return ops.transpose(rows, (0, 1, 3, 2, 4, 5)).reshape(-1, parts * high, parts * wide, channels)


def to_channel_groups(maps: Tensor, parts: int) -> Tensor:
    """Splits the channels into neighbours: [B, H, W, C] -> [B * parts, H, W, C / parts]."""
    _, height, width, channels = maps.shape
    maps = maps.reshape(-1, height, width, parts, channels // parts)  # [B, H, W, parts, C / parts]
    return ops.transpose(maps, (0, 3, 1, 2, 4)).reshape(-1, height, width, channels // parts)


def from_channel_groups(rows: Tensor, parts: int) -> Tensor:
    """Returns the inverse of `to_channel_groups`: [B * parts, H, W, c] -> [B, H, W, parts * c]."""
    _, height, width, channels = rows.shape
    rows = rows.reshape(-1, parts, height, width, channels)  # [B, parts, H, W, c]
    return ops.transpose(rows, (0, 2, 3, 1, 4)).reshape(-1, height, width, parts * channels)


def to_slices(rows: Tensor, length: int) -> Tensor:
    """Windows of `length` neighbouring tokens as one row each: [N, D] -> [N / length, length * D]."""
    return rows.reshape(-1, length * rows.shape[-1])


def from_slices(rows: Tensor, length: int) -> Tensor:
    """Returns the inverse of `to_slices`: [N / length, length * D] -> [N, D]."""
    return rows.reshape(-1, rows.shape[-1] // length)


def first_of_slices(values: Tensor, length: int) -> Tensor:
    """Returns the values at the first token of each window: [N, ...] -> [N / length, ...].

    A window goes where its first token goes. That is causal: the first token has seen all before the window and every
    token of the window comes at or after it. The mean of the window would tell a token about later ones; the mean of
    the window before is causal too, but older by a window and missing for the first.
    """
    return values[::length]


class ImageFold(nn.Cell):
    """Turns maps into the rows of a granularity and back.

    sample: an image is a row. task: too, for a router that goes by the task id of the image. region: each of
    vision.regions^2 parts is a row. channel: each of vision.channel_groups groups of channels.

    Args:
        config: moe.granularity and the section `vision` are read.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.kind, self.units = config.granularity, config.units
        self.regions, self.channel_groups = config.vision.regions, config.vision.channel_groups

    def row_shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        """Returns (height, width, channels) of a row's map."""
        if self.kind == "region":
            return height // self.regions, width // self.regions, channels
        return height, width, channels // self.units

    def construct(self, maps: Tensor) -> Tensor:
        """Splits maps into rows: [B, H, W, C] -> [B * U, h, w, c]."""
        if self.kind == "region":
            return to_regions(maps, self.regions)
        if self.kind == "channel":
            return to_channel_groups(maps, self.channel_groups)
        return maps

    def back(self, rows: Tensor) -> Tensor:
        """Joins rows into maps: [B * U, h, w, c] -> [B, H, W, C]."""
        if self.kind == "region":
            return from_regions(rows, self.regions)
        if self.kind == "channel":
            return from_channel_groups(rows, self.channel_groups)
        return rows

    def repeat_per_row(self, values: Tensor) -> Tensor:
        """Repeats a value of each image for each of its rows: [B] -> [B * U]."""
        if self.units == 1:
            return values
        return ops.tile(values.reshape(-1, 1), (1, self.units)).reshape(-1)
