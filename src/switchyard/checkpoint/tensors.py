"""Reads and writes safetensors files piece by piece, so that no file need ever be in memory as a whole.

The library writes a file from a dict of full arrays and maps full files; here a header is written first and then the
bytes as they come, and a part of one tensor is read at a time. Files are byte for byte those of the library
(https://github.com/huggingface/safetensors#format): eight bytes with the header's length, the header as JSON with
`data_offsets` into what follows, the bytes of the tensors; widest types first, then by name.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from switchyard.config.reader import parse_json
from switchyard.errors import UserError
from switchyard.file_errors import writing
from switchyard.files import open_regular

Box = tuple[slice, ...]  # a part of an array: start and stop for each axis

# in the library's order, the last first; NumPy has no bfloat16, whose bits stand here
CODES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2",
    "I32": "<i4", "U32": "<u4", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U64": "<u8",
}  # fmt: skip
TYPES = {name: code for name, code in CODES.items() if name != "BF16"}  # of checkpoints: numbers as NumPy has them
LONGEST_NAME, MOST_AXES = 500, 16
LONGEST_HEADER = 100_000_000  # bytes, as in the library
PIECE = 1 << 20  # bytes that are read, or made ready to be written, at a time


@dataclass(frozen=True)
class Entry:
    """Describes one tensor of a file: its type (a key of CODES), its shape, and the byte of the file at which it
    starts.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def bytes(self) -> int:
        """Returns the size in the file, in bytes."""
        return math.prod(self.shape) * np.dtype(CODES[self.dtype]).itemsize


def type_of(array: np.ndarray) -> str:
    """Returns the name of the type of an array in the file (UserError: the format has no such type)."""
    for name, code in TYPES.items():
        if array.dtype == np.dtype(code):
            return name
    raise UserError(f"tensor type: {array.dtype}; one of {', '.join(TYPES)}")


def full_box(shape: tuple[int, ...]) -> Box:
    """Returns the box that covers a full array."""
    return tuple(slice(0, size) for size in shape)


def size_of(box: Box) -> tuple[int, ...]:
    """Returns the shape of a box."""
    return tuple(part.stop - part.start for part in box)


def within(box: Box, outer: Box) -> Box:
    """Returns a box inside another box, counted from the beginning of the outer one."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, outer))


def pieces(box: Box, itemsize: int, limit: int = PIECE) -> Iterator[Box]:
    """Cuts a part into parts of at most `limit` bytes, in the order of their bytes in a file."""
    shape = size_of(box)
    if math.prod(shape) * itemsize <= limit or not any(size > 1 for size in shape):
        yield box
        return
    axis = next(index for index, size in enumerate(shape) if size > 1)
    rows = max(1, limit // (math.prod(shape[axis + 1 :]) * itemsize))
    for start in range(box[axis].start, box[axis].stop, rows):
        part = slice(start, min(start + rows, box[axis].stop))
        yield from pieces((*box[:axis], part, *box[axis + 1 :]), itemsize, limit)


def read_header(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a file by name.

    Raises:
        ValueError: not safetensors, or a tensor that ends beyond the file's end.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes")
        content = parse_json(file.read(length))
    if not isinstance(content, dict):
        raise ValueError("the header is not a mapping")
    content.pop("__metadata__", None)
    entries = {name: _entry(name, fields, 8 + length) for name, fields in content.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.bytes)):
        if entry.start != end:
            raise ValueError("tensors that leave gaps or share bytes")
        end += entry.bytes
    if end != size:
        raise ValueError(f"tensors end at byte {end} of {size}")
    return entries


def _entry(name: str, fields: object, data: int) -> Entry:
    """Returns one entry of a header; `data` is the byte after it (ValueError)."""
    if not (name.isprintable() and len(name) <= LONGEST_NAME and isinstance(fields, dict)):
        raise ValueError(f"{name[:20]!r}: no name and fields of a tensor")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and dtype in CODES and _are_sizes(shape) and _are_sizes(offsets)):
        raise ValueError(f"'{name}': dtype, shape or data_offsets are missing or wrong")
    entry = Entry(dtype, tuple(shape), data + offsets[0] if offsets else -1)
    if (
        len(offsets) != 2
        or len(shape) > MOST_AXES
        or not fits_memory(entry.shape)
        or entry.bytes != offsets[1] - offsets[0]
    ):
        raise ValueError(f"'{name}': does not fit into the file")
    return entry


def fits_memory(shape: tuple[int, ...]) -> bool:
    """Returns whether NumPy can hold an array of a shape, also of one without elements."""
    return math.prod(max(1, size) for size in shape) < 2**48


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)


def read_part(path: Path, entry: Entry, box: Box, out: np.ndarray) -> None:
    """Copies the part `box` of one tensor into `out`, an array of the part's shape.

    The file is mapped for the copy only, so the pages that were read do not stay in memory.
    """
    if out.size:
        mapped = np.memmap(path, np.dtype(CODES[entry.dtype]), "r", entry.start, entry.shape or (1,))
        out[...] = mapped.reshape(entry.shape)[box]


def write_file(
    path: Path,
    entries: dict[str, Entry],
    read: Callable[[str, Box], np.ndarray],
    advance: Callable[[int], object] = lambda count: None,
    metadata: dict[str, str] | None = None,
) -> dict[str, object]:
    """Writes a file whose tensors come in pieces.

    Args:
        path: the file, which appears as it grows.
        entries: name -> type and shape.
        read: (name, part) -> that part of the tensor; asked for consecutive parts of at most PIECE bytes.
        advance: told the bytes of each piece.
        metadata: what the header holds besides the tensors.

    Returns:
        {"sha256", "bytes"} of the file, taken on the way.
    """
    order = list(CODES)
    names = sorted(sorted(entries), key=lambda name: -order.index(entries[name].dtype))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name in names:
        entry = entries[name]
        stop = start + entry.bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with writing(path), open(path, "wb") as file:
        for content in (len(text).to_bytes(8, "little"), text):
            file.write(content)
            digest.update(content)
        for name in names:
            code = np.dtype(CODES[entries[name].dtype])
            for box in pieces(full_box(entries[name].shape), code.itemsize):
                content = np.ascontiguousarray(read(name, box), code).reshape(-1).view(np.uint8)
                file.write(content)
                digest.update(content)
                advance(content.size)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": 8 + len(text) + start}
