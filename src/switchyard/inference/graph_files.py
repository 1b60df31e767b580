"""Checks a MindIR graph of somebody else before MindSpore opens it: where its weights lie, what its operators may do.

MindSpore follows any path that stands in a graph, so a graph could name any file of the reader. And it knows operators
that run Python or a library, or write files. Both are read from the bytes of the graph, by the descriptors of
MindSpore's own message; nothing but the structure is decoded.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchyard.errors import UserError

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5  # kinds of a field (protobuf, "Encoding")
DEEPEST = 100  # messages within each other: what protobuf itself reads
LOCATION, OPERATORS = "ExternalDataProto.location", ("NodeProto.op_type", "PrimitiveProto.op_type")
READ = (LOCATION, *OPERATORS)
PREPROCESSOR = "ModelProto.preprocessor"  # operators of MindSpore's data sets
UNSAFE = ("PyExecute", "PyFunc", "PyInterpret", "Custom", "Dump", "Summary", "Print")  # in the name of an operator


def check_graph(path: Path) -> None:
    """Refuses a graph that reads files elsewhere, or has operators that run code or write files.

    Args:
        path: NAME.mindir or NAME_graph.mindir, not encrypted. Weights may lie in the folder NAME_variables beside it.

    Raises:
        UserError: such a graph, or a file that is no graph.
    """
    folder = f"{path.stem.removesuffix('_graph')}_variables"
    for field, text in sorted(read_texts(path)):
        if field == PREPROCESSOR or (field in OPERATORS and any(word in text for word in UNSAFE)):
            what = "preprocesses data" if field == PREPROCESSOR else f"has the operator {text[:80]!r}"
            raise UserError(f"--model: '{path}' {what}, which may run code or write files: do not use this export")
        if field == LOCATION and not is_in(folder, text):
            where = f"{text[:80]!r}, which is not in '{folder}'"
            raise UserError(f"--model: '{path}' reads weights from {where}: do not use this export")


def is_in(folder: str, location: str) -> bool:
    """Returns whether a location is that of a file in a folder, and of no folder below or above it."""
    inside, _, name = location.partition("/")
    return inside == folder and "/" not in name and name not in ("", ".", "..")


def read_texts(path: Path) -> set[tuple[str, str]]:
    """Returns (field, its text) of all fields READ of a graph (UserError: the file is no graph)."""
    from mindspore.train.mind_ir_pb2 import ModelProto

    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            return set(texts(view, 0, len(view), ModelProto.DESCRIPTOR))
    except (ValueError, IndexError):
        what = f"MindSpore cannot load '{path}': it is no graph"
        raise UserError(f"--model: {what}; export the checkpoint again") from None


def texts(data: memoryview, place: int, end: int, message: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yields (field, its text) of the fields READ of a message that lies in data[place:end], and PREPROCESSOR.

    Args:
        data: a whole file.
        place, end: where the message lies.
        message: its descriptor.
        depth: in how many other messages it lies.

    Raises:
        ValueError, IndexError: the bytes are no message.
    """
    if depth > DEEPEST:
        raise ValueError("messages within messages")
    while place < end:
        tag, place = varint(data, place)
        kind, field = tag & 7, message.fields_by_number.get(tag >> 3)
        if kind != BYTES:
            place = behind(data, place, kind)
            continue
        length, place = varint(data, place)
        if place + length > end:
            raise ValueError("a field that is longer than its message")
        name = f"{message.name}.{field.name}" if field is not None else ""
        if name == PREPROCESSOR:
            yield name, ""
        elif name in READ:
            yield name, bytes(data[place : place + length]).decode("utf-8", "backslashreplace")
        elif field is not None and field.message_type is not None:
            yield from texts(data, place, place + length, field.message_type, depth + 1)
        place += length
    if place != end:
        raise ValueError("a message that is longer than its place")


def behind(data: memoryview, place: int, kind: int) -> int:
    """Returns the place behind a field of a fixed size, or of a number (ValueError: another kind)."""
    if kind == VARINT:
        return varint(data, place)[1]
    if kind not in (EIGHT, FOUR):
        raise ValueError(f"a field of kind {kind}")
    return place + (8 if kind == EIGHT else 4)


def varint(data: memoryview, place: int) -> tuple[int, int]:
    """Returns (a number of seven bits a byte, the place behind it)."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
