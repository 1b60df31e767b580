"""Reads text, JSON lines and Parquet files, plain or compressed, as a stream of units of about one megabyte.

A unit is bytes of text, whole lines of JSON, or rows of Parquet. A process of its own may encode each unit. Memory does
not depend on the size of a file.
"""

import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from switchyard.data.corpus import files_below, library_modules, matches
from switchyard.data.split import MANY_FILES, hash_fraction
from switchyard.data.utf8 import PROBE, is_binary, is_utf8, text_bytes
from switchyard.errors import UserError
from switchyard.optional import require

UNIT = 1 << 20  # bytes of a unit of text or lines
ROWS = 256  # of a unit of Parquet
LONGEST_LINE = 64 << 20  # bytes of one line of JSON
PIECE = 4096  # compressed bytes that zstd gets at a time: bounds what a file made to swell can fill
KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst")
BINARY = "is binary, not UTF-8 text"


class BadSource(Exception):
    """Reports a part of a source that cannot be read: file, position in words, and reason."""

    def __init__(self, name: str, position: str, reason: str):
        super().__init__(f"'{name}' {position}: {reason}")


@dataclass(frozen=True)
class SourceFile:
    """Holds one input file.

    Attributes:
        path: of the file.
        name: for messages and for the rule that selects validation.
        kind: text, json or parquet.
        validates: whether the whole file validates; None where a part of it does.
        size, changed: bytes and time of the last change, to detect another file under the name.
    """

    path: str
    name: str
    kind: str
    validates: bool | None
    size: int
    changed: int


@dataclass(frozen=True)
class Unit:
    """Holds what one process encodes at a time.

    Attributes:
        file: the input file.
        first: byte offset of text, number of the first line of JSON (from 1) or of the first row of Parquet (from 0).
        content: bytes, or rows; in their place why the rest of the file cannot be read.
        ends: whether a document of text ends with the unit.
        validates: as of SourceFile; of text never None.
    """

    file: SourceFile
    first: int
    content: bytes | list[Any] | str
    ends: bool = True
    validates: bool | None = None


def find_files(source: str, fraction: float, option: str = "--input") -> list[SourceFile]:
    """Returns the files of a path, folder, glob or the word stdlib (its modules in UTF-8), sorted by name.

    Args:
        source: as the user gave it.
        fraction: that validates. 1 and 0 select all files and no file.
        option: begins messages.

    Raises:
        UserError: nothing there.
    """
    place = os.path.expanduser(source)
    if source == "stdlib":
        root, modules = library_modules()
        paths = [path for path in modules if is_module(path.read_bytes())]
    elif os.path.isfile(place):
        root, paths = Path(place).parent, [Path(place)]
    elif os.path.isdir(place):
        root, paths = Path(place), files_below(Path(place))
    else:
        root, paths = matches(glob.escape(place) if os.path.exists(place) else source, option)
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    whole = len(named) >= MANY_FILES
    found = [_describe(path, name, fraction, whole) for name, path in named]
    if not any(file.size for file in found):
        raise UserError(f"{option}: '{source}' contains no file with content; give UTF-8 text, JSON lines or Parquet")
    return found


def is_module(raw: bytes) -> bool:
    """Returns whether a file of the standard library is text that trains: UTF-8 without NULs."""
    return is_utf8(raw) and b"\0" not in raw


def _describe(path: Path, name: str, fraction: float, whole: bool) -> SourceFile:
    state = path.stat()
    validates = None
    if fraction in (0.0, 1.0):
        validates = fraction == 1.0
    elif whole:
        validates = hash_fraction(name) < fraction
    return SourceFile(str(path), name, kind_of(name), validates, state.st_size, state.st_mtime_ns)


def kind_of(name: str) -> str:
    """Returns text, json or parquet by the end of a file's name, without that of a compression."""
    stem = Path(name.lower())
    return KINDS.get(Path(stem.stem if is_compressed(name) else stem).suffix, "text")


def is_compressed(name: str) -> bool:
    """Says whether a file of this name is compressed."""
    return Path(name.lower()).suffix in COMPRESSED


def units_of(file: SourceFile, fraction: float, fields: tuple[str, ...] | None) -> Iterator[Unit]:
    """Yields the units of a file in order.

    Args:
        file: one of `find_files`.
        fraction: of a text file that validates: its last part.
        fields: columns of Parquet to read; None reads all.

    Raises:
        BadSource: the file cannot be read on from here.
        UserError: a package is missing.
    """
    if file.kind == "parquet":
        yield from _parquet_units(file, fields)
    elif file.kind == "json":
        yield from _line_units(file)
    else:
        yield from _text_units(file, fraction)


def chunks(file: SourceFile) -> Iterator[bytes]:
    """Yields the bytes of a file in pieces of about one unit, decompressed (BadSource: damaged or truncated)."""
    read = 0
    try:
        with open(file.path, "rb") as raw:
            pieces = iter(lambda: raw.read(UNIT), b"")
            if file.name.lower().endswith(".gz"):
                pieces = _gzip_pieces(raw)
            elif file.name.lower().endswith(".zst"):
                pieces = _zstd_pieces(raw, file)
            for piece in pieces:
                yield piece
                read += len(piece)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise BadSource(file.name, f"behind byte {read:,} of its text", reason) from None


def _gzip_pieces(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.open(raw) as opened:
        yield from iter(lambda: opened.read(UNIT), b"")


def _zstd_pieces(raw: BinaryIO, file: SourceFile) -> Iterator[bytes]:
    """Yields decompressed pieces of one or more frames; the library's own reader takes a truncated file for whole."""
    library = require("zstandard", "zstandard", f"--input: '{file.name}'")
    frame, left = None, []
    size = 0
    try:
        while compressed := raw.read(PIECE):
            while compressed:
                frame = frame or library.ZstdDecompressor().decompressobj()
                left.append(frame.decompress(compressed))
                size += len(left[-1])
                compressed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
            if size >= UNIT:
                yield b"".join(left)
                left, size = [], 0
    except library.ZstdError as error:
        raise EOFError(f"damaged zstd data: {error}") from None
    yield b"".join(left)
    if frame is not None:
        raise EOFError("the compressed file ends in the middle of a frame")


def _line_units(file: SourceFile) -> Iterator[Unit]:
    """Yields whole lines; the last line may lack its line end."""
    left, line = b"", 1
    for chunk in chunks(file):
        left += chunk
        place = left.rfind(b"\n") + 1
        if place:
            yield Unit(file, line, left[:place], validates=file.validates)
            line += left.count(b"\n", 0, place)
            left = left[place:]
        elif len(left) > LONGEST_LINE:
            raise BadSource(file.name, f"line {line:,}", f"has more than {LONGEST_LINE:,} bytes")
    if left:
        yield Unit(file, line, left, validates=file.validates)


def _text_units(file: SourceFile, fraction: float) -> Iterator[Unit]:
    """Yields one document, or two where the last part of the file validates; parts end at line ends where they can."""
    border = None if file.validates is not None else _held_out_from(file, fraction)
    validates, left, offset = bool(file.validates), b"", -1
    for chunk, is_last in _with_last(chunks(file)):
        left += chunk
        if offset < 0:
            left, offset = _without_mark(file, left)
        while left and (is_last or len(left) >= 2 * UNIT):  # bytes behind a cut show whether the line end is a lone one
            cut, ends = min(UNIT, len(left)), len(left) <= UNIT
            if border is not None and border - offset <= cut:
                cut, ends = _character_border(left, max(border - offset, 0)), True
            elif not ends:
                cut = _line_border(left, cut)
            yield Unit(file, offset, left[:cut], ends, validates)
            if ends:
                border, validates = None, validates or border is not None
            left, offset = left[cut:], offset + cut


def _with_last(pieces: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yields pieces, each with whether it is the last."""
    before = next(pieces, b"")
    for piece in pieces:
        yield before, False
        before = piece
    yield before, True


def _without_mark(file: SourceFile, first: bytes) -> tuple[bytes, int]:
    """Returns the first bytes without a byte-order mark, and their offset (BadSource: no UTF-8 text)."""
    if is_binary(first[:PROBE]):
        raise BadSource(file.name, "offset 0", BINARY)
    try:
        kept = text_bytes(first[:PROBE], "") + first[PROBE:]
    except UserError as error:
        raise BadSource(file.name, "offset 0", str(error).strip()) from None
    return kept, len(first) - len(kept)


def _held_out_from(file: SourceFile, fraction: float) -> int:
    """Returns the offset from which a text file validates; a compressed file is decompressed once for its size."""
    compressed = is_compressed(file.name)
    size = sum(map(len, chunks(file))) if compressed else file.size
    return size - round(size * fraction)


def _line_border(raw: bytes, most: int) -> int:
    """Returns where to divide text of at least `most` bytes: behind a lone line end if there is one near, so that
    most tokenizers give the same ids as for the undivided text."""
    end = most
    for _ in range(1000):
        end = raw.rfind(b"\n", most // 2, end)
        if end < 0:
            break
        if end + 1 < len(raw) and not raw[end - 1 : end].isspace() and not raw[end + 1 : end + 2].isspace():
            return end + 1
    return (raw.rfind(b"\n", most // 2, most) + 1) or _character_border(raw, most)


def _character_border(raw: bytes, place: int) -> int:
    """Returns the last place up to `place` that is not in the middle of a character of UTF-8."""
    start = place
    while 0 < place < len(raw) and start - place < 4 and raw[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _parquet_units(file: SourceFile, fields: tuple[str, ...] | None) -> Iterator[Unit]:
    """Yields rows: of one field its bytes, otherwise dictionaries."""
    arrow = require("pyarrow", "pyarrow", f"--input: '{file.name}'")
    parquet = require("pyarrow.parquet", "pyarrow", f"--input: '{file.name}'")
    row = 0
    try:
        with parquet.ParquetFile(file.path, buffer_size=UNIT, pre_buffer=False) as opened:
            names = opened.schema_arrow.names
            missing = [name for name in fields or () if name not in names]
            if missing:
                raise BadSource(file.name, "row 0", f"no column '{missing[0]}', only {', '.join(names[:8])}")
            for batch in opened.iter_batches(ROWS, columns=list(fields) if fields else None):
                rows = batch.to_pylist() if fields is None else batch.column(0).cast(arrow.binary()).to_pylist()
                yield Unit(file, row, rows, validates=file.validates)
                row += len(rows)
    except (OSError, arrow.ArrowException, UnicodeDecodeError) as error:
        raise BadSource(file.name, f"row {row:,}", " ".join(str(error).split())[:200]) from None
