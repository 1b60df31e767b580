"""Reads and writes a folder of two MindRecord files, the tokenizer and a manifest. MindSpore is imported on use.

    DIR/train.mindrecord       blocks of seq_length + 1 tokens, read by index through `mindspore.dataset`
    DIR/validation.mindrecord  the same blocks; read whole and joined to a stream
    DIR/tokenizer.json
    DIR/manifest.json          block length, vocabulary, counts, sizes, sha256

The last block of a file is filled up with token 0; the manifest's token count says where the text ends.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from switchyard.data.tokenizer import Tokenizer, smallest_dtype
from switchyard.errors import UserError
from switchyard.file_errors import check_room, line_of, writing
from switchyard.files import UnfitError, follow_umask, read_regular, require_text, sha256_of

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
COLUMN = "tokens"
LONGEST = 256 << 20  # bytes of manifest and tokenizer
WRITE_BLOCKS = 1024  # blocks handed to the writer, or counted, at a time
PAGES, BLOCK_BYTES = 50_400_000, 64  # bytes of a file without blocks, and of what stands about each block besides it
STREAM_BLOCKS = 65_536  # blocks of one opened pipeline: bounds the list of indices that the sampler copies
PREPARE = "python -m switchyard.data.prepare"


class Split(BaseModel):
    """Describes one MindRecord file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # in the folder itself
    tokens: Annotated[int, Field(ge=1, lt=2**48)]  # of text, without the filling of the last block
    blocks: Annotated[int, Field(ge=1, lt=2**40)]
    size: Annotated[int, Field(ge=1, lt=2**63)]  # bytes of the file
    sha256: str


class Manifest(BaseModel):
    """Describes what a prepared folder holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["switchyard-mindrecord-1"] = "switchyard-mindrecord-1"
    source: str
    seq_length: Annotated[int, Field(ge=1, lt=2**31)]
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    tokenizer_fingerprint: str
    train: Split
    validation: Split


def locate(path: str | None, key: str = "data.path") -> Path | None:
    """Returns the prepared folder that the configuration names: the folder itself or a `*.mindrecord` in it; None for
    text.

    Raises:
        UserError: MindRecord without a manifest beside it.
    """
    if path is None:
        return None
    place = Path(os.path.expanduser(path))
    if place.suffix == ".mindrecord":
        place = place.parent
    elif not os.path.isdir(place) or not any(place.glob("*.mindrecord")):
        return None
    require_text(place, key)
    if not os.path.isfile(place / MANIFEST):
        raise UserError(f"{key}: '{path}'; MindRecord without {MANIFEST}; create the folder with {PREPARE}")
    return place


def read_manifest(folder: Path) -> tuple[Manifest, Tokenizer]:
    """Returns the manifest and the tokenizer of a prepared folder, after a check that all files are there and complete.

    Sizes are compared, not checksums: hashing every byte at each start would cost minutes on large data.

    Raises:
        UserError: a file is missing, truncated or altered.
    """
    try:
        manifest = Manifest.model_validate_json(read_regular(folder / MANIFEST, LONGEST, folder))
        text = read_regular(folder / TOKENIZER, LONGEST, folder).decode("utf-8")
        tokenizer = Tokenizer.from_json(text, str(folder / TOKENIZER))
    except ValidationError as error:
        where = ".".join(str(step) for step in error.errors()[0]["loc"]) or "JSON"
        raise UserError(f"data.path: '{folder / MANIFEST}': damaged at '{where}'; create the folder again") from None
    except (OSError, UnfitError, UnicodeDecodeError) as error:
        raise UserError(f"data.path: '{folder}': {error}; create the folder again with {PREPARE}") from None
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(f"data.path: '{folder / TOKENIZER}': is not the tokenizer that wrote the blocks; restore it")
    for split in (manifest.train, manifest.validation):
        file = folder / split.file
        size = file.stat().st_size if file.is_file() else None
        if size != split.size or not Path(f"{file}.db").is_file():
            found = "missing or without its .db" if size in (None, split.size) else f"{size} bytes, not {split.size}"
            raise UserError(f"data.path: '{file}': {found}; copy it again or create the folder again")
    return manifest, tokenizer


def write_split(file: Path, stream: np.ndarray, seq_length: int, advance: Callable[[int], Any]) -> Split:
    """Writes a stream [T] as blocks of seq_length + 1 and tells `advance` how many went out.

    Raises:
        UserError: MindSpore could not write (a full disk, for one).
    """
    try:
        count = _write_blocks(file, stream, seq_length + 1, advance)
    except RuntimeError as error:  # what MindSpore raises; its first line is the message, a C++ stack follows
        if full := line_of(error, file):
            raise UserError(full) from None
        raise UserError(f"--out: '{file.parent}': {str(error).strip().splitlines()[0]}; free some space") from None
    follow_umask(file.parent)  # the writer gives modes of its own
    with open(file, "rb") as handle:
        digest = sha256_of(handle)
    return Split(file=file.name, tokens=len(stream), blocks=count, size=file.stat().st_size, sha256=digest)


def _write_blocks(file: Path, stream: np.ndarray, width: int, advance: Callable[[int], Any]) -> int:
    """Writes the stream and counts the blocks."""
    from mindspore.mindrecord import FileWriter

    count = -(-len(stream) // width)
    check_room(file, PAGES + count * (4 * width + BLOCK_BYTES))
    writer = FileWriter(str(file), shard_num=1)
    writer.add_schema({COLUMN: {"type": "int32", "shape": [width]}}, "blocks of tokens")
    for start in range(0, count, WRITE_BLOCKS):
        piece = stream[start * width : (start + WRITE_BLOCKS) * width].astype(np.int32)
        blocks = np.pad(piece, (0, -len(piece) % width)).reshape(-1, width)  # [n, S+1]
        writer.write_raw_data([{COLUMN: block} for block in blocks])
        advance(len(blocks))
    writer.commit()
    return count


def write_manifest(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Writes the two small files of a prepared folder."""
    text = json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for name, content in ((TOKENIZER, tokenizer.to_json()), (MANIFEST, text)):
        with writing(folder / name):
            (folder / name).write_text(content, encoding="utf-8")


def read_stream(folder: Path, manifest: Manifest, split: Split) -> np.ndarray:
    """Returns the full stream [T] of a split."""
    source = RecordSource(folder / split.file, split.blocks)
    blocks = source.read(np.arange(split.blocks), 0, split.blocks, 0)  # [n, S+1]
    return blocks.reshape(-1)[: split.tokens].astype(smallest_dtype(manifest.vocab_size))  # [n, S+1] -> [T]


class RecordSource:
    """Reads blocks of one MindRecord file as a source of training windows.

    Batches asked for in order come from one open pipeline; any other index opens a new one there.
    """

    slack = 0  # blocks were made when they were written

    def __init__(self, file: Path, blocks: int):
        self._file, self._blocks = file, blocks
        self._order: np.ndarray | None = None
        self._next = -1
        self._rows: Iterator[np.ndarray] = iter(())

    def __len__(self) -> int:
        return self._blocks

    def read(self, order: np.ndarray, start: int, stop: int, offset: int) -> np.ndarray:
        """Returns blocks order[start:stop] as [stop - start, S + 1] int32."""
        if order is not self._order or start != self._next:
            self._rows = self._stream(order, start)
        self._order, self._next = order, stop
        return np.stack([next(self._rows) for _ in range(start, stop)])

    def pieces(self) -> Iterator[np.ndarray]:
        """Yields all blocks in order, WRITE_BLOCKS at a time: arrays [n, S + 1] int32."""
        order = np.arange(self._blocks)
        for start in range(0, self._blocks, WRITE_BLOCKS):
            yield self.read(order, start, min(start + WRITE_BLOCKS, self._blocks), 0)

    def _stream(self, order: np.ndarray, start: int) -> Iterator[np.ndarray]:
        """Yields blocks order[start:] one by one."""
        import mindspore.dataset as dataset

        for first in range(start, len(order), STREAM_BLOCKS):
            sampler = dataset.SubsetSampler(order[first : first + STREAM_BLOCKS].tolist())
            pipeline = dataset.MindDataset(
                str(self._file), columns_list=[COLUMN], sampler=sampler, num_parallel_workers=1
            )
            for (row,) in pipeline.create_tuple_iterator(num_epochs=1, output_numpy=True):
                yield row
